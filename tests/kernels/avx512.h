// AVX-512 by its definition, for machines without it: included before kernels/cpu/isa.cpp, which is then
// compiled with -mavx2 -mfma. What the kernels do with vector types the compiler makes of two halves;
// here are the intrinsics. One that is missing ends the compilation.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#define FASTTX_EMULATED 1
#define __AVX512F__ 1
#if defined(EMULATE_BFLOAT16)
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif
#define asm(...)  // which hold a value in a register of AVX-512

namespace emulated {

template <class Lane>
static inline __m512 lanes(Lane lane) {
  __m512 out;
  for (int i = 0; i < 16; i++) out[i] = lane(i);
  return out;
}

static inline __m512 set1(float x) {  // its bits as they are: they may be whole numbers
  __m512 out;
  for (int i = 0; i < 16; i++) memcpy((char*)&out + 4 * i, &x, 4);
  return out;
}

static inline __m512 max(__m512 a, __m512 b) {  // b where one is NaN
  return lanes([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}

static inline __m512 keep(__mmask16 mask, __m512 x) {
  return lanes([&](int i) { return mask >> i & 1 ? x[i] : 0.0f; });
}

static inline __m512i multiply_low_halves(__m512i a, __m512i b) {
  __m512i out;
  for (int i = 0; i < 8; i++) out[i] = (long long)((uint64_t)(uint32_t)a[i] * (uint32_t)b[i]);
  return out;
}

template <int how>
static inline __m512 round_scale(__m512 x) {
  static_assert(how == 8, "to the nearest integer, ties to even");
  return lanes([&](int i) { return rintf(x[i]); });
}

template <int how>
static inline __mmask16 compare(__m512 a, __m512 b) {
  static_assert(how == _CMP_NLT_UQ, "not less than, or unordered");
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= (unsigned)!(a[i] < b[i]) << i;
  return (__mmask16)mask;
}

static inline __m512 scale(__m512 x, __m512 power) {  // x 2^floor(power)
  return lanes([&](int i) {
    const float n = floorf(power[i]);
    return n != n ? n : ldexpf(x[i], (int)fminf(fmaxf(n, -400.0f), 400.0f));
  });
}

// Two fused multiplications, the odd one first; subnormal numbers are 0, those that go in and come out.
static inline __m512 dot_pairs(__m512 sum, __m512bh a, __m512bh b) {
  uint32_t pairs_a[16], pairs_b[16];
  memcpy(pairs_a, &a, sizeof pairs_a);
  memcpy(pairs_b, &b, sizeof pairs_b);
  const auto normal = [](float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; };
  const auto number = [&](uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return normal(x);
  };
  return lanes([&](int i) {
    const uint32_t upper = 0xFFFF0000u;
    float x = fmaf(number(pairs_a[i] & upper), number(pairs_b[i] & upper), normal(sum[i]));
    x = fmaf(number(pairs_a[i] << 16), number(pairs_b[i] << 16), normal(x));
    return normal(x);
  });
}

static inline __m512i multiply_add_pairs(__m512i a, __m512i b) {
  int16_t x[32], y[32];
  int32_t sums[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; i++) sums[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  __m512i out;
  memcpy(&out, sums, sizeof out);
  return out;
}

// The first factor has no sign.
static inline __m512i dot_bytes(__m512i sum, __m512i a, __m512i b) {
  uint8_t x[64];
  int8_t y[64];
  int32_t sums[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  memcpy(sums, &sum, sizeof sums);
  for (int i = 0; i < 64; i++) sums[i / 4] += x[i] * y[i];
  __m512i out;
  memcpy(&out, sums, sizeof out);
  return out;
}

}  // namespace emulated

#undef _mm512_roundscale_ps
#undef _mm512_cmp_ps_mask
#define _mm512_set1_ps emulated::set1
#define _mm512_max_ps emulated::max
#define _mm512_maskz_mov_ps emulated::keep
#define _mm512_mul_epu32 emulated::multiply_low_halves
#define _mm512_roundscale_ps(x, how) emulated::round_scale<how>(x)
#define _mm512_cmp_ps_mask(a, b, how) emulated::compare<how>(a, b)
#define _mm512_maskz_scalef_ps(mask, x, power) emulated::keep(mask, emulated::scale(x, power))
#define _mm512_dpbf16_ps emulated::dot_pairs
#define _mm512_madd_epi16 emulated::multiply_add_pairs
#define _mm512_dpbusd_epi32 emulated::dot_bytes
