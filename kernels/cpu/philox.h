// Dropout bits from Philox4x32-7 (Salmon et al., SC'11): what fasttx/ops/dropout.py specifies.
#pragma once
#include "simd.h"

namespace FASTTX_ISA {

constexpr int ROUNDS = 7;
constexpr int LANES = 8;              // 16-bit uniforms of one 128-bit block, so bits of one byte
constexpr uint32_t DROP_ALL = 65536;  // the threshold at which nothing is kept

struct Philox {
  U64 key0[ROUNDS], key1[ROUNDS];

  explicit Philox(uint64_t seed) {
    uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    for (int i = 0; i < ROUNDS; i++) {
      key0[i] = U64{} + low;
      key1[i] = U64{} + high;
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
  }
};

// Seven rounds on W / 2 counters of 64-bit lanes. What the upper halves hold does not matter: a
// multiplication reads the lower ones, and its operand words sit there.
INLINE void rounds(const Philox& philox, U64& c0, U64& c1, U64& c2, U64& c3) {
  const U64 m0 = U64{} + 0xD2511F53u, m1 = U64{} + 0xCD9E8D57u;
#pragma GCC unroll 7
  for (int i = 0; i < ROUNDS; i++) {
    U64 p0 = mul_wide(c0, m0), p1 = mul_wide(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ philox.key0[i];
    c2 = (p0 >> 32) ^ c3 ^ philox.key1[i];
    c1 = p1;
    c3 = p0;
  }
}

// How many bytes `draw_keep` may write past the end of its output.
constexpr int DRAW_SLACK = 2 * W;

// Keep bits of `rows` rows and `blocks` blocks of eight neighbours: byte r * blocks + b holds those
// of counter (block0 + b, row0 + r, head, sequence), bit k for neighbour k; 1 = keep.
static inline void draw_keep(uint8_t* out, uint64_t row0, int rows, uint64_t block0, int blocks,
                             uint64_t head, uint64_t sequence, const Philox& philox,
                             uint32_t threshold) {
  const int total = rows * blocks;
  if (threshold >= DROP_ALL) {
    memset(out, 0, total);
    return;
  }
  // W counters a turn, in two halves: even ones in `a`, odd ones in `b`.
  U64 block_a, block_b, row_a, row_b;
  uint64_t row = row0;
  for (int i = 0, block = 0; i < W; i++) {
    // By reference: GCC's UBSan gets a subscript of the conditional itself wrong.
    U64 &to_block = i & 1 ? block_b : block_a, &to_row = i & 1 ? row_b : row_a;
    to_block[i / 2] = block;
    to_row[i / 2] = row;
    if (++block == blocks) block = 0, row++;
  }
  const U64 in_row = U64{} + (uint64_t)blocks, first = U64{} + block0;
  const U64 next_block = U64{} + (uint64_t)(W % blocks), next_row = U64{} + (uint64_t)(W / blocks);
  const U64 low = U64{} + 0xFFFFFFFFu;
  U16 at_least = U16{} + (uint16_t)threshold;
  for (int i = 0; i < total; i += W) {
    U64 a0 = first + block_a, a1 = row_a, a2 = U64{} + head, a3 = U64{} + sequence;
    U64 b0 = first + block_b, b1 = row_b, b2 = a2, b3 = a3;
    rounds(philox, a0, a1, a2, a3);
    rounds(philox, b0, b1, b2, b3);
    const U64 words[4] = {(a0 & low) | (b0 << 32), (a1 & low) | (b1 << 32),
                          (a2 & low) | (b2 << 32), (a3 & low) | (b3 << 32)};
    U16 kept = {};
    for (int w = 0; w < 4; w++) {  // bit 2w from the low half of word w, 2w + 1 from the high one
      const U16 bits = (U16)(U32{} + ((1u << (2 * w)) | (2u << (2 * w + 16))));
      kept |= (U16)((U16)words[w] >= at_least) & bits;
    }
    U32 bytes = (U32)kept;
    bytes |= bytes >> 16;
    typedef uint8_t Bytes __attribute__((vector_size(W)));
    Bytes narrow = __builtin_convertvector(bytes, Bytes);
    memcpy(out + i, &narrow, W);

    block_a += next_block, row_a += next_row;
    U64 wrap = (U64)(block_a >= in_row);
    block_a -= in_row & wrap, row_a -= wrap;
    block_b += next_block, row_b += next_row;
    wrap = (U64)(block_b >= in_row);
    block_b -= in_row & wrap, row_b -= wrap;
  }
}

// The W bits of vector v of a row whose keep bytes begin at `row`.
INLINE uint32_t bits_of(const uint8_t* row, int v) {
#if defined(__AVX512F__)
  uint16_t bits;
  memcpy(&bits, row + 2 * v, 2);
  return bits;
#elif defined(__AVX2__)
  return row[v];
#else
  return row[v >> 1] >> (4 * (v & 1));
#endif
}

}  // namespace FASTTX_ISA
