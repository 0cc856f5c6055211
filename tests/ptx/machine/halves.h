// bfloat16 and float16, as bits.
#pragma once

#include "lanes.h"

typedef _Float16 f16;
struct bf16 { u16 bits; };

inline f32 widen(bf16 x) { return as_f32(u32(x.bits) << 16); }
inline f32 widen(f16 x) { return f32(x); }

// Element 0 or 1 of a register that holds two.
template <class T> f32 half_of(u32 word, int which) {
  const u16 bits = u16(word >> (16 * which));
  T x;
  memcpy(&x, &bits, 2);
  return widen(x);
}

// To nearest, ties to even; any NaN becomes 0x7FFF.
inline u16 to_bf16(f32 x) {
  if (x != x) return 0x7FFF;
  const u32 bits = bits_of(x);
  return u16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline u16 to_f16(f32 x) {
  if (x != x) return 0x7FFF;
  const f16 h = f16(x);
  u16 bits;
  memcpy(&bits, &h, 2);
  return bits;
}
