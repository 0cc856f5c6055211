// Attention inside each sequence of packed rows: out = dropout(softmax(q k^T scale)) v.
//
// A simdgroup owns 8 queries of one head and walks over the keys, 32 at a time, with a running
// maximum and sum (Milakov, Gimelshein, 2018; Dao et al., 2022). No L x L matrix reaches memory.
// Needs philox.metal and tiles.metal.

#define LOWEST -1e30f  // finite: -INFINITY - -INFINITY would be NaN

kernel void attention_forward(
    const device element_type* q [[buffer(0)]],
    const device element_type* k [[buffer(1)]],
    const device element_type* v [[buffer(2)]],
    device element_type* out [[buffer(3)]],
    device float* lse [[buffer(4)]],       // (H, T), natural, of the scaled scores
    const device int* starts [[buffer(5)]],
    const device int* lens [[buffer(6)]],
    const device uint* seed [[buffer(7)]], // one int64; not read without dropout
    constant long* size [[buffer(8)]],
    constant float* factor [[buffer(9)]],  // 1 / keep probability, scale log2(e)
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int sequence = int(group.z), head = int(group.y);
  const int n = min(lens[sequence], int(size[MAX_SEQLEN]));
  const int q0 = int(group.x * SIMDGROUPS + simdgroup_index) * 8;
  if (q0 >= n) return;

  const long start = starts[sequence];
  q += start * size[Q_ROW] + head * size[Q_HEAD];
  k += start * size[K_ROW] + head * size[K_HEAD];
  v += start * size[V_ROW] + head * size[V_HEAD];
  out += start * size[OUT_ROW] + head * size[OUT_HEAD];
  lse += head * size[ROWS] + start;
  const int k_row = int(size[K_ROW]), v_row = int(size[V_ROW]);
  const int query = q0 + tile_row(lane), col = tile_col(lane);

  tile_t queries[DIMS], sum_v[DIMS];
  UNROLL for (int d = 0; d < DIMS; d++) {
    queries[d] = load_tile(q, int(size[Q_ROW]), q0, n, d * 8, lane);
    sum_v[d] = zero_tile();
  }
  float maximum = LOWEST, total = 0.0f;
  const int end = CAUSAL ? min(n, q0 + 8) : n;
  for (int k0 = 0; k0 < end; k0 += SPAN) {
    tile_t scores[4];
    float largest = LOWEST;
    UNROLL for (int j = 0; j < 4; j++) {
      const int key = k0 + j * 8;
      scores[j] = zero_tile();
      if (key < end) {
        UNROLL for (int d = 0; d < DIMS; d++) {
          const tile_t keys = load_tile_transposed(k, k_row, key, n, d * 8, lane);
          simdgroup_multiply_accumulate(scores[j], queries[d], keys, scores[j]);
        }
      }
      UNROLL for (int e = 0; e < 2; e++) {
        const int at_key = key + col + e;
        const bool seen = at_key < n && (!CAUSAL || at_key <= query);
        const float score = seen ? scores[j].thread_elements()[e] * factor[1] : LOWEST;
        scores[j].thread_elements()[e] = score;
        largest = max(largest, score);
      }
    }
    // Key 0 is seen by every row, so after the first step the maximum is a score.
    const float before = maximum;
    maximum = max(maximum, row_max(largest));
    const float shrink = fast::exp2(before - maximum);
    uint4 words = uint4(0u, 0u, 0u, 0u);
    if (DROPOUT)
      words = words_of_keys(uint(k0 / 8), uint(query), uint(head), uint(sequence),
                            philox_key(seed), lane);
    float added = 0.0f;
    UNROLL for (int j = 0; j < 4; j++) {
      UNROLL for (int e = 0; e < 2; e++) {
        float weight = fast::exp2(scores[j].thread_elements()[e] - maximum);
        added += weight;
        if (DROPOUT)
          weight = half_of(words[j], e) >= uint(size[THRESHOLD]) ? weight * factor[0] : 0.0f;
        scores[j].thread_elements()[e] = weight;
      }
    }
    total = total * shrink + row_sum(added);
    UNROLL for (int d = 0; d < DIMS; d++) {
      UNROLL for (int e = 0; e < 2; e++) sum_v[d].thread_elements()[e] *= shrink;
      UNROLL for (int j = 0; j < 4; j++) {
        if (k0 + j * 8 < end) {
          const tile_t values = load_tile(v, v_row, k0 + j * 8, n, d * 8, lane);
          simdgroup_multiply_accumulate(sum_v[d], scores[j], values, sum_v[d]);
        }
      }
    }
  }
  UNROLL for (int d = 0; d < DIMS; d++)
    store_tile(out, int(size[OUT_ROW]), q0, n, d * 8, sum_v[d], 1.0f / total, lane);
  if (col == 0 && query < n) lse[query] = (maximum + log2(total)) / LOG2_E;
}
