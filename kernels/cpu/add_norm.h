// h' = h + dropout(y + bias), n = LayerNorm(h').
// Forward and backward on shares of rows, one pass over memory each.
#pragma once
#include "rows.h"

namespace FASTTX_ISA {

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

}  // namespace FASTTX_ISA
