// Fused attention, forward and backward, for one sequence and head at a time.
//
// Scores live in tiles that fit the first-level cache; no L x L matrix is stored. Long sequences
// go through blocks of keys with an online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022).
// Scores are kept in base 2: q is scaled by scale * log2(e) when it is copied.
//
// Letters: L the sequence's length, DP head_dim padded to a power of two, W lanes of a vector.
// Panels: the keys are cut into panels of at most NR vectors; a panel of K or V lies transposed,
// [DP][NR * W], so that a row of scores is a product of broadcast q values and panel rows.
#pragma once
#include <math.h>

#include "kernels.h"
#include "philox.h"

namespace FASTTX_ISA {

constexpr int FORWARD_ROWS = 32;    // queries a block
constexpr int BACKWARD_ROWS = 64;

INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Scratch {
  char* at;

  template <class T>
  T* take(size_t count) {
    T* found = (T*)at;
    at += round_up(count * sizeof(T), 64);
    return found;
  }
};

// ---- panels and copies ---------------------------------------------------------------------------

constexpr int PANEL = NR * W;  // keys
static_assert(PANEL % LANES == 0, "a panel holds whole blocks of keep bits");

// Keys a block: whole panels, whose scores stay in the second-level cache.
constexpr int FORWARD_KEYS = (512 + PANEL - 1) / PANEL * PANEL;

// Rows of one sequence as [length][DP], times `factor`; columns from head_dim and rows from `rows`
// up to `padded` are 0.
template <int DP, class S>
INLINE void copy_rows(float* to, const S* from, int64_t stride, int64_t rows, int64_t padded,
                      int head_dim, float factor) {
  for (int64_t r = 0; r < rows; r++, to += DP, from += stride)
#pragma GCC unroll 8
    for (int d = 0; d < DP; d += W)
      store(to + d, d < head_dim ? load_first(from + d, head_dim - d) * factor : F{});
  memset(to, 0, (padded - rows) * DP * sizeof(float));
}

// [length][DP] -> panels, `vectors` of W keys in all.
template <int DP>
INLINE void transpose_panels(float* to, const float* rows, int vectors) {
  for (int v = 0; v < vectors; v++) {
    const int first = v / NR * NR, width = (vectors - first < NR ? vectors - first : NR) * W;
    float* panel = to + (size_t)first * W * DP + (v - first) * W;
#pragma GCC unroll 8
    for (int d = 0; d < DP; d += W) {
      F r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) r[i] = load(rows + ((size_t)v * W + i) * DP + d);
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store(panel + (d + i) * width, r[i]);
    }
  }
}

// ---- products ------------------------------------------------------------------------------------

// acc[MR][N] = a [MR][DP] times a panel [DP][N * W].
template <int DP, int N>
INLINE void times_panel(F acc[MR][N], const float* a, const float* panel) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) acc[m][n] = F{};
#pragma GCC unroll 2
  for (int d = 0; d < DP; d++) {
    F b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) b[n] = load(panel + (d * N + n) * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const F x = broadcast(a + m * DP + d);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[m][n] += x * b[n];
    }
  }
}

// c [MR][DP] (+)= the sum over k of a(m, k) b[k][DP]; a(m, k) is a[m * stride + k], or a[k * stride + m]
// where a lies TRANSPOSED.
template <int DP, bool ADD, bool TRANSPOSED>
static __attribute__((noinline)) void accumulate(float* c, const float* a, int64_t stride, int64_t depth,
                                                 const float* b) {
  constexpr int N = NC * W < DP ? NC : DP / W;
  for (int d = 0; d < DP; d += N * W) {
    F acc[MR][N];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[m][n] = ADD ? load(c + m * DP + d + n * W) : F{};
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; k++) {
      F row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) row[n] = load(b + k * DP + d + n * W);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const F x = broadcast(TRANSPOSED ? a + k * stride + m : a + m * stride + k);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) acc[m][n] += x * row[n];
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) store(c + m * DP + d + n * W, acc[m][n]);
  }
}

// Lanes of the keys from `key` on that row `query` may see.
INLINE I visible(int64_t key, int64_t query, int64_t length, bool causal) {
  const int64_t end = causal && query + 1 < length ? query + 1 : length;
  return lane_index() < I{} + (int32_t)(end - key < W ? end - key : W);
}

// ---- forward -------------------------------------------------------------------------------------

// Scores of `rows` queries and one panel, [rows][stride], and their running maxima [rows][W].
template <int DP, int N>
static __attribute__((noinline)) void score_panel(float* scores, int64_t stride, F* maxima,
                                                  const float* q, int rows, const float* panel,
                                                  int64_t key, int64_t query, int64_t length,
                                                  bool causal) {
  const int64_t end = causal && query + 1 < length ? query + 1 : length;
  const bool edge = key + N * W > end;  // some row sees some of these keys only
  for (int r = 0; r < rows; r += MR) {
    F acc[MR][N];
    times_panel<DP, N>(acc, q + r * DP, panel);
    if (edge) {
      for (int m = 0; m < MR; m++)
        for (int n = 0; n < N; n++)
          acc[m][n] = select(visible(key + n * W, query + r + m, length, causal), acc[m][n],
                             splat(-INFINITY));
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      F most = maxima[r + m];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        most = max(most, acc[m][n]);
        store(scores + (r + m) * stride + n * W, acc[m][n]);
      }
      maxima[r + m] = most;
    }
  }
}

template <int DP>
INLINE void score_panel(int vectors, float* scores, int64_t stride, F* maxima, const float* q, int rows,
                        const float* panel, int64_t key, int64_t query, int64_t length, bool causal) {
  if (vectors >= NR)
    score_panel<DP, NR>(scores, stride, maxima, q, rows, panel, key, query, length, causal);
  else if (NR > 3 && vectors == 3)
    score_panel<DP, 3>(scores, stride, maxima, q, rows, panel, key, query, length, causal);
  else if (NR > 2 && vectors == 2)
    score_panel<DP, 2>(scores, stride, maxima, q, rows, panel, key, query, length, causal);
  else
    score_panel<DP, 1>(scores, stride, maxima, q, rows, panel, key, query, length, causal);
}

template <int DP, bool DROP, class S>
static void forward(const Attention<S>& a, int sequence, int head, int64_t first, int64_t last,
                    char* scratch) {
  const int64_t start = a.starts[sequence], length = a.lens[sequence];
  const int head_dim = (int)a.head_dim;
  const int64_t seen = a.causal ? last : length;  // keys that any of these queries sees
  const int vectors = (int)((seen + W - 1) / W);
  const int64_t keys = (int64_t)vectors * W;
  const int64_t most = keys < FORWARD_KEYS ? keys : FORWARD_KEYS;  // scores of a row at a time
  Scratch room{scratch};
  float* v = room.take<float>(keys * DP);
  float* panels = room.take<float>(keys * DP);
  float* k = room.take<float>(keys * DP);
  float* scores = room.take<float>(FORWARD_ROWS * FORWARD_KEYS);
  float* q = room.take<float>(FORWARD_ROWS * DP);
  float* o = room.take<float>(FORWARD_ROWS * DP);
  F* maxima = room.take<F>(FORWARD_ROWS);
  F* sums = room.take<F>(FORWARD_ROWS);
  float* top = room.take<float>(FORWARD_ROWS);    // the largest score so far
  float* total = room.take<float>(FORWARD_ROWS);  // the sum of 2^(score - top) so far
  float* factor = room.take<float>(FORWARD_ROWS);
  uint8_t* keep = room.take<uint8_t>(FORWARD_ROWS * FORWARD_KEYS / LANES + DRAW_SLACK);
  const Philox philox(a.dropout.seed);

  copy_rows<DP>(k, a.k.at(start, head), a.k.row, seen, keys, head_dim, 1.0f);
  transpose_panels<DP>(panels, k, vectors);
  copy_rows<DP>(v, a.v.at(start, head), a.v.row, seen, keys, head_dim, 1.0f);

  for (int64_t query = first; query < last; query += FORWARD_ROWS) {
    const int rows = (int)(last - query < FORWARD_ROWS ? last - query : FORWARD_ROWS);
    const int tiled = (int)round_up(rows, MR), grouped = (int)round_up(rows, W);
    const int64_t limit = a.causal ? query + rows : length;
    copy_rows<DP>(q, a.q.at(start + query, head), a.q.row, rows, tiled, head_dim, a.scale * LOG2E);
    for (int r = 0; r < FORWARD_ROWS; r++) top[r] = -INFINITY, total[r] = 0.0f;

    for (int64_t key = 0; key < limit; key += FORWARD_KEYS) {
      const int64_t end = limit - key < FORWARD_KEYS ? limit : key + FORWARD_KEYS;
      const int width = (int)((end - key + W - 1) / W);  // vectors of this block
      for (int r = 0; r < grouped; r++) maxima[r] = splat(-INFINITY);
      for (int n = 0; n < width; n += NR) {
        const int64_t at = key + n * W;
        const int whole = vectors - (int)(at / W);  // a panel is as wide as it was made
        score_panel<DP>(whole < NR ? whole : NR, scores + n * W, most, maxima, q, tiled,
                        panels + at * DP, at, query, length, a.causal);
      }
      // The panels of this block may reach past `width` vectors; what they wrote there is not read.
      const int blocks = (width * W + LANES - 1) / LANES;
      if (DROP)
        draw_keep(keep, query, rows, key / LANES, blocks, head, sequence, philox, a.dropout.threshold);

      for (int r = 0; r < grouped; r += W) {
        F m[W];
        memcpy(m, maxima + r, sizeof m);
        const F before = load(top + r);
        F now = max(before, reduce_rows(m, [](F x, F y) { return max(x, y); }));
        store(top + r, now);
        store(factor + r, exp2(before - now));
      }
      for (int r = 0; r < tiled; r++) {
        float* s = scores + r * most;
        const uint8_t* kept = keep + r * blocks;
        const F highest = splat(top[r]);
        F sum0 = {}, sum1 = {};
        for (int n = 0; n < width; n++) {
          F p = exp2(load(s + n * W) - highest);
          (n & 1 ? sum1 : sum0) += p;
          store(s + n * W, DROP ? keep_lanes(p, bits_of(kept, n)) : p);
        }
        sums[r] = sum0 + sum1;
      }
      for (int r = tiled; r < grouped; r++) sums[r] = F{};
      for (int r = 0; r < grouped; r += W) {
        F m[W];
        memcpy(m, sums + r, sizeof m);
        const F more = reduce_rows(m, [](F x, F y) { return x + y; });
        store(total + r, load(total + r) * load(factor + r) + more);
      }
      if (key == 0) {
        for (int r = 0; r < tiled; r += MR)
          accumulate<DP, false, false>(o + r * DP, scores + r * most, most, end - key, v);
      } else {
        for (int r = 0; r < rows; r++)
          for (int d = 0; d < DP; d += W) store(o + r * DP + d, load(o + r * DP + d) * factor[r]);
        for (int r = 0; r < tiled; r += MR)
          accumulate<DP, true, false>(o + r * DP, scores + r * most, most, end - key, v + key * DP);
      }
    }

    for (int r = 0; r < grouped; r += W) {
      const F sum = load(total + r);
      store_first(a.lse + head * a.rows + start + query + r, load(top + r) * LN2 + log(sum), rows - r);
      store(factor + r, splat(DROP ? a.dropout.scale() : 1.0f) / sum);
    }
    for (int r = 0; r < rows; r++) {
      S* out = a.written_out.at(start + query + r, head);
      for (int d = 0; d < head_dim; d += W)
        store_first(out + d, load(o + r * DP + d) * factor[r], head_dim - d);
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------

// P and dS of `rows` queries and one panel, [rows][N * W]: P = 2^(s - lse), the weights; then
// dS = P (keep dP - delta), and what is left in `p` is keep P.
template <int DP, int N, bool DROP>
static __attribute__((noinline)) void weigh_panel(float* p, float* ds, const float* q, const float* dout,
                                                  int rows, const float* k, const float* v,
                                                  const float* lse2, const float* delta,
                                                  const uint8_t* keep, float keep_scale, int64_t key,
                                                  int64_t query, int64_t length, bool causal) {
  const int64_t end = causal && query + 1 < length ? query + 1 : length;
  const bool edge = key + N * W > end;
  constexpr int blocks = (N * W + LANES - 1) / LANES;
  for (int r = 0; r < rows; r += MR) {
    F acc[MR][N];
    times_panel<DP, N>(acc, q + r * DP, k);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const F row = splat(lse2[r + m]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        F weight = exp2(acc[m][n] - row);
        if (edge) weight = select(visible(key + n * W, query + r + m, length, causal), weight, F{});
        store(p + ((r + m) * N + n) * W, weight);
      }
    }
    times_panel<DP, N>(acc, dout + r * DP, v);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const F row = splat(delta[r + m]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        float* at = p + ((r + m) * N + n) * W;
        const F weight = load(at);
        F kept = weight;
        if (DROP) {
          kept = keep_lanes(weight * keep_scale, bits_of(keep + (r + m) * blocks, n));
          store(at, kept);
        }
        store(ds + ((r + m) * N + n) * W, kept * acc[m][n] - weight * row);
      }
    }
  }
}

template <int DP, bool DROP>
struct Backward {
  const Spans& a;
  int sequence, head;
  int64_t length;
  const float *q, *dout, *k_rows, *lse2, *delta;  // [length][DP], by query or by key
  float *dq, *dk, *dv;                            // dq [length][DP]; dk and dv of a panel
  float *p, *ds;                                  // [BACKWARD_ROWS][PANEL]
  uint8_t* keep;
  const Philox& philox;

  // All that the keys of one panel, from `key` on, take part in.
  template <int N>
  void panel(int64_t key, const float* k, const float* v) {
    constexpr int width = N * W, blocks = (width + LANES - 1) / LANES;
    memset(dk, 0, width * DP * sizeof(float));
    memset(dv, 0, width * DP * sizeof(float));
    const int64_t begin = a.causal ? key / BACKWARD_ROWS * BACKWARD_ROWS : 0;
    for (int64_t query = begin; query < length; query += BACKWARD_ROWS) {
      const int64_t left = round_up(length - query, MR);
      const int rows = (int)(left < BACKWARD_ROWS ? left : BACKWARD_ROWS);
      const float* qs = q + query * DP;
      const float* g = dout + query * DP;
      if (DROP)
        draw_keep(keep, query, rows, key / LANES, blocks, head, sequence, philox, a.dropout.threshold);
      weigh_panel<DP, N, DROP>(p, ds, qs, g, rows, k, v, lse2 + query, delta + query, keep,
                               a.dropout.scale(), key, query, length, a.causal);
      for (int m = 0; m < width; m += MR) {
        accumulate<DP, true, true>(dv + m * DP, p + m, width, rows, g);
        accumulate<DP, true, true>(dk + m * DP, ds + m, width, rows, qs);
      }
      for (int m = 0; m < rows; m += MR)
        accumulate<DP, true, false>(dq + (query + m) * DP, ds + m * width, width, width,
                                    k_rows + key * DP);
    }
  }
};

template <int DP, bool DROP, class S>
static void backward(const Attention<S>& a, int sequence, int head, char* scratch) {
  const int64_t start = a.starts[sequence], length = a.lens[sequence];
  const int head_dim = (int)a.head_dim;
  const int vectors = (int)((length + W - 1) / W);
  const int64_t keys = (int64_t)vectors * W, queries = round_up(length, BACKWARD_ROWS);
  Scratch room{scratch};
  float* k = room.take<float>(keys * DP);
  float* v = room.take<float>(keys * DP);
  float* k_rows = room.take<float>(keys * DP);
  float* q = room.take<float>(queries * DP);
  float* dout = room.take<float>(queries * DP);
  float* dq = room.take<float>(queries * DP);
  float* dk = room.take<float>(PANEL * DP);
  float* dv = room.take<float>(PANEL * DP);
  float* p = room.take<float>(BACKWARD_ROWS * PANEL);
  float* ds = room.take<float>(BACKWARD_ROWS * PANEL);
  float* lse2 = room.take<float>(queries);
  float* delta = room.take<float>(queries);
  uint8_t* keep = room.take<uint8_t>(BACKWARD_ROWS * PANEL / LANES + DRAW_SLACK);

  copy_rows<DP>(k_rows, a.v.at(start, head), a.v.row, length, keys, head_dim, 1.0f);
  transpose_panels<DP>(v, k_rows, vectors);
  copy_rows<DP>(k_rows, a.k.at(start, head), a.k.row, length, keys, head_dim, 1.0f);
  transpose_panels<DP>(k, k_rows, vectors);
  copy_rows<DP>(q, a.q.at(start, head), a.q.row, length, queries, head_dim, a.scale * LOG2E);
  copy_rows<DP>(dout, a.dout.at(start, head), a.dout.row, length, queries, head_dim, 1.0f);
  memset(dq, 0, queries * DP * sizeof(float));
  for (int64_t r = 0; r < length; r++) {
    const S* out = a.out.at(start + r, head);
    F product = {};
    for (int d = 0; d < head_dim; d += W)
      product += load_first(out + d, head_dim - d) * load(dout + r * DP + d);
    delta[r] = sum(product);
    lse2[r] = a.lse[head * a.rows + start + r] * LOG2E;
  }
  for (int64_t r = length; r < queries; r++) delta[r] = 0.0f, lse2[r] = INFINITY;  // weights of 0

  const Philox philox(a.dropout.seed);
  Backward<DP, DROP> work{a, sequence, head, length, q, dout, k_rows, lse2, delta, dq, dk, dv, p, ds,
                          keep, philox};
  for (int at = 0; at < vectors; at += NR) {
    const int64_t key = (int64_t)at * W, from = key * DP;
    const int width = vectors - at < NR ? vectors - at : NR;
    if (width == NR)
      work.template panel<NR>(key, k + from, v + from);
    else if (NR > 3 && width == 3)
      work.template panel<(NR > 3 ? 3 : 1)>(key, k + from, v + from);
    else if (NR > 2 && width == 2)
      work.template panel<(NR > 2 ? 2 : 1)>(key, k + from, v + from);
    else
      work.template panel<1>(key, k + from, v + from);

    const int64_t here = length - key < width * W ? length - key : width * W;
    for (int64_t r = 0; r < here; r++) {
      S* to_k = a.dk.at(start + key + r, head);
      S* to_v = a.dv.at(start + key + r, head);
      for (int d = 0; d < head_dim; d += W) {
        // q carries scale * log2(e), dk wants scale.
        store_first(to_k + d, load(dk + r * DP + d) * LN2, head_dim - d);
        store_first(to_v + d, load(dv + r * DP + d), head_dim - d);
      }
    }
  }
  for (int64_t r = 0; r < length; r++) {
    S* to = a.dq.at(start + r, head);
    for (int d = 0; d < head_dim; d += W)
      store_first(to + d, load(dq + r * DP + d) * a.scale, head_dim - d);
  }
}

static size_t attention_scratch(int64_t len, int64_t head_dim, bool backward) {
  const int64_t dp = head_dim <= 16 ? 16 : head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128;
  const int64_t keys = round_up(len, W), queries = round_up(len, BACKWARD_ROWS);
  const size_t rounding = 16 * 64;  // what `take` may add
  if (backward)
    return 4 * ((size_t)(3 * keys + 3 * queries + 2 * PANEL) * dp + 2 * BACKWARD_ROWS * PANEL +
                2 * queries) + BACKWARD_ROWS * PANEL / LANES + DRAW_SLACK + rounding;
  return 4 * ((size_t)(3 * keys + 2 * FORWARD_ROWS) * dp + FORWARD_ROWS * (FORWARD_KEYS + 2 * W + 3)) +
         FORWARD_ROWS * FORWARD_KEYS / LANES + DRAW_SLACK + rounding;
}

template <int DP, class S>
static void forward_of(const Attention<S>& a, int s, int h, int64_t first, int64_t last, char* scratch) {
  a.dropout.threshold ? forward<DP, true>(a, s, h, first, last, scratch)
                      : forward<DP, false>(a, s, h, first, last, scratch);
}

template <int DP, class S>
static void backward_of(const Attention<S>& a, int s, int h, char* scratch) {
  a.dropout.threshold ? backward<DP, true>(a, s, h, scratch) : backward<DP, false>(a, s, h, scratch);
}

template <class S>
static void attention_forward(const Attention<S>& a, int s, int h, int64_t first, int64_t last,
                              char* scratch) {
  (a.head_dim <= 16   ? forward_of<16, S>
   : a.head_dim <= 32 ? forward_of<32, S>
   : a.head_dim <= 64 ? forward_of<64, S>
                      : forward_of<128, S>)(a, s, h, first, last, scratch);
}

template <class S>
static void attention_backward(const Attention<S>& a, int s, int h, char* scratch) {
  (a.head_dim <= 16   ? backward_of<16, S>
   : a.head_dim <= 32 ? backward_of<32, S>
   : a.head_dim <= 64 ? backward_of<64, S>
                      : backward_of<128, S>)(a, s, h, scratch);
}

}  // namespace FASTTX_ISA
