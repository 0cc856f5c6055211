// The C interface: picks an instruction set, checks spans, shares work out among threads.
//
// Every function returns 0, or the number of the first sequence (from 1) whose span is wrong, or
// NO_MEMORY. `bfloat16` says how what is given as void is stored: as Bf16, or else as float.
#include <string.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "interface.h"
#include "kernels.h"
#include "threads.h"

#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels fasttx_kernels_avx512bf16, fasttx_kernels_avx512, fasttx_kernels_avx2,
    fasttx_kernels_baseline;
#elif defined(__ARM_NEON)
extern const Kernels fasttx_kernels_neon;
#else
extern const Kernels fasttx_kernels_baseline;
#endif

namespace {

constexpr int64_t ROW_SHARE = 64;       // rows a thread takes at a time
constexpr int64_t PARTIAL_SHARE = 512;  // rows whose sums are added up together
constexpr int64_t QUERY_SHARE = 512;    // queries a thread takes at a time, of one sequence and head

// ---- instruction sets ----------------------------------------------------------------------------

#if defined(FASTTX_SETS)  // of a test, which emulates those that the machine lacks
const Kernels* const* supported() {
  static const Kernels* const sets[] = {FASTTX_SETS, nullptr};
  return sets;
}
#else
const Kernels* const* supported() {
  static const Kernels* found[5] = {};  // best first
  static const bool once = [] {
    int n = 0;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
      found[n++] = &fasttx_kernels_avx512bf16;
    if (avx512) found[n++] = &fasttx_kernels_avx512;
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
#endif

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() { return kernels_in_use(); }

// ---- shares --------------------------------------------------------------------------------------

int64_t shares(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Column sums: partial (chunks, columns) -> out (columns,), added up in order.
void add_up(const float* partial, int64_t chunks, int64_t columns, int64_t stride, float* out) {
  std::fill(out, out + columns, 0.0f);
  for (int64_t k = 0; k < chunks; k++)
    for (int64_t c = 0; c < columns; c++) out[c] += partial[k * stride + c];
}

// work(first, last, scratch) for every share of the rows.
template <class Work>
int64_t share_rows(int threads, int64_t rows, int64_t columns, const Work& work) {
  return share_out(threads, shares(rows, ROW_SHARE), kernels().row_scratch(columns),
                   [&](int64_t i, char* scratch) {
    work(i * ROW_SHARE, std::min(rows, (i + 1) * ROW_SHARE), scratch);
  });
}

// work(first, last, partial, scratch) for every share of the rows, whose sums over columns it leaves
// in partial (sums, columns). They are added up in order.
template <class Work>
int64_t share_sums(int threads, int64_t rows, int64_t columns, std::initializer_list<float*> sums,
                   const Work& work) {
  const int64_t chunks = shares(rows, PARTIAL_SHARE), stride = (int64_t)sums.size() * columns;
  std::vector<float> partial(chunks * stride);
  const int64_t code = share_out(threads, chunks, kernels().row_scratch(columns),
                                 [&](int64_t i, char* scratch) {
    work(i * PARTIAL_SHARE, std::min(rows, (i + 1) * PARTIAL_SHARE), partial.data() + i * stride, scratch);
  });
  const float* from = partial.data();
  for (float* to : sums) {
    add_up(from, chunks, columns, stride, to);
    from += columns;
  }
  return code;
}

// ---- products ------------------------------------------------------------------------------------

constexpr int64_t FEW_PANELS = 4;         // that are packed together, and used before they leave the cache
constexpr int64_t THREAD_WORK = 1 << 18;  // multiplications that are worth another thread

int worthwhile(int threads, int64_t work) {
  return (int)std::min<int64_t>(threads, std::max<int64_t>(1, work / THREAD_WORK));
}

thread_local Room packed_room;  // a weight, as panels

// y of `a`, whose weight is not packed. Many rows: the weight is packed once, and blocks of rows are
// shared out. Few: the panels are, and each is packed by the thread that multiplies with it.
template <class S>
int64_t multiply(const StorageKernels<S>& k, const Linear<S>& a, const Matrix& w, int threads) {
  const int64_t panels = shares(a.n, kernels().panel), depth = shares(a.k, k.unit);
  const int64_t panel = depth * kernels().panel;
  const size_t scratch = kernels().product_scratch(a.n, a.k);
  threads = worthwhile(threads, a.rows * a.n * a.k);
  if (a.rows <= kernels().product_rows(a.k)) {
    const int64_t items = std::min<int64_t>(threads, panels);
    const size_t own = shares(FEW_PANELS * panel * sizeof(float), 64) * 64;
    return share_out(threads, items, own + scratch, [&](int64_t i, char* space) {
      float* packed = reinterpret_cast<float*>(space);
      const int64_t end = panels * (i + 1) / items;
      for (int64_t first = panels * i / items; first < end; first += FEW_PANELS) {
        const int64_t last = std::min(end, first + FEW_PANELS);
        for (int64_t p = first; p < last; p++) k.pack_panel(w, a.n, a.k, p, packed + (p - first) * panel);
        k.linear_forward(a, packed, 0, a.rows, first, last, space + own);
      }
    });
  }
  float* packed = reinterpret_cast<float*>(packed_room.of(panels * panel * sizeof(float)));
  if (!packed) return NO_MEMORY;
  if (int64_t code = share_out(threads, panels, 64, [&](int64_t p, char*) {
        k.pack_panel(w, a.n, a.k, p, packed + p * panel);
      }))
    return code;
  const int64_t block = std::min(kernels().product_rows(a.k), shares(a.rows, threads));
  return share_out(threads, shares(a.rows, block), scratch, [&](int64_t i, char* space) {
    k.linear_forward(a, packed, i * block, std::min(a.rows, (i + 1) * block), 0, panels, space);
  });
}

// Each thread has a block of dw, as square as can be: a block's sides are what is packed for it.
template <class S>
int64_t sum_products(const StorageKernels<S>& k, const WeightGradient<S>& a, int threads) {
  threads = worthwhile(threads, a.rows * a.n * a.k);
  const int64_t panel = kernels().panel, panels = shares(a.k, panel);
  int64_t over_n = 1;
  for (int64_t t = 2; t <= threads; t++)
    if (threads % t == 0 && a.n / t + a.k * t / threads < a.n / over_n + a.k * over_n / threads) over_n = t;
  const int64_t over_k = threads / over_n;
  const size_t scratch = kernels().gradient_scratch(shares(a.n, over_n), shares(panels, over_k) * panel);
  return share_out(threads, threads, scratch, [&](int64_t i, char* space) {
    const int64_t x = i % over_n, y = i / over_n;
    k.weight_gradient(a, a.n * x / over_n, a.n * (x + 1) / over_n, panels * y / over_k * panel,
                      std::min(a.k, panels * (y + 1) / over_k * panel), space);
  });
}

// ---- spans ---------------------------------------------------------------------------------------

// Rows that belong to a sequence, in `covered`; the first sequence (from 1) that leaves the rows or
// shares one with another, or 0.
int64_t cover(const Spans& a, int64_t batch, std::vector<uint8_t>& covered) {
  covered.assign(a.rows, 0);
  for (int64_t b = 0; b < batch; b++) {
    const int64_t start = a.starts[b], len = a.lens[b];
    if (len < 0 || (len > 0 && (start < 0 || start + len > a.rows))) return b + 1;
    for (int64_t r = start; r < start + len; r++)
      if (covered[r]++) return b + 1;
  }
  return 0;
}

template <class S>
void clear_dead(const std::vector<uint8_t>& covered, const View<S>& x, int64_t heads, int64_t dim) {
  for (size_t r = 0; r < covered.size(); r++)
    if (!covered[r])
      for (int64_t h = 0; h < heads; h++) memset(x.at(r, h), 0, dim * sizeof(S));
}

struct Item {
  int32_t sequence, head;
  int64_t first, last;
};

// Longest first, so that the threads end together.
std::vector<Item> items_of(const Spans& a, int64_t batch, int64_t share) {
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

const Kernels& kernels_in_use() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  return k ? *k : *supported()[0];
}

// ---- the interface -------------------------------------------------------------------------------

// Changes with the arguments below, and with kernels/cpu/library.py, which asks for it: a library
// that was built before the Python beside it would read other arguments than it is given.
API int64_t fasttx_interface() { return 4; }

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

// work(kernels), those for tensors that are stored like this.
template <class Work>
static int64_t in_storage(int bfloat16, const Work& work) {
  return bfloat16 ? work(kernels().bfloat16) : work(kernels().float32);
}

// For decltype: what the tensors of these kernels hold.
template <class S>
S storage_of(const StorageKernels<S>&);

// q, k, v, out, dout, dq, dk, dv: pointer, row stride, head stride (in elements). Null: not wanted.
struct Tensors {
  View<void> q, k, v, out, dout, dq, dk, dv;
};

template <class S>
static Attention<S> attention_of(const Tensors& t, const Spans& spans) {
  auto input = [](const View<void>& x) { return View<const S>{(const S*)x.data, x.row, x.head}; };
  auto output = [](const View<void>& x) { return View<S>{(S*)x.data, x.row, x.head}; };
  return {spans, input(t.q), input(t.k), input(t.v), input(t.out), input(t.dout),
          output(t.out), output(t.dq), output(t.dk), output(t.dv)};
}

static int64_t longest(const Spans& a, int64_t batch) {
  return batch ? *std::max_element(a.lens, a.lens + batch) : 0;
}

API int64_t fasttx_attention_forward(int bfloat16, const Tensors* t, float* lse, const int32_t* starts,
                                     const int32_t* lens, int64_t batch, int64_t rows, int64_t heads,
                                     int64_t head_dim, float scale, int causal, int64_t seed,
                                     uint32_t threshold, int threads) {
  const Spans spans = {lse, starts, lens, rows, heads, head_dim, scale, causal != 0,
                       {(uint64_t)seed, threshold}};
  std::vector<uint8_t> covered;
  if (int64_t wrong = cover(spans, batch, covered)) return wrong;
  clear_dead(covered, View<float>{lse, 1, rows}, heads, 1);
  const std::vector<Item> items = items_of(spans, batch, QUERY_SHARE);
  const size_t scratch = kernels().attention_scratch(longest(spans, batch), head_dim, false);
  return in_storage(bfloat16, [&](const auto& k) {
    const auto a = attention_of<decltype(storage_of(k))>(*t, spans);
    clear_dead(covered, a.written_out, heads, head_dim);
    return share_out(threads, items.size(), scratch, [&](int64_t i, char* space) {
      const Item& item = items[i];
      k.attention_forward(a, item.sequence, item.head, item.first, item.last, space);
    });
  });
}

API int64_t fasttx_attention_backward(int bfloat16, const Tensors* t, const float* lse,
                                      const int32_t* starts, const int32_t* lens, int64_t batch,
                                      int64_t rows, int64_t heads, int64_t head_dim, float scale, int causal,
                                      int64_t seed, uint32_t threshold, int threads) {
  const Spans spans = {const_cast<float*>(lse), starts, lens, rows, heads, head_dim, scale, causal != 0,
                       {(uint64_t)seed, threshold}};
  std::vector<uint8_t> covered;
  if (int64_t wrong = cover(spans, batch, covered)) return wrong;
  const std::vector<Item> items = items_of(spans, batch, INT64_MAX / 2);
  const size_t scratch = kernels().attention_scratch(longest(spans, batch), head_dim, true);
  return in_storage(bfloat16, [&](const auto& k) {
    const auto a = attention_of<decltype(storage_of(k))>(*t, spans);
    for (const auto& x : {a.dq, a.dk, a.dv}) clear_dead(covered, x, heads, head_dim);
    return share_out(threads, items.size(), scratch, [&](int64_t i, char* space) {
      k.attention_backward(a, items[i].sequence, items[i].head, space);
    });
  });
}

API int64_t fasttx_add_norm_forward(int bfloat16, const float* h, const void* y, const float* bias,
                                    const float* gamma, const float* beta, float* sum, void* normed,
                                    float* mean, float* rstd, int64_t rows, int64_t columns, float eps,
                                    int64_t seed, uint32_t threshold, int threads) {
  return in_storage(bfloat16, [&](const auto& k) {
    using S = decltype(storage_of(k));
    AddNorm<S> a = {};
    a.h = h, a.y = (const S*)y, a.bias = bias, a.gamma = gamma, a.beta = beta;
    a.sum = sum, a.normed = (S*)normed, a.mean = mean, a.rstd = rstd;
    a.rows = rows, a.columns = columns, a.eps = eps, a.dropout = {(uint64_t)seed, threshold};
    return share_rows(threads, rows, columns, [&](int64_t first, int64_t last, char* scratch) {
      k.add_norm_forward(a, first, last, scratch);
    });
  });
}

API int64_t fasttx_add_norm_backward(int bfloat16, const float* sum, const float* gamma, const float* mean,
                                     const float* rstd, const float* dsum, const void* dnormed, float* dh,
                                     void* dy, float* dgamma, float* dbeta, float* dbias, int64_t rows,
                                     int64_t columns, int64_t seed, uint32_t threshold, int threads) {
  return in_storage(bfloat16, [&](const auto& k) {
    using S = decltype(storage_of(k));
    AddNorm<S> a = {};
    a.h = sum, a.gamma = gamma, a.mean = const_cast<float*>(mean), a.rstd = const_cast<float*>(rstd);
    a.dsum = dsum, a.dnormed = (const S*)dnormed, a.dh = dh, a.dy = (S*)dy;
    a.rows = rows, a.columns = columns, a.dropout = {(uint64_t)seed, threshold};
    return share_sums(threads, rows, columns, {dgamma, dbeta, dbias},
                      [&](int64_t first, int64_t last, float* partial, char* scratch) {
      k.add_norm_backward(a, first, last, partial, scratch);
    });
  });
}

API int64_t fasttx_bias_act_forward(int bfloat16, const void* u, const float* bias, void* out, int64_t rows,
                                    int64_t columns, int gelu, int64_t seed, uint32_t threshold,
                                    int threads) {
  return in_storage(bfloat16, [&](const auto& k) {
    using S = decltype(storage_of(k));
    BiasAct<S> a = {};
    a.u = (const S*)u, a.bias = bias, a.out = (S*)out;
    a.rows = rows, a.columns = columns, a.gelu = gelu, a.dropout = {(uint64_t)seed, threshold};
    return share_rows(threads, rows, columns, [&](int64_t first, int64_t last, char* scratch) {
      k.bias_act_forward(a, first, last, scratch);
    });
  });
}

// relu reads `out`; gelu reads `u` and `bias`.
API int64_t fasttx_bias_act_backward(int bfloat16, const void* u, const float* bias, const void* out,
                                     const void* dout, void* du, float* dbias, int64_t rows,
                                     int64_t columns, int gelu, int64_t seed, uint32_t threshold,
                                     int threads) {
  return in_storage(bfloat16, [&](const auto& k) {
    using S = decltype(storage_of(k));
    BiasAct<S> a = {};
    a.u = (const S*)u, a.bias = bias, a.out = (S*)out, a.dout = (const S*)dout, a.du = (S*)du;
    a.rows = rows, a.columns = columns, a.gelu = gelu, a.dropout = {(uint64_t)seed, threshold};
    return share_sums(threads, rows, columns, {dbias},
                      [&](int64_t first, int64_t last, float* partial, char* scratch) {
      k.bias_act_backward(a, first, last, partial, scratch);
    });
  });
}

// y (rows, n) = dropout(act(x W^T + bias)); W (n, k) by strides, of which one is 1. bias, gate and
// before (rows, n) may be null: see Linear.
API int64_t fasttx_linear_forward(int bfloat16, const void* x, const float* w, int64_t w_row,
                                  int64_t w_column, const float* bias, const void* gate, void* before,
                                  void* y, int64_t rows, int64_t n, int64_t k, int act, int64_t seed,
                                  uint32_t threshold, int threads) {
  return in_storage(bfloat16, [&](const auto& kernels) {
    using S = decltype(storage_of(kernels));
    const Linear<S> a = {(const S*)x, bias, (const S*)gate, (S*)before, (S*)y, rows, n, k, (Act)act,
                         {(uint64_t)seed, threshold}};
    return multiply(kernels, a, Matrix{w, w_row, w_column}, threads);
  });
}

// dw (n, k) = g^T x, and the sum of g's rows in dbias, unless it is null.
API int64_t fasttx_weight_gradient(int bfloat16, const void* g, const void* x, float* dw, float* dbias,
                                   int64_t rows, int64_t n, int64_t k, int threads) {
  return in_storage(bfloat16, [&](const auto& kernels) {
    using S = decltype(storage_of(kernels));
    return sum_products(kernels, WeightGradient<S>{(const S*)g, (const S*)x, dw, dbias, rows, n, k}, threads);
  });
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
  return share_rows(threads, rows, columns, [&](int64_t first, int64_t last, char* scratch) {
    kernels().embed_forward(a, first, last, scratch);
  });
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
  });
}

// Keep bytes (rows, blocks) of counters (block0 + b, row0 + r, head, sequence).
API void fasttx_keep(uint8_t* out, int64_t row0, int rows, int64_t block0, int blocks, int64_t head,
                     int64_t sequence, int64_t seed, uint32_t threshold) {
  std::vector<uint8_t> bytes((size_t)rows * blocks + 256);
  kernels().keep(bytes.data(), row0, rows, block0, blocks, head, sequence, {(uint64_t)seed, threshold});
  memcpy(out, bytes.data(), (size_t)rows * blocks);
}
