// The C interface: picks an instruction set, checks spans, shares work out among threads.
//
// Every function returns 0, or the number of the first sequence (from 1) whose span is wrong, or
// NO_MEMORY. Threads come from the OpenMP runtime that the caller names with `fasttx_use_threads`:
// torch's own, since a second pool in one process costs a scheduler's slice a call.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "kernels.h"

#if defined(_WIN32)
#define API extern "C" __declspec(dllexport)
#else
#define API extern "C" __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels fasttx_kernels_avx512, fasttx_kernels_avx2, fasttx_kernels_baseline;
#elif defined(__ARM_NEON)
extern const Kernels fasttx_kernels_neon;
#else
extern const Kernels fasttx_kernels_baseline;
#endif

namespace {

constexpr int64_t NO_MEMORY = -1;
constexpr int64_t ROW_SHARE = 64;       // rows a thread takes at a time
constexpr int64_t PARTIAL_SHARE = 512;  // rows whose sums are added up together
constexpr int64_t QUERY_SHARE = 512;    // queries a thread takes at a time, of one sequence and head

// ---- instruction sets ----------------------------------------------------------------------------

const Kernels* const* supported() {
  static const Kernels* found[4] = {};  // best first
  static const bool once = [] {
    int n = 0;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found[n++] = &fasttx_kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found[n++] = &fasttx_kernels_avx2;
    found[n++] = &fasttx_kernels_baseline;
#elif defined(__ARM_NEON)
    found[n++] = &fasttx_kernels_neon;
#else
    found[n++] = &fasttx_kernels_baseline;
#endif
    return n > 0;
  }();
  (void)once;
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  return k ? *k : *supported()[0];
}

// ---- threads -------------------------------------------------------------------------------------

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

// work(item, scratch) for every item, each taken by the next free thread. False: no memory.
template <class Work>
bool share_out(int threads, int64_t items, size_t scratch, const Work& work) {
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
  return !context.failed;
}

int64_t shares(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Column sums: partial (chunks, columns) -> out (columns,), added up in order.
void add_up(const float* partial, int64_t chunks, int64_t columns, int64_t stride, float* out) {
  std::fill(out, out + columns, 0.0f);
  for (int64_t k = 0; k < chunks; k++)
    for (int64_t c = 0; c < columns; c++) out[c] += partial[k * stride + c];
}

// ---- spans ---------------------------------------------------------------------------------------

// Rows that belong to a sequence, in `covered`; the first sequence (from 1) that leaves the rows or
// shares one with another, or 0.
int64_t cover(const Attention& a, int64_t batch, std::vector<uint8_t>& covered) {
  covered.assign(a.rows, 0);
  for (int64_t b = 0; b < batch; b++) {
    const int64_t start = a.starts[b], len = a.lens[b];
    if (len < 0 || (len > 0 && (start < 0 || start + len > a.rows))) return b + 1;
    for (int64_t r = start; r < start + len; r++)
      if (covered[r]++) return b + 1;
  }
  return 0;
}

void clear_dead(const std::vector<uint8_t>& covered, const View<float>& x, int64_t heads, int64_t dim) {
  for (size_t r = 0; r < covered.size(); r++)
    if (!covered[r])
      for (int64_t h = 0; h < heads; h++) memset(x.at(r, h), 0, dim * sizeof(float));
}

struct Item {
  int32_t sequence, head;
  int64_t first, last;
};

// Longest first, so that the threads end together.
std::vector<Item> items_of(const Attention& a, int64_t batch, int64_t share) {
  std::vector<int32_t> order(batch);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return a.lens[x] > a.lens[y]; });
  std::vector<Item> items;
  for (int32_t s : order)
    for (int32_t h = 0; h < a.heads; h++)
      for (int64_t q = 0; q < a.lens[s]; q += share)
        items.push_back({s, h, q, std::min<int64_t>(q + share, a.lens[s])});
  return items;
}

}  // namespace

// ---- the interface -------------------------------------------------------------------------------

// The sets that this machine runs, best first, separated by spaces.
API const char* fasttx_instruction_sets() {
  static char text[64] = "";
  if (!*text)
    for (const Kernels* const* k = supported(); *k; k++) {
      if (*text) strcat(text, " ");
      strcat(text, (*k)->name);
    }
  return text;
}

// 0, or 1 where this machine does not run that set.
API int64_t fasttx_choose(const char* name) {
  for (const Kernels* const* k = supported(); *k; k++)
    if (!strcmp((*k)->name, name)) {
      chosen = *k;
      return 0;
    }
  return 1;
}

API const char* fasttx_chosen() { return kernels().name; }

// The entry points of an OpenMP runtime: GNU's (the first), or LLVM's (the other three).
API void fasttx_use_threads(void* gomp, void* fork, void* push_threads, void* thread) {
  gomp_parallel = reinterpret_cast<GompParallel>(gomp);
  kmp_fork = reinterpret_cast<KmpFork>(fork);
  kmp_push_threads = reinterpret_cast<KmpPushThreads>(push_threads);
  kmp_thread = reinterpret_cast<KmpThread>(thread);
}

// q, k, v, out, dout, dq, dk, dv: pointer, row stride, head stride (in floats). Null: not wanted.
struct Tensors {
  View<float> q, k, v, out, dout, dq, dk, dv;
};

static Attention attention_of(const Tensors& t, float* lse, const int32_t* starts, const int32_t* lens,
                              int64_t rows, int64_t heads, int64_t head_dim, float scale, int causal,
                              int64_t seed, uint32_t threshold) {
  auto input = [](const View<float>& x) { return View<const float>{x.data, x.row, x.head}; };
  return {input(t.q), input(t.k), input(t.v), input(t.out), input(t.dout), t.out, t.dq, t.dk, t.dv, lse,
          starts, lens, rows, heads, head_dim, scale, causal != 0, {(uint64_t)seed, threshold}};
}

static int64_t longest(const Attention& a, int64_t batch) {
  return batch ? *std::max_element(a.lens, a.lens + batch) : 0;
}

API int64_t fasttx_attention_forward(const Tensors* t, float* lse, const int32_t* starts,
                                     const int32_t* lens, int64_t batch, int64_t rows, int64_t heads,
                                     int64_t head_dim, float scale, int causal, int64_t seed,
                                     uint32_t threshold, int threads) {
  const Attention a = attention_of(*t, lse, starts, lens, rows, heads, head_dim, scale, causal, seed,
                                   threshold);
  std::vector<uint8_t> covered;
  if (int64_t wrong = cover(a, batch, covered)) return wrong;
  clear_dead(covered, a.written_out, heads, head_dim);
  clear_dead(covered, {lse, 1, rows}, heads, 1);
  const Kernels& k = kernels();
  const std::vector<Item> items = items_of(a, batch, QUERY_SHARE);
  const bool done = share_out(threads, items.size(), k.attention_scratch(longest(a, batch), head_dim, false),
                              [&](int64_t i, char* scratch) {
    const Item& item = items[i];
    k.attention_forward(a, item.sequence, item.head, item.first, item.last, scratch);
  });
  return done ? 0 : NO_MEMORY;
}

API int64_t fasttx_attention_backward(const Tensors* t, const float* lse, const int32_t* starts,
                                      const int32_t* lens, int64_t batch, int64_t rows, int64_t heads,
                                      int64_t head_dim, float scale, int causal, int64_t seed,
                                      uint32_t threshold, int threads) {
  const Attention a = attention_of(*t, const_cast<float*>(lse), starts, lens, rows, heads, head_dim, scale,
                                   causal, seed, threshold);
  std::vector<uint8_t> covered;
  if (int64_t wrong = cover(a, batch, covered)) return wrong;
  for (const View<float>& x : {a.dq, a.dk, a.dv}) clear_dead(covered, x, heads, head_dim);
  const Kernels& k = kernels();
  const std::vector<Item> items = items_of(a, batch, INT64_MAX / 2);
  const bool done = share_out(threads, items.size(), k.attention_scratch(longest(a, batch), head_dim, true),
                              [&](int64_t i, char* scratch) {
    k.attention_backward(a, items[i].sequence, items[i].head, scratch);
  });
  return done ? 0 : NO_MEMORY;
}

API int64_t fasttx_add_norm_forward(const float* h, const float* y, const float* bias, const float* gamma,
                                    const float* beta, float* sum, float* normed, float* mean, float* rstd,
                                    int64_t rows, int64_t columns, float eps, int64_t seed,
                                    uint32_t threshold, int threads) {
  AddNorm a = {};
  a.h = h, a.y = y, a.bias = bias, a.gamma = gamma, a.beta = beta;
  a.sum = sum, a.normed = normed, a.mean = mean, a.rstd = rstd;
  a.rows = rows, a.columns = columns, a.eps = eps, a.dropout = {(uint64_t)seed, threshold};
  const Kernels& k = kernels();
  return share_out(threads, shares(rows, ROW_SHARE), k.row_scratch(columns), [&](int64_t i, char* scratch) {
    k.add_norm_forward(a, i * ROW_SHARE, std::min(rows, (i + 1) * ROW_SHARE), scratch);
  }) ? 0 : NO_MEMORY;
}

API int64_t fasttx_add_norm_backward(const float* sum, const float* gamma, const float* mean,
                                     const float* rstd, const float* dsum, const float* dnormed, float* dh,
                                     float* dy, float* dgamma, float* dbeta, float* dbias, int64_t rows,
                                     int64_t columns, int64_t seed, uint32_t threshold, int threads) {
  AddNorm a = {};
  a.h = sum, a.gamma = gamma, a.mean = const_cast<float*>(mean), a.rstd = const_cast<float*>(rstd);
  a.dsum = dsum, a.dnormed = dnormed, a.dh = dh, a.dy = dy;
  a.rows = rows, a.columns = columns, a.dropout = {(uint64_t)seed, threshold};
  const Kernels& k = kernels();
  const int64_t chunks = shares(rows, PARTIAL_SHARE), stride = 3 * columns;
  std::vector<float> partial(chunks * stride);
  const bool done = share_out(threads, chunks, k.row_scratch(columns), [&](int64_t i, char* scratch) {
    k.add_norm_backward(a, i * PARTIAL_SHARE, std::min(rows, (i + 1) * PARTIAL_SHARE),
                        partial.data() + i * stride, scratch);
  });
  add_up(partial.data(), chunks, columns, stride, dgamma);
  add_up(partial.data() + columns, chunks, columns, stride, dbeta);
  add_up(partial.data() + 2 * columns, chunks, columns, stride, dbias);
  return done ? 0 : NO_MEMORY;
}

API int64_t fasttx_bias_act_forward(const float* u, const float* bias, float* out, int64_t rows,
                                    int64_t columns, int gelu, int64_t seed, uint32_t threshold,
                                    int threads) {
  BiasAct a = {};
  a.u = u, a.bias = bias, a.out = out;
  a.rows = rows, a.columns = columns, a.gelu = gelu, a.dropout = {(uint64_t)seed, threshold};
  const Kernels& k = kernels();
  return share_out(threads, shares(rows, ROW_SHARE), k.row_scratch(columns), [&](int64_t i, char* scratch) {
    k.bias_act_forward(a, i * ROW_SHARE, std::min(rows, (i + 1) * ROW_SHARE), scratch);
  }) ? 0 : NO_MEMORY;
}

// relu reads `out`; gelu reads `u` and `bias`.
API int64_t fasttx_bias_act_backward(const float* u, const float* bias, const float* out, const float* dout,
                                     float* du, float* dbias, int64_t rows, int64_t columns, int gelu,
                                     int64_t seed, uint32_t threshold, int threads) {
  BiasAct a = {};
  a.u = u, a.bias = bias, a.out = const_cast<float*>(out), a.dout = dout, a.du = du;
  a.rows = rows, a.columns = columns, a.gelu = gelu, a.dropout = {(uint64_t)seed, threshold};
  const Kernels& k = kernels();
  const int64_t chunks = shares(rows, PARTIAL_SHARE);
  std::vector<float> partial(chunks * columns);
  const bool done = share_out(threads, chunks, k.row_scratch(columns), [&](int64_t i, char* scratch) {
    k.bias_act_backward(a, i * PARTIAL_SHARE, std::min(rows, (i + 1) * PARTIAL_SHARE),
                        partial.data() + i * columns, scratch);
  });
  add_up(partial.data(), chunks, columns, columns, dbias);
  return done ? 0 : NO_MEMORY;
}

// Also returns i + 1 where row i has an id or a position outside its table.
API int64_t fasttx_embed_forward(const int64_t* ids, const int32_t* position_ids, const float* table,
                                 const float* positions, float* h, int64_t rows, int64_t columns,
                                 int64_t vocabulary, int64_t places, float scale, int64_t seed,
                                 uint32_t threshold, int threads) {
  for (int64_t r = 0; r < rows; r++)
    if (ids[r] < 0 || ids[r] >= vocabulary || position_ids[r] < 0 || position_ids[r] >= places) return r + 1;
  Embed a = {};
  a.ids = ids, a.position_ids = position_ids, a.table = table, a.positions = positions, a.h = h;
  a.rows = rows, a.columns = columns, a.vocabulary = vocabulary, a.scale = scale;
  a.dropout = {(uint64_t)seed, threshold};
  const Kernels& k = kernels();
  return share_out(threads, shares(rows, ROW_SHARE), k.row_scratch(columns), [&](int64_t i, char* scratch) {
    k.embed_forward(a, i * ROW_SHARE, std::min(rows, (i + 1) * ROW_SHARE), scratch);
  }) ? 0 : NO_MEMORY;
}

API int64_t fasttx_embed_backward(const int64_t* ids, const float* dh, float* dtable, int64_t rows,
                                  int64_t columns, int64_t vocabulary, float scale, int64_t seed,
                                  uint32_t threshold, int threads) {
  Embed a = {};
  a.ids = ids, a.dh = dh, a.dtable = dtable;
  a.rows = rows, a.columns = columns, a.vocabulary = vocabulary, a.scale = scale;
  a.dropout = {(uint64_t)seed, threshold};
  const Kernels& k = kernels();
  const int64_t divisor = threads < 1 ? 1 : threads;
  return share_out(threads, divisor, k.row_scratch(columns), [&](int64_t i, char* scratch) {
    k.embed_backward(a, i, divisor, scratch);
  }) ? 0 : NO_MEMORY;
}

// Keep bytes (rows, blocks) of counters (block0 + b, row0 + r, head, sequence).
API void fasttx_keep(uint8_t* out, int64_t row0, int rows, int64_t block0, int blocks, int64_t head,
                     int64_t sequence, int64_t seed, uint32_t threshold) {
  std::vector<uint8_t> bytes((size_t)rows * blocks + 256);
  kernels().keep(bytes.data(), row0, rows, block0, blocks, head, sequence, {(uint64_t)seed, threshold});
  memcpy(out, bytes.data(), (size_t)rows * blocks);
}
