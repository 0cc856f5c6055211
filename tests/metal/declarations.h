// Declarations of the Metal standard library, for clang to type-check our kernels as C++14: address
// spaces are real here, and overloads are as separate as Metal's. See typecheck.py.
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

template <class T, int N> struct vec;
template <class T> struct vec<T, 2> {
  T x, y;
  vec();
  vec(T x, T y);
  T& operator[](int);
  const T& operator[](int) const;
};
template <class T> struct vec<T, 3> {
  T x, y, z;
  vec();
  vec(T x, T y, T z);
  T& operator[](int);
  const T& operator[](int) const;
};
template <class T> struct vec<T, 4> {
  T x, y, z, w;
  vec();
  vec(T x, T y, T z, T w);
  T& operator[](int);
  const T& operator[](int) const;
};
typedef vec<uint, 2> uint2;
typedef vec<ulong, 2> ulong2;
typedef vec<uint, 3> uint3;
typedef vec<uint, 4> uint4;

namespace metal {

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <class T> T simd_shuffle(T, ushort);
template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T simd_sum(T);
template <class T> T simd_max(T);

// A call that mixes types is ambiguous, as in Metal.
float max(float, float);
half max(half, half);
int max(int, int);
uint max(uint, uint);
long max(long, long);
float min(float, float);
half min(half, half);
int min(int, int);
uint min(uint, uint);
long min(long, long);
float abs(float);
half abs(half);
int abs(int);
float exp(float);
half exp(half);
float exp2(float);
half exp2(half);
float log2(float);
half log2(half);
float sqrt(float);
half sqrt(half);
uint mulhi(uint, uint);
int mulhi(int, int);
namespace fast { float exp(float); float exp2(float); float log2(float); }
namespace precise { float exp(float); float exp2(float); float log2(float); }

template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "8 x 8 only");
  vec<T, 2>& thread_elements();
};
template <class T, int R, int C> simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
template <class T>
void simdgroup_load(simdgroup_matrix<T, 8, 8>&, const device T*, ulong stride = 8,
                    ulong2 origin = ulong2(), bool transposed = false);
template <class T>
void simdgroup_load(simdgroup_matrix<T, 8, 8>&, const threadgroup T*, ulong stride = 8,
                    ulong2 origin = ulong2(), bool transposed = false);
template <class T>
void simdgroup_multiply_accumulate(simdgroup_matrix<T, 8, 8>&, simdgroup_matrix<T, 8, 8>,
                                   simdgroup_matrix<T, 8, 8>, simdgroup_matrix<T, 8, 8>);

}  // namespace metal
