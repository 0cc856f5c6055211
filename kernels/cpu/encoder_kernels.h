// What one instruction set's build offers for a whole encoder in one call, and the arguments it works
// on. A model is packed once, and is only read afterwards: any number of calls may run at a time.
#pragma once
#include <stddef.h>
#include <stdint.h>

// How the products of the blocks are computed. Everything else is float.
enum class Precision : int32_t {
  FP32 = 0,
  BF16 = 1,  // pairs of bfloat16, products of the attention too
  INT8 = 2,  // weights by channel and activations by row, symmetric; the attention stays float
};

// ---- the weights, as torch has them: contiguous, W (out, in) ---------------------------------------

struct NormWeights {
  const float *gamma, *beta;
  float eps;
};

struct LinearWeights {
  const float *weight, *bias;  // bias may be null
};

// A pre-norm block: h += out(attention(qkv(norm1(h)))), then h += down(act(up(norm2(h)))).
// A post-norm block: h = norm1(h + out(attention(qkv(h)))), then h = norm2(h + down(act(up(h)))).
struct BlockWeights {
  NormWeights norm1, norm2;
  LinearWeights qkv, out, up, down;
};

enum class HeadActivation : int32_t { GELU = 0, TANH = 1, RELU = 2 };

// embedding (vocabulary, e) and positions (places, e) are read where they lie; all else is copied.
// What a model lacks has null weights: embedding_norm, projection (d, e), and with post-norm blocks norm.
// first_row: the head reads a text's first row, not the mean of its rows.
struct EncoderWeights {
  int64_t d_model, embedding_width, heads, d_ff, layers, vocabulary, places, classes;
  int32_t gelu, post_norm, first_row;
  HeadActivation head_activation;
  float embedding_scale;
  const float *embedding, *positions;
  NormWeights embedding_norm;
  LinearWeights projection;
  const BlockWeights* blocks;
  NormWeights norm;
  LinearWeights dense, classify;
};

// ---- a call ----------------------------------------------------------------------------------------

// B texts: text b is ids[offsets[b]:offsets[b + 1]]. logits (B, classes).
struct Texts {
  const int32_t* ids;
  const int64_t* offsets;
  int64_t batch;
  float* logits;
};

// How a call is cut up. The bits of the logits do not depend on it.
enum class Split : int32_t {
  BY_SIZE = 0,
  COLUMNS = 1,  // few rows: the columns of every product are shared out, and so the weights
  ROWS = 2,     // many rows: a block of rows goes through several products, and stays in one cache
};

// A call is a sequence of phases, each of them a number of items that may run in any order and on any
// thread, once the phase before is over.
struct EncoderKernels {
  bool (*offers)(Precision);
  // Bytes of a packed model; 0 where this precision cannot hold such sizes.
  size_t (*model_bytes)(const EncoderWeights&, Precision);
  void (*pack)(const EncoderWeights&, Precision, void* model);
  // Bytes of one call's scratch, and its number of phases.
  size_t (*call_bytes)(const void* model, const Texts&, int threads, Split, int64_t* phases);
  // Lays out the scratch; items (phases,) of each phase.
  void (*start)(const void* model, const Texts&, int threads, Split, void* call, int64_t* items);
  void (*run)(void* call, int64_t phase, int64_t item, int thread);
};
