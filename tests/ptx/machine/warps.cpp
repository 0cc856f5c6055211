// Instructions of a whole warp: shuffles, reductions, its barrier.
#include "machine.h"

#include <algorithm>
#include <cstring>

static void all_members(Warp& w, s32 members) {
  for (u32 lane = 0; lane < LANES; lane++)
    if (w.at<u32>(members)[lane] != ALL) fail("warp %u: a membermask of some lanes is not supported", w.index);
}

// r: d, a, b, c, membermask. c: the last lane of a segment, and above 8 bits which bits name a segment.
template <class F> static void shuffle(Warp& w, const Instruction& i, u32 mask, F source) {
  together(w, mask), all_members(w, i.r[4]);
  const u32 *a = w.at<u32>(i.r[1]), *b = w.at<u32>(i.r[2]), *c = w.at<u32>(i.r[3]);
  u32 out[LANES];
  for (u32 lane = 0; lane < LANES; lane++) {
    const u32 segment = c[lane] >> 8 & 31, clamp = c[lane] & 31;
    const u32 last = (lane & segment) | (clamp & ~segment);
    const u32 from = source(lane, b[lane] & 31, segment);
    out[lane] = a[from <= last ? from : lane];
  }
  memcpy(w.at<u32>(i.r[0]), out, sizeof out);
}
static void butterfly(Warp& w, const Instruction& i, u32 mask) {
  shuffle(w, i, mask, [](u32 lane, u32 b, u32) { return lane ^ b; });
}
static void by_index(Warp& w, const Instruction& i, u32 mask) {
  shuffle(w, i, mask, [](u32 lane, u32 b, u32 segment) { return (lane & segment) | (b & ~segment); });
}

template <class F> static void reduce(Warp& w, const Instruction& i, u32 mask) {  // r: d, a, membermask
  together(w, mask), all_members(w, i.r[2]);
  const u32* a = w.at<u32>(i.r[1]);
  u32 value = a[0];
  for (u32 lane = 1; lane < LANES; lane++) value = F{}(value, a[lane]);
  std::fill_n(w.at<u32>(i.r[0]), LANES, value);
}
typedef decltype([](u32 a, u32 b) { return u32(std::max(s32(a), s32(b))); }) Largest;
typedef decltype([](u32 a, u32 b) { return u32(std::min(s32(a), s32(b))); }) Smallest;
typedef decltype([](u32 a, u32 b) { return a + b; }) Sum;

static void barrier(Warp& w, const Instruction& i, u32 mask) {
  together(w, mask), all_members(w, i.r[0]);
  w.step++;
}

void add_warp_instructions(Table& t) {
  t.push_back({"shfl.sync.bfly.b32", "w=wwww", butterfly, true});
  t.push_back({"shfl.sync.idx.b32", "w=wwww", by_index, true});
  t.push_back({"redux.sync.max.s32", "w=ww", reduce<Largest>, true});
  t.push_back({"redux.sync.min.s32", "w=ww", reduce<Smallest>, true});
  t.push_back({"redux.sync.add.s32", "w=ww", reduce<Sum>, true});
  t.push_back({"bar.warp.sync", "=w", barrier, true});
}
