// The team of threads of kernels/cpu/team.h without kernels, under ThreadSanitizer: every item is run
// once, a phase sees all that the phase before it wrote, and jobs may come from several threads.
#include <stdio.h>

#include <thread>

#include "team.h"

namespace {

struct Work {
  std::vector<std::vector<int64_t>> cells;  // of each phase and item
  team::Job job;
  std::vector<team::Phase> phases;
  std::atomic<int> wrong{0}, released{0};

  explicit Work(const std::vector<int>& items) : phases(items.size()) {
    for (size_t p = 0; p < items.size(); p++) {
      cells.emplace_back(items[p], 0);
      phases[p].items = items[p];
    }
    job.phases = phases.data(), job.count = (int64_t)items.size(), job.context = this;
    job.release = [](team::Job* j) { static_cast<Work*>(j->context)->released = 1; };
    job.run = [](void* self, int64_t phase, int64_t item, int) {
      Work& w = *static_cast<Work*>(self);
      int64_t sum = 1;
      if (phase)
        for (int64_t x : w.cells[phase - 1]) sum += x;
      for (volatile int i = 0; i < 1000;) i = i + 1;  // or one thread would be through before another comes
      if (w.cells[phase][item]) w.wrong++;
      w.cells[phase][item] = sum;
    };
  }

  // Whether it came out as one thread has it; waits for helpers that are still inside.
  bool sound() {
    while (!released) std::this_thread::yield();
    int64_t sum = 0;
    for (const auto& phase : cells) {
      for (int64_t x : phase)
        if (x != sum + 1) return false;
      sum = (int64_t)phase.size() * (sum + 1);
    }
    return !wrong;
  }
};

std::atomic<int> failures{0};

// One that no stall makes cautious; its helpers outlive main.
team::Team& crew = *new team::Team(INT64_MAX);

void call(int threads, const std::vector<int>& items) {
  Work work(items);
  crew.run(work.job, threads);
  if (!work.sound()) failures++;
}

}  // namespace

int main() {
  for (int round = 0; round < 200; round++) {
    call(1 + round % 4, {3, 0, 1, 7, 2, 5});
    if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // helpers sleep
  }
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; i++)
    callers.emplace_back([] {
      for (int round = 0; round < 100; round++) call(3, {2, 6, 1});
    });
  for (std::thread& t : callers) t.join();
  puts(failures ? "an item was lost, or came too early" : "every item once, in order");
  return failures != 0;
}
