// The C interface of the encoder: packs a model, and runs calls on the team's threads.
#include "encoder_kernels.h"

#include <string.h>

#include "interface.h"
#include "team.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// A number of a weight as it was when it was packed, to see that somebody changed the weights.
struct Sample {
  const float* at;
  float value;
};

struct PackedModel {
  const EncoderKernels* kernels;  // of the set that it was packed for
  int64_t vocabulary, places;
  int64_t bytes, products;  // that a call reads, and that it computes for each row
  std::vector<Sample> samples;
};

// Threads that are worth waking: one for each 60 us that one thread would take, at some 60 GB/s and
// 40 products a nanosecond.
int worthwhile(int threads, const PackedModel& m, int64_t rows) {
  const int64_t microseconds = m.bytes / 60'000 + rows * m.products / 40'000;
  return (int)std::min<int64_t>(threads, 1 + microseconds / 60);
}

void sample(std::vector<Sample>& samples, const float* weight, int64_t count) {
  if (!weight || count < 1) return;
  for (int i = 0; i < 4; i++) {
    const float* at = weight + (count - 1) * i / 3;
    samples.push_back({at, *at});
  }
}

void sample(std::vector<Sample>& samples, const LinearWeights& l, int64_t out, int64_t in) {
  sample(samples, l.weight, out * in);
  sample(samples, l.bias, out);
}

void sample(std::vector<Sample>& samples, const NormWeights& n, int64_t d) {
  sample(samples, n.gamma, d);
  sample(samples, n.beta, d);
}

// Some numbers of every tensor that is copied.
std::vector<Sample> samples_of(const EncoderWeights& w) {
  std::vector<Sample> samples;
  const int64_t d = w.d_model;
  for (int64_t i = 0; i < w.layers; i++) {
    const BlockWeights& b = w.blocks[i];
    sample(samples, b.norm1, d), sample(samples, b.norm2, d);
    sample(samples, b.qkv, 3 * d, d), sample(samples, b.out, d, d);
    sample(samples, b.up, w.d_ff, d), sample(samples, b.down, d, w.d_ff);
  }
  sample(samples, w.embedding_norm, w.embedding_width);
  sample(samples, w.projection, d, w.embedding_width);
  sample(samples, w.norm, d);
  sample(samples, w.dense, d, d), sample(samples, w.classify, w.classes, d);
  return samples;
}

constexpr size_t HUGE_PAGE = 2 << 20;

size_t aligned(size_t bytes) { return (bytes + 127) / 128 * 128; }

// What a call needs, one piece after the other in a block of the pool.
struct CallRoom {
  team::Pool::Block* block;
  team::Job job;
};

void give_back(team::Job* job) {
  CallRoom* room = reinterpret_cast<CallRoom*>(reinterpret_cast<char*>(job) - offsetof(CallRoom, job));
  team::Pool::Block* block = room->block;
  room->~CallRoom();
  team::shared().pool.give_back(block);
}

}  // namespace

// Whether the instruction set in use has products of this precision.
API int64_t fasttx_encoder_offers(int precision) {
  return kernels_in_use().encoder->offers((Precision)precision);
}

// 0, and the model; NO_MEMORY; or 1 where this precision cannot hold such sizes.
API int64_t fasttx_encoder_create(const EncoderWeights* weights, int precision, void** model) {
  const EncoderKernels* kernels = kernels_in_use().encoder;
  const size_t bytes = kernels->model_bytes(*weights, (Precision)precision);
  if (!bytes) return 1;
  // Whole pages of the large kind: a call reads all of it.
  const size_t whole = (aligned(sizeof(PackedModel)) + bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes > HUGE_PAGE ? HUGE_PAGE : 4096, whole)) return NO_MEMORY;
#if defined(MADV_HUGEPAGE)
  if (bytes > HUGE_PAGE) madvise(memory, whole, MADV_HUGEPAGE);
#endif
  const int64_t d = weights->d_model, products = weights->layers * d * (4 * d + 2 * weights->d_ff);
  new (memory) PackedModel{kernels, weights->vocabulary, weights->places, (int64_t)bytes, products,
                           samples_of(*weights)};
  kernels->pack(*weights, (Precision)precision, static_cast<char*>(memory) + aligned(sizeof(PackedModel)));
  *model = memory;
  return 0;
}

// 1 where the weights, which must still be there, no longer hold what they held.
API int64_t fasttx_encoder_changed(const void* model) {
  for (const Sample& s : static_cast<const PackedModel*>(model)->samples)
    if (memcmp(s.at, &s.value, sizeof s.value)) return 1;
  return 0;
}

API int64_t fasttx_encoder_destroy(void* model) {
  static_cast<PackedModel*>(model)->~PackedModel();
  free(model);
  return 0;
}

// Texts b: ids[offsets[b]:offsets[b + 1]] -> logits (batch, classes). `threads`: at most so many.
// 0; NO_MEMORY; the number of the first row (from 1, from offsets[0] on) with an id that is outside the
// table; or -2 - b where text b is longer than the table of positions.
API int64_t fasttx_encoder_forward(const void* model, const int32_t* ids, const int64_t* offsets, int64_t batch,
                                   float* logits, int split, int threads) {
  const PackedModel& m = *static_cast<const PackedModel*>(model);
  const void* packed = static_cast<const char*>(model) + aligned(sizeof(PackedModel));
  if (batch < 1) return 0;
  for (int64_t b = 0; b < batch; b++)
    if (offsets[b + 1] < offsets[b] || offsets[b + 1] - offsets[b] > m.places) return -2 - b;
  for (int64_t r = offsets[0]; r < offsets[batch]; r++)
    if (ids[r] < 0 || ids[r] >= m.vocabulary) return r - offsets[0] + 1;

  if (split == (int)Split::BY_SIZE) threads = worthwhile(threads, m, offsets[batch] - offsets[0]);

  const Texts texts = {ids, offsets, batch, logits};
  int64_t phases = 0;
  const size_t bytes = m.kernels->call_bytes(packed, texts, threads, (Split)split, &phases);
  const size_t head = aligned(sizeof(CallRoom)), table = phases * sizeof(team::Phase);
  const size_t counts = aligned(8 * phases);
  team::Pool::Block* block = team::shared().pool.take(head + table + counts + bytes + 256);
  if (!block) return NO_MEMORY;
  char* at = block->data();
  at += (128 - reinterpret_cast<uintptr_t>(at) % 128) % 128;
  CallRoom* room = new (at) CallRoom;
  room->block = block;
  team::Phase* phase = reinterpret_cast<team::Phase*>(at + head);
  int64_t* items = reinterpret_cast<int64_t*>(at + head + table);
  char* call = at + head + table + counts;
  m.kernels->start(packed, texts, threads, (Split)split, call, items);
  for (int64_t p = 0; p < phases; p++) new (phase + p) team::Phase, phase[p].items = (int32_t)items[p];
  room->job.phases = phase, room->job.count = phases;
  room->job.run = m.kernels->run, room->job.context = call;
  room->job.release = give_back;
  team::shared().team.run(room->job, threads);
  return 0;
}
