// The part of the Metal Shading Language that our kernels use, as C++17. See emulator.py.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include "fibers.h"

typedef uint8_t uchar;
typedef uint32_t uint;
typedef uint16_t ushort_;  // glibc has a ushort and a ulong of its own
typedef uint64_t ulong_;
#define ushort ushort_
#define ulong ulong_
typedef _Float16 half;

struct bfloat {  // rounds to nearest, ties to even
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    bits = x != x ? 0x7FC0 : uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};

template <class T, int N> struct vec;
template <class T> struct vec<T, 2> {
  T x, y;
  vec(T x = T()) : x(x), y(x) {}
  vec(T x, T y) : x(x), y(y) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};
template <class T> struct vec<T, 3> {
  T x, y, z;
  vec(T x = T()) : x(x), y(x), z(x) {}
  vec(T x, T y, T z) : x(x), y(y), z(z) {}
};
template <class T> struct vec<T, 4> {
  T x, y, z, w;
  vec(T x = T()) : x(x), y(x), z(x), w(x) {}
  vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};
typedef vec<float, 2> float2;
typedef vec<half, 2> half2;
typedef vec<short, 2> short2;
typedef vec<uint, 2> uint2;
typedef vec<ulong, 2> ulong2;
typedef vec<uint, 3> uint3;
typedef vec<uint, 4> uint4;

namespace emulator {

// A pointer into a buffer that knows where the buffer ends.
template <class T> struct checked {
  T *p, *begin, *end;
  T& operator[](long i) const {
    T* at = p + i;
    if (at < begin || at >= end) fail("out of bounds of a buffer", __LINE__);
    return *at;
  }
  T& operator*() const { return (*this)[0]; }
  checked operator+(long i) const { return {p + i, begin, end}; }
  checked& operator+=(long i) { p += i; return *this; }
  operator checked<const T>() const { return {p, begin, end}; }
};

// What a launch passes for each buffer: its first and its past-the-last byte.
struct Buffer { char *begin, *end; };
template <class T> checked<T> as_checked(Buffer b) {
  return {(T*)b.begin, (T*)b.begin, (T*)b.end};
}

inline uint lane() { return thread_index() % 32; }

template <class T> T shuffle(T value, uint from, int line) {
  static_assert(sizeof(T) <= 32, "too large a value");
  T result;
  memcpy(&result, exchange(&value, sizeof value, nullptr, line)[from % 32].in, sizeof result);
  return result;
}

template <class T, class F> T reduce(T value, F f, int line) {
  Slot* slots = exchange(&value, sizeof value, nullptr, line);
  T result, other;
  memcpy(&result, slots[0].in, sizeof result);
  for (int i = 1; i < 32; i++) {
    memcpy(&other, slots[i].in, sizeof other);
    result = f(result, other);
  }
  return result;
}

// Where the two elements of a lane stand in an 8 x 8 matrix, on the GPUs that Apple has made so far.
inline int row_of(uint l) { return ((l >> 2) & 4) + ((l >> 1) & 3); }
inline int col_of(uint l) { return ((l >> 1) & 4) + ((l & 1) << 1); }

template <class T> struct Operands { T a[2], b[2], c[2]; };

template <class T> void multiply_accumulate(Slot* slots) {
  T a[8][8], b[8][8], c[8][8];
  for (int l = 0; l < 32; l++) {
    Operands<T> in;
    memcpy(&in, slots[l].in, sizeof in);
    for (int e = 0; e < 2; e++) {
      a[row_of(l)][col_of(l) + e] = in.a[e];
      b[row_of(l)][col_of(l) + e] = in.b[e];
      c[row_of(l)][col_of(l) + e] = in.c[e];
    }
  }
  for (int i = 0; i < 8; i++)
    for (int k = 0; k < 8; k++)
      for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < 32; l++) memcpy(slots[l].out, &c[row_of(l)][col_of(l)], 2 * sizeof(T));
}

}  // namespace emulator

namespace metal {

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
#define threadgroup_barrier(flags) emulator::threadgroup_barrier_at(__LINE__)
#define simdgroup_barrier(flags) emulator::exchange("", 1, nullptr, __LINE__)
#define simd_shuffle(value, from) emulator::shuffle((value), (from), __LINE__)
#define simd_shuffle_xor(value, mask) emulator::shuffle((value), emulator::lane() ^ (mask), __LINE__)
#define simd_sum(value) emulator::reduce((value), [](auto a, auto b) { return a + b; }, __LINE__)
#define simd_max(value) emulator::reduce((value), [](auto a, auto b) { return a > b ? a : b; }, __LINE__)

inline float exp(float x) { return std::exp(x); }
inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float abs(float x) { return std::fabs(x); }
inline float fma(float x, float y, float z) { return std::fma(x, y, z); }
namespace fast { using metal::exp; using metal::exp2; using metal::log2; }
namespace precise { using metal::exp; using metal::exp2; using metal::log2; }
template <class T> T max(T a, T b) { return a > b ? a : b; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
inline uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }

template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "8 x 8 only");
  vec<T, 2> elements;
  vec<T, 2>& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

template <class T, int R, int C> simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  return {vec<T, 2>(x, x)};
}

template <class T, class P>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, P p, ulong stride = 8, ulong2 at = ulong2(0, 0),
                    bool transposed = false) {
  const int row = emulator::row_of(emulator::lane()), col = emulator::col_of(emulator::lane());
  for (int e = 0; e < 2; e++) {
    const long i = transposed ? col + e : row, j = transposed ? row : col + e;
    m.elements[e] = p[long((at.y + i) * stride + at.x + j)];
  }
}

template <class T>
void multiply_accumulate(simdgroup_matrix<T, 8, 8>& d, simdgroup_matrix<T, 8, 8> a,
                         simdgroup_matrix<T, 8, 8> b, simdgroup_matrix<T, 8, 8> c, int line) {
  typedef emulator::Operands<T> Operands;
  static_assert(sizeof(Operands) <= 32, "too large a type");
  const Operands in = {{a.elements.x, a.elements.y}, {b.elements.x, b.elements.y},
                       {c.elements.x, c.elements.y}};
  auto* slots = emulator::exchange(&in, sizeof in, emulator::multiply_accumulate<T>, line);
  memcpy(&d.elements, slots[emulator::lane()].out, 2 * sizeof(T));
}
#define simdgroup_multiply_accumulate(d, a, b, c) metal::multiply_accumulate((d), (a), (b), (c), __LINE__)

}  // namespace metal

#define constant const
#define thread
#define kernel static
