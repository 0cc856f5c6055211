// setp: comparisons. Of floats, lt and its kin are false where one is NaN; ltu and its kin are true.
#include "halves.h"

template <class F, class A> struct Compare {
  static std::string signature() { return {'p', '=', letter<A>(), letter<A>()}; }
  static void run(Warp& w, const Instruction& i, u32 mask) {
    const A *a = w.at<A>(i.r[1]), *b = w.at<A>(i.r[2]);
    u32 result = 0;
    for (u32 lane = 0; lane < LANES; lane++) result |= u32(F{}(a[lane], b[lane])) << lane;
    u32& d = *w.at<u32>(i.r[0]);
    d = (d & ~mask) | (result & mask);
  }
};

// Of the lower halves, and of the upper ones. r: p, q, a, b
template <class F, class T> static void compare_pairs(Warp& w, const Instruction& i, u32 mask) {
  for (int half = 0; half < 2; half++) {
    u32 result = 0;
    for (u32 lane = 0; lane < LANES; lane++) {
      const f32 a = half_of<T>(w.at<u32>(i.r[2])[lane], half), b = half_of<T>(w.at<u32>(i.r[3])[lane], half);
      result |= u32(F{}(a, b)) << lane;
    }
    u32& d = *w.at<u32>(i.r[half]);
    d = (d & ~mask) | (result & mask);
  }
}

void add_comparisons(Table& t) {
#define SETP(name, A, value) \
  { typedef Compare<decltype([](A a, A b) -> bool { return value; }), A> O; t.push_back({"setp." name, O::signature(), O::run}); }
#define EQUALITY(type, A) SETP("eq." type, A, a == b) SETP("ne." type, A, a != b)
#define ORDER(type, A) \
  SETP("lt." type, A, a < b) SETP("le." type, A, a <= b) SETP("gt." type, A, a > b) SETP("ge." type, A, a >= b)
  EQUALITY("b16", u16)
  EQUALITY("b32", u32)
  EQUALITY("b64", u64)
  EQUALITY("s32", s32)
  EQUALITY("s64", s64)
  ORDER("s16", s16)
  ORDER("u16", u16)
  ORDER("s32", s32)
  ORDER("u32", u32)
  ORDER("s64", s64)
  ORDER("u64", u64)
  ORDER("f32", f32)
  SETP("eq.f32", f32, a == b)
  SETP("ne.f32", f32, a < b || a > b)
  SETP("nan.f32", f32, a != a || b != b)
  SETP("num.f32", f32, a == a && b == b)
  SETP("equ.f32", f32, !(a < b || a > b))
  SETP("neu.f32", f32, a != b)
  SETP("ltu.f32", f32, !(a >= b))
  SETP("leu.f32", f32, !(a > b))
  SETP("gtu.f32", f32, !(a <= b))
  SETP("geu.f32", f32, !(a < b))
#define PAIRS(name, value) \
  t.push_back({"setp." name ".f16x2", "pp=ww", compare_pairs<decltype([](f32 a, f32 b) { return value; }), f16>}); \
  t.push_back({"setp." name ".bf16x2", "pp=ww", compare_pairs<decltype([](f32 a, f32 b) { return value; }), bf16>});
  PAIRS("lt", a < b)
  PAIRS("le", a <= b)
  PAIRS("gt", a > b)
  PAIRS("ge", a >= b)
}
