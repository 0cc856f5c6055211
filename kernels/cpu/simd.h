// Vectors of one instruction set, for a source that is compiled once per set.
// GCC and Clang vector extensions carry the arithmetic; intrinsics stand only where no portable
// expression compiles to the right instruction.
#pragma once
#include <string.h>

#include <utility>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// Each set has names of its own: nothing compiled for one may be called from another.
#if defined(__AVX512BF16__)
#define FASTTX_ISA avx512bf16
#elif defined(__AVX512F__)
#define FASTTX_ISA avx512
#elif defined(__AVX2__)
#define FASTTX_ISA avx2
#elif defined(__ARM_NEON)
#define FASTTX_ISA neon
#else
#define FASTTX_ISA baseline
#endif

namespace FASTTX_ISA {

// W lanes. A tile of a product keeps MR rows of NR vectors in registers; a product into C keeps MR
// rows of (at most) NC vectors.
#if defined(__AVX512F__)
constexpr int W = 16, MR = 8, NR = 3, NC = 2;  // 32 registers
#elif defined(__AVX2__)
constexpr int W = 8, MR = 4, NR = 3, NC = 2;  // 16 registers
#elif defined(__ARM_NEON)
constexpr int W = 4, MR = 4, NR = 4, NC = 4;  // 32 registers
#else
constexpr int W = 4, MR = 4, NR = 2, NC = 2;  // 16 registers, no fused multiply-add
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));    // as many lanes as F, of half the size
typedef uint16_t U16 __attribute__((vector_size(4 * W)));  // 2 W lanes
typedef uint32_t U32 __attribute__((vector_size(4 * W)));
typedef uint64_t U64 __attribute__((vector_size(4 * W)));  // W / 2 lanes

INLINE F splat(float x) { return F{} + x; }

INLINE F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float* p, F v) { memcpy(p, &v, sizeof v); }

INLINE F widen(H v) { return (F)(__builtin_convertvector(v, U32) << 16); }

// To the nearest, ties to even. By integers: few machines with AVX-512 have its bfloat16 instructions.
INLINE H narrow(F v) {
  const U32 bits = (U32)v;
  const U32 rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
  const U32 nan = (U32)(v != v);  // which rounding could carry into the sign
  return __builtin_convertvector(((rounded & ~nan) | ((bits | 0x400000u) & nan)) >> 16, H);
}

INLINE F load(const Bf16* p) {
  H v;
  memcpy(&v, p, sizeof v);
  return widen(v);
}

INLINE void store(Bf16* p, F v) {
  const H rounded = narrow(v);
  memcpy(p, &rounded, sizeof rounded);
}

// The first n lanes (0 < n <= W); the others read 0.
INLINE F load_first(const float* p, int n) {
  if (n >= W) return load(p);
  F v = {};
  memcpy(&v, p, 4 * n);
  return v;
}

INLINE F load_first(const Bf16* p, int n) {
  if (n >= W) return load(p);
  H v = {};
  memcpy(&v, p, 2 * n);
  return widen(v);
}

INLINE void store_first(float* p, F v, int n) {
  if (n >= W) return store(p, v);
  memcpy(p, &v, 4 * n);
}

INLINE void store_first(Bf16* p, F v, int n) {
  if (n >= W) return store(p, v);
  const H rounded = narrow(v);
  memcpy(p, &rounded, 2 * n);
}

// A scalar from memory into all lanes. The barrier keeps the load from being folded into each
// multiply-add that uses it, which would load it once for every vector of the tile.
INLINE F broadcast(const float* p) {
#if defined(__AVX512F__)
  F v = _mm512_set1_ps(*p);
  asm("" : "+v"(v));
#elif defined(__AVX2__)
  F v = _mm256_broadcast_ss(p);
  asm("" : "+x"(v));
#else
  int32_t bits;  // its bits as they are: a unit may hold whole numbers
  memcpy(&bits, p, sizeof bits);
  F v = (F)(I{} + bits);
#endif
  return v;
}

INLINE F select(I mask, F a, F b) { return (F)((mask & (I)a) | (~mask & (I)b)); }
INLINE F max(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}

INLINE I lane_index() {
  I v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}

// x where the lane's bit is 1, else 0 (whatever x is).
INLINE F keep_lanes(F x, uint32_t bits) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps((__mmask16)bits, x);
#else
  const I bit = (I{} + 1) << lane_index();
  return (F)((((I{} + (int32_t)bits) & bit) == bit) & (I)x);
#endif
}

// Products of the low halves of 64-bit lanes.
INLINE U64 mul_wide(U64 a, U64 b) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
  return (U64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// ---- shuffles: a transpose, and W horizontal reductions at a time --------------------------------

template <int... L>
INLINE F zip_low(F a, F b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (L / 2 + (L % 2) * W)...);
}

template <int... L>
INLINE F zip_high(F a, F b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (W / 2 + L / 2 + (L % 2) * W)...);
}

INLINE F zip_low(F a, F b) { return zip_low(a, b, std::make_integer_sequence<int, W>{}); }
INLINE F zip_high(F a, F b) { return zip_high(a, b, std::make_integer_sequence<int, W>{}); }

// W rows become W columns: log2(W) perfect shuffles. On AVX2 such a shuffle takes two instructions, and
// there are shuffles that take one.
INLINE void transpose(F r[W]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  F t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#else
  F t[W];
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; i++) {
      t[2 * i] = zip_low(r[i], r[i + W / 2]);
      t[2 * i + 1] = zip_high(r[i], r[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) r[i] = t[i];
  }
#endif
}

// Lane i of the result is the reduction of r[i] by `op`; r is destroyed.
template <class Op>
INLINE F reduce_rows(F r[W], Op op) {
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++)
      r[i] = op(zip_low(r[i], r[i + half]), zip_high(r[i], r[i + half]));
  return r[0];
}

INLINE float sum(F v) {
  float lanes[W];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// ---- functions -----------------------------------------------------------------------------------

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

// 2^x for x <= 127, 0 below 2^-125 (no subnormal numbers, which are slow), NaN stays.
// Degree-5 minimax polynomial on [-1/2, 1/2]: relative error 9e-8.
INLINE F exp2(F x) {
#if defined(__AVX512F__)
  F n = _mm512_roundscale_ps(x, 8);
#else
  const F shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  F n = (max(x, splat(-126.0f)) + shift) - shift;
#endif
  F f = x - n;
  F p = splat(1.3264729e-3f);
  p = p * f + 9.6715132e-3f;
  p = p * f + 5.5507337e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  __mmask16 keep = _mm512_cmp_ps_mask(x, splat(-125.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(keep, p, n);
#else
  F power = (F)((__builtin_convertvector(n, I) + 127) << 23);
  return (F)(~(x < -125.0f) & (I)(p * power));
#endif
}

// ln x for normal x > 0: x = m 2^e with m in [2/3, 4/3), ln m = 2 artanh((m - 1) / (m + 1)).
INLINE F log(F x) {
  I e = (((I)(x * (4.0f / 3.0f)) >> 23) & 0xFF) - 127;
  F m = (F)((I)x - (e << 23));
  F t = (m - 1.0f) / (m + 1.0f), u = t * t;
  F p = u * (2.0f / 9) + 2.0f / 7;
  p = p * u + 2.0f / 5;
  p = p * u + 2.0f / 3;
  p = p * u + 2.0f;
  return __builtin_convertvector(e, F) * LN2 + p * t;
}

// From e^(-2 |x|), which does not overflow.
INLINE F tanh(F x) {
  F e = exp2((F)((I)x & 0x7FFFFFFF) * (-2 * LOG2E));
  F y = (1.0f - e) / (1.0f + e);
  return select(x < 0.0f, -y, y) + (x - x);  // NaN stays
}

// The normal distribution's Phi(x) and phi(x). erf by Abramowitz and Stegun 7.1.26, error 1.5e-7.
INLINE void normal(F x, F& cdf, F& pdf) {
  F z = (F)((I)x & 0x7FFFFFFF) * 0.70710678118654752f;
  F t = 1.0f / (z * 0.3275911f + 1.0f);
  F p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  F e = exp2(z * z * -LOG2E);
  F tail = p * t * e * 0.5f;
  cdf = select(x < 0.0f, tail, 1.0f - tail);
  pdf = e * 0.3989422804014327f;
}

}  // namespace FASTTX_ISA
