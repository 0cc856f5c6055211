// What one instruction set's build offers, and the arguments it works on.
// T rows, B sequences, H heads, D head_dim; every last dimension is contiguous.
//
// S is how linear layers' products and their gradients are stored, float or Bf16. All else is float,
// and so is all arithmetic: Bf16 is widened where it is loaded and rounded where it is stored.
#pragma once
#include <stddef.h>
#include <stdint.h>

// What has code here is in the object of every set. Where it is not inlined, the linker keeps one copy,
// which may be that of a set that this machine lacks.
#define ALWAYS_INLINE __attribute__((always_inline))

// bfloat16: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// Rows and heads of a (T, H, D) tensor, by strides counted in elements.
template <class T>
struct View {
  T* data;
  int64_t row, head;

  ALWAYS_INLINE T* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
};

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // keep where a 16-bit uniform is at least this; 0: no dropout

  ALWAYS_INLINE float scale() const { return threshold < 65536 ? 65536.0f / (65536 - threshold) : 0.0f; }
};

// Attention, but for the tensors that S stores.
struct Spans {
  float* lse;                    // (H, T): natural logarithm of each row's sum of exp
  const int32_t *starts, *lens;  // (B,)
  int64_t rows, heads, head_dim;
  float scale;
  bool causal;
  Dropout dropout;
};

template <class S>
struct Attention : Spans {
  View<const S> q, k, v, out, dout;  // out and dout: backward only
  View<S> written_out, dq, dk, dv;   // dq, dk, dv: backward only
};

// h' = h + dropout(y + bias), n = LayerNorm(h') * gamma + beta. (rows, columns), contiguous.
template <class S>
struct AddNorm {
  const float *h, *bias, *gamma, *beta;  // forward; backward reads h' as h
  const S* y;
  float *sum, *mean, *rstd;              // written by forward; mean and rstd (rows,)
  S* normed;
  const float* dsum;                     // gradients of h', which may be null, and of n
  const S* dnormed;
  float* dh;
  S* dy;
  int64_t rows, columns;
  float eps;
  Dropout dropout;
};

// out = dropout(act(u + bias)). (rows, columns), contiguous.
template <class S>
struct BiasAct {
  const S* u;                   // backward of relu reads neither u nor bias
  const float* bias;
  S* out;                       // forward writes it, backward of relu reads it
  const S* dout;
  S* du;
  int64_t rows, columns;
  bool gelu;
  Dropout dropout;
};

// (n, k) floats, by strides, of which one is 1.
struct Matrix {
  const float* data;
  int64_t row, column;
};

enum class Act { NONE, RELU, GELU };

// y = dropout(act(x W^T + bias)); x (rows, k), y (rows, n), contiguous. W is packed.
// With `gate`, the backward pass through what followed another product: y = (x W^T) dropout' act'.
template <class S>
struct Linear {
  const S* x;
  const float* bias;            // (n,), or null
  const S* gate;                // what came out of relu and dropout, what went into gelu; or null
  S *before, *y;                // before: what goes into act, or null
  int64_t rows, n, k;
  Act act;
  Dropout dropout;
};

// dw = g^T x, dbias = the sum of g's rows; g (rows, n), x (rows, k), contiguous.
template <class S>
struct WeightGradient {
  const S *g, *x;
  float *dw, *dbias;            // (n, k), (n,); dbias may be null
  int64_t rows, n, k;
};

// h = dropout(table[ids] * scale + positions[position_ids]). (rows, columns), contiguous.
struct Embed {
  const int64_t* ids;           // (rows,)
  const int32_t* position_ids;  // (rows,)
  const float *table, *positions, *dh;
  float *h, *dtable;
  int64_t rows, columns, vocabulary;
  float scale;
  Dropout dropout;
};

// Each function works on a share [first, last) that threads may take in any order; sums over shares
// are made elsewhere, in an order that does not depend on the number of threads.
template <class S>
struct StorageKernels {
  // Queries [first, last) of one sequence and head.
  void (*attention_forward)(const Attention<S>&, int sequence, int head, int64_t first, int64_t last,
                            char* scratch);
  void (*attention_backward)(const Attention<S>&, int sequence, int head, char* scratch);
  void (*add_norm_forward)(const AddNorm<S>&, int64_t first, int64_t last, char* scratch);
  // partial (3, columns): dgamma, dbeta, dbias of this share.
  void (*add_norm_backward)(const AddNorm<S>&, int64_t first, int64_t last, float* partial,
                            char* scratch);
  void (*bias_act_forward)(const BiasAct<S>&, int64_t first, int64_t last, char* scratch);
  // partial (columns,): dbias of this share.
  void (*bias_act_backward)(const BiasAct<S>&, int64_t first, int64_t last, float* partial,
                            char* scratch);
  // One panel of W (n, k), into panel * parts(k, unit) floats.
  void (*pack_panel)(const Matrix&, int64_t n, int64_t k, int64_t panel, float* out);
  // Rows [r0, r1), at most product_rows(k), and panels [p0, p1), whose first one `packed` begins with.
  void (*linear_forward)(const Linear<S>&, const float* packed, int64_t r0, int64_t r1, int64_t p0,
                         int64_t p1, char* scratch);
  // dw[n0:n1, k0:k1], where k0 is a multiple of `panel`; dbias[n0:n1] where k0 is 0.
  void (*weight_gradient)(const WeightGradient<S>&, int64_t n0, int64_t n1, int64_t k0, int64_t k1,
                          char* scratch);
  int64_t unit;  // numbers that are multiplied as one
};

struct EncoderKernels;  // of encoder_kernels.h

struct Kernels {
  const char* name;
  int64_t panel;  // columns of a packed panel
  StorageKernels<float> float32;
  StorageKernels<Bf16> bfloat16;
  // Bytes of scratch for one sequence of this length.
  size_t (*attention_scratch)(int64_t len, int64_t head_dim, bool backward);
  // Bytes of scratch for rows of this many columns.
  size_t (*row_scratch)(int64_t columns);
  // Bytes of scratch for a block of rows, and for a block (n, k) of a weight's gradient.
  size_t (*product_scratch)(int64_t n, int64_t k);
  size_t (*gradient_scratch)(int64_t n, int64_t k);
  int64_t (*product_rows)(int64_t k);
  void (*embed_forward)(const Embed&, int64_t first, int64_t last, char* scratch);
  // The rows of dtable whose id leaves this remainder, so that no two threads write to one row.
  void (*embed_backward)(const Embed&, int64_t remainder, int64_t divisor, char* scratch);
  // Keep bytes of counters (block0 + b, row0 + r, head, sequence), for tests.
  void (*keep)(uint8_t* out, uint64_t row0, int rows, uint64_t block0, int blocks, uint64_t head,
               uint64_t sequence, const Dropout&);
  const EncoderKernels* encoder;
};
