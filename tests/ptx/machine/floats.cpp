// Arithmetic of float32. The `approx` functions are exact to rounding here; on a GPU their last bits
// differ, by bounds that the PTX ISA gives. .ftz: subnormal operands and results become zeros. Any NaN
// that comes out is the one of `canonical`, whatever went in (CUDA C++ Programming Guide, floating point).
#include "lanes.h"

#include <cmath>

static f32 flush(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
// NaN only where both are; -0 is below +0.
static f32 smaller(f32 a, f32 b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
static f32 larger(f32 a, f32 b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

void add_floats(Table& t) {
  TWO("add.f32", f32, f32, f32, canonical(a + b))
  TWO("sub.f32", f32, f32, f32, canonical(a - b))
  TWO("mul.f32", f32, f32, f32, canonical(a * b))
  TWO("add.rn.f32", f32, f32, f32, canonical(a + b))
  TWO("sub.rn.f32", f32, f32, f32, canonical(a - b))
  TWO("mul.rn.f32", f32, f32, f32, canonical(a * b))
  TWO("add.ftz.f32", f32, f32, f32, canonical(flush(flush(a) + flush(b))))
  TWO("sub.ftz.f32", f32, f32, f32, canonical(flush(flush(a) - flush(b))))
  TWO("mul.ftz.f32", f32, f32, f32, canonical(flush(flush(a) * flush(b))))
  THREE("fma.rn.f32", f32, f32, f32, f32, canonical(std::fma(a, b, c)))
  THREE("fma.rn.ftz.f32", f32, f32, f32, f32, canonical(flush(std::fma(flush(a), flush(b), flush(c)))))
  TWO("div.full.f32", f32, f32, f32, canonical(a / b))
  TWO("div.rn.f32", f32, f32, f32, canonical(a / b))
  ONE("neg.f32", u32, u32, a ^ 0x80000000u)
  ONE("abs.f32", u32, u32, a & 0x7FFFFFFFu)
  ONE("neg.ftz.f32", f32, f32, flush(-a))
  ONE("abs.ftz.f32", f32, f32, flush(std::fabs(a)))
  TWO("copysign.f32", u32, u32, u32, (b & 0x7FFFFFFFu) | (a & 0x80000000u))
  TWO("min.f32", f32, f32, f32, smaller(a, b))
  TWO("max.f32", f32, f32, f32, larger(a, b))
  ONE("ex2.approx.f32", f32, f32, canonical(std::exp2(double(a))))
  ONE("ex2.approx.ftz.f32", f32, f32, canonical(flush(f32(std::exp2(double(flush(a)))))))
  ONE("lg2.approx.f32", f32, f32, canonical(std::log2(double(a))))
  ONE("lg2.approx.ftz.f32", f32, f32, canonical(std::log2(double(flush(a)))))
  ONE("rsqrt.approx.f32", f32, f32, canonical(1 / std::sqrt(double(a))))
  ONE("rsqrt.approx.ftz.f32", f32, f32, canonical(1 / std::sqrt(double(flush(a)))))
  ONE("sqrt.approx.ftz.f32", f32, f32, canonical(std::sqrt(flush(a))))
  ONE("rcp.approx.ftz.f32", f32, f32, canonical(flush(1 / flush(a))))
}
