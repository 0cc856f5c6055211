// See fibers.h. Threads are switched by hand on x86-64, elsewhere by ucontext.
#if !defined(__x86_64__)
#define EMULATOR_UCONTEXT
#endif
#if defined(EMULATOR_UCONTEXT)
#define _XOPEN_SOURCE 700
#include <ucontext.h>
#endif

#include "fibers.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace emulator {
namespace {

const size_t STACK = 128 << 10;

#if !defined(EMULATOR_UCONTEXT)
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

typedef void* Context;

void prepare(Context& context, std::vector<char>& stack, void (*entry)()) {
  void** top = (void**)((uintptr_t)(stack.data() + stack.size()) & ~(uintptr_t)15);
  *--top = nullptr;  // where `entry` must never return to; aligns its frame too
  *--top = (void*)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context = top;
}
void change(Context& from, Context& to) { emulator_switch(&from, to); }
#else
typedef ucontext_t Context;

void prepare(Context& context, std::vector<char>& stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack.data();
  context.uc_stack.ss_size = stack.size();
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void change(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Fiber {
  Context context;
  std::vector<char> stack;
  bool done;
  uint32_t thread, phase;
};

struct Simdgroup {
  Slot slots[2][32];  // by the parity of the operation: late lanes still read the one before
  int arrived[2], line[2];
  uint32_t released;
};

std::vector<Fiber> fibers;
std::vector<Simdgroup> simdgroups;
Fiber* current;
Context scheduler;
int at_barrier, barrier_line, alive;
uint32_t barriers_passed;
long progress;
std::string error;
Body body;
void* body_arguments;
Id body_group, body_threads;

struct Failure {};

void pause() { change(current->context, scheduler); }

void enter() {
  try {
    body(body_arguments, body_group, body_threads, current->thread);
  } catch (const Failure&) {
  }
  current->done = true;
  alive--;
  progress++;
  for (;;) pause();
}

}  // namespace

void fail(const char* what, int line) {
  if (error.empty()) {
    char text[300];
    snprintf(text, sizeof text, "%s (line %d, thread %u of threadgroup %u, %u, %u)", what, line,
             current->thread, body_group.x, body_group.y, body_group.z);
    error = text;
  }
  throw Failure();
}

uint32_t thread_index() { return current->thread; }

void threadgroup_barrier_at(int line) {
  const uint32_t mine = barriers_passed;
  if (at_barrier == 0)
    barrier_line = line;
  else if (barrier_line != line)
    fail("threads of a threadgroup wait at different barriers", line);
  progress++;
  if (++at_barrier == (int)fibers.size()) {  // all of them: one that has returned is an error
    at_barrier = 0;
    barriers_passed++;
  } else {
    while (barriers_passed == mine) pause();
  }
}

Slot* exchange(const void* value, int bytes, Combine combine, int line) {
  Simdgroup& group = simdgroups[current->thread / 32];
  const uint32_t phase = current->phase++;
  const int side = phase & 1;
  Slot* slots = group.slots[side];
  if (group.arrived[side] == 0)
    group.line[side] = line;
  else if (group.line[side] != line)
    fail("lanes of a simdgroup are at different operations", line);
  memcpy(slots[current->thread % 32].in, value, bytes);
  progress++;
  if (++group.arrived[side] == 32) {
    group.arrived[side] = 0;
    group.released = phase + 1;
    if (combine) combine(slots);
  } else {
    while ((int32_t)(group.released - (phase + 1)) < 0) pause();
  }
  return slots;
}

}  // namespace emulator

using namespace emulator;

extern "C" const char* emulator_run(Body function, void* arguments, Id groups, Id threads,
                                    int order) {
  const uint32_t count = threads.x * threads.y * threads.z;
  error.clear();
  if (count % 32) return "a threadgroup must be whole simdgroups of 32 threads";
  body = function;
  body_arguments = arguments;
  body_threads = threads;
  if (fibers.size() != count) {
    fibers.clear();
    fibers.resize(count);
    for (Fiber& fiber : fibers) fiber.stack.resize(STACK);
  }
  std::vector<uint32_t> turns(count);
  std::mt19937 random(order);
  for (uint32_t z = 0; z < groups.z; z++)
    for (uint32_t y = 0; y < groups.y; y++)
      for (uint32_t x = 0; x < groups.x; x++) {
        body_group = Id{x, y, z};
        simdgroups.assign(count / 32, Simdgroup());
        at_barrier = 0;
        alive = count;
        for (uint32_t i = 0; i < count; i++) {
          turns[i] = i;
          fibers[i].done = false;
          fibers[i].thread = i;
          fibers[i].phase = 0;
          prepare(fibers[i].context, fibers[i].stack, enter);
        }
        if (order == REVERSE) std::reverse(turns.begin(), turns.end());
        if (order >= SHUFFLED) std::shuffle(turns.begin(), turns.end(), random);
        while (alive) {
          const long before = progress;
          for (uint32_t i : turns) {
            if (fibers[i].done) continue;
            current = &fibers[i];
            change(scheduler, current->context);
            if (!error.empty()) return error.c_str();
          }
          if (alive && progress == before) {
            error = "deadlock: not every thread reaches a barrier or simdgroup operation";
            return error.c_str();
          }
        }
      }
  return nullptr;
}
