// Matrix products: y = x W^T with what follows it, and dw = g^T x.
//
// A product is made of 32-bit units along its depth: a float, or a pair of bfloat16 that one
// instruction multiplies and adds into float lanes. So one tile serves both.
//   W is packed into panels of GN = GV * W columns, each (depth, GN) units.
//   x is read in place, by broadcasts; for dw both factors are packed, strips of g and panels of x.
// An output has one accumulator, to which the units are added in order. So the bits of a row depend
// neither on the other rows, nor on the tile it falls in, nor on the number of threads.
// The tile is that of Goto and van de Geijn (2008) and of BLIS (Van Zee and van de Geijn, 2015).
#pragma once
#include "philox.h"

namespace FASTTX_ISA {

// A tile is GM rows of GV vectors.
#if defined(__AVX512F__)
constexpr int GM = 14, GV = 2;  // 28 accumulators, 2 of W and 1 of x, of 32 registers
#elif defined(__AVX2__)
constexpr int GM = 6, GV = 2;   // 12 + 2 + 1 of 16
#elif defined(__ARM_NEON)
constexpr int GM = 6, GV = 4;   // 24 + 4 + 1 of 32
#else
constexpr int GM = 4, GV = 2;   // 8 + 2 + 1 and products, of 16
#endif
constexpr int GN = GV * W;

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
// Where share `i` of `of` equal ones of n begins.
constexpr int64_t share(int64_t n, int64_t i, int64_t of) { return n / of * i + least(i, n % of); }

// ---- units ---------------------------------------------------------------------------------------

struct Floats {
  using Stored = float;
  static constexpr int PER = 1;  // numbers in a unit
  INLINE F multiply_add(F sum, F a, F b) { return sum + a * b; }
  // Unit u of the depth for n columns, of a row-major matrix whose rows are the depth.
  template <class S>
  INLINE F down(const S* p, int64_t ld, int64_t u, int64_t, int n) {
    return load_first(p + u * ld, n);
  }
  // W units that lie side by side, of which `numbers` are there.
  INLINE F along(const float* p, int64_t numbers) {
    return numbers > 0 ? load_first(p, (int)least(numbers, W)) : F{};
  }
};

// bfloat16 numbers, multiplied as floats where no instruction takes pairs of them.
struct Widened : Floats {
  INLINE F rounded(F v) { return widen(narrow(v)); }
  INLINE F down(const Bf16* p, int64_t ld, int64_t u, int64_t rows, int n) {
    return Floats::down(p, ld, u, rows, n);
  }
  INLINE F down(const float* p, int64_t ld, int64_t u, int64_t rows, int n) {
    return rounded(Floats::down(p, ld, u, rows, n));
  }
  INLINE F along(const float* p, int64_t numbers) { return rounded(Floats::along(p, numbers)); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Stored = Bf16;
  static constexpr int PER = 2;
  INLINE F multiply_add(F sum, F a, F b) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  // Units of a pair each, the numbers of `low` first.
  INLINE F pair(H low, H high) {
    return (F)(__builtin_convertvector(low, U32) | __builtin_convertvector(high, U32) << 16);
  }
  INLINE H bits_first(const Bf16* p, int n) {
    H v = {};
    memcpy(&v, p, n >= W ? sizeof v : 2 * n);
    return v;
  }
  INLINE F down(const float* p, int64_t ld, int64_t u, int64_t rows, int n) {
    const F high = 2 * u + 1 < rows ? load_first(p + (2 * u + 1) * ld, n) : F{};
    return pair(narrow(load_first(p + 2 * u * ld, n)), narrow(high));
  }
  INLINE F down(const Bf16* p, int64_t ld, int64_t u, int64_t rows, int n) {
    const H high = 2 * u + 1 < rows ? bits_first(p + (2 * u + 1) * ld, n) : H{};
    return pair(bits_first(p + 2 * u * ld, n), high);
  }
  INLINE F along(const float* p, int64_t numbers) {
    H halves[2];
    halves[0] = narrow(Floats::along(p, numbers));
    halves[1] = narrow(Floats::along(p + W, numbers - W));
    F units;
    memcpy(&units, halves, sizeof units);
    return units;
  }
};
#endif

// What tensors stored as S are multiplied as.
template <class S>
struct Unit {
  using Type = Floats;
};
template <>
struct Unit<Bf16> {
#if defined(__AVX512BF16__)
  using Type = Pairs;
#else
  using Type = Widened;
#endif
};

// ---- the tile ------------------------------------------------------------------------------------

// acc[M][V] = sum over the depth of A(i, u) B(u, j), of panels that are `panel` units apart.
// A(i, u): a strip (depth, M), or rows that are `a_row` units apart.
template <class E, bool STRIP, int M, int V>
INLINE void multiply(F (&acc)[M][V], const float* a, int64_t a_row, const float* b, int64_t panel,
                     int64_t depth) {
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) acc[i][j] = F{};
  for (int64_t u = 0; u < depth; u++) {
    F bv[V];
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) bv[j] = load(b + (j / GV) * panel + (j % GV) * W);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      const F s = broadcast(a + (STRIP ? i : i * a_row));
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) acc[i][j] = E::multiply_add(acc[i][j], s, bv[j]);
    }
    a += STRIP ? M : 1;
    b += GN;
  }
}

// m rows times P panels -> tile (m, P * GN); at most GM * GV vectors.
template <class E, bool STRIP, int P, int M>
INLINE void rows_of_tile(const float* a, int64_t a_row, const float* b, int64_t panel, int64_t depth,
                         float* tile) {
  if constexpr (M * P <= GM) {
    F acc[M][P * GV];
    multiply<E, STRIP, M, P * GV>(acc, a, a_row, b, panel, depth);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
      for (int j = 0; j < P * GV; j++) store(tile + i * P * GN + j * W, acc[i][j]);
  }
}

template <class E, bool STRIP, int P, int... I>
INLINE void any_rows(int m, const float* a, int64_t a_row, const float* b, int64_t panel, int64_t depth,
                     float* tile, std::integer_sequence<int, I...>) {
  ((m == I + 1 ? rows_of_tile<E, STRIP, P, I + 1>(a, a_row, b, panel, depth, tile) : void()), ...);
}

// One function for all that multiplies: its variants are many.
template <class E, bool STRIP, int P>
static __attribute__((noinline)) void tile_product(int m, const float* a, int64_t a_row, const float* b,
                                                   int64_t panel, int64_t depth, float* tile) {
  any_rows<E, STRIP, P>(m, a, a_row, b, panel, depth, tile, std::make_integer_sequence<int, GM>{});
}

// Rows [r0, r1) of x times panels [p0, p1) of W. end(row, column, sum) takes every vector of it;
// begin(row, rows, column) is called before a tile. ld: from row to row of x, in units.
template <class E, class Begin, class End>
INLINE void product(const float* x, int64_t ld, int64_t r0, int64_t r1, const float* w, int64_t depth,
                    int64_t p0, int64_t p1, const Begin& begin, const End& end) {
  const int64_t rows = r1 - r0, tiles = parts(rows, GM), panel = depth * GN;
  alignas(64) float tile[GM * GN];
  const auto finish = [&](int64_t row, int64_t m, int64_t column, int64_t width)
      __attribute__((always_inline)) {
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < width; j += W) end(row + i, column + j, load(tile + i * width + j));
  };
  if (rows <= 0) return;
  int64_t p = p0;
  // Few rows: several panels at a time, or the latency of an addition would bind.
  if (rows * 4 <= GM)
    for (; p + 4 <= p1; p += 4) {
      tile_product<E, false, 4>((int)rows, x + r0 * ld, ld, w + p * panel, panel, depth, tile);
      finish(r0, rows, p * GN, 4 * GN);
    }
  if (rows * 2 <= GM)
    for (; p + 2 <= p1; p += 2) {
      tile_product<E, false, 2>((int)rows, x + r0 * ld, ld, w + p * panel, panel, depth, tile);
      finish(r0, rows, p * GN, 2 * GN);
    }
  for (; p < p1; p++)
    for (int64_t t = 0; t < tiles; t++) {  // of equal heights, rather than GM and a rest
      const int64_t at = r0 + share(rows, t, tiles), m = r0 + share(rows, t + 1, tiles) - at;
      begin(at, m, p * GN);
      tile_product<E, false, 1>((int)m, x + at * ld, ld, w + p * panel, panel, depth, tile);
      finish(at, m, p * GN, GN);
    }
}

// Fetches the rows that come next, some lines a tile, while those at hand are computed with: the
// machine's own prefetchers do not follow many short rows.
struct Ahead {
  const char* data;
  int64_t stride, width, rows;  // bytes, bytes, rows still to come
  int64_t at = 0;

  template <class S>
  Ahead(const S* from, int64_t row, int64_t columns, int64_t count)
      : data((const char*)from), stride(row * sizeof(S)), width(columns * sizeof(S)), rows(count) {}

  int64_t lines() const { return rows > 0 ? rows * parts(width, 64) : 0; }
  void fetch(int64_t lines) {
    for (; lines > 0 && rows > 0; lines--) {
      __builtin_prefetch(data + at, 0, 2);
      at += 64;
      if (at >= width) at = 0, data += stride, rows--;
    }
  }
};

// ---- packing -------------------------------------------------------------------------------------

// One panel of W (n, k) -> (depth, GN) units; what lies beyond n and k is 0. One of W's strides is 1.
template <class E>
static void pack_panel(const Matrix& w, int64_t n, int64_t k, int64_t panel, float* out) {
  const int64_t depth = parts(k, E::PER);
  for (int j = 0; j < GV; j++) {
    const int64_t column = panel * GN + j * W, left = n - column;
    float* to = out + j * W;
    if (left <= 0) {
      for (int64_t u = 0; u < depth; u++) store(to + u * GN, F{});
    } else if (w.row == 1) {  // a transposed weight: its columns are rows in memory
      const int count = (int)least(left, W);
      for (int64_t u = 0; u < depth; u++)
        store(to + u * GN, E::down(w.data + column, w.column, u, k, count));
    } else {
      for (int64_t u = 0; u < depth; u += W) {
        F r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
          r[i] = i < left ? E::along(w.data + (column + i) * w.row + u * E::PER, k - u * E::PER) : F{};
        transpose(r);
        const int64_t count = least(W, depth - u);
        for (int64_t i = 0; i < count; i++) store(to + (u + i) * GN, r[i]);
      }
    }
  }
}

// ---- y = x W^T -----------------------------------------------------------------------------------

// Rows that are a multiple of 2 KB apart share the sets of the first-level cache: such rows are
// copied, to SKEW units more than they need.
constexpr int64_t SKEW = 16;
INLINE bool collides(int64_t ld) { return ld % 512 == 0; }

// Rows whose units stay in the second-level cache.
static int64_t product_rows(int64_t k) { return (k > 512 ? 4 : 8) * GM; }

static size_t product_scratch(int64_t n, int64_t k) {
  const int64_t rows = product_rows(k);
  return 4 * rows * (k + SKEW + 64) + rows * parts(n, LANES) + DRAW_SLACK + 64;
}

// Rows [r0, r1) of x as units, from row r0 on. `ld` becomes their distance.
template <class S, class E>
INLINE const float* rows_as_units(const S* x, int64_t k, int64_t r0, int64_t r1, int64_t& ld, float* to) {
  constexpr bool same = sizeof(S) == sizeof(typename E::Stored);
  ld = parts(k, E::PER);
  if (same && k % E::PER == 0 && !collides(ld)) return reinterpret_cast<const float*>(x + r0 * k);
  if (collides(ld)) ld += SKEW;
  for (int64_t r = r0; r < r1; r++) {
    float* row = to + (r - r0) * ld;
    if constexpr (same) {
      if (k % E::PER) row[k / E::PER] = 0;
      memcpy(row, x + r * k, k * sizeof(S));
    } else {
      int64_t c = 0;
      for (; c + W <= k; c += W) store(row + c, load(x + r * k + c));
      if (c < k) store_first(row + c, load_first(x + r * k + c, (int)(k - c)), (int)(k - c));
    }
  }
  return to;
}

// Rows [r0, r1), at most product_rows(k), and panels [p0, p1) of a.y.
template <class S>
static void linear_forward(const Linear<S>& a, const float* packed, int64_t r0, int64_t r1, int64_t p0,
                           int64_t p1, char* scratch) {
  using E = typename Unit<S>::Type;
  const int64_t n = a.n, k = a.k, depth = parts(k, E::PER), first = p0 * GN;
  const int blocks = (int)parts(least(n, p1 * GN) - first, LANES);
  const int64_t rows = r1 - r0;
  uint8_t* keep = reinterpret_cast<uint8_t*>(scratch);
  const int64_t kept = parts(product_rows(k) * parts(n, LANES) + DRAW_SLACK, 64) * 64;
  if (a.dropout.threshold && !(a.gate && a.act == Act::RELU))
    draw_keep(keep, r0, (int)rows, first / LANES, blocks, 0, 0, Philox(a.dropout.seed), a.dropout.threshold);
  int64_t ld;
  const float* x = rows_as_units<S, E>(a.x, k, r0, r1, ld, reinterpret_cast<float*>(scratch + kept));
  Ahead next(a.x + r1 * k, k, k, least(a.rows - r1, rows));
  const int64_t lines = parts(next.lines(), parts(rows, GM) * (p1 - p0));
  const float scale = a.dropout.scale();
  product<E>(
      x - r0 * ld, ld, r0, r1, packed - p0 * depth * GN, depth, p0, p1,
      [&](int64_t row, int64_t m, int64_t column) __attribute__((always_inline)) {
        for (int64_t i = 0; i < m; i++)
          for (size_t j = 0; j < GN * sizeof(S); j += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(a.y + (row + i) * n + column) + j, 1);
        next.fetch(lines);
      },
      [&](int64_t row, int64_t column, F sum) __attribute__((always_inline)) {
        const int count = (int)least(n - column, W);
        if (count <= 0) return;
        const int64_t at = row * n + column;
        if (a.bias) sum += load_first(a.bias + column, count);
        if (a.before) store_first(a.before + at, sum, count);
        const F gate = a.gate ? load_first(a.gate + at, count) : sum;
        if (a.act == Act::RELU) {  // NaN stays
          sum = select(gate <= 0.0f, F{}, a.gate ? sum * scale : sum);
        } else if (a.act == Act::GELU) {
          F cdf, pdf;
          normal(gate, cdf, pdf);
          sum *= a.gate ? (cdf + gate * pdf) : cdf;
        }
        // What relu and dropout let through shows in the gate.
        if (a.dropout.threshold && !(a.gate && a.act == Act::RELU))
          sum = keep_lanes(sum * scale, bits_of(keep + (row - r0) * blocks, (int)((column - first) / W)));
        store_first(a.y + at, sum, count);
      });
}

// ---- dw = g^T x ----------------------------------------------------------------------------------

constexpr int64_t CHUNK = 128;  // units of the depth that are packed at a time

static size_t gradient_scratch(int64_t n, int64_t k) {
  return 4 * CHUNK * (size_t)(n + GN * parts(k, GN)) + 4096;
}

// Units [v0, v1) of columns [0, n) of g, as strips: equal parts of them, each (depth, its columns).
template <class E, class S>
INLINE void pack_strips(const S* g, int64_t ld, int64_t rows, int64_t n, int64_t u0, int64_t v0, int64_t v1,
                        int64_t depth, float* out) {
  const int64_t strips = parts(n, GM);
  for (int64_t s = 0; s < strips; s++) {
    const int64_t at = share(n, s, strips), m = share(n, s + 1, strips) - at;
    for (int64_t c = 0; c < m; c += W) {
      const int count = (int)least(m - c, W);
      // A whole vector where there is room: what it writes too much, the next unit overwrites.
      const bool whole = m <= W && at + W <= n;
      for (int64_t u = v0; u < v1; u++) {
        float* to = out + at * depth + u * m + c;
        if (whole && (u + 1) * m + W <= m * depth)
          store(to, E::down(g + at, ld, u0 + u, rows, W));
        else
          store_first(to, E::down(g + at + c, ld, u0 + u, rows, count), count);
      }
    }
  }
}

// Units [v0, v1) of columns [0, k) of x, as panels.
template <class E, class S>
INLINE void pack_panels(const S* x, int64_t ld, int64_t rows, int64_t k, int64_t u0, int64_t v0, int64_t v1,
                        int64_t depth, float* out) {
  for (int64_t column = 0; column < parts(k, GN) * GN; column += W) {
    const int count = (int)least(k - column, W);
    float* to = out + column / GN * depth * GN + column % GN;
    for (int64_t u = v0; u < v1; u++)
      store(to + u * GN, count > 0 ? E::down(x + column, ld, u0 + u, rows, count) : F{});
  }
}

// dw[n0:n1, k0:k1], and dbias[n0:n1] where k0 is 0; k0 is a multiple of GN.
template <class S>
static void weight_gradient(const WeightGradient<S>& a, int64_t n0, int64_t n1, int64_t k0, int64_t k1,
                            char* scratch) {
  using E = typename Unit<S>::Type;
  const int64_t rows = a.rows, n = a.n, k = a.k, total = parts(rows, E::PER);
  const int64_t strips = parts(n1 - n0, GM), panels = parts(k1 - k0, GN);
  const bool sums = a.dbias && k0 == 0;
  if (sums) memset(a.dbias + n0, 0, (n1 - n0) * sizeof(float));
  if (strips <= 0 || panels <= 0) return;
  float* const gs = reinterpret_cast<float*>(scratch);
  float* const xs = gs + parts((n1 - n0) * CHUNK + W, 16) * 16;
  alignas(64) float tile[GM * GN];
  for (int64_t u0 = 0; u0 < total; u0 += CHUNK) {
    const int64_t depth = least(CHUNK, total - u0);
    for (int64_t v = 0; v < depth; v += 8) {  // rows that stay in the first-level cache
      const int64_t end = least(depth, v + 8);
      pack_strips<E>(a.g + n0, n, rows, n1 - n0, u0, v, end, depth, gs);
      pack_panels<E>(a.x + k0, k, rows, k1 - k0, u0, v, end, depth, xs);
      if (sums)
        for (int64_t r = (u0 + v) * E::PER; r < least(rows, (u0 + end) * E::PER); r++)
          for (int64_t c = n0; c < n1; c += W) {
            const int count = (int)least(n1 - c, W);
            store_first(a.dbias + c, load_first(a.dbias + c, count) + load_first(a.g + r * n + c, count), count);
          }
    }
    const int64_t next = (u0 + depth) * E::PER, coming = least(rows, (u0 + 2 * CHUNK) * E::PER) - next;
    Ahead next_g(a.g + next * n + n0, n, n1 - n0, coming), next_x(a.x + next * k + k0, k, k1 - k0, coming);
    const int64_t lines_g = parts(next_g.lines(), strips * panels);
    const int64_t lines_x = parts(next_x.lines(), strips * panels);
    for (int64_t p = 0; p < panels; p++)
      for (int64_t s = 0; s < strips; s++) {
        const int64_t at = share(n1 - n0, s, strips), m = share(n1 - n0, s + 1, strips) - at;
        next_g.fetch(lines_g);
        next_x.fetch(lines_x);
        float* out = a.dw + (n0 + at) * k + k0 + p * GN;
        const int64_t left = k1 - k0 - p * GN;
        if (u0)
          for (int64_t i = 0; i < m; i++)
            for (int j = 0; j < GN; j += 16) __builtin_prefetch(out + i * k + j, 1);
        tile_product<E, true, 1>((int)m, gs + at * depth, 0, xs + p * depth * GN, 0, depth, tile);
        for (int64_t i = 0; i < m; i++)
          for (int64_t j = 0; j < least(left, GN); j += W) {
            const int count = (int)least(left - j, W);
            const F sum = load(tile + i * GN + j);
            store_first(out + i * k + j, u0 ? load_first(out + i * k + j, count) + sum : sum, count);
          }
      }
  }
}

}  // namespace FASTTX_ISA
