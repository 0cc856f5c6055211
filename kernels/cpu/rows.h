// The row operations, forward and backward, on shares of rows: one pass over memory each.
#pragma once
#include <math.h>

#include "kernels.h"
#include "philox.h"

namespace FASTTX_ISA {

constexpr int DRAWN_ROWS = 16;  // rows whose keep bits are drawn together

static size_t row_scratch(int64_t columns) {
  return DRAWN_ROWS * ((columns + LANES - 1) / LANES) + DRAW_SLACK;
}

// The dropout mask of one row after another; all ones where there is no dropout.
struct RowMask {
  Philox philox;
  uint32_t threshold;
  int blocks;
  uint8_t *keep, *row;
  int64_t begin = 0, end = 0;  // the rows that `keep` holds

  RowMask(const Dropout& dropout, int64_t columns, char* scratch)
      : philox(dropout.seed), threshold(dropout.threshold), blocks((int)((columns + LANES - 1) / LANES)),
        keep((uint8_t*)scratch), row(keep) {
    if (!threshold) memset(keep, 0xFF, blocks + DRAW_SLACK);
  }

  // Moves to row r; those up to `last` will follow.
  void move(int64_t r, int64_t last) {
    if (!threshold) return;
    if (r < begin || r >= end) {
      begin = r;
      end = last - r < DRAWN_ROWS ? last : r + DRAWN_ROWS;
      draw_keep(keep, begin, (int)(end - begin), 0, blocks, 0, 0, philox, threshold);
    }
    row = keep + (r - begin) * blocks;
  }

  F operator()(F x, int64_t column) const { return keep_lanes(x, bits_of(row, (int)(column / W))); }
};

// f(column, lanes) over the vectors of a row.
template <class Function>
INLINE void each_vector(int64_t columns, Function f) {
  int64_t c = 0;
  for (; c + W <= columns; c += W) f(c, W);
  if (c < columns) f(c, (int)(columns - c));
}

// ---- h' = h + dropout(y + bias), n = LayerNorm(h') -----------------------------------------------

template <class S>
static void add_norm_forward(const AddNorm<S>& a, int64_t first, int64_t last, char* scratch) {
  RowMask mask(a.dropout, a.columns, scratch);
  const float scale = a.dropout.scale(), share = 1.0f / a.columns;
  for (int64_t r = first; r < last; r++) {
    const int64_t row = r * a.columns;
    mask.move(r, last);
    F total = {};
    each_vector(a.columns, [&](int64_t c, int n) {
      const F y = load_first(a.y + row + c, n) + load_first(a.bias + c, n);
      const F h = load_first(a.h + row + c, n) + mask(y * scale, c);
      store_first(a.sum + row + c, h, n);
      total += h;
    });
    const float mean = sum(total) * share;
    F squares = {};
    each_vector(a.columns, [&](int64_t c, int n) {
      F x = load_first(a.sum + row + c, n) - mean;
      if (n < W) x = select(lane_index() < I{} + n, x, F{});
      squares += x * x;
    });
    const float rstd = 1.0f / sqrtf(sum(squares) * share + a.eps);
    a.mean[r] = mean;
    a.rstd[r] = rstd;
    each_vector(a.columns, [&](int64_t c, int n) {
      const F x = (load_first(a.sum + row + c, n) - mean) * rstd;
      store_first(a.normed + row + c, x * load_first(a.gamma + c, n) + load_first(a.beta + c, n), n);
    });
  }
}

template <class S>
static void add_norm_backward(const AddNorm<S>& a, int64_t first, int64_t last, float* partial,
                              char* scratch) {
  RowMask mask(a.dropout, a.columns, scratch);
  const float scale = a.dropout.scale(), share = 1.0f / a.columns;
  float *dgamma = partial, *dbeta = partial + a.columns, *dbias = partial + 2 * a.columns;
  memset(partial, 0, 3 * a.columns * sizeof(float));
  for (int64_t r = first; r < last; r++) {
    const int64_t row = r * a.columns;
    const float mean = a.mean[r], rstd = a.rstd[r];
    F total = {}, along = {};  // of g and of g x, g the gradient of the normalised x
    each_vector(a.columns, [&](int64_t c, int n) {
      const F x = (load_first(a.h + row + c, n) - mean) * rstd, dn = load_first(a.dnormed + row + c, n);
      store_first(dgamma + c, load_first(dgamma + c, n) + dn * x, n);
      store_first(dbeta + c, load_first(dbeta + c, n) + dn, n);
      const F g = dn * load_first(a.gamma + c, n);
      total += g;
      along += g * x;
    });
    const float m1 = sum(total) * share, m2 = sum(along) * share;
    mask.move(r, last);
    each_vector(a.columns, [&](int64_t c, int n) {
      const F x = (load_first(a.h + row + c, n) - mean) * rstd;
      const F g = load_first(a.dnormed + row + c, n) * load_first(a.gamma + c, n);
      F dh = (g - m1 - x * m2) * rstd;
      if (a.dsum) dh += load_first(a.dsum + row + c, n);
      store_first(a.dh + row + c, dh, n);
      const F dy = mask(dh * scale, c);
      store_first(a.dy + row + c, dy, n);
      store_first(dbias + c, load_first(dbias + c, n) + dy, n);
    });
  }
}

// ---- dropout(act(u + bias)) ----------------------------------------------------------------------

template <class S>
static void bias_act_forward(const BiasAct<S>& a, int64_t first, int64_t last, char* scratch) {
  RowMask mask(a.dropout, a.columns, scratch);
  const float scale = a.dropout.scale();
  for (int64_t r = first; r < last; r++) {
    const int64_t row = r * a.columns;
    mask.move(r, last);
    each_vector(a.columns, [&](int64_t c, int n) {
      const F u = load_first(a.u + row + c, n) + load_first(a.bias + c, n);
      F out;
      if (a.gelu) {
        F cdf, pdf;
        normal(u, cdf, pdf);
        out = u * cdf;
      } else {
        out = select(u <= 0.0f, F{}, u);  // NaN stays
      }
      store_first(a.out + row + c, mask(out * scale, c), n);
    });
  }
}

template <class S>
static void bias_act_backward(const BiasAct<S>& a, int64_t first, int64_t last, float* partial,
                              char* scratch) {
  RowMask mask(a.dropout, a.columns, scratch);
  const float scale = a.dropout.scale();
  memset(partial, 0, a.columns * sizeof(float));
  for (int64_t r = first; r < last; r++) {
    const int64_t row = r * a.columns;
    if (a.gelu) mask.move(r, last);  // what relu let through shows in its output
    each_vector(a.columns, [&](int64_t c, int n) {
      F du = load_first(a.dout + row + c, n) * scale;
      if (a.gelu) {
        const F u = load_first(a.u + row + c, n) + load_first(a.bias + c, n);
        F cdf, pdf;
        normal(u, cdf, pdf);
        du = mask(du * (cdf + u * pdf), c);
      } else {
        du = select(load_first(a.out + row + c, n) <= 0.0f, F{}, du);
      }
      store_first(a.du + row + c, du, n);
      store_first(partial + c, load_first(partial + c, n) + du, n);
    });
  }
}

// ---- dropout(table[ids] * scale + positions[position_ids]) ---------------------------------------

static void embed_forward(const Embed& a, int64_t first, int64_t last, char* scratch) {
  RowMask mask(a.dropout, a.columns, scratch);
  const float scale = a.dropout.scale();
  for (int64_t r = first; r < last; r++) {
    const float* word = a.table + a.ids[r] * a.columns;
    const float* place = a.positions + (int64_t)a.position_ids[r] * a.columns;
    mask.move(r, last);
    each_vector(a.columns, [&](int64_t c, int n) {
      const F h = load_first(word + c, n) * a.scale + load_first(place + c, n);
      store_first(a.h + r * a.columns + c, mask(h * scale, c), n);
    });
  }
}

static void embed_backward(const Embed& a, int64_t remainder, int64_t divisor, char* scratch) {
  RowMask mask(a.dropout, a.columns, scratch);
  const float scale = a.dropout.scale() * a.scale;
  for (int64_t w = remainder; w < a.vocabulary; w += divisor)
    memset(a.dtable + w * a.columns, 0, a.columns * sizeof(float));
  for (int64_t r = 0; r < a.rows; r++) {
    if (a.ids[r] % divisor != remainder) continue;
    float* to = a.dtable + a.ids[r] * a.columns;
    mask.move(r, r + 1);
    each_vector(a.columns, [&](int64_t c, int n) {
      const F dh = mask(load_first(a.dh + r * a.columns + c, n) * scale, c);
      store_first(to + c, load_first(to + c, n) + dh, n);
    });
  }
}

}  // namespace FASTTX_ISA
