// Arithmetic of integers.
#include "lanes.h"

#include <algorithm>

void add_integers(Table& t) {
  TWO("add.s16", u16, u16, u16, a + b)
  TWO("add.s32", u32, u32, u32, a + b)
  TWO("add.s64", u64, u64, u64, a + b)
  TWO("sub.s16", u16, u16, u16, a - b)
  TWO("sub.s32", u32, u32, u32, a - b)
  TWO("sub.s64", u64, u64, u64, a - b)
  TWO("mul.lo.s16", u16, u16, u16, u32(a) * b)
  TWO("mul.lo.s32", u32, u32, u32, a * b)
  TWO("mul.lo.s64", u64, u64, u64, a * b)
  TWO("mul.hi.u32", u32, u32, u32, u64(a) * b >> 32)
  TWO("mul.hi.s32", s32, s32, s32, s64(a) * b >> 32)
  TWO("mul.wide.s16", s32, s16, s16, s32(a) * b)
  TWO("mul.wide.u16", u32, u16, u16, u32(a) * b)
  TWO("mul.wide.s32", s64, s32, s32, s64(a) * b)
  TWO("mul.wide.u32", u64, u32, u32, u64(a) * b)
  THREE("mad.lo.s32", u32, u32, u32, u32, a * b + c)
  THREE("mad.lo.s64", u64, u64, u64, u64, a * b + c)
  THREE("mad.wide.s32", u64, s32, s32, u64, u64(s64(a) * b) + c)
  THREE("mad.wide.u32", u64, u32, u32, u64, u64(a) * b + c)
  // Division by zero is left open by PTX; here it gives all ones, which shows.
  TWO("div.s32", s32, s32, s32, b ? s64(a) / b : -1)
  TWO("rem.s32", s32, s32, s32, b ? s64(a) % b : -1)
  TWO("div.u32", u32, u32, u32, b ? a / b : ALL)
  TWO("rem.u32", u32, u32, u32, b ? a % b : ALL)
  ONE("neg.s32", u32, u32, 0 - a)
  ONE("neg.s64", u64, u64, 0 - a)
  ONE("abs.s32", u32, s32, a < 0 ? 0 - u32(a) : u32(a))
  TWO("min.s32", s32, s32, s32, std::min(a, b))
  TWO("max.s32", s32, s32, s32, std::max(a, b))
  TWO("min.u32", u32, u32, u32, std::min(a, b))
  TWO("max.u32", u32, u32, u32, std::max(a, b))
  TWO("min.s64", s64, s64, s64, std::min(a, b))
  TWO("max.s64", s64, s64, s64, std::max(a, b))
}
