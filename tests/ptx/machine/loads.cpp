// ld and st, global and shared.
#include "memory.h"

#include <cstring>

template <bool SHARED> static u64 address_of(Warp& w, const Instruction& i, s32 base, u32 lane) {
  return (SHARED ? u64(w.at<u32>(base)[lane]) : w.at<u64>(base)[lane]) + i.immediate;
}

template <bool SHARED> static void count(Warp& w, const Instruction& i, s32 base, u32 mask) {
  u64 addresses[LANES];
  each(mask, [&](u32 lane) { addresses[lane] = address_of<SHARED>(w, i, base, lane); });
  (SHARED ? count_shared : count_global)(*w.machine, addresses, mask, u32(i.count * i.size));
}

// r: destinations, then the address.
template <bool SHARED> static void load(Warp& w, const Instruction& i, u32 mask) {
  const s32 base = i.r[i.count];
  count<SHARED>(w, i, base, mask);
  each(mask, [&](u32 lane) {
    u8 data[16];
    (SHARED ? shared_read : global_read)(w, lane, address_of<SHARED>(w, i, base, lane), i.count * i.size, data);
    for (s32 e = 0; e < i.count; e++) {
      u64 value = 0;
      memcpy(&value, data + e * i.size, i.size);
      if (i.is_signed) {
        const int unused = 64 - 8 * i.size;
        value = u64(s64(value << unused) >> unused);
      }
      memcpy(w.at<u8>(i.r[e]) + lane * i.width, &value, i.width);
    }
  });
}

// r: the address, then sources. Which lane stores last is left open, so the seed decides it.
template <bool SHARED> static void store(Warp& w, const Instruction& i, u32 mask) {
  count<SHARED>(w, i, i.r[0], mask);
  const bool backwards = w.machine->options.seed && w.machine->random() & 1;
  each(mask, [&](u32 lane) {
    u8 data[16];
    for (s32 e = 0; e < i.count; e++) memcpy(data + e * i.size, w.at<u8>(i.r[1 + e]) + lane * i.width, i.size);
    (SHARED ? shared_write : global_write)(w, lane, address_of<SHARED>(w, i, i.r[0], lane), i.count * i.size, i.size, data);
  }, backwards);
}

void add_memory(Table& t) {
  t.push_back({"ld.global", "", load<false>});
  t.push_back({"ld.shared", "", load<true>});
  t.push_back({"st.global", "", store<false>});
  t.push_back({"st.shared", "", store<true>});
}
