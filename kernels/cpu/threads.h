// Items of work, shared out among the threads of an OpenMP runtime that the caller names: torch's own,
// since a second pool in one process costs a scheduler's slice a call.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>

#include "interface.h"

namespace {

using Body = void (*)(void*);
using GompParallel = void (*)(Body, void*, unsigned threads, unsigned flags);
using KmpFork = void (*)(void* location, int arguments, void (*task)(int*, int*, void*, void*), ...);
using KmpPushThreads = void (*)(void* location, int thread, int threads);
using KmpThread = int (*)(void* location);

GompParallel gomp_parallel = nullptr;
KmpFork kmp_fork = nullptr;
KmpPushThreads kmp_push_threads = nullptr;
KmpThread kmp_thread = nullptr;

void kmp_task(int*, int*, void* body, void* context) { reinterpret_cast<Body>(body)(context); }

void on_threads(int threads, Body body, void* context) {
  if (threads > 1 && gomp_parallel) return gomp_parallel(body, context, (unsigned)threads, 0);
  if (threads > 1 && kmp_fork) {
    static struct { int reserved1, flags, reserved2, reserved3; const char* source; } location = {
        0, 2, 0, 0, ";fasttx;on_threads;0;0;;"};
    kmp_push_threads(&location, kmp_thread(&location), threads);
    return kmp_fork(&location, 2, kmp_task, reinterpret_cast<void*>(body), context);
  }
  body(context);
}

// Scratch that a thread keeps for its next call.
struct Room {
  char* data = nullptr;
  size_t size = 0;

  char* of(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = 0;
      if (posix_memalign(reinterpret_cast<void**>(&data), 4096, bytes)) data = nullptr;
      if (data) size = bytes;
    }
    return data;
  }
  ~Room() { free(data); }
};
thread_local Room room;

// work(item, scratch) for every item, each taken by the next free thread. Returns 0 or NO_MEMORY.
template <class Work>
int64_t share_out(int threads, int64_t items, size_t scratch, const Work& work) {
  struct Context {
    const Work& work;
    int64_t items;
    size_t scratch;
    std::atomic<int64_t> next;
    std::atomic<bool> failed;
  } context{work, items, scratch, {0}, {false}};
  on_threads((int)std::min<int64_t>(threads, items), [](void* given) {
    Context& c = *static_cast<Context*>(given);
    char* space = room.of(c.scratch);
    if (!space) {
      c.failed = true;
      return;
    }
    for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.items;) c.work(i, space);
  }, &context);
  return context.failed ? NO_MEMORY : 0;
}

}  // namespace
