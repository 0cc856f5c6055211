// The dropout generator that every backend shares: Philox4x32-7 (Salmon et al., SC'11).
//
// A block of 128 bits is a pure function of a key (the seed) and of a counter (where the element
// stands). It holds eight 16-bit uniforms for eight neighbours: element i takes word i / 2, the low
// half where i is even. So a mask depends on no tile, and the backward pass draws it again.

inline uint4 philox(uint4 counter, uint2 key) {
  _Pragma("clang loop unroll(full)")
  for (int round = 0; round < 7; round++) {
    const uint high0 = mulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const uint high1 = mulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key = uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
  }
  return counter;
}

// An int64 seed, read as two words.
inline uint2 philox_key(const device uint* seed) { return uint2(seed[0], seed[1]); }

inline uint half_of(uint word, int i) { return (i & 1) ? word >> 16 : word & 0xFFFFu; }
