// A classifier from token ids to logits, on weights that were packed once.
//
// Two ways to cut a call into phases, whose logits are the same bits:
//   columns  few rows: each product's columns are shared out, so that a thread reads its part of the
//            weights only, which is what such a call spends its time on. A layer has five phases, a
//            post-norm one seven.
//   rows     many rows: a block of rows goes from the attention to the next layer's qkv and stays in
//            one second-level cache. A layer has two phases.
// What a thread needs besides (the norms of the rows, or their 8-bit form) it makes for itself, once a
// phase.
//
// Everything is padded to whole panels, with zeros: rows of h to DP columns, each head to HP. So no
// loop has an edge, but for the sums of a norm.
#pragma once
#include "encoder_kernels.h"
#include "quantised.h"

namespace FASTTX_ISA {

// ---- packed models -------------------------------------------------------------------------------

struct PackedNorm {
  const float *gamma, *beta;  // (DP,)
  float eps;
};

struct PackedLinear {
  const float* panels;
  const float* bias;      // (columns,), zeros where there is none
  const float* scale;     // of each column, and
  const int32_t* offset;  // what its sums are too large by; 8-bit products only
  int64_t columns, inputs, depth;  // depth: units
};

struct PackedBlock {
  PackedNorm norm1, norm2;
  PackedLinear qkv, out, up, down;
};

// The phases of a layer, where columns are shared out.
enum Step { QKV, ATTENTION, OUT, NORM1, UP, DOWN, NORM2 };
constexpr Step PRE_NORM[] = {QKV, ATTENTION, OUT, UP, DOWN};
constexpr Step POST_NORM[] = {QKV, ATTENTION, OUT, NORM1, UP, DOWN, NORM2};

struct Model {
  void (*run)(void* call, int64_t phase, int64_t item, int thread);
  Precision precision;
  int64_t d, dp, e, ep, heads, head_dim, hp, d_ff, fp, layers, places, classes;
  bool gelu, post_norm, first_row;
  HeadActivation head_activation;
  float embedding_scale;
  const float *embedding, *positions;
  PackedNorm embedding_norm;  // without gamma there is none
  PackedLinear projection;    // without panels there is none
  PackedBlock* blocks;
  PackedNorm norm;
  PackedLinear dense, classify;
};

// Hands out pieces of one block of memory; without a block it counts them.
struct Pieces {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* found = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * sizeof(T) + 63) / 64 * 64;
    return found;
  }
};

// Where a weight's row or column goes: the heads of a projection lie hp apart.
struct Padding {
  int64_t parts, size, padded;  // `parts` pieces of `size`, each padded to `padded`
  int64_t total() const { return parts * padded; }
  int64_t source(int64_t i) const { return i % padded < size ? i / padded * size + i % padded : -1; }
};

// A unit of these numbers, which 8-bit products scale.
INLINE void store_unit(Floats, const float* x, float, float* to) { *to = *x; }
#if defined(__AVX512BF16__)
INLINE void store_unit(Pairs, const float* x, float, float* to) {
  const H halves = narrow(load_first(x, 2));
  memcpy(to, &halves, 4);
}
#endif
INLINE void store_unit(Bytes, const float* x, float inverse, float* to) {
  // Weights have a sign in every set.
  int8_t small[Bytes::PER];
  typename std::conditional<Bytes::PER == 2, int16_t, int8_t>::type unit[Bytes::PER];
  for (int e = 0; e < Bytes::PER; e++) {
    const float scaled = x[e] * inverse;
    small[e] = (int8_t)(int)(scaled < 0 ? scaled - 0.5f : scaled + 0.5f);
    unit[e] = small[e];
  }
  memcpy(to, unit, 4);
}

template <class E>
static PackedLinear pack_linear(const LinearWeights& l, const Padding& out, const Padding& in, Pieces& pieces) {
  constexpr bool BYTES = __is_same(E, Bytes);
  PackedLinear p = {};
  p.columns = parts(out.total(), GN) * GN, p.inputs = in.total(), p.depth = parts(p.inputs, E::PER);
  float* panels = pieces.take<float>(p.columns * p.depth);
  float* bias = pieces.take<float>(p.columns);
  float* scale = BYTES ? pieces.take<float>(p.columns) : nullptr;
  int32_t* offset = BYTES ? pieces.take<int32_t>(p.columns) : nullptr;
  p.panels = panels, p.bias = bias, p.scale = scale, p.offset = offset;
  if (!panels) return p;
  const int64_t inputs = in.parts * in.size;
  for (int64_t c = 0; c < p.columns; c++) {
    const int64_t row = c < out.total() ? out.source(c) : -1;
    const float* from = row < 0 ? nullptr : l.weight + row * inputs;
    bias[c] = from && l.bias ? l.bias[row] : 0.0f;
    float top = 0, unsound = 0, inverse = 0;
    int32_t sum = 0;
    if (BYTES && from) {
      for (int64_t i = 0; i < inputs; i++) {
        const float size = from[i] < 0 ? -from[i] : from[i];
        top = size > top ? size : top;
        unsound += from[i] - from[i];  // NaN where it is not finite
      }
      inverse = top > 1e-30f && unsound == 0 ? LARGEST / top : 0.0f;
    }
    float* to = panels + c / GN * GN * p.depth + c % GN;
    for (int64_t u = 0; u < p.depth; u++) {
      float numbers[E::PER];
      for (int e = 0; e < E::PER; e++) {
        const int64_t i = u * E::PER + e, source = i < p.inputs ? in.source(i) : -1;
        numbers[e] = from && source >= 0 ? from[source] : 0.0f;
      }
      store_unit(E{}, numbers, inverse, to + u * GN);
      if (BYTES && Bytes::OFFSET) {
        int8_t unit[4];
        memcpy(unit, to + u * GN, 4);
        for (int e = 0; e < 4; e++) sum += unit[e];
      }
    }
    if (BYTES) scale[c] = top / LARGEST + unsound, offset[c] = Bytes::OFFSET * sum;
  }
  return p;
}

INLINE PackedNorm pack_norm(const NormWeights& n, int64_t d, int64_t dp, Pieces& pieces) {
  float *gamma = pieces.take<float>(dp), *beta = pieces.take<float>(dp);
  if (gamma)
    for (int64_t c = 0; c < dp; c++) gamma[c] = c < d ? n.gamma[c] : 0, beta[c] = c < d ? n.beta[c] : 0;
  return {gamma, beta, n.eps};
}

// ---- how each precision computes -----------------------------------------------------------------

// Products: units of the blocks' products. Attended: those of the attention's. Stored: what lies
// between products.
struct InFloats {
  using Products = Floats;
  using Attended = Floats;
  using Stored = float;
};
struct InBytes {
  using Products = Bytes;
  using Attended = Floats;
  using Stored = float;
};
#if defined(__AVX512BF16__)
struct InPairs {
  using Products = Pairs;
  using Attended = Pairs;
  using Stored = Bf16;
};
#endif

// Calls work with what computes in this precision.
template <class Work>
INLINE bool in_precision(Precision precision, const Work& work) {
  switch (precision) {
    case Precision::FP32: return work(InFloats{}), true;
    case Precision::INT8: return work(InBytes{}), true;
#if defined(__AVX512BF16__)
    case Precision::BF16: return work(InPairs{}), true;
#endif
    default: return false;
  }
}

// ---- calls ---------------------------------------------------------------------------------------

// Row buffers: from row to row in units, not a multiple of 2 KB, which would put all rows of a tile
// into the same sets of the first-level cache.
INLINE int64_t row_units(int64_t units) {
  const int64_t ld = parts(units, 16) * 16 + SKEW;
  return ld % 512 == 0 ? ld + SKEW : ld;
}

constexpr int64_t ROWS_BLOCK = 8 * GM < 64 ? 64 : 8 * GM;
constexpr int64_t QUERIES = 128;  // of an item, where there are few sequences and heads

// What a thread has to itself in a call.
struct Own {
  float *n, *q, *u, *scales, *space;
  int64_t prepared;  // the phase that q (or n) is of
};

struct Call {
  const Model* m;
  Texts texts;
  int64_t rows, longest;
  int threads;
  bool columns;
  int64_t blocks;               // of rows
  int64_t queries;              // of an item of attention
  int64_t normed;               // items of a phase that norms h
  const int64_t* first_item;    // (batch + 1,): the first item of attention of each text
  int64_t qkv_share, out_share, up_share;  // panels of an item
  int64_t ld, qkv_ld, mixed_ld, u_ld, q_ld;
  float *h, *qkv, *mixed, *u;
  Own* own;
};

INLINE int64_t attention_floats(int64_t longest, int64_t hp) {
  const int64_t keys = parts(longest, GN) * GN;
  return 2 * keys * hp + 2 * GM * (keys + SKEW) + 4 * 64;
}

// Panels of an item: some items for each thread, and as many panels as a tile takes at a time.
INLINE int64_t panel_share(int64_t columns, int64_t rows, int threads) {
  const int64_t panels = columns / GN;
  if (threads == 1) return panels;
  const int64_t together = rows * 4 <= GM ? 4 : rows * 2 <= GM ? 2 : 1;
  const int64_t wanted = parts(panels, 4 * threads);
  return parts(wanted, together) * together;
}

INLINE bool by_columns(const Texts& t, int threads, Split split) {
  const int64_t rows = t.offsets[t.batch] - t.offsets[0];
  return split == Split::BY_SIZE ? rows <= 8 * threads : split == Split::COLUMNS;
}

INLINE int64_t steps_of(const Model& m) { return m.post_norm ? 7 : 5; }
INLINE Step step_of(const Model& m, int64_t i) { return m.post_norm ? POST_NORM[i % 7] : PRE_NORM[i % 5]; }
INLINE int64_t phases_of(const Model& m, bool columns) { return (columns ? steps_of(m) : 2) * m.layers + 2; }

// Lays out a call; without a block of memory it counts bytes.
static void lay_out(const Model& m, const Texts& t, int threads, Split split, Pieces& pieces, Call& c) {
  const int64_t per = m.precision == Precision::BF16 ? 2 : 1;  // numbers in 32 bits, between products
  c.m = &m, c.texts = t, c.threads = threads, c.columns = by_columns(t, threads, split);
  c.rows = t.offsets[t.batch] - t.offsets[0];
  c.longest = 0;
  for (int64_t b = 0; b < t.batch; b++) {
    const int64_t length = t.offsets[b + 1] - t.offsets[b];
    if (length > c.longest) c.longest = length;
  }
  c.blocks = parts(parts(c.rows, ROWS_BLOCK), threads) * threads;
  if (c.blocks > c.rows) c.blocks = c.rows;
  c.normed = least(c.rows, threads);
  c.queries = t.batch * m.heads < 4 * threads ? QUERIES : INT64_MAX / 2;
  c.qkv_share = panel_share(3 * m.heads * m.hp, c.rows, threads);
  c.out_share = panel_share(m.dp, c.rows, threads);
  c.up_share = panel_share(m.fp, c.rows, threads);
  const int64_t widest = m.fp > m.heads * m.hp ? m.fp : m.heads * m.hp;
  c.ld = row_units(m.dp > m.ep ? m.dp : m.ep), c.qkv_ld = row_units(3 * m.heads * m.hp / per);
  c.mixed_ld = row_units(m.heads * m.hp / per), c.u_ld = row_units(m.fp / per);
  c.q_ld = row_units(parts(widest > m.dp ? widest : m.dp, Bytes::PER));
  c.h = pieces.take<float>(c.rows * m.dp);
  c.qkv = pieces.take<float>(c.rows * c.qkv_ld);
  c.mixed = pieces.take<float>(c.rows * c.mixed_ld);
  c.u = c.columns ? pieces.take<float>(c.rows * c.u_ld) : nullptr;
  int64_t* first_item = pieces.take<int64_t>(t.batch + 1);
  if (first_item) {
    first_item[0] = 0;
    for (int64_t b = 0; b < t.batch; b++)
      first_item[b + 1] = first_item[b] + m.heads * parts(t.offsets[b + 1] - t.offsets[b], c.queries);
  }
  c.first_item = first_item;
  c.own = pieces.take<Own>(threads);
  const int64_t rows = c.columns ? c.rows : ROWS_BLOCK;
  for (int i = 0; i < threads; i++) {
    Own o = {};
    o.n = pieces.take<float>(rows * c.ld);
    o.q = m.precision == Precision::INT8 ? pieces.take<float>(rows * c.q_ld) : nullptr;
    o.scales = pieces.take<float>(rows);
    o.u = c.columns ? nullptr : pieces.take<float>(rows * c.u_ld);
    o.space = pieces.take<float>(attention_floats(c.longest, m.hp) + 4 * m.dp);
    o.prepared = -1;
    if (c.own) c.own[i] = o;
  }
}

// ---- rows ----------------------------------------------------------------------------------------

// LayerNorm of h (d of dp columns) into n, whose columns from d on come out 0.
template <class S>
INLINE void norm_row(const float* h, S* n, const PackedNorm& norm, int64_t d) {
  F total = {}, squares = {};
  for (int64_t c = 0; c < d; c += W) total += load(h + c);
  const float share = 1.0f / (float)d, mean = sum(total) * share;
  for (int64_t c = 0; c < d; c += W) {
    F x = load(h + c) - mean;
    if (c + W > d) x = select(lane_index() < I{} + (int32_t)(d - c), x, F{});
    squares += x * x;
  }
  const float rstd = 1.0f / __builtin_sqrtf(sum(squares) * share + norm.eps);
  for (int64_t c = 0; c < d; c += W)
    store(n + c, (load(h + c) - mean) * rstd * load(norm.gamma + c) + load(norm.beta + c));
}

// ---- attention -----------------------------------------------------------------------------------

// Queries [first, last) of one sequence and head: softmax(q k^T scale) v. qkv: rows of ld units, q, k
// and v `apart` units from each other; out: rows of out_ld units. Scores are kept in base 2.
template <class E>
static void attend(const float* qkv, int64_t ld, int64_t apart, float* out, int64_t out_ld, int64_t length,
                   int64_t first, int64_t last, int64_t head_dim, int64_t hp, float* space) {
  using S = typename E::Stored;
  const auto nothing = [](int64_t, int64_t, int64_t) {};
  const int64_t keys = parts(length, GN) * GN, key_units = parts(length, E::PER);
  const int64_t depth = parts(head_dim, E::PER);
  float* kt = space;                 // panels of keys: (keys / GN, depth, GN)
  float* v = kt + keys * depth;      // panels of columns: (hp / GN, key_units, GN)
  float* s = v + key_units * hp;     // (GM, keys), scores and then weights
  float* p = s + GM * (keys + SKEW);  // (GM, keys / PER), weights as units
  const int64_t s_ld = keys + SKEW, p_ld = keys / E::PER + SKEW;
  const float *k0 = qkv + apart, *v0 = qkv + 2 * apart;
  for (int64_t j = 0; j < keys; j += W)
    for (int64_t c = 0; c < depth; c += W) {
      F t[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) t[i] = j + i < length ? load(k0 + (j + i) * ld + c) : F{};
      transpose(t);
      float* to = kt + (j / GN * depth + c) * GN + j % GN;
      const int64_t count = least(W, depth - c);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        if (i < count) store(to + i * GN, t[i]);
    }
  for (int64_t c = 0; c < hp; c += W)
    for (int64_t u = 0; u < key_units; u++)
      store(v + (c / GN * key_units + u) * GN + c % GN,
            E::down(reinterpret_cast<const S*>(v0) + c, ld * E::PER, u, length, W));

  const float to_base2 = LOG2E / __builtin_sqrtf((float)head_dim);
  const int64_t tiles = parts(last - first, GM);
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t at = first + share(last - first, t, tiles);
    const int64_t m = first + share(last - first, t + 1, tiles) - at;
    F top[GM];
    for (int64_t i = 0; i < m; i++) top[i] = splat(-__builtin_inff());
    product<E>(qkv + at * ld, ld, 0, m, kt, depth, 0, keys / GN, nothing,
               [&](int64_t i, int64_t column, F x) __attribute__((always_inline)) {
      if (column + W > length) {
        const int64_t left = length - column;
        x = select(lane_index() < I{} + (int32_t)(left > 0 ? left : 0), x, splat(-__builtin_inff()));
      }
      top[i] = max(x, top[i]);
      store(s + i * s_ld + column, x);
    });
    float inverse[GM];
    for (int64_t i = 0; i < m; i++) {
      float* row = s + i * s_ld;
      const float most = largest(top[i]) * to_base2;
      F total = {};
      for (int64_t j = 0; j < keys; j += W) {
        const F weight = exp2(load(row + j) * to_base2 - most);
        total += weight;
        if constexpr (E::PER == 1) store(row + j, weight);
        else store(reinterpret_cast<S*>(p + i * p_ld) + j, weight);
      }
      inverse[i] = 1.0f / sum(total);
    }
    const float* weights = E::PER == 1 ? s : p;
    product<E>(weights, E::PER == 1 ? s_ld : p_ld, 0, m, v, key_units, 0, hp / GN, nothing,
               [&](int64_t i, int64_t column, F x) __attribute__((always_inline)) {
      store(reinterpret_cast<S*>(out + (at + i) * out_ld) + column, x * inverse[i]);
    });
  }
}

// ---- items ---------------------------------------------------------------------------------------

template <class P>
struct Items {
  using E = typename P::Products;
  using S = typename P::Stored;
  static constexpr bool BYTES = __is_same(E, Bytes);
  static constexpr int64_t PER = P::Attended::PER;  // numbers in 32 bits, between products

  Call& c;
  const Model& m;
  Own& own;

  static S* stored(float* p) { return reinterpret_cast<S*>(p); }

  // Rows as a product reads them, from row 0 on.
  struct Operand {
    const float* data;
    int64_t ld;
  };

  Operand as_units(const float* x, int64_t ld, int64_t rows, const PackedLinear& l) {
    if constexpr (!BYTES) return {x, ld};
    for (int64_t r = 0; r < rows; r++)
      own.scales[r] = quantise_row(x + r * ld, parts(l.inputs, W) * W,
                                   reinterpret_cast<Bytes::Stored*>(own.q + r * c.q_ld));
    return {own.q, c.q_ld};
  }

  // What a product takes of rows [r0, r1) of h: their norms, or where h is normed itself, the rows.
  Operand normed(const PackedNorm& norm, int64_t r0, int64_t r1, const PackedLinear& l) {
    for (int64_t r = r0; r < r1; r++) {
      const float* h = c.h + r * m.dp;
      S* n = stored(own.n + (r - r0) * c.ld);
      if (!m.post_norm) norm_row(h, n, norm, m.d);
      else
        for (int64_t i = 0; i < m.dp; i += W) store(n + i, load(h + i));
    }
    return as_units(own.n, c.ld, r1 - r0, l);
  }

  // h becomes its norm, after a sublayer of a post-norm block.
  void settle(const PackedNorm& norm, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; r++) norm_row(c.h + r * m.dp, c.h + r * m.dp, norm, m.d);
  }

  // take(row, column, x W^T + bias), for panels [p0, p1).
  template <class Take>
  INLINE void linear(const PackedLinear& l, Operand x, int64_t rows, int64_t p0, int64_t p1,
                     const float* scales, const Take& take) {
    product<E>(x.data, x.ld, 0, rows, l.panels, l.depth, p0, p1, [](int64_t, int64_t, int64_t) {},
               [&](int64_t row, int64_t column, F sum) __attribute__((always_inline)) {
      if constexpr (BYTES) {
        I offset;
        memcpy(&offset, l.offset + column, sizeof offset);
        sum = __builtin_convertvector((I)sum - offset, F) * (load(l.scale + column) * scales[row]);
      }
      take(row, column, sum + load(l.bias + column));
    });
  }

  void project(const PackedLinear& l, Operand x, int64_t rows, int64_t p0, int64_t p1, float* y, int64_t y_ld) {
    linear(l, x, rows, p0, p1, own.scales,
           [=](int64_t row, int64_t column, F sum) __attribute__((always_inline)) {
      store(stored(y + row * y_ld) + column, sum);
    });
  }

  void activate(const PackedLinear& l, Operand x, int64_t rows, int64_t p0, int64_t p1, float* y,
                int64_t y_ld) {
    linear(l, x, rows, p0, p1, own.scales,
           [=](int64_t row, int64_t column, F sum) __attribute__((always_inline)) {
      if (m.gelu) {
        F cdf, pdf;
        normal(sum, cdf, pdf);
        sum *= cdf;
      } else {
        sum = select(sum <= 0.0f, F{}, sum);  // NaN stays
      }
      store(stored(y + row * y_ld) + column, sum);
    });
  }

  void add(const PackedLinear& l, Operand x, int64_t rows, int64_t p0, int64_t p1, float* h) {
    const int64_t dp = m.dp;
    linear(l, x, rows, p0, p1, own.scales,
           [=](int64_t row, int64_t column, F sum) __attribute__((always_inline)) {
      float* to = h + row * dp + column;
      store(to, load(to) + sum);
    });
  }

  void embed(int64_t r0, int64_t r1) {
    const int64_t* offsets = c.texts.offsets;
    int64_t b = text_of(r0);
    const bool projected = m.projection.panels;  // from rows of e columns
    for (int64_t r = r0; r < r1; r++) {
      while (offsets[b + 1] - offsets[0] <= r) b++;
      const float* word = m.embedding + c.texts.ids[offsets[0] + r] * m.e;
      const float* place = m.positions + (r - (offsets[b] - offsets[0])) * m.e;
      float* x = projected ? own.n + (r - r0) * c.ld : c.h + r * m.dp;
      int64_t i = 0;
      for (; i + W <= m.e; i += W) store(x + i, load(word + i) * m.embedding_scale + load(place + i));
      if (i < m.e) {
        const int n = (int)(m.e - i);
        store(x + i, load_first(word + i, n) * m.embedding_scale + load_first(place + i, n));
        i += W;
      }
      for (; i < m.ep; i += W) store(x + i, F{});
      if (m.embedding_norm.gamma) norm_row(x, x, m.embedding_norm, m.e);
    }
    if (!projected) return;
    float* h = c.h + r0 * m.dp;
    const PackedLinear& l = m.projection;
    product<Floats>(own.n, c.ld, 0, r1 - r0, l.panels, l.depth, 0, l.columns / GN,
                    [](int64_t, int64_t, int64_t) {}, [&](int64_t row, int64_t column, F sum) {
      store(h + row * m.dp + column, sum + load(l.bias + column));
    });
  }

  // The text that row r, from 0, belongs to.
  int64_t text_of(int64_t r) {
    const int64_t* offsets = c.texts.offsets;
    int64_t low = 0, high = c.texts.batch;  // row r lies in [low, high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (offsets[middle] - offsets[0] <= r ? low : high) = middle;
    }
    return low;
  }

  void attention_item(int64_t item) {
    int64_t low = 0, high = c.texts.batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (c.first_item[middle] <= item ? low : high) = middle;
    }
    const int64_t start = c.texts.offsets[low] - c.texts.offsets[0];
    const int64_t length = c.texts.offsets[low + 1] - c.texts.offsets[low];
    const int64_t pieces = parts(length, c.queries), in_text = item - c.first_item[low];
    const int64_t head = in_text / pieces, piece = in_text % pieces, units = head * m.hp / PER;
    attend<typename P::Attended>(c.qkv + start * c.qkv_ld + units, c.qkv_ld, m.heads * m.hp / PER,
                                 c.mixed + start * c.mixed_ld + units, c.mixed_ld, length,
                                 share(length, piece, pieces), share(length, piece + 1, pieces),
                                 m.head_dim, m.hp, own.space);
  }

  F head_activation(F x) {
    if (m.head_activation == HeadActivation::TANH) return tanh(x);
    if (m.head_activation == HeadActivation::RELU) return select(x <= 0.0f, F{}, x);
    F cdf, pdf;
    normal(x, cdf, pdf);
    return x * cdf;
  }

  // The mean of a text's normed rows, or the first of them, and the head.
  void finish(int64_t b) {
    const int64_t* offsets = c.texts.offsets;
    const int64_t first = offsets[b] - offsets[0], last = offsets[b + 1] - offsets[0];
    const auto nothing = [](int64_t, int64_t, int64_t) {};
    float *n = own.space, *pooled = n + m.dp, *hidden = pooled + m.dp;
    memset(pooled, 0, 4 * m.dp);
    const int64_t end = m.first_row ? least(last, first + 1) : last;
    for (int64_t r = first; r < end; r++) {
      const float* row = c.h + r * m.dp;
      if (!m.post_norm) norm_row(row, n, m.norm, m.d), row = n;
      for (int64_t i = 0; i < m.d; i += W) store(pooled + i, load(pooled + i) + load(row + i));
    }
    if (end - first > 1)
      for (int64_t i = 0; i < m.d; i += W) store(pooled + i, load(pooled + i) / (float)(end - first));
    product<Floats>(pooled, m.dp, 0, 1, m.dense.panels, m.dense.depth, 0, m.dense.columns / GN, nothing,
                    [&](int64_t, int64_t column, F sum) {
      store(hidden + column, head_activation(sum + load(m.dense.bias + column)));
    });
    product<Floats>(hidden, m.dp, 0, 1, m.classify.panels, m.classify.depth, 0, m.classify.columns / GN,
                    nothing, [&](int64_t, int64_t column, F sum) {
      const int64_t left = m.classes - column;
      if (left > 0)
        store_first(c.texts.logits + b * m.classes + column, sum + load(m.classify.bias + column),
                    (int)least(left, W));
    });
  }

  // A phase of `columns`: all rows, panels from item * width on.
  void column_item(int64_t phase, int64_t item) {
    if (phase == 0) return embed(0, c.rows);
    const int64_t layer = (phase - 1) / steps_of(m);
    if (layer == m.layers) return finish(item);
    const Step step = step_of(m, phase - 1);
    if (step == ATTENTION) return attention_item(item);
    const PackedBlock& l = m.blocks[layer];
    if (step == NORM1 || step == NORM2)
      return settle(step == NORM1 ? l.norm1 : l.norm2, share(c.rows, item, c.normed),
                    share(c.rows, item + 1, c.normed));
    const PackedLinear& of = step == QKV ? l.qkv : step == OUT ? l.out : step == UP ? l.up : l.down;
    const int64_t width = step == QKV ? c.qkv_share : step == UP ? c.up_share : c.out_share;
    const int64_t p0 = item * width, p1 = least(p0 + width, of.columns / GN);
    const bool fresh = own.prepared != phase;  // the rows, as this thread reads them
    own.prepared = phase;
    Operand x = BYTES ? Operand{own.q, c.q_ld} : Operand{own.n, c.ld};
    if (step == QKV) {
      if (fresh) x = normed(l.norm1, 0, c.rows, of);
      project(of, x, c.rows, p0, p1, c.qkv, c.qkv_ld);
    } else if (step == UP) {
      if (fresh) x = normed(l.norm2, 0, c.rows, of);
      activate(of, x, c.rows, p0, p1, c.u, c.u_ld);
    } else {
      if (fresh || !BYTES)
        x = step == OUT ? as_units(c.mixed, c.mixed_ld, c.rows, of) : as_units(c.u, c.u_ld, c.rows, of);
      add(of, x, c.rows, p0, p1, c.h);
    }
  }

  // A phase of `rows`: what a block of rows needs between two attentions.
  void row_item(int64_t phase, int64_t item) {
    const int64_t layer = phase / 2;
    if (phase % 2) return layer < m.layers ? attention_item(item) : finish(item);
    const int64_t r0 = share(c.rows, item, c.blocks), r1 = share(c.rows, item + 1, c.blocks), rows = r1 - r0;
    if (layer == 0) {
      embed(r0, r1);
    } else {
      const PackedBlock& l = m.blocks[layer - 1];
      float* h = c.h + r0 * m.dp;
      add(l.out, as_units(c.mixed + r0 * c.mixed_ld, c.mixed_ld, rows, l.out), rows, 0, l.out.columns / GN, h);
      if (m.post_norm) settle(l.norm1, r0, r1);
      activate(l.up, normed(l.norm2, r0, r1, l.up), rows, 0, l.up.columns / GN, own.u, c.u_ld);
      add(l.down, as_units(own.u, c.u_ld, rows, l.down), rows, 0, l.down.columns / GN, h);
      if (m.post_norm) settle(l.norm2, r0, r1);
    }
    if (layer < m.layers) {
      const PackedBlock& l = m.blocks[layer];
      project(l.qkv, normed(l.norm1, r0, r1, l.qkv), rows, 0, l.qkv.columns / GN, c.qkv + r0 * c.qkv_ld,
              c.qkv_ld);
    }
  }
};

template <class P>
static void run_item(void* call, int64_t phase, int64_t item, int thread) {
  Call& c = *static_cast<Call*>(call);
  Items<P> items{c, *c.m, c.own[thread]};
  if (c.columns) items.column_item(phase, item);
  else items.row_item(phase, item);
}

// ---- the interface -------------------------------------------------------------------------------

template <class P>
static void build(const EncoderWeights& w, Precision precision, Pieces& pieces) {
  using E = typename P::Products;
  Model* m = pieces.take<Model>(1);
  PackedBlock* blocks = pieces.take<PackedBlock>(w.layers);
  Model counted = {};
  Model& to = m ? *m : counted;
  to = {};
  to.run = run_item<P>, to.precision = precision;
  to.d = w.d_model, to.heads = w.heads, to.head_dim = w.d_model / w.heads, to.d_ff = w.d_ff;
  to.dp = parts(to.d, GN) * GN, to.hp = parts(to.head_dim, GN) * GN, to.fp = parts(to.d_ff, GN) * GN;
  to.e = w.embedding_width, to.ep = parts(to.e, GN) * GN;
  to.layers = w.layers, to.places = w.places, to.classes = w.classes;
  to.post_norm = w.post_norm, to.first_row = w.first_row, to.head_activation = w.head_activation;
  to.gelu = w.gelu, to.embedding_scale = w.embedding_scale;
  to.embedding = w.embedding, to.positions = w.positions, to.blocks = blocks;
  const Padding d{1, to.d, to.d}, f{1, to.d_ff, to.d_ff}, heads{to.heads, to.head_dim, to.hp};
  const Padding projections{3 * to.heads, to.head_dim, to.hp}, classes{1, w.classes, w.classes};
  for (int64_t i = 0; i < w.layers; i++) {
    const BlockWeights& from = w.blocks[i];
    PackedBlock b = {};
    b.norm1 = pack_norm(from.norm1, to.d, to.dp, pieces);
    b.qkv = pack_linear<E>(from.qkv, projections, d, pieces);
    b.out = pack_linear<E>(from.out, d, heads, pieces);
    b.norm2 = pack_norm(from.norm2, to.d, to.dp, pieces);
    b.up = pack_linear<E>(from.up, f, d, pieces);
    b.down = pack_linear<E>(from.down, d, f, pieces);
    if (blocks) blocks[i] = b;
  }
  if (w.embedding_norm.gamma) to.embedding_norm = pack_norm(w.embedding_norm, to.e, to.ep, pieces);
  if (w.projection.weight) to.projection = pack_linear<Floats>(w.projection, d, {1, to.e, to.e}, pieces);
  if (w.norm.gamma) to.norm = pack_norm(w.norm, to.d, to.dp, pieces);
  to.dense = pack_linear<Floats>(w.dense, d, d, pieces);
  to.classify = pack_linear<Floats>(w.classify, classes, d, pieces);
}

static bool encoder_offers(Precision precision) {
  return in_precision(precision, [](auto) {});
}

static size_t encoder_model_bytes(const EncoderWeights& w, Precision precision) {
  if (precision == Precision::INT8 && (w.d_model > DEEPEST || w.d_ff > DEEPEST)) return 0;
  Pieces pieces{nullptr};
  in_precision(precision, [&](auto p) { build<decltype(p)>(w, precision, pieces); });
  return pieces.used;
}

static void encoder_pack(const EncoderWeights& w, Precision precision, void* model) {
  Pieces pieces{static_cast<char*>(model)};
  in_precision(precision, [&](auto p) { build<decltype(p)>(w, precision, pieces); });
}

static size_t encoder_call_bytes(const void* model, const Texts& t, int threads, Split split, int64_t* phases) {
  const Model& m = *static_cast<const Model*>(model);
  *phases = phases_of(m, by_columns(t, threads, split));
  Pieces pieces{nullptr};
  Call c;
  pieces.take<Call>(1);
  lay_out(m, t, threads, split, pieces, c);
  return pieces.used;
}

static void encoder_start(const void* model, const Texts& t, int threads, Split split, void* call,
                          int64_t* items) {
  const Model& m = *static_cast<const Model*>(model);
  Pieces pieces{static_cast<char*>(call)};
  Call& c = *pieces.take<Call>(1);
  lay_out(m, t, threads, split, pieces, c);
  const int64_t attention = c.first_item[t.batch];
  const int64_t steps[] = {parts(3 * m.heads * m.hp / GN, c.qkv_share), attention,
                           parts(m.dp / GN, c.out_share), c.normed, parts(m.fp / GN, c.up_share),
                           parts(m.dp / GN, c.out_share), c.normed};  // as `Step` has them
  const int64_t phases = phases_of(m, c.columns);
  for (int64_t i = 0; i < phases; i++)
    items[i] = c.columns ? (i == 0 ? 1 : steps[step_of(m, i - 1)]) : i % 2 ? attention : c.blocks;
  items[phases - 1] = t.batch;
}

static void encoder_run(void* call, int64_t phase, int64_t item, int thread) {
  static_cast<Call*>(call)->m->run(call, phase, item, thread);
}

}  // namespace FASTTX_ISA
