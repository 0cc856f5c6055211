// What the row operations share. Specialised by text: the types in memory, COLUMNS where a row is
// held in registers. Everything is computed in float. Needs philox.metal.

#define UNROLL _Pragma("clang loop unroll(full)")
#define ROWS_OF_A_SUM 16  // rows whose sum over a column one simdgroup or thread makes

// Dropout of eight neighbouring columns of a row: one block, which is kept where DROPOUT is 0.
inline uint4 row_block(const device uint* seed, int column_block, int row) {
  if (!DROPOUT) return uint4(0u, 0u, 0u, 0u);
  return philox(uint4(uint(column_block), uint(row), 0u, 0u), philox_key(seed));
}

inline float dropped(float x, uint4 block, int i, uint threshold, float scale) {
  if (!DROPOUT) return x;
  return half_of(block[i / 2], i) >= threshold ? x * scale : 0.0f;
}
