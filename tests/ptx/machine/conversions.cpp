// cvt: between integers, between integers and float32, between float32 and the halves.
#include "halves.h"

void add_conversions(Table& t) {
  ONE("cvt.u16.u32", u16, u32, a)
  ONE("cvt.u16.u64", u16, u64, a)
  ONE("cvt.u32.u16", u32, u16, a)
  ONE("cvt.u32.u64", u32, u64, a)
  ONE("cvt.u64.u16", u64, u16, a)
  ONE("cvt.u64.u32", u64, u32, a)
  ONE("cvt.s16.s8", s16, s16, s8(a))
  ONE("cvt.s32.s16", s32, s16, a)
  ONE("cvt.s64.s32", s64, s32, a)
  ONE("cvt.rn.f32.s32", f32, s32, a)
  ONE("cvt.rn.f32.u32", f32, u32, a)
  ONE("cvt.f32.bf16", f32, u16, as_f32(u32(a) << 16))
  ONE("cvt.f32.f16", f32, u16, half_of<f16>(a, 0))
  ONE("cvt.rn.bf16.f32", u16, f32, to_bf16(a))
  ONE("cvt.rn.f16.f32", u16, f32, to_f16(a))
  // a is the upper half
  TWO("cvt.rn.bf16x2.f32", u32, f32, f32, u32(to_bf16(a)) << 16 | to_bf16(b))
  TWO("cvt.rn.f16x2.f32", u32, f32, f32, u32(to_f16(a)) << 16 | to_f16(b))
}
