// h = dropout(table[id] scale + positions[position]): a thread makes eight columns of a row.
// Specialised: table_type, positions_type, element_type (of h). Needs philox.metal and rows.metal.

enum EmbedSize { THRESHOLD, ROWS, COLUMNS };

kernel void embed_forward(
    const device long* ids [[buffer(0)]],
    const device int* position_ids [[buffer(1)]],
    const device table_type* table [[buffer(2)]],
    const device positions_type* positions [[buffer(3)]],
    device element_type* out [[buffer(4)]],
    const device uint* seed [[buffer(5)]],
    constant long* size [[buffer(6)]],
    constant float* factor [[buffer(7)]], // 1 / keep probability, scale
    uint3 thread_index [[thread_position_in_grid]]) {
  const int column = int(thread_index.x) * 8, row = int(thread_index.y);
  const int columns = int(size[COLUMNS]);
  if (column >= columns || row >= size[ROWS]) return;
  const uint4 block = row_block(seed, column / 8, row);
  table += ids[row] * size[COLUMNS] + column;
  positions += position_ids[row] * size[COLUMNS] + column;
  out += row * size[COLUMNS] + column;
  const int end = min(8, columns - column);
  UNROLL for (int i = 0; i < 8; i++) {
    if (i >= end) break;
    const float x = float(table[i]) * factor[1] + float(positions[i]);
    out[i] = element_type(dropped(x, block, i, uint(size[THRESHOLD]), factor[0]));
  }
}

// The gradient of the table. Ids are sorted, `order` says which row each came from; the thread at
// the first of equal ids sums the run up. So the sum has one order, and no atomic.
kernel void embed_backward(
    const device int* ids [[buffer(0)]],   // sorted
    const device long* order [[buffer(1)]],
    const device element_type* dout [[buffer(2)]],
    device table_type* dtable [[buffer(3)]],
    const device uint* seed [[buffer(4)]],
    constant long* size [[buffer(5)]],
    constant float* factor [[buffer(6)]],
    uint3 thread_index [[thread_position_in_grid]]) {
  const int column = int(thread_index.x) * 8, first = int(thread_index.y);
  const int columns = int(size[COLUMNS]), rows = int(size[ROWS]);
  if (column >= columns || first >= rows) return;
  const int id = ids[first];
  if (first > 0 && ids[first - 1] == id) return;
  const int end = min(8, columns - column);
  float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  for (int at = first; at < rows && ids[at] == id; at++) {
    const int row = int(order[at]);
    const uint4 block = row_block(seed, column / 8, row);
    const device element_type* grad = dout + row * size[COLUMNS] + column;
    UNROLL for (int i = 0; i < 8; i++) {
      if (i >= end) break;
      sum[i] += dropped(float(grad[i]), block, i, uint(size[THRESHOLD]), factor[0]);
    }
  }
  dtable += id * size[COLUMNS] + column;
  for (int i = 0; i < end; i++) dtable[i] = table_type(sum[i] * factor[1]);
}
