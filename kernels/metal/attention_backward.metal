// The derivatives of attention, from its output and log-sum-exp (Dao et al., 2022).
//
//   weight = exp(score - lse), m = 0 or 1 / keep probability: the dropout mask, drawn again
//   delta  = sum of out * dout over a row;  dscore = weight * (m * (dout v^T) - delta)
//   dq = scale dscore k,  dk = scale dscore^T q,  dv = (weight m)^T dout
//
// Two kernels, so that each sum belongs to one simdgroup: no atomics, the same bits on every run.
// Needs philox.metal and tiles.metal.

// A simdgroup owns 8 queries of one head and walks over the keys. Also writes delta.
kernel void attention_dq(
    const device element_type* q [[buffer(0)]],
    const device element_type* k [[buffer(1)]],
    const device element_type* v [[buffer(2)]],
    const device element_type* out [[buffer(3)]],
    const device element_type* dout [[buffer(4)]],
    device element_type* dq [[buffer(5)]],
    const device float* lse [[buffer(6)]], // (H, T), as is delta
    device float* delta [[buffer(7)]],
    const device int* starts [[buffer(8)]],
    const device int* lens [[buffer(9)]],
    const device uint* seed [[buffer(10)]],
    constant long* size [[buffer(11)]],
    constant float* factor [[buffer(12)]], // 1 / keep probability, scale log2(e), scale
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
  dout += start * size[DOUT_ROW] + head * size[DOUT_HEAD];
  dq += start * size[DQ_ROW] + head * size[DQ_HEAD];
  lse += head * size[ROWS] + start;
  delta += head * size[ROWS] + start;
  const int k_row = int(size[K_ROW]), v_row = int(size[V_ROW]);
  const int query = q0 + tile_row(lane), col = tile_col(lane);

  tile_t queries[DIMS], douts[DIMS], sum[DIMS];
  float product = 0.0f;
  UNROLL for (int d = 0; d < DIMS; d++) {
    queries[d] = load_tile(q, int(size[Q_ROW]), q0, n, d * 8, lane);
    douts[d] = load_tile(dout, int(size[DOUT_ROW]), q0, n, d * 8, lane);
    tile_t outs = load_tile(out, int(size[OUT_ROW]), q0, n, d * 8, lane);
    sum[d] = zero_tile();
    UNROLL for (int e = 0; e < 2; e++)
      product += outs.thread_elements()[e] * douts[d].thread_elements()[e];
  }
  product = row_sum(product);
  const bool live = query < n;
  const float row_lse = live ? lse[query] * LOG2_E : 0.0f;
  if (col == 0 && live) delta[query] = product;

  const int end = CAUSAL ? min(n, q0 + 8) : n;
  for (int k0 = 0; k0 < end; k0 += SPAN) {
    uint4 words = uint4(0u, 0u, 0u, 0u);
    if (DROPOUT)
      words = words_of_keys(uint(k0 / 8), uint(query), uint(head), uint(sequence),
                            philox_key(seed), lane);
    UNROLL for (int j = 0; j < 4; j++) {
      const int key = k0 + j * 8;
      if (key >= end) continue;
      tile_t scores = zero_tile(), dweights = zero_tile();
      UNROLL for (int d = 0; d < DIMS; d++) {
        const tile_t keys = load_tile_transposed(k, k_row, key, n, d * 8, lane);
        const tile_t values = load_tile_transposed(v, v_row, key, n, d * 8, lane);
        simdgroup_multiply_accumulate(scores, queries[d], keys, scores);
        simdgroup_multiply_accumulate(dweights, douts[d], values, dweights);
      }
      UNROLL for (int e = 0; e < 2; e++) {
        const int at_key = key + col + e;
        const bool seen = live && at_key < n && (!CAUSAL || at_key <= query);
        float dweight = dweights.thread_elements()[e];
        if (DROPOUT)
          dweight = half_of(words[j], e) >= uint(size[THRESHOLD]) ? dweight * factor[0] : 0.0f;
        const float weight = fast::exp2(scores.thread_elements()[e] * factor[1] - row_lse);
        scores.thread_elements()[e] = seen ? weight * (dweight - product) : 0.0f;
      }
      UNROLL for (int d = 0; d < DIMS; d++) {
        const tile_t keys = load_tile(k, k_row, key, n, d * 8, lane);
        simdgroup_multiply_accumulate(sum[d], scores, keys, sum[d]);
      }
    }
  }
  UNROLL for (int d = 0; d < DIMS; d++)
    store_tile(dq, int(size[DQ_ROW]), q0, n, d * 8, sum[d], factor[2], lane);
}

// A simdgroup owns 8 keys of one head and walks over the queries. Tiles of scores are held
// transposed: a row is a key, a column a query.
kernel void attention_dkdv(
    const device element_type* q [[buffer(0)]],
    const device element_type* k [[buffer(1)]],
    const device element_type* v [[buffer(2)]],
    const device element_type* dout [[buffer(3)]],
    device element_type* dk [[buffer(4)]],
    device element_type* dv [[buffer(5)]],
    const device float* lse [[buffer(6)]],
    const device float* delta [[buffer(7)]],
    const device int* starts [[buffer(8)]],
    const device int* lens [[buffer(9)]],
    const device uint* seed [[buffer(10)]],
    constant long* size [[buffer(11)]],
    constant float* factor [[buffer(12)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int sequence = int(group.z), head = int(group.y);
  const int n = min(lens[sequence], int(size[MAX_SEQLEN]));
  const int k0 = int(group.x * SIMDGROUPS + simdgroup_index) * 8;
  if (k0 >= n) return;

  const long start = starts[sequence];
  q += start * size[Q_ROW] + head * size[Q_HEAD];
  k += start * size[K_ROW] + head * size[K_HEAD];
  v += start * size[V_ROW] + head * size[V_HEAD];
  dout += start * size[DOUT_ROW] + head * size[DOUT_HEAD];
  dk += start * size[DK_ROW] + head * size[DK_HEAD];
  dv += start * size[DV_ROW] + head * size[DV_HEAD];
  lse += head * size[ROWS] + start;
  delta += head * size[ROWS] + start;
  const int q_row = int(size[Q_ROW]), dout_row = int(size[DOUT_ROW]);
  const int row = tile_row(lane), key = k0 + row, col = tile_col(lane);

  tile_t keys[DIMS], values[DIMS], sum_k[DIMS], sum_v[DIMS];
  UNROLL for (int d = 0; d < DIMS; d++) {
    keys[d] = load_tile(k, int(size[K_ROW]), k0, n, d * 8, lane);
    values[d] = load_tile(v, int(size[V_ROW]), k0, n, d * 8, lane);
    sum_k[d] = zero_tile();
    sum_v[d] = zero_tile();
  }
  // With a causal mask the first query to see these keys is k0, whose step of 32 begins here.
  for (int q0 = CAUSAL ? k0 / SPAN * SPAN : 0; q0 < n; q0 += SPAN) {
    uint4 blocks = uint4(0u, 0u, 0u, 0u);
    if (DROPOUT)
      blocks = philox(uint4(uint(k0 / 8), uint(q0) + lane, uint(head), uint(sequence)),
                      philox_key(seed));
    UNROLL for (int j = 0; j < 4; j++) {
      const int first = q0 + j * 8;
      if (first >= n || (CAUSAL && first < k0)) continue;
      tile_t scores = zero_tile(), dweights = zero_tile();
      UNROLL for (int d = 0; d < DIMS; d++) {
        const tile_t queries = load_tile_transposed(q, q_row, first, n, d * 8, lane);
        const tile_t douts = load_tile_transposed(dout, dout_row, first, n, d * 8, lane);
        simdgroup_multiply_accumulate(scores, keys[d], queries, scores);
        simdgroup_multiply_accumulate(dweights, values[d], douts, dweights);
      }
      UNROLL for (int e = 0; e < 2; e++) {
        const int query = first + col + e;
        float mask = 1.0f;
        if (DROPOUT) {
          const uint bits = bits_of_query(blocks, ushort(j * 8 + col + e), row);
          mask = bits >= uint(size[THRESHOLD]) ? factor[0] : 0.0f;
        }
        float weight = 0.0f, dscore = 0.0f;
        if (key < n && query < n && (!CAUSAL || key <= query)) {
          weight = fast::exp2(scores.thread_elements()[e] * factor[1] - lse[query] * LOG2_E);
          dscore = weight * (dweights.thread_elements()[e] * mask - delta[query]);
        }
        scores.thread_elements()[e] = weight * mask;
        dweights.thread_elements()[e] = dscore;
      }
      UNROLL for (int d = 0; d < DIMS; d++) {
        const tile_t douts = load_tile(dout, dout_row, first, n, d * 8, lane);
        const tile_t queries = load_tile(q, q_row, first, n, d * 8, lane);
        simdgroup_multiply_accumulate(sum_v[d], scores, douts, sum_v[d]);
        simdgroup_multiply_accumulate(sum_k[d], dweights, queries, sum_k[d]);
      }
    }
  }
  UNROLL for (int d = 0; d < DIMS; d++) {
    store_tile(dk, int(size[DK_ROW]), k0, n, d * 8, sum_k[d], factor[2], lane);
    store_tile(dv, int(size[DV_ROW]), k0, n, d * 8, sum_v[d], 1.0f, lane);
  }
}
