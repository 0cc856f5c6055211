// wgmma of sm_90: 64 rows, 16 of each of the four warps of a warpgroup; B, and A too if it is not in
// registers, from shared memory. Accumulators hold NaN until they are waited for, and until then what is
// read must not be written.
#include "halves.h"
#include "memory.h"

#include <algorithm>

static void proxy_fence(Warp& w, const Instruction&, u32) { w.fence_serial = w.machine->serial; }

// Where an element of a matrix lies that a descriptor points to, in bytes. `along` counts elements along
// the contiguous dimension: K, or M and N if it is transposed.
static u32 described(u64 descriptor, u32 along, u32 across, bool transposed, u32 size) {
  const u32 start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
            stride = (descriptor >> 32 & 0x3FFF) << 4, mode = u32(descriptor >> 62);
  if (descriptor >> 49 & 7) fail("wgmma: a base offset in a descriptor is not supported");
  if (!mode) fail("wgmma: a layout without swizzle is not supported");
  const u32 width = mode == 1 ? 128 : mode == 2 ? 64 : 32;  // bytes of a swizzled row
  u32 at = start + across / 8 * stride + across % 8 * width;
  at += transposed ? size * along / width * leading + size * along % width : size * along;
  const u32 bits = mode == 1 ? 7 : mode == 2 ? 3 : 1;
  return at ^ ((at >> 7 & bits) << 4);
}

struct tf32 { u32 bits; };
static f32 widen(tf32 x) { return as_f32(x.bits & 0xFFFFE000u); }

template <class T> static f32 read(Warp& w, u64 descriptor, u32 along, u32 across, bool transposed) {
  Machine& m = *w.machine;
  constexpr u32 size = sizeof(T);
  const u32 at = shared_offset(w, 0, described(descriptor, along, across, transposed, size), size, size);
  for (u32 b = at; b < at + size; b++) {
    Shadow& s = m.shadow[b];
    if (s.in_flight) fail("warp %u: wgmma reads shared byte %u before its cp.async was waited for", w.index, b);
    if (s.write_epoch == m.epoch && s.write_warp != w.index)
      fail("race: warp %u: wgmma reads shared byte %u that warp %u wrote, no bar.sync between", w.index, b, s.write_warp);
    // Of the warp that wrote, or of the one that reads.
    const u64 fenced = std::max(w.fence_serial, m.warps[s.write_warp].fence_serial);
    if (s.write_serial && fenced < s.write_serial)
      fail("warp %u: wgmma reads shared byte %u, no fence.proxy.async since it was written", w.index, b);
    s.asynchronous_readers |= 1u << w.index;
  }
  w.readings.push_back({w.products, at, size});
  T x;
  memcpy(&x, &m.shared[at], size);
  return widen(x);
}

// In the pool at r[0]: N / 2 accumulators; A, a descriptor or four registers; the descriptor of B; the
// predicate that adds to the accumulators. immediate: A transposed (1), B transposed (2), A in registers (4).
template <class T, int N> static void wgmma(Warp& w, const Instruction& i, u32 mask) {
  together(w, mask);
  constexpr int K = 32 / sizeof(T);
  const s32* accumulators = w.machine->pool + i.r[0];
  const s32* operands = accumulators + N / 2;
  const bool in_registers = i.immediate & 4, a_transposed = i.immediate & 1, b_transposed = i.immediate & 2;
  const u32 first_row = 16 * (w.index % 4);
  double a[16][K], b[K][N], sums[16][N];
  if (!in_registers) {
    const u64 descriptor = *w.at<u64>(operands[0]);
    for (u32 row = 0; row < 16; row++)
      for (u32 k = 0; k < K; k++)
        a[row][k] = a_transposed ? read<T>(w, descriptor, first_row + row, k, true)
                                 : read<T>(w, descriptor, k, first_row + row, false);
  } else {
    for (u32 lane = 0; lane < LANES; lane++)
      for (int r = 0; r < 4; r++) {
        const u32 word = w.at<u32>(operands[r])[lane], row = lane / 4 + 8 * (r % 2);
        if constexpr (sizeof(T) == 4) {
          a[row][lane % 4 + 4 * (r / 2)] = widen(tf32{word});
        } else {
          for (int h = 0; h < 2; h++) a[row][2 * (lane % 4) + 8 * (r / 2) + h] = half_of<T>(word, h);
        }
      }
  }
  operands += in_registers ? 4 : 1;
  const u64 descriptor = *w.at<u64>(operands[0]);
  for (u32 k = 0; k < K; k++)
    for (u32 n = 0; n < N; n++)
      b[k][n] = b_transposed ? read<T>(w, descriptor, n, k, true) : read<T>(w, descriptor, k, n, false);
  const u32 add = *w.at<u32>(operands[1]);
  auto each_element = [&](int e, auto visit) {
    for (u32 lane = 0; lane < LANES; lane++)
      visit(lane, sums[lane / 4 + 8 * (e / 2 % 2)][8 * (e / 4) + 2 * (lane % 4) + e % 2]);
  };
  for (int e = 0; e < N / 2; e++) {
    const auto found = w.pending.find(accumulators[e]);
    const u32* old = found == w.pending.end() ? w.at<u32>(accumulators[e]) : found->second.value;
    each_element(e, [&](u32 lane, double& sum) { sum = add ? as_f32(old[lane]) : 0; });
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < N; n++) sums[row][n] += a[row][k] * b[k][n];
  for (int e = 0; e < N / 2; e++) {
    Pending& p = w.pending[accumulators[e]];
    p.group = w.products;
    each_element(e, [&](u32 lane, double& sum) { p.value[lane] = bits_of(canonical(f32(sum))); });
    std::fill_n(w.at<u32>(accumulators[e]), LANES, 0x7FFFFFFFu);
  }
}

static void fence(Warp& w, const Instruction&, u32 mask) { together(w, mask); }
static void commit(Warp& w, const Instruction&, u32 mask) { together(w, mask), w.products++; }

// Until at most so many groups are under way.
static void wait(Warp& w, const Instruction& i, u32 mask) {
  together(w, mask);
  const u64 left = u64(i.immediate), groups = w.products > left ? w.products - left : 0;
  for (auto p = w.pending.begin(); p != w.pending.end();) {
    if (p->second.group >= groups) {
      ++p;
      continue;
    }
    memcpy(w.at<u32>(p->first), p->second.value, sizeof p->second.value);
    p = w.pending.erase(p);
  }
  size_t kept = 0;
  for (const Reading& r : w.readings) {
    if (r.group >= groups) {
      w.readings[kept++] = r;
      continue;
    }
    for (u32 b = r.at; b < r.at + r.bytes; b++) {
      Shadow& s = w.machine->shadow[b];
      s.asynchronous_readers &= ~(1u << w.index);
      if (s.read_epoch != w.machine->epoch) s.read_epoch = w.machine->epoch, s.read_warps = 0;
      s.read_warps |= 1u << w.index;
    }
  }
  w.readings.resize(kept);
  for (const Reading& r : w.readings)  // also read by a group under way
    for (u32 b = r.at; b < r.at + r.bytes; b++) w.machine->shadow[b].asynchronous_readers |= 1u << w.index;
}

void add_warpgroup_products(Table& t) {
#define PRODUCT(n) \
  t.push_back({"wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16", "", wgmma<bf16, n>, true}); \
  t.push_back({"wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16", "", wgmma<f16, n>, true}); \
  t.push_back({"wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32", "", wgmma<tf32, n>, true});
  PRODUCT(8) PRODUCT(16) PRODUCT(32) PRODUCT(64) PRODUCT(128) PRODUCT(256)
  t.push_back({"wgmma.fence.sync.aligned", "", fence, true});
  t.push_back({"wgmma.commit_group.sync.aligned", "", commit, true});
  t.push_back({"wgmma.wait_group.sync.aligned", "", wait, true});
  t.push_back({"fence.proxy.async.shared::cta", "", proxy_fence});
}
