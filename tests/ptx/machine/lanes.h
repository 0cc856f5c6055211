// Opcodes whose lanes do not see one another: each from an expression of its operands a, b, c.
#pragma once

#include "machine.h"

#include <cstring>
#include <tuple>
#include <utility>

template <class T> constexpr char letter() { return sizeof(T) == 2 ? 'h' : sizeof(T) == 4 ? 'w' : 'd'; }

template <class F, class D, class... A> struct Lanewise {
  static std::string signature() { return {letter<D>(), '=', letter<A>()...}; }
  static void run(Warp& w, const Instruction& i, u32 mask) { go(w, i, mask, std::index_sequence_for<A...>{}); }
  template <size_t... K> static void go(Warp& w, const Instruction& i, u32 mask, std::index_sequence<K...>) {
    D* d = w.at<D>(i.r[0]);
    const std::tuple<const A*...> from{w.at<A>(i.r[1 + K])...};
    if (mask != ALL) return each(mask, [&](u32 lane) { d[lane] = F{}(std::get<K>(from)[lane]...); });
#pragma GCC ivdep
    for (u32 lane = 0; lane < LANES; lane++) d[lane] = F{}(std::get<K>(from)[lane]...);
  }
};

inline f32 as_f32(u32 bits) {
  f32 x;
  memcpy(&x, &bits, 4);
  return x;
}
inline u32 bits_of(f32 x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline f32 canonical(f32 x) { return x != x ? as_f32(0x7FFFFFFFu) : x; }

// Value of d, types of d, a, b, c.
#define ONE(name, D, A, value) \
  { typedef Lanewise<decltype([](A a) -> D { return D(value); }), D, A> O; t.push_back({name, O::signature(), O::run}); }
#define TWO(name, D, A, B, value) \
  { typedef Lanewise<decltype([](A a, B b) -> D { return D(value); }), D, A, B> O; t.push_back({name, O::signature(), O::run}); }
#define THREE(name, D, A, B, C, value) \
  { typedef Lanewise<decltype([](A a, B b, C c) -> D { return D(value); }), D, A, B, C> O; t.push_back({name, O::signature(), O::run}); }
