#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

constexpr u64 PAGE = 2048;  // cells

Touched& Buffer::at(u64 address) {
  const u64 cell = address / CELL - begin / CELL;
  auto& page = pages[cell / PAGE];
  if (!page) page.reset(new Touched[PAGE]);
  return page[cell % PAGE];
}

// ---------------------------------------------------------------------------------------- global

static Buffer& buffer_of(Warp& w, u32 lane, u64 address, u32 bytes) {
  if (address % bytes) fail("warp %u lane %u: misaligned access of %u bytes", w.index, lane, bytes);
  for (Buffer& b : w.machine->buffers)
    if (address >= b.begin && address + bytes <= b.end) return b;
  // A distance, not an address: so that the message is the same from run to run.
  s64 least = INT64_MAX;
  size_t nearest = 0;
  for (size_t i = 0; i < w.machine->buffers.size(); i++) {
    const Buffer& b = w.machine->buffers[i];
    const s64 d = address < b.begin ? s64(address - b.begin) : s64(address + bytes - b.end);
    if (std::llabs(d) < std::llabs(least)) least = d, nearest = i;
  }
  fail("warp %u lane %u: %u bytes outside every buffer (%+lld bytes beyond buffer %zu)", w.index, lane, bytes,
       (long long)least, nearest);
}

// Whether another thread of the same program wrote the cell, and no barrier came since.
static bool unordered(const Warp& w, u32 lane, const Touched& t) {
  if (t.epoch != w.machine->epoch) return false;
  return t.warp != w.index || (t.lane != lane && t.step == w.step);
}

void global_read(Warp& w, u32 lane, u64 address, u32 bytes, void* to) {
  Buffer& buffer = buffer_of(w, lane, address, bytes);
  const u32 me = w.machine->program + 1;
  for (u64 i = address; i < address + bytes; i += CELL) {
    Touched& t = buffer.at(i);
    if (t.writer && t.writer != me) fail("lane %u reads global memory that program %u writes", lane, t.writer - 1);
    if (t.writer && unordered(w, lane, t))
      fail("race: warp %u lane %u reads global memory that warp %u lane %u wrote, no barrier between", w.index, lane,
           t.warp, t.lane);
    t.reader = t.reader && t.reader != me ? ALL : me;
  }
  memcpy(to, reinterpret_cast<const void*>(address), bytes);
}

// Threads that hold copies of an element may all store it, in one instruction, if the bits agree:
// which store stays is left open.
void global_write(Warp& w, u32 lane, u64 address, u32 bytes, u32 element, const void* from) {
  Buffer& buffer = buffer_of(w, lane, address, bytes);
  const u32 me = w.machine->program + 1;
  for (u64 i = address; i < address + bytes; i += std::max(element, CELL)) {
    const bool same = !memcmp(reinterpret_cast<const void*>(i), static_cast<const u8*>(from) + (i - address), element);
    for (u64 cell = i; cell < i + element; cell += CELL) {
      Touched& t = buffer.at(cell);
      if (t.writer && t.writer != me) fail("lane %u writes global memory that program %u writes too", lane, t.writer - 1);
      if (t.reader && t.reader != me) fail("lane %u writes global memory that another program reads", lane);
      if (t.writer && !same && unordered(w, lane, t)) {
        if (t.instruction == w.machine->current)
          fail("unsettled: warp %u lane %u and warp %u lane %u store different bits to one place of global memory", w.index,
               lane, t.warp, t.lane);
        fail("race: warp %u lane %u writes global memory that warp %u lane %u wrote, no barrier between", w.index, lane,
             t.warp, t.lane);
      }
      t.writer = me, t.epoch = w.machine->epoch, t.step = w.step, t.warp = u8(w.index), t.lane = u8(lane);
      t.instruction = w.machine->current;
    }
  }
  memcpy(reinterpret_cast<void*>(address), from, bytes);
}

// ---------------------------------------------------------------------------------------- shared

u32 shared_offset(Warp& w, u32 lane, u64 address, u32 bytes, u32 align) {
  if (address % align) fail("warp %u lane %u: misaligned access to shared memory", w.index, lane);
  if (address < SHARED_BASE || address + bytes > SHARED_BASE + w.machine->shared.size())
    fail("warp %u lane %u: %u bytes at offset %lld of %zu bytes of shared memory", w.index, lane, bytes,
         (long long)address - SHARED_BASE, w.machine->shared.size());
  return u32(address - SHARED_BASE);
}

void saw_shared_read(Warp& w, u32 lane, u32 at, u32 bytes) {
  const u32 epoch = w.machine->epoch;
  for (u32 i = at; i < at + bytes; i++) {
    Shadow& s = w.machine->shadow[i];
    if (s.in_flight) fail("warp %u lane %u reads shared byte %u before its cp.async was waited for", w.index, lane, i);
    if (s.write_epoch == epoch && s.write_warp != w.index)
      fail("race: warp %u lane %u reads shared byte %u that warp %u wrote, no bar.sync between", w.index, lane, i,
           s.write_warp);
    if (s.write_epoch == epoch && s.write_step == w.step && s.write_lane != lane)
      fail("race in a warp: warp %u lane %u reads shared byte %u that lane %u wrote, no bar.warp.sync between", w.index,
           lane, i, s.write_lane);
    if (s.read_epoch != epoch) s.read_epoch = epoch, s.read_warps = 0;
    if (s.read_warp != w.index || s.read_step != w.step || !s.read_warps) s.read_lanes = 0;
    s.read_warps |= 1u << w.index, s.read_lanes |= 1u << lane;
    s.read_warp = u8(w.index), s.read_step = w.step;
  }
}

void saw_shared_write(Warp& w, u32 lane, u32 at, u32 bytes, const u8* value) {
  Machine& m = *w.machine;
  const bool same = value && !memcmp(&m.shared[at], value, bytes);
  for (u32 i = at; i < at + bytes; i++) {
    Shadow& s = m.shadow[i];
    if (s.in_flight) fail("warp %u lane %u writes shared byte %u under a cp.async in flight", w.index, lane, i);
    if (s.asynchronous_readers)
      fail("warp %u lane %u writes shared byte %u that a wgmma not waited for reads", w.index, lane, i);
    if (!same && s.write_epoch == m.epoch) {
      const bool other_warp = s.write_warp != w.index;
      if (other_warp || (s.write_step == w.step && s.write_lane != lane)) {
        if (value && s.write_instruction == m.current && s.read_epoch != m.epoch)
          fail("unsettled: warp %u lane %u and warp %u lane %u store different bits to shared byte %u", w.index, lane,
               s.write_warp, s.write_lane, i);
        if (other_warp)
          fail("race: warp %u lane %u writes shared byte %u that warp %u wrote, no bar.sync between", w.index, lane, i,
               s.write_warp);
        fail("race in a warp: warp %u lane %u writes shared byte %u that lane %u wrote, no bar.warp.sync between", w.index,
             lane, i, s.write_lane);
      }
    }
    if (!same && s.read_epoch == m.epoch) {
      if (s.read_warps & ~(1u << w.index))
        fail("race: warp %u lane %u writes shared byte %u that another warp read, no bar.sync between", w.index, lane, i);
      if (s.read_warp == w.index && s.read_step == w.step && (s.read_lanes & ~(1u << lane)))
        fail("race in a warp: warp %u lane %u writes shared byte %u that another lane read, no bar.warp.sync between",
             w.index, lane, i);
    }
    s.write_serial = m.serial, s.write_epoch = m.epoch, s.write_step = w.step, s.write_instruction = m.current;
    s.write_warp = u8(w.index), s.write_lane = u8(lane);
  }
}

void shared_read(Warp& w, u32 lane, u64 address, u32 bytes, void* to) {
  const u32 at = shared_offset(w, lane, address, bytes, bytes);
  saw_shared_read(w, lane, at, bytes);
  memcpy(to, &w.machine->shared[at], bytes);
}

void shared_write(Warp& w, u32 lane, u64 address, u32 bytes, u32 element, const void* from) {
  const u32 at = shared_offset(w, lane, address, bytes, bytes);
  const u8* data = static_cast<const u8*>(from);
  for (u32 b = 0; b < bytes; b += element) saw_shared_write(w, lane, at + b, element, data + b);
  memcpy(&w.machine->shared[at], from, bytes);
}

// ---------------------------------------------------------------------------------------- counts

// Global memory moves in sectors of 32 bytes.
void count_global(Machine& m, const u64* addresses, u32 mask, u32 bytes) {
  u64 sectors[LANES], starts[LANES];
  u32 n = 0;
  each(mask, [&](u32 lane) { starts[n] = addresses[lane], sectors[n++] = addresses[lane] / 32; });
  std::sort(sectors, sectors + n), std::sort(starts, starts + n);
  const s64 distinct = std::unique(starts, starts + n) - starts;
  m.counts.sectors += std::unique(sectors, sectors + n) - sectors;
  m.counts.sectors_needed += (distinct * bytes + 31) / 32;
}

// Shared memory has 32 banks of 4 bytes. A warp takes 128 bytes a wavefront: all lanes at once up to 4
// bytes each, 16 lanes of 8 bytes, 8 lanes of 16. A bank gives one word a wavefront.
void count_shared(Machine& m, const u64* addresses, u32 mask, u32 bytes) {
  const u32 lanes = bytes <= 4 ? 32 : 128 / bytes, words = std::max(1u, bytes / 4);
  for (u32 first = 0; first < LANES; first += lanes) {
    std::vector<u64> taken[32];
    size_t most = 0;
    for (u32 lane = first; lane < first + lanes; lane++) {
      if (!(mask >> lane & 1)) continue;
      for (u32 i = 0; i < words; i++) {
        const u64 word = addresses[lane] / 4 + i;
        auto& bank = taken[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        most = std::max(most, bank.size());
      }
    }
    m.counts.wavefronts += s64(most);
    m.counts.conflicts += most ? s64(most) - 1 : 0;
  }
}
