// A machine that executes PTX on the CPU: programs (CTAs) of warps of 32 lanes, shared memory, barriers.
//
// parser.py makes `Instruction`s of PTX. Each opcode is an entry of `opcodes()`, by its PTX name, which
// does it for all lanes under a mask. A register is 32 lanes side by side, raw bits; a predicate is one
// mask of 32 bits. Semantics: PTX ISA 8.7.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;

constexpr u32 LANES = 32;
constexpr u32 ALL = 0xFFFFFFFFu;
constexpr u32 SHARED_BASE = 1024;  // not 0, so that a forgotten base shows; aligned as wgmma asks for
constexpr u32 CELL = 2;            // bytes of global memory that are watched together

enum Control { BRANCH = -1, RETURN = -2, BARRIER = -3 };  // in place of an opcode's number

struct Instruction {
  s32 opcode;  // index in opcodes(), or a Control
  s32 guard;   // where the guarding predicate lies, or -1
  s32 negated;
  s32 count;      // elements of a vector access
  s32 size;       // bytes of an element in memory
  s32 width;      // bytes of a register
  s32 is_signed;  // what is loaded is extended by its sign
  s32 extra;      // a second offset of an address
  s64 immediate;  // the offset of an address, the target of a branch, a count of groups
  s32 r[16];      // where the registers lie
};

struct Options {
  s64 seed;   // of the schedule; 0: programs and warps in order
  s64 limit;  // instructions of one warp
};

// What the launch cost, in counts. `needed`: the least that the same bytes could take.
struct Counts {
  s64 instructions, sectors, sectors_needed, wavefronts, conflicts;
};

// Who touched a cell of global memory. Programs are counted from 1.
struct Touched {
  u32 writer = 0, reader = 0, epoch = 0, step = 0;
  s32 instruction = -1;
  u8 warp = 0, lane = 0;
};
struct Buffer {
  u64 begin, end;
  std::vector<std::unique_ptr<Touched[]>> pages;  // made when they are touched
  Touched& at(u64 address);
};

// Who used a byte of shared memory last. Epochs never come back, so nothing is ever cleared.
struct Shadow {
  u32 write_epoch = 0, write_step = 0, read_epoch = 0, read_step = 0, read_warps = 0, read_lanes = 0;
  u32 asynchronous_readers = 0;  // warps whose wgmma may still read it
  u64 write_serial = 0;
  s32 write_instruction = -1;
  u8 write_warp = 0, write_lane = 0, read_warp = 0, in_flight = 0;
};

struct Copy {  // a cp.async under way
  u32 to, bytes;
  u64 group;
  u8 data[16];
};
struct Pending {  // an accumulator of a wgmma under way
  u64 group;
  u32 value[LANES];
};
struct Reading {  // shared memory that a wgmma under way reads
  u64 group;
  u32 at, bytes;
};

struct Machine;

struct Warp {
  Machine* machine;
  u32 index;
  std::vector<u8> registers;
  s32 next = 0;       // instruction
  u32 active = ALL;
  struct Group {
    s32 next;
    u32 mask;
    bool parked;  // at an instruction of the whole warp
  };
  std::vector<Group> elsewhere;  // lanes that branched off
  u32 step = 1;                  // advances whenever the warp synchronises
  std::vector<Copy> copies[LANES];
  u64 committed[LANES] = {};
  std::map<s32, Pending> pending;
  std::vector<Reading> readings;
  u64 products = 0;      // groups of wgmma committed
  u64 fence_serial = 0;  // of the last fence.proxy.async
  bool at_barrier = false, done = false;
  s64 executed = 0;

  template <class T> T* at(s32 offset) { return reinterpret_cast<T*>(registers.data() + offset); }
};

struct Machine {
  const Instruction* code = nullptr;
  s32 length = 0;
  const s32* pool = nullptr;  // registers of the instructions that have many
  std::vector<Buffer> buffers;
  std::vector<u8> shared;
  std::vector<Shadow> shadow;
  std::vector<Warp> warps;
  Options options{};
  Counts counts{};
  std::mt19937 random;
  u64 serial = 0;  // of instructions
  u32 epoch = 1;   // advances at every barrier of a program
  u32 program = 0;
  s32 current = 0;  // instruction
};

typedef void (*Run)(Warp&, const Instruction&, u32 mask);
struct Opcode {
  std::string name;
  // The widths of its operands, destinations before "=": p predicate, h, w, d 2, 4, 8 bytes,
  // [ an address in shared memory. Empty where parser.py takes the operands apart itself.
  std::string signature;
  Run run;
  bool whole_warp = false;  // all lanes must be there
};
typedef std::vector<Opcode> Table;
const Table& opcodes();

// One family a file.
void add_integers(Table&);
void add_logic(Table&);
void add_comparisons(Table&);
void add_floats(Table&);
void add_conversions(Table&);
void add_memory(Table&);
void add_asynchronous_copies(Table&);
void add_warp_instructions(Table&);
void add_matrices(Table&);
void add_warpgroup_products(Table&);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <class F> void each(u32 mask, F f, bool backwards = false) {
  for (u32 n = 0; n < LANES; n++) {
    const u32 lane = backwards ? LANES - 1 - n : n;
    if (mask >> lane & 1) f(lane);
  }
}

inline void together(Warp& w, u32 mask) {
  if (mask != ALL) fail("warp %u: only lanes %08x reach an instruction of the whole warp", w.index, mask);
}
