// What the attention kernels share: tiles of 8 x 8 in the registers of a simdgroup.
//
// Specialised by text: element_type is the type in memory, HEAD_DIM any size, DROPOUT and CAUSAL 0
// or 1. Everything is computed in float. One simdgroup owns 8 rows of its result, four of them make
// a threadgroup; they share nothing, so there is no threadgroup memory, no barrier and no atomic.

#define UNROLL _Pragma("clang loop unroll(full)")
#define SIMDGROUPS 4              // in a threadgroup: 128 threads
#define SPAN 32                   // keys (or queries) of a step: four tiles, a Philox block a lane
#define DIMS ((HEAD_DIM + 7) / 8) // tiles across a head

#define LOG2_E 1.44269504f

// What the host passes as `size`. Strides are in elements; those of one head are neighbours.
enum AttentionSize {
  THRESHOLD, ROWS, MAX_SEQLEN, Q_ROW, Q_HEAD, K_ROW, K_HEAD, V_ROW, V_HEAD, OUT_ROW, OUT_HEAD,
  DOUT_ROW, DOUT_HEAD, DQ_ROW, DQ_HEAD, DK_ROW, DK_HEAD, DV_ROW, DV_HEAD // of the backward pass
};

typedef simdgroup_matrix<float, 8, 8> tile_t;

// Of a tile, a lane holds two neighbours of one row. Apple documents no layout; this is the one
// that MLX and PyTorch rely on, and the first use on a machine probes it.
inline int tile_row(uint lane) { return int(((lane >> 2) & 4u) + ((lane >> 1) & 3u)); }
inline int tile_col(uint lane) { return int(((lane >> 1) & 4u) + ((lane & 1u) << 1)); }

// The four lanes of one row differ in bits 0 and 3.
inline float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, ushort(1)));
  return max(x, simd_shuffle_xor(x, ushort(8)));
}

inline float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

inline tile_t zero_tile() { return make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }

// One element of x (rows, HEAD_DIM), 0 outside: beyond a sequence lies NaN, perhaps, or no memory.
inline float element_at(const device element_type* x, int stride, int row, int rows, int dim) {
  const bool there = row < rows && (HEAD_DIM % 8 == 0 || dim < HEAD_DIM);
  return there ? float(x[row * stride + dim]) : 0.0f;
}

// Rows row ... row + 7 and columns dim ... dim + 7 of x.
inline tile_t load_tile(const device element_type* x, int stride, int row, int rows, int dim,
                        uint lane) {
  const int r = row + tile_row(lane), c = dim + tile_col(lane);
  tile_t t = zero_tile();
  UNROLL for (int e = 0; e < 2; e++) t.thread_elements()[e] = element_at(x, stride, r, rows, c + e);
  return t;
}

// The same, transposed.
inline tile_t load_tile_transposed(const device element_type* x, int stride, int row, int rows,
                                   int dim, uint lane) {
  const int r = row + tile_col(lane), c = dim + tile_row(lane);
  tile_t t = zero_tile();
  UNROLL for (int e = 0; e < 2; e++) t.thread_elements()[e] = element_at(x, stride, r + e, rows, c);
  return t;
}

// A lane's two elements, times `factor`, to x (rows, HEAD_DIM).
inline void store_tile(device element_type* x, int stride, int row, int rows, int dim, tile_t t,
                       float factor, uint lane) {
  const int r = row + tile_row(lane), c = dim + tile_col(lane);
  UNROLL for (int e = 0; e < 2; e++) {
    if (r < rows && (HEAD_DIM % 8 == 0 || c + e < HEAD_DIM))
      x[r * stride + c + e] = element_type(t.thread_elements()[e] * factor);
  }
}

// Dropout bits of one query and 32 keys, for the four lanes that hold its row of four tiles.
// Lane i of them draws the block of tile i (eight keys, a word for two) and needs word i of each:
// a transposition in two exchanges. Component j of the result is for the lane's pair in tile j.
inline uint4 words_of_keys(uint key_block, uint query, uint head, uint sequence, uint2 seed,
                           uint lane) {
  const bool odd = (lane & 1u) != 0, upper = (lane & 8u) != 0;
  const uint mine = (odd ? 1u : 0u) + (upper ? 2u : 0u);
  uint4 w = philox(uint4(key_block + mine, query, head, sequence), seed);
  const uint a = simd_shuffle_xor(odd ? w.x : w.y, ushort(1));
  const uint b = simd_shuffle_xor(odd ? w.z : w.w, ushort(1));
  w = odd ? uint4(a, w.y, b, w.w) : uint4(w.x, a, w.z, b);
  const uint c = simd_shuffle_xor(upper ? w.x : w.z, ushort(8));
  const uint d = simd_shuffle_xor(upper ? w.y : w.w, ushort(8));
  return upper ? uint4(c, d, w.z, w.w) : uint4(w.x, w.y, c, d);
}

// The 16 bits of one key and one query, where each lane holds the block of a query of its own.
inline uint bits_of_query(uint4 blocks, ushort query_lane, int key) {
  const uint x = simd_shuffle(blocks.x, query_lane), y = simd_shuffle(blocks.y, query_lane);
  const uint z = simd_shuffle(blocks.z, query_lane), w = simd_shuffle(blocks.w, query_lane);
  return half_of(key < 4 ? (key < 2 ? x : y) : (key < 6 ? z : w), key);
}
