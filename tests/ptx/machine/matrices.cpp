// ldmatrix, stmatrix, and mma.sync of a warp.
#include "halves.h"
#include "memory.h"

static u64 row_address(Warp& w, const Instruction& i, s32 base, u32 lane) {
  return u64(w.at<u32>(base)[lane]) + i.immediate;
}
static void count_rows(Warp& w, const Instruction& i, s32 base, int matrices) {
  u64 addresses[LANES];
  for (int lane = 0; lane < 8 * matrices; lane++) addresses[lane] = row_address(w, i, base, lane);
  count_shared(*w.machine, addresses, matrices == 4 ? ALL : (1u << 8 * matrices) - 1, 16);
}

// r: destinations, then the address. Lanes 8 n ... 8 n + 7 hold the addresses of the rows of matrix n.
template <int COUNT, bool TRANSPOSED> static void load_matrix(Warp& w, const Instruction& i, u32 mask) {
  together(w, mask);
  count_rows(w, i, i.r[COUNT], COUNT);
  u32 out[COUNT][LANES];
  for (int matrix = 0; matrix < COUNT; matrix++) {
    u16 rows[8][8];
    for (int row = 0; row < 8; row++) {
      const u32 lane = 8 * matrix + row, at = shared_offset(w, lane, row_address(w, i, i.r[COUNT], lane), 16, 16);
      // Those lanes read an element that receive it.
      for (int e = 0; e < 8; e++) saw_shared_read(w, TRANSPOSED ? 4 * e + row / 2 : 4 * row + e / 2, at + 2 * e, 2);
      memcpy(rows[row], &w.machine->shared[at], 16);
    }
    for (u32 lane = 0; lane < LANES; lane++) {
      const u32 r = lane / 4, c = 2 * (lane % 4);
      const u32 low = TRANSPOSED ? rows[c][r] : rows[r][c], high = TRANSPOSED ? rows[c + 1][r] : rows[r][c + 1];
      out[matrix][lane] = low | high << 16;
    }
  }
  for (int matrix = 0; matrix < COUNT; matrix++) memcpy(w.at<u32>(i.r[matrix]), out[matrix], sizeof out[matrix]);
}

// r: the address, then sources: the inverse of load_matrix.
template <int COUNT, bool TRANSPOSED> static void store_matrix(Warp& w, const Instruction& i, u32 mask) {
  together(w, mask);
  count_rows(w, i, i.r[0], COUNT);
  for (int matrix = 0; matrix < COUNT; matrix++)
    for (u32 lane = 0; lane < LANES; lane++)
      for (u32 h = 0; h < 2; h++) {
        const u32 r = lane / 4, c = 2 * (lane % 4) + h, row = TRANSPOSED ? c : r, column = TRANSPOSED ? r : c;
        const u32 from = 8 * matrix + row;
        const u32 at = shared_offset(w, from, row_address(w, i, i.r[0], from), 16, 16) + 2 * column;
        const u16 value = u16(w.at<u32>(i.r[1 + matrix])[lane] >> (16 * h));
        saw_shared_write(w, lane, at, 2, reinterpret_cast<const u8*>(&value));
        memcpy(&w.machine->shared[at], &value, 2);
      }
}

// Products are exact and summed in double, then rounded once. The hardware cuts bits off inside, and how
// is not said: what depends on it is no business of a test.
template <int K> static void multiply(Warp& w, const Instruction& i, const double (&a)[16][K], const double (&b)[K][8]) {
  double sums[16][8];
  auto each_element = [&](auto visit) {
    for (u32 lane = 0; lane < LANES; lane++)
      for (int e = 0; e < 4; e++) visit(lane, e, sums[lane / 4 + 8 * (e / 2)][2 * (lane % 4) + e % 2]);
  };
  each_element([&](u32 lane, int e, double& sum) { sum = w.at<f32>(i.r[10 + e])[lane]; });
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
  each_element([&](u32 lane, int e, double& sum) { w.at<f32>(i.r[e])[lane] = canonical(f32(sum)); });
}

template <class T> static void mma_m16n8k16(Warp& w, const Instruction& i, u32 mask) {  // r: d 4, a 4, b 2, c 4
  together(w, mask);
  double a[16][16], b[16][8];
  for (u32 lane = 0; lane < LANES; lane++) {
    const u32 group = lane / 4, pair = 2 * (lane % 4);
    for (int h = 0; h < 2; h++) {
      for (int r = 0; r < 4; r++)
        a[group + 8 * (r % 2)][pair + 8 * (r / 2) + h] = half_of<T>(w.at<u32>(i.r[4 + r])[lane], h);
      for (int r = 0; r < 2; r++) b[pair + 8 * r + h][group] = half_of<T>(w.at<u32>(i.r[8 + r])[lane], h);
    }
  }
  multiply<16>(w, i, a, b);
}

static void mma_m16n8k8_tf32(Warp& w, const Instruction& i, u32 mask) {  // r: d 4, a 4, b 2, c 4
  together(w, mask);
  auto tf32 = [](u32 bits) { return double(as_f32(bits & 0xFFFFE000u)); };  // the low bits are not looked at
  double a[16][8], b[8][8];
  for (u32 lane = 0; lane < LANES; lane++) {
    const u32 group = lane / 4, column = lane % 4;
    for (int r = 0; r < 4; r++) a[group + 8 * (r % 2)][column + 4 * (r / 2)] = tf32(w.at<u32>(i.r[4 + r])[lane]);
    for (int r = 0; r < 2; r++) b[column + 4 * r][group] = tf32(w.at<u32>(i.r[8 + r])[lane]);
  }
  multiply<8>(w, i, a, b);
}

void add_matrices(Table& t) {
#define MATRICES(n, registers) \
  t.push_back({"ldmatrix.sync.aligned.m8n8.x" #n ".shared.b16", registers "=[", load_matrix<n, false>, true}); \
  t.push_back({"ldmatrix.sync.aligned.m8n8.x" #n ".trans.shared.b16", registers "=[", load_matrix<n, true>, true}); \
  t.push_back({"stmatrix.sync.aligned.m8n8.x" #n ".shared.b16", "=[" registers, store_matrix<n, false>, true}); \
  t.push_back({"stmatrix.sync.aligned.m8n8.x" #n ".trans.shared.b16", "=[" registers, store_matrix<n, true>, true});
  MATRICES(1, "w")
  MATRICES(2, "ww")
  MATRICES(4, "wwww")
  const char* registers = "wwww=wwwwwwwwww";
  t.push_back({"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", registers, mma_m16n8k16<bf16>, true});
  t.push_back({"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", registers, mma_m16n8k16<f16>, true});
  t.push_back({"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", registers, mma_m16n8k8_tf32, true});
}
