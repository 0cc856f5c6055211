// One fiber per GPU thread of a threadgroup, and what these may do together: exchange values inside a
// simdgroup, and wait for one another. A threadgroup runs on one CPU thread, so there are no races
// here; what a missing barrier breaks shows in another order of the threads (see `order`).
#pragma once
#include <cstdint>

namespace emulator {

struct Id { uint32_t x, y, z; };

// 32 lanes, what each brought to the operation under way, and what it takes away.
struct Slot { alignas(16) unsigned char in[32], out[32]; };
typedef void (*Combine)(Slot* slots);

uint32_t thread_index();  // in its threadgroup; lane = index % 32
// Waits for all lanes; `line` tells operations apart. Returns the slots, valid until the next call.
Slot* exchange(const void* value, int bytes, Combine combine, int line);
void threadgroup_barrier_at(int line);
[[noreturn]] void fail(const char* what, int line);

typedef void (*Body)(void* arguments, Id group, Id threads, uint32_t thread);
enum Order { FORWARD, REVERSE, SHUFFLED };  // larger values: shuffled with other seeds

}  // namespace emulator

// nullptr, or what went wrong.
extern "C" const char* emulator_run(emulator::Body, void* arguments, emulator::Id groups,
                                    emulator::Id threads, int order);
