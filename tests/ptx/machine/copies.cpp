// cp.async: copies from global to shared memory, in groups that a thread waits for.
#include "memory.h"

#include <algorithm>
#include <cstring>

// r: shared address, global address, how many bytes are read (the rest is zeros); size: bytes that are
// written; immediate and extra: the offsets of the two addresses.
static void copy(Warp& w, const Instruction& i, u32 mask) {
  const u32 bytes = u32(i.size);
  u64 to[LANES], from[LANES];
  u32 reading = 0;
  each(mask, [&](u32 lane) {
    to[lane] = u64(w.at<u32>(i.r[0])[lane]) + i.immediate;
    from[lane] = w.at<u64>(i.r[1])[lane] + i.extra;
    if (w.at<u32>(i.r[2])[lane]) reading |= 1u << lane;
  });
  count_shared(*w.machine, to, mask, bytes);
  count_global(*w.machine, from, reading, bytes);
  each(mask, [&](u32 lane) {
    const u32 given = std::min(w.at<u32>(i.r[2])[lane], bytes);
    Copy c{shared_offset(w, lane, to[lane], bytes, bytes), bytes, w.committed[lane], {}};
    if (from[lane] % bytes) fail("warp %u lane %u: misaligned cp.async", w.index, lane);
    for (u32 b = 0; b < given; b += CELL) global_read(w, lane, from[lane] + b, CELL, c.data + b);
    saw_shared_write(w, lane, c.to, bytes, nullptr);
    for (u32 b = 0; b < bytes; b++) {
      w.machine->shadow[c.to + b].in_flight = 1;
      w.machine->shared[c.to + b] = 0xFF;  // NaN, until it has come
    }
    w.copies[lane].push_back(c);
  });
}

static void commit(Warp& w, const Instruction&, u32 mask) {
  each(mask, [&](u32 lane) { w.committed[lane]++; });
}

// Until at most so many of the groups of a thread are under way.
static void wait(Warp& w, const Instruction& i, u32 mask) {
  each(mask, [&](u32 lane) {
    const u64 left = u64(i.immediate), groups = w.committed[lane] > left ? w.committed[lane] - left : 0;
    auto& copies = w.copies[lane];
    size_t kept = 0;
    for (const Copy& c : copies) {
      if (c.group >= groups) {
        copies[kept++] = c;
        continue;
      }
      for (u32 b = 0; b < c.bytes; b++) w.machine->shadow[c.to + b].in_flight = 0;
      memcpy(&w.machine->shared[c.to], c.data, c.bytes);
      saw_shared_write(w, lane, c.to, c.bytes, nullptr);
    }
    copies.resize(kept);
  });
}

void add_asynchronous_copies(Table& t) {
  t.push_back({"cp.async", "", copy});
  t.push_back({"cp.async.commit_group", "", commit});
  t.push_back({"cp.async.wait_group", "", wait});
}
