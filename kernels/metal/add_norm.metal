// h' = h + dropout(y + bias), n = LayerNorm(h') gamma + beta: a simdgroup holds a row in registers.
// Specialised: h_type, y_type (of y and n), total_type (of h'), vector_type, COLUMNS. Needs
// philox.metal and rows.metal.

#define CHUNKS ((COLUMNS + 255) / 256)  // of 256 columns, eight neighbours a lane
#define SIMDGROUPS 4                    // in a threadgroup

enum AddNormSize { THRESHOLD, ROWS, HAS_DTOTAL };

inline int column_of(int chunk, uint lane) { return chunk * 256 + int(lane) * 8; }

kernel void add_norm_forward(
    const device h_type* h [[buffer(0)]],
    const device y_type* y [[buffer(1)]],
    const device vector_type* bias [[buffer(2)]],
    const device vector_type* gamma [[buffer(3)]],
    const device vector_type* beta [[buffer(4)]],
    device total_type* total [[buffer(5)]],
    device y_type* normed [[buffer(6)]],
    device float* moments [[buffer(7)]],  // (2, T): means and 1 / deviations
    const device uint* seed [[buffer(8)]],
    constant long* size [[buffer(9)]],
    constant float* factor [[buffer(10)]], // 1 / keep probability, epsilon
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int row = int(group.x * SIMDGROUPS + simdgroup_index);
  if (row >= size[ROWS]) return;
  const long begin = long(row) * COLUMNS;
  h += begin;
  y += begin;
  total += begin;
  normed += begin;

  float x[CHUNKS * 8];
  float sum = 0.0f;
  UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int first = column_of(chunk, lane);
    const uint4 block = row_block(seed, first / 8, row);
    UNROLL for (int i = 0; i < 8; i++) {
      const int column = first + i;
      float value = 0.0f;
      if (column < COLUMNS) {
        const float added = float(y[column]) + float(bias[column]);
        value = float(h[column]) + dropped(added, block, i, uint(size[THRESHOLD]), factor[0]);
        const total_type rounded = total_type(value);
        total[column] = rounded;
        value = float(rounded);
      }
      x[chunk * 8 + i] = value;
      sum += value;
    }
  }
  const float mean = simd_sum(sum) / float(COLUMNS);
  float squares = 0.0f;  // of what is left of the mean: no cancellation
  UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
    UNROLL for (int i = 0; i < 8; i++) {
      const float centred = x[chunk * 8 + i] - mean;
      if (column_of(chunk, lane) + i < COLUMNS) squares += centred * centred;
    }
  }
  const float inverse = 1.0f / sqrt(simd_sum(squares) / float(COLUMNS) + factor[1]);
  UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
    UNROLL for (int i = 0; i < 8; i++) {
      const int column = column_of(chunk, lane) + i;
      if (column >= COLUMNS) break;
      const float centred = (x[chunk * 8 + i] - mean) * inverse;
      normed[column] = y_type(centred * float(gamma[column]) + float(beta[column]));
    }
  }
  if (lane == 0) {
    moments[row] = mean;
    moments[size[ROWS] + row] = inverse;
  }
}

// With c = (h' - mean) / deviation and g = dn gamma:
//   dh = dh' + (g - mean(g) - c mean(g c)) / deviation,   dy = dropout(dh)
// A simdgroup walks over 16 rows, and writes their sums for dbias, dgamma and dbeta: the host adds
// those up, so the order of every sum is fixed.
kernel void add_norm_backward(
    const device total_type* dtotal [[buffer(0)]], // read where size[HAS_DTOTAL], else 0
    const device y_type* dnormed [[buffer(1)]],
    const device total_type* total [[buffer(2)]],
    const device vector_type* gamma [[buffer(3)]],
    const device float* moments [[buffer(4)]],
    device h_type* dh [[buffer(5)]],
    device y_type* dy [[buffer(6)]],
    device float* sums [[buffer(7)]],  // (ceil(T / 16), 3, COLUMNS)
    const device uint* seed [[buffer(8)]],
    constant long* size [[buffer(9)]],
    constant float* factor [[buffer(10)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int part = int(group.x * SIMDGROUPS + simdgroup_index), rows = int(size[ROWS]);
  const int begin = part * ROWS_OF_A_SUM, end = min(rows, begin + ROWS_OF_A_SUM);
  if (begin >= rows) return;

  float dbias[CHUNKS * 8], dgamma[CHUNKS * 8], dbeta[CHUNKS * 8];
  UNROLL for (int j = 0; j < CHUNKS * 8; j++) dbias[j] = dgamma[j] = dbeta[j] = 0.0f;
  for (int row = begin; row < end; row++) {
    const long at = long(row) * COLUMNS;
    const float mean = moments[row], inverse = moments[rows + row];
    float sum_g = 0.0f, sum_gc = 0.0f;
    UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
      UNROLL for (int i = 0; i < 8; i++) {
        const int column = column_of(chunk, lane) + i, j = chunk * 8 + i;
        if (column >= COLUMNS) break;
        const float c = (float(total[at + column]) - mean) * inverse;
        const float dn = float(dnormed[at + column]), g = dn * float(gamma[column]);
        sum_g += g;
        sum_gc += g * c;
        dgamma[j] += dn * c;
        dbeta[j] += dn;
      }
    }
    const float mean_g = simd_sum(sum_g) / float(COLUMNS);
    const float mean_gc = simd_sum(sum_gc) / float(COLUMNS);
    UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const uint4 block = row_block(seed, column_of(chunk, lane) / 8, row);
      UNROLL for (int i = 0; i < 8; i++) {
        const int column = column_of(chunk, lane) + i, j = chunk * 8 + i;
        if (column >= COLUMNS) break;
        const float c = (float(total[at + column]) - mean) * inverse;
        const float g = float(dnormed[at + column]) * float(gamma[column]);
        const float added = size[HAS_DTOTAL] ? float(dtotal[at + column]) : 0.0f;
        const float dx = added + (g - mean_g - c * mean_gc) * inverse;
        const float dbranch = dropped(dx, block, i, uint(size[THRESHOLD]), factor[0]);
        dh[at + column] = h_type(dx);
        dy[at + column] = y_type(dbranch);
        dbias[j] += dbranch;
      }
    }
  }
  sums += long(part) * 3 * COLUMNS;
  UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
    UNROLL for (int i = 0; i < 8; i++) {
      const int column = column_of(chunk, lane) + i, j = chunk * 8 + i;
      if (column >= COLUMNS) break;
      sums[column] = dbias[j];
      sums[COLUMNS + column] = dgamma[j];
      sums[2 * COLUMNS + column] = dbeta[j];
    }
  }
}
