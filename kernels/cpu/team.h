// Threads of the library's own for calls of well under a millisecond.
//
// A job is a sequence of phases, a phase a number of items. Whoever is there takes the next item, the
// caller too, and a phase is over when its items are done: nobody waits for a helper that has not
// taken an item. A helper that the system wakes late, or puts onto a busy core, finds nothing to do
// and costs nothing. (In a barrier of all threads, as OpenMP has it, a call waits for the last of them,
// up to a whole slice of the scheduler.)
//
// What is waited for is a thread that holds an item, and that thread may lose its core to another
// process. The caller measures such stalls, and works alone for a while after one.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace team {

inline void pause() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

// ---- a number that can be waited for ---------------------------------------------------------------

class Word {
 public:
  std::atomic<int32_t> value{0};

  // Returns at once where the value is another, and perhaps for no reason.
  void sleep_while(int32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    std::unique_lock<std::mutex> lock(mutex_);
    if (value.load() == seen) changed_.wait(lock);
#endif
  }

  // After the value changed.
  void wake(int most) {
#if defined(__linux__)
    syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, most, nullptr, nullptr, 0);
#else
    (void)most;
    { std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_all();
#endif
  }

#if !defined(__linux__)
 private:
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
};

// ---- jobs ------------------------------------------------------------------------------------------

constexpr int64_t SPIN = 20'000;         // ns that a thread spins for a phase to end, then it sleeps
constexpr int64_t IDLE_SPIN = 60'000;    // ns that a helper spins for the next job
constexpr int64_t STALL = 150'000;       // ns that others may be late in a call
constexpr int64_t SHORTEST_PAUSE = 50'000'000, LONGEST_PAUSE = 2'000'000'000;  // ns alone after a stall

struct alignas(128) Phase {
  std::atomic<int64_t> next{0};
  Word done;
  std::atomic<int32_t> asleep{0};
  int32_t items = 0;
};

struct Job {
  Phase* phases;
  int64_t count;
  void (*run)(void* context, int64_t phase, int64_t item, int thread);
  void* context;
  void (*release)(Job*);         // called by the last thread to leave
  std::atomic<int> users{1};
  std::atomic<int> entered{1};   // threads so far; the caller is number 0
  int places = 0;                // of helpers, still free; under the team's lock
  unsigned rounding = 0;         // the caller's: helpers compute with it too

  void leave() {
    if (users.fetch_sub(1, std::memory_order_acq_rel) == 1) release(this);
  }
};

inline unsigned rounding_mode() {
#if defined(__SSE2__)
  return _mm_getcsr() & ~0x3Fu;  // without the flags of exceptions
#else
  return 0;
#endif
}

inline void set_rounding_mode(unsigned mode) {
#if defined(__SSE2__)
  if (rounding_mode() != mode) _mm_setcsr(mode);
#else
  (void)mode;
#endif
}

// Spins, then sleeps, until the phase is over.
inline void wait_for(Phase& phase) {
  if (phase.done.value.load(std::memory_order_acquire) == phase.items) return;
  const int64_t until = nanoseconds() + SPIN;
  do {
    for (int i = 0; i < 16; i++) {
      if (phase.done.value.load(std::memory_order_acquire) == phase.items) return;
      pause();
    }
  } while (nanoseconds() < until);
  phase.asleep.fetch_add(1);
  for (int32_t done; (done = phase.done.value.load()) != phase.items;) phase.done.sleep_while(done);
  phase.asleep.fetch_sub(1);
}

// Takes items of each phase in turn. How long others kept this thread waiting, beyond what items took
// here, in ns.
inline int64_t work(Job& job, int thread) {
  int64_t stalled = 0;
  for (int64_t p = 0; p < job.count; p++) {
    Phase& phase = job.phases[p];
    if (phase.done.value.load(std::memory_order_acquire) == phase.items) continue;
    const int64_t begin = nanoseconds();
    int64_t mine = 0;
    for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < phase.items; mine++) {
      job.run(job.context, p, i, thread);
      if (phase.done.value.fetch_add(1) + 1 == phase.items && phase.asleep.load()) phase.done.wake(1 << 30);
    }
    if (phase.done.value.load(std::memory_order_acquire) == phase.items) continue;
    const int64_t end = nanoseconds();
    wait_for(phase);
    const int64_t an_item = mine ? (end - begin) / mine : 0;
    stalled += std::max<int64_t>(0, nanoseconds() - end - 2 * an_item);
  }
  return stalled;
}

// ---- the team --------------------------------------------------------------------------------------

class Team {
 public:
  explicit Team(int64_t stall = STALL) : stall_(stall) {}

  // Runs a job, with up to `threads` threads, the caller among them.
  void run(Job& job, int threads) {
    job.rounding = rounding_mode();
    const int callers = calls_.fetch_add(1) + 1;
    threads = std::max(1, threads / callers);  // who calls from several threads has a core for each
    if (threads > 1 && nanoseconds() < alone_until_.load(std::memory_order_relaxed)) threads = 1;
    if (threads == 1) {
      for (int64_t p = 0; p < job.count; p++)
        for (int64_t i = 0; i < job.phases[p].items; i++) job.run(job.context, p, i, 0);
    } else {
      const int64_t begin = nanoseconds();
      post(job, threads - 1);
      const int64_t stalled = work(job, 0);
      withdraw(job);
      remember(stalled, nanoseconds() - begin);
    }
    calls_.fetch_sub(1);
    job.leave();
  }

 private:
  void post(Job& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (helpers_ < helpers && start_helper()) helpers_++;
      job.places = std::min(helpers, helpers_);
      if (!job.places) return;
      jobs_.push_back(&job);
    }
    posted_.value.fetch_add(1);
    if (asleep_.load()) posted_.wake(helpers);
  }

  void withdraw(Job& job) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find(jobs_.begin(), jobs_.end(), &job);
    if (found != jobs_.end()) jobs_.erase(found);
  }

  // A job that still has a place, which is taken; or null.
  Job* join() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (jobs_.empty()) return nullptr;
    Job* job = jobs_.front();
    job->users.fetch_add(1);
    if (--job->places == 0) jobs_.erase(jobs_.begin());
    return job;
  }

  void help() {
    for (;;) {
      const int32_t seen = posted_.value.load();
      while (Job* job = join()) {
        set_rounding_mode(job->rounding);
        work(*job, job->entered.fetch_add(1));
        job->leave();
      }
      const int64_t until = nanoseconds() + IDLE_SPIN;
      while (posted_.value.load(std::memory_order_acquire) == seen && nanoseconds() < until)
        for (int i = 0; i < 16; i++) pause();
      asleep_.fetch_add(1);
      while (posted_.value.load() == seen) posted_.sleep_while(seen);
      asleep_.fetch_sub(1);
    }
  }

  // Under the lock. A helper lives as long as the process, and lets the signals go to other threads.
  bool start_helper() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const int failed = pthread_create(&thread, nullptr, [](void* self) -> void* {
      static_cast<Team*>(self)->help();
      return nullptr;
    }, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!failed) pthread_detach(thread);
    return !failed;
  }

  // A call that waited for a quarter of its time would have been as fast alone.
  void remember(int64_t stalled, int64_t duration) {
    int64_t pause = pause_.load(std::memory_order_relaxed);
    if (stalled > std::max(stall_, duration / 4)) {
      alone_until_.store(nanoseconds() + pause, std::memory_order_relaxed);
      pause = std::min(2 * pause, LONGEST_PAUSE);
    } else {
      pause = std::max(pause - pause / 8, SHORTEST_PAUSE);
    }
    pause_.store(pause, std::memory_order_relaxed);
  }

  const int64_t stall_;
  std::mutex mutex_;
  std::vector<Job*> jobs_;
  int helpers_ = 0;
  Word posted_;
  std::atomic<int32_t> asleep_{0};
  std::atomic<int> calls_{0};
  std::atomic<int64_t> alone_until_{0}, pause_{SHORTEST_PAUSE};
};

// ---- scratch ---------------------------------------------------------------------------------------

// Blocks of memory that calls leave for the next ones.
class Pool {
 public:
  struct Block {
    size_t size;  // of what follows, from the next line of the cache on
    char* data() { return reinterpret_cast<char*>(this) + 64; }
  };

  // Null where there is no memory.
  Block* take(size_t size) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = 0; i < count_; i++)
        if (free_[i]->size >= size) {
          Block* found = free_[i];
          free_[i] = free_[--count_];
          return found;
        }
    }
    void* memory = nullptr;
    const size_t larger = size + size / 4;
    if (posix_memalign(&memory, 4096, larger + 64)) return nullptr;
    Block* block = new (memory) Block;
    block->size = larger;
    return block;
  }

  void give_back(Block* block) {
    if (block->size <= LARGEST) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (count_ < KEPT) {
        free_[count_++] = block;
        return;
      }
      // The smallest goes.
      const auto smaller = [](Block* a, Block* b) { return a->size < b->size; };
      const auto smallest = std::min_element(free_, free_ + count_, smaller);
      if ((*smallest)->size < block->size) std::swap(*smallest, block);
    }
    free(block);
  }

 private:
  static constexpr size_t KEPT = 4, LARGEST = 64 << 20;
  std::mutex mutex_;
  Block* free_[KEPT];
  size_t count_ = 0;
};

// ---- one of each in a process ----------------------------------------------------------------------

// Never destroyed: helpers may still look at it while the process ends. A child of fork has none of
// the parent's helpers, and perhaps a lock that one of them held, so it makes its own.
struct Shared {
  Team team;
  Pool pool;
};

inline Shared& shared() {
  static std::atomic<Shared*> current{nullptr};
  static const bool once = [] {
    pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    return true;
  }();
  (void)once;
  Shared* found = current.load(std::memory_order_acquire);
  if (found) return *found;
  Shared* made = new Shared;
  if (current.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace team
