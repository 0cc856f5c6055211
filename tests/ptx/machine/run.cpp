// Programs one after another, in each of them the warps in turns, both in an order of the seed's choice.
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

void fail(const char* format, ...) {
  char text[400];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  throw std::runtime_error(text);
}

const Table& opcodes() {
  static const Table table = [] {
    Table t;
    for (auto add : {add_integers, add_logic, add_comparisons, add_floats, add_conversions, add_memory,
                     add_asynchronous_copies, add_warp_instructions, add_matrices, add_warpgroup_products})
      add(t);
    return t;
  }();
  return table;
}

// Chooses the lanes that run next: those furthest behind, so that lanes that leave a loop wait at its
// end. Lanes at an instruction of the whole warp are parked until all are there.
static void regroup(Warp& w, bool park) {
  if (w.active) w.elsewhere.push_back({w.next, w.active, park});
  if (w.elsewhere.empty()) {
    w.done = true;
    return;
  }
  s32 first = INT32_MAX;
  for (const auto& group : w.elsewhere)
    if (!group.parked) first = std::min(first, group.next);
  if (first == INT32_MAX) {  // all are parked
    first = w.elsewhere[0].next;
    for (const auto& group : w.elsewhere)
      if (group.next != first)
        fail("warp %u: lanes %08x wait at another instruction of the whole warp than lanes %08x", w.index, group.mask,
             w.elsewhere[0].mask);
  }
  u32 mask = 0;
  std::vector<Warp::Group> rest;
  for (const auto& group : w.elsewhere) {
    if (group.next == first) mask |= group.mask;
    else rest.push_back(group);
  }
  w.elsewhere = rest, w.next = first, w.active = mask;
}

// Runs a warp until it waits at a barrier, ends, or has had its turn.
static void turn(Machine& m, Warp& w, s64 instructions) {
  const Table& table = opcodes();
  while (instructions-- > 0) {
    if (!w.elsewhere.empty()) regroup(w, false);
    if (w.done) return;
    if (w.next >= m.length) fail("ran past the last instruction");
    if (++w.executed > m.options.limit) fail("more than %lld instructions of a warp", (long long)m.options.limit);
    m.current = w.next, m.serial++;
    const Instruction& i = m.code[w.next];
    if (!w.elsewhere.empty() && (i.opcode == BARRIER || (i.opcode >= 0 && table[i.opcode].whole_warp))) {
      regroup(w, true);
      if (!w.elsewhere.empty() || w.next != m.current) continue;
    }
    u32 mask = w.active;
    if (i.guard >= 0) {
      const u32 p = *w.at<u32>(i.guard);
      mask &= i.negated ? ~p : p;
    }
    if (i.opcode >= 0) {
      if (mask) table[i.opcode].run(w, i, mask);
      w.next++;
    } else if (i.opcode == BRANCH) {
      if (mask == w.active) {
        w.next = s32(i.immediate);
        continue;
      }
      if (mask) w.elsewhere.push_back({s32(i.immediate), mask, false}), w.active &= ~mask;
      w.next++;
    } else if (i.opcode == RETURN) {
      w.active &= ~mask;
      w.next++;
      if (!w.active) regroup(w, false);
    } else {  // BARRIER
      w.next++;
      if (!mask) continue;
      if (mask != ALL) fail("warp %u: only lanes %08x reach bar.sync", w.index, mask);
      w.at_barrier = true;
      return;
    }
  }
}

enum Special { TID_X, TID_Y, TID_Z, NTID_X, NTID_Y, NTID_Z, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, LANEID, WARPID };

static u32 special(s32 which, const Machine& m, u32 warp, u32 lane, const u32* place, const u32* grid) {
  switch (which) {
    case TID_X: return LANES * warp + lane;
    case NTID_X: return LANES * u32(m.warps.size());
    case NTID_Y: case NTID_Z: return 1;
    case CTAID_X: case CTAID_Y: case CTAID_Z: return place[which - CTAID_X];
    case NCTAID_X: case NCTAID_Y: case NCTAID_Z: return grid[which - NCTAID_X];
    case LANEID: return lane;
    case WARPID: return warp;
    default: return 0;  // TID_Y, TID_Z
  }
}

// What a launch is given; the same in ctypes in machine.py.
struct Launch {
  const Instruction* code;
  s64 length;
  const s32* pool;
  const u8* image;  // of the registers of a warp as a program begins
  s64 image_bytes;
  s64 warps, shared;
  const s32* specials;  // pairs: which special register, where it lies
  s64 special_count;
  const u32* grid;
  const u64* buffers;  // pairs: begin and end
  s64 buffer_count;
  Options options;
  Counts counts;        // out
  s64 current, program;  // out: the last instruction, and whose
};

static void run_program(Machine& m, const Launch& l, const u32* place) {
  // Shared memory holds NaN, of 16 and of 32 bits, others for each program.
  m.shared.assign(l.shared, 0xFF);
  for (s64 i = 0; i + 1 < l.shared; i += 2) m.shared[i] = u8(m.random()) | 0x81;
  m.shadow.resize(std::max<size_t>(m.shadow.size(), l.shared));
  for (Shadow& s : m.shadow) s.in_flight = 0, s.asynchronous_readers = 0;
  m.epoch++;
  m.warps.clear();
  m.warps.resize(l.warps);
  for (u32 n = 0; n < m.warps.size(); n++) {
    Warp& w = m.warps[n];
    w.machine = &m, w.index = n;
    w.registers.assign(l.image, l.image + l.image_bytes);
    for (s64 s = 0; s < l.special_count; s++)
      for (u32 lane = 0; lane < LANES; lane++)
        w.at<u32>(l.specials[2 * s + 1])[lane] = special(l.specials[2 * s], m, n, lane, place, l.grid);
  }
  for (;;) {
    std::vector<Warp*> ready;
    size_t waiting = 0;
    for (Warp& w : m.warps) {
      if (w.at_barrier) waiting++;
      else if (!w.done) ready.push_back(&w);
    }
    if (!ready.empty()) {
      if (m.options.seed) turn(m, *ready[m.random() % ready.size()], 1 + m.random() % 64);
      else turn(m, *ready[0], INT64_MAX);
      continue;
    }
    if (!waiting) break;
    if (waiting != m.warps.size()) fail("%zu of %zu warps wait at bar.sync, the others have ended", waiting, m.warps.size());
    m.epoch++;
    for (Warp& w : m.warps) w.at_barrier = false, w.step++;
  }
  for (Warp& w : m.warps) {
    m.counts.instructions += w.executed;
    if (!w.pending.empty()) fail("warp %u ends before its wgmma was waited for", w.index);
  }
}

extern "C" {

s32 machine_opcodes() { return s32(opcodes().size()); }
const char* machine_opcode(s32 i) {
  static std::string text;
  text = opcodes()[i].name + " " + opcodes()[i].signature;
  return text.c_str();
}
s32 machine_instruction_bytes() { return sizeof(Instruction); }
s32 machine_launch_bytes() { return sizeof(Launch); }

// Runs all programs. Returns null, or what went wrong.
const char* machine_run(Launch* l) {
  static std::string message;
  Machine m;
  m.code = l->code, m.length = s32(l->length), m.pool = l->pool, m.options = l->options;
  m.random.seed(u32(l->options.seed));
  for (s64 i = 0; i < l->buffer_count; i++) {
    Buffer b{l->buffers[2 * i], l->buffers[2 * i + 1], {}};
    b.pages.resize((b.end - b.begin) / 4096 + 2);
    m.buffers.push_back(std::move(b));
  }
  const u32* grid = l->grid;
  std::vector<u32> order(size_t(grid[0]) * grid[1] * grid[2]);
  for (size_t i = 0; i < order.size(); i++) order[i] = u32(i);
  if (m.options.seed) std::shuffle(order.begin(), order.end(), m.random);
  const char* wrong = nullptr;
  try {
    for (u32 program : order) {
      const u32 place[3] = {program % grid[0], program / grid[0] % grid[1], program / grid[0] / grid[1]};
      m.program = program;
      run_program(m, *l, place);
    }
  } catch (const std::exception& error) {
    message = error.what();
    wrong = message.c_str();
  }
  l->counts = m.counts, l->current = m.current, l->program = m.program;
  return wrong;
}

}  // extern "C"
