// Bits: logic, shifts, fields, bytes; moves, packing, selection.
#include "lanes.h"

#include <algorithm>
#include <type_traits>

template <class T> static T shift_left(T a, u32 n) { return n >= 8 * sizeof(T) ? T(0) : T(a << n); }
template <class T> static T shift_right(T a, u32 n) { return n >= 8 * sizeof(T) ? T(a < 0 ? -1 : 0) : T(a >> n); }

// bfe: `length` bits from `position` on; beyond the top a signed field is filled with its sign.
template <class T> static T field(T a, u32 position, u32 length) {
  position &= 0xFF, length &= 0xFF;
  if (!length) return 0;
  const u32 top = 8 * sizeof(T) - 1;
  const bool negative = std::is_signed_v<T> && (a >> std::min(position + length - 1, top) & 1);
  T value = 0;
  for (u32 i = 0; i <= top; i++) {
    const bool bit = i < length && position + i <= top ? a >> (position + i) & 1 : negative;
    value |= T(std::make_unsigned_t<T>(bit) << i);
  }
  return value;
}

// prmt: each 4 bits of the selector choose a byte of a (0 ... 3) or b (4 ... 7), or 8 times its sign.
static u32 permute(u32 a, u32 b, u32 selector) {
  const u64 both = u64(b) << 32 | a;
  u32 value = 0;
  for (int i = 0; i < 4; i++) {
    const u32 s = selector >> (4 * i) & 15;
    u32 byte = u32(both >> (8 * (s & 7))) & 0xFF;
    if (s & 8) byte = byte & 0x80 ? 0xFF : 0;
    value |= byte << (8 * i);
  }
  return value;
}

template <class F> static void predicate(Warp& w, const Instruction& i, u32 mask) {  // r: d, a, b
  u32& d = *w.at<u32>(i.r[0]);
  d = (d & ~mask) | (F{}(*w.at<u32>(i.r[1]), *w.at<u32>(i.r[2])) & mask);
}
static void predicate_not(Warp& w, const Instruction& i, u32 mask) {
  u32& d = *w.at<u32>(i.r[0]);
  d = (d & ~mask) | (~*w.at<u32>(i.r[1]) & mask);
}
static void predicate_move(Warp& w, const Instruction& i, u32 mask) {
  u32& d = *w.at<u32>(i.r[0]);
  d = (d & ~mask) | (*w.at<u32>(i.r[1]) & mask);
}

template <class T> static void select(Warp& w, const Instruction& i, u32 mask) {  // r: d, a, b, p
  T* d = w.at<T>(i.r[0]);
  const T *a = w.at<T>(i.r[1]), *b = w.at<T>(i.r[2]);
  const u32 p = *w.at<u32>(i.r[3]);
  if (mask != ALL) return each(mask, [&](u32 lane) { d[lane] = p >> lane & 1 ? a[lane] : b[lane]; });
#pragma GCC ivdep
  for (u32 lane = 0; lane < LANES; lane++) d[lane] = p >> lane & 1 ? a[lane] : b[lane];
}

// mov of a vector to a register and back: the first element is the lowest.
template <class WHOLE, class PART> static void pack(Warp& w, const Instruction& i, u32 mask) {
  constexpr int parts = sizeof(WHOLE) / sizeof(PART);
  each(mask, [&](u32 lane) {
    PART value[parts];
    for (int e = 0; e < parts; e++) value[e] = w.at<PART>(i.r[1 + e])[lane];
    memcpy(&w.at<WHOLE>(i.r[0])[lane], value, sizeof value);
  });
}
template <class WHOLE, class PART> static void unpack(Warp& w, const Instruction& i, u32 mask) {
  constexpr int parts = sizeof(WHOLE) / sizeof(PART);
  each(mask, [&](u32 lane) {
    PART value[parts];
    memcpy(value, &w.at<WHOLE>(i.r[parts])[lane], sizeof value);
    for (int e = 0; e < parts; e++) w.at<PART>(i.r[e])[lane] = value[e];
  });
}

void add_logic(Table& t) {
#define WIDTHS(name, value) \
  TWO(name ".b16", u16, u16, u16, value) TWO(name ".b32", u32, u32, u32, value) TWO(name ".b64", u64, u64, u64, value)
  WIDTHS("and", a & b)
  WIDTHS("or", a | b)
  WIDTHS("xor", a ^ b)
  ONE("not.b16", u16, u16, ~a)
  ONE("not.b32", u32, u32, ~a)
  ONE("not.b64", u64, u64, ~a)
  TWO("shl.b16", u16, u16, u32, shift_left(a, b))
  TWO("shl.b32", u32, u32, u32, shift_left(a, b))
  TWO("shl.b64", u64, u64, u32, shift_left(a, b))
  TWO("shr.u16", u16, u16, u32, shift_right(a, b))
  TWO("shr.u32", u32, u32, u32, shift_right(a, b))
  TWO("shr.u64", u64, u64, u32, shift_right(a, b))
  TWO("shr.s16", s16, s16, u32, shift_right(a, b))
  TWO("shr.s32", s32, s32, u32, shift_right(a, b))
  TWO("shr.s64", s64, s64, u32, shift_right(a, b))
  THREE("bfe.u32", u32, u32, u32, u32, field(a, b, c))
  THREE("bfe.s32", s32, s32, u32, u32, field(a, b, c))
  THREE("prmt.b32", u32, u32, u32, u32, permute(a, b, c))
  ONE("mov.b16", u16, u16, a)
  ONE("mov.b32", u32, u32, a)
  ONE("mov.b64", u64, u64, a)
#define PREDICATES(name, value) \
  t.push_back({name ".pred", "p=pp", predicate<decltype([](u32 a, u32 b) -> u32 { return value; })>});
  PREDICATES("and", a & b)
  PREDICATES("or", a | b)
  PREDICATES("xor", a ^ b)
  t.push_back({"not.pred", "p=p", predicate_not});
  t.push_back({"mov.pred", "p=p", predicate_move});
  t.push_back({"selp.b16", "h=hhp", select<u16>});
  t.push_back({"selp.b32", "w=wwp", select<u32>});
  t.push_back({"selp.f32", "w=wwp", select<u32>});
  t.push_back({"selp.b64", "d=ddp", select<u64>});
  t.push_back({"pack.b32", "w=hh", pack<u32, u16>});
  t.push_back({"pack.b64", "d=ww", pack<u64, u32>});
  t.push_back({"unpack.b32", "hh=w", unpack<u32, u16>});
  t.push_back({"unpack.b64", "ww=d", unpack<u64, u32>});
}
