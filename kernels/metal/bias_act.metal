// out = dropout(act(u + bias)): a thread makes eight columns of a row, act is ReLU or GELU (erf).
// Specialised: element_type (of u and out), bias_type, GELU 0 or 1. Needs philox.metal, rows.metal.

enum BiasActSize { THRESHOLD, ROWS, COLUMNS };

// The share of a normal distribution below x. Metal has no erf: this is erfc(z) = t P(t) exp(-z^2),
// t = 1 / (1 + z / 2), z = |x| / sqrt(2), P of degree 8 fitted at Chebyshev's points; within 4e-7.
inline float normal_share(float x) {
  const float t = 1.0f / (1.0f + 0.353553391f * abs(x));
  float p = -0.0496588089f;
  p = p * t + 0.243219718f;
  p = p * t - 0.411693841f;
  p = p * t + 0.203975752f;
  p = p * t + 0.0155845918f;
  p = p * t + 0.188621953f;
  p = p * t + 0.245722741f;
  p = p * t + 0.2821334f;
  p = p * t + 0.282094568f;
  const float tail = 0.5f * t * p * exp(-0.5f * x * x);
  return x < 0.0f ? tail : 1.0f - tail;
}

inline float act(float x) { return GELU ? x * normal_share(x) : max(x, 0.0f); }

inline float gelu_slope(float x) {
  return normal_share(x) + x * 0.398942280f * exp(-0.5f * x * x);
}

kernel void bias_act_forward(
    const device element_type* u [[buffer(0)]],
    const device bias_type* bias [[buffer(1)]],
    device element_type* out [[buffer(2)]],
    const device uint* seed [[buffer(3)]],
    constant long* size [[buffer(4)]],
    constant float* factor [[buffer(5)]], // 1 / keep probability
    uint3 thread_index [[thread_position_in_grid]]) {
  const int column = int(thread_index.x) * 8, row = int(thread_index.y);
  const int columns = int(size[COLUMNS]);
  if (column >= columns || row >= size[ROWS]) return;
  const uint4 block = row_block(seed, column / 8, row);
  u += row * size[COLUMNS] + column;
  bias += column;
  out += row * size[COLUMNS] + column;
  const int end = min(8, columns - column);
  UNROLL for (int i = 0; i < 8; i++) {
    if (i >= end) break;
    const float x = act(float(u[i]) + float(bias[i]));
    out[i] = element_type(dropped(x, block, i, uint(size[THRESHOLD]), factor[0]));
  }
}

// A thread walks over 16 rows of its eight columns, and writes their sums for dbias. Where ReLU and
// dropout let something through, `out` is above 0.
kernel void bias_act_backward(
    const device element_type* dout [[buffer(0)]],
    const device element_type* seen [[buffer(1)]], // u of GELU, out of ReLU
    const device bias_type* bias [[buffer(2)]],    // not read by ReLU
    device element_type* du [[buffer(3)]],
    device float* sums [[buffer(4)]],  // (ceil(T / 16), columns)
    const device uint* seed [[buffer(5)]],
    constant long* size [[buffer(6)]],
    constant float* factor [[buffer(7)]],
    uint3 thread_index [[thread_position_in_grid]]) {
  const int column = int(thread_index.x) * 8, part = int(thread_index.y);
  const int columns = int(size[COLUMNS]), rows = int(size[ROWS]);
  const int begin = part * ROWS_OF_A_SUM, last = min(rows, begin + ROWS_OF_A_SUM);
  if (column >= columns || begin >= rows) return;
  const int end = min(8, columns - column);
  float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  for (int row = begin; row < last; row++) {
    const uint4 block = GELU ? row_block(seed, column / 8, row) : uint4(0u, 0u, 0u, 0u);
    const long at = row * size[COLUMNS] + column;
    UNROLL for (int i = 0; i < 8; i++) {
      if (i >= end) break;
      float g = float(dout[at + i]);
      if (GELU)
        g = dropped(g, block, i, uint(size[THRESHOLD]), factor[0]) *
            gelu_slope(float(seen[at + i]) + float(bias[column + i]));
      else
        g = float(seen[at + i]) > 0.0f ? g * factor[0] : 0.0f;
      du[at + i] = element_type(g);
      sum[i] += g;
    }
  }
  sums += part * size[COLUMNS] + column;
  for (int i = 0; i < end; i++) sums[i] = sum[i];
}
