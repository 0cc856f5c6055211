// Memory, watched: who reads and writes what, in which order, and what an access costs.
#pragma once

#include "machine.h"

void global_read(Warp&, u32 lane, u64 address, u32 bytes, void* to);
void global_write(Warp&, u32 lane, u64 address, u32 bytes, u32 element, const void* from);

// From an address to an offset in Machine::shared; faults outside of it.
u32 shared_offset(Warp&, u32 lane, u64 address, u32 bytes, u32 align);
void shared_read(Warp&, u32 lane, u64 address, u32 bytes, void* to);
void shared_write(Warp&, u32 lane, u64 address, u32 bytes, u32 element, const void* from);
// The watch alone. value: what is written, or null where that is not known yet.
void saw_shared_read(Warp&, u32 lane, u32 at, u32 bytes);
void saw_shared_write(Warp&, u32 lane, u32 at, u32 bytes, const u8* value);

// What one instruction of a warp costs: each lane under the mask takes `bytes` at its address.
void count_global(Machine&, const u64* addresses, u32 mask, u32 bytes);
void count_shared(Machine&, const u64* addresses, u32 mask, u32 bytes);
