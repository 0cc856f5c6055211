// dropout(table[ids] * scale + positions[position_ids]).
// Forward and backward on shares of rows, one pass over memory each.
#pragma once
#include "rows.h"

namespace FASTTX_ISA {

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
