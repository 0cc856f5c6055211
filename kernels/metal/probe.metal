// What the attention kernels take for granted, asked of the machine: how many lanes a simdgroup
// has, and where in an 8 x 8 tile the two elements of each lane stand.

kernel void probe(
    const device float* numbers [[buffer(0)]], // 0 ... 63, row by row
    device float* found [[buffer(1)]],         // (32, 2): the numbers each lane holds
    device int* width [[buffer(2)]],
    uint lane [[thread_index_in_simdgroup]],
    uint lanes [[threads_per_simdgroup]]) {
  simdgroup_matrix<float, 8, 8> t;
  simdgroup_load(t, numbers, 8);
  found[lane * 2] = t.thread_elements()[0];
  found[lane * 2 + 1] = t.thread_elements()[1];
  if (lane == 0) width[0] = int(lanes);
}
