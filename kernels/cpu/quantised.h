// Units of whole numbers, for products of 8-bit weights and activations: four to a unit where an
// instruction multiplies and adds four, else two of 16 bits. Sums are exact, so they are the same
// numbers in every set.
#pragma once
#include "products.h"

namespace FASTTX_ISA {

// The vectors of a tile hold whole numbers here, in the lanes of F.
#if defined(__AVX512VNNI__)
struct Bytes {
  using Stored = uint8_t;
  static constexpr int PER = 4;
  static constexpr int OFFSET = 128;  // the instruction wants activations of no sign: x + 128
  INLINE F multiply_add(F sum, F a, F b) {
    return (F)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  }
};
#elif defined(__ARM_NEON)
struct Bytes {
  using Stored = int8_t;
  static constexpr int PER = 4;
  static constexpr int OFFSET = 0;
  INLINE F multiply_add(F sum, F a, F b) {
    const int8x16_t x = (int8x16_t)a, w = (int8x16_t)b;
#if defined(__ARM_FEATURE_DOTPROD)
    return (F)vdotq_s32((int32x4_t)sum, x, w);
#else
    // Products of numbers up to 127, and sums of two of them, fit 16 bits.
    const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(w));
    const int16x8_t high = vmull_s8(vget_high_s8(x), vget_high_s8(w));
    const int16x8_t pairs = vcombine_s16(vpadd_s16(vget_low_s16(low), vget_high_s16(low)),
                                         vpadd_s16(vget_low_s16(high), vget_high_s16(high)));
    return (F)vpadalq_s16((int32x4_t)sum, pairs);
#endif
  }
};
#else
struct Bytes {
  using Stored = int16_t;
  static constexpr int PER = 2;
  static constexpr int OFFSET = 0;
  INLINE F multiply_add(F sum, F a, F b) {
// The addition by hand, into the register of the sum: a compiler that renames it needs one more than
// there are.
#if defined(__AVX512F__)
    const __m512i products = _mm512_madd_epi16((__m512i)a, (__m512i)b);
    asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(products));
    return sum;
#elif defined(__AVX2__)
    const __m256i products = _mm256_madd_epi16((__m256i)a, (__m256i)b);
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
#elif defined(__SSE2__)
    return (F)((I)sum + (I)_mm_madd_epi16((__m128i)a, (__m128i)b));
#else
    int16_t x[2 * W], w[2 * W];
    int32_t s[W];
    memcpy(x, &a, sizeof a), memcpy(w, &b, sizeof b), memcpy(s, &sum, sizeof sum);
    for (int i = 0; i < W; i++) s[i] += x[2 * i] * w[2 * i] + x[2 * i + 1] * w[2 * i + 1];
    memcpy(&sum, s, sizeof sum);
    return sum;
#endif
  }
};
#endif

constexpr float LARGEST = 127;
// A sum of this many products fits 32 bits, also of those that are 128 too large.
constexpr int64_t DEEPEST = 65536;

INLINE F absolute(F x) { return (F)((I)x & 0x7FFFFFFF); }

INLINE float largest(F v) {
  float lanes[W];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

INLINE F nearest(F x) {
  const F shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  return (x + shift) - shift;
}

// x = scale * q for a row of x. What x holds up to a multiple of W must be numbers too; scale is NaN
// where one of them is not finite.
INLINE float quantise_row(const float* x, int64_t columns, Bytes::Stored* q) {
  typedef Bytes::Stored Narrow __attribute__((vector_size(sizeof(Bytes::Stored) * W)));
  F most = {}, unsound = {};
  for (int64_t c = 0; c < columns; c += W) {
    const F v = load(x + c);
    most = max(most, absolute(v));
    unsound += v - v;
  }
  const float top = largest(most), inverse = top > 1e-30f ? LARGEST / top : 0.0f;
  for (int64_t c = 0; c < columns; c += W) {
    const I whole = __builtin_convertvector(nearest(load(x + c) * inverse), I) + Bytes::OFFSET;
    const Narrow narrow = __builtin_convertvector(whole, Narrow);
    memcpy(q + c, &narrow, sizeof narrow);
  }
  return top / LARGEST + sum(unsound);
}

}  // namespace FASTTX_ISA
