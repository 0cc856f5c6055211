// dropout(act(u + bias)).
// Forward and backward on shares of rows, one pass over memory each.
#pragma once
#include "rows.h"

namespace FASTTX_ISA {

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

}  // namespace FASTTX_ISA
