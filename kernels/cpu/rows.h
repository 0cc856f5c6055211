// What operations on rows share: the dropout mask of a row, and its vectors.
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

}  // namespace FASTTX_ISA
