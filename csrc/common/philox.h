// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11) and Box-Muller, for SIMD
// lanes and for the scalars of a GPU thread. The stream of a seed has the layout of torch.func._random.normal:
//   key = seed (64 bits), counter = block (64 bits) and 64 zero bits; block c holds elements 4c .. 4c + 3;
//   words 0 and 2 give the radii of two Box-Muller pairs, words 1 and 3 their angles; cosine first, sine second.
#pragma once

#include <cstdint>

#include "macros.h"
#include "math.h"

namespace fastlm {

template <class W>
struct Words {
  W w0, w1, w2, w3;
};

// A 32-bit word is the low half of a 64-bit lane; the high half may hold anything, because mul32 ignores it. So the low word of
// a product is the product itself, and its high word takes one shift.
FASTLM_HD uint64_t mul32(uint64_t word, uint64_t constant) { return (word & 0xffffffffu) * constant; }
FASTLM_HD uint64_t high32(uint64_t word) { return word >> 32; }

// Encrypts a counter. W is uint64_t, or a vector of 64-bit lanes with one counter per lane.
template <class W>
FASTLM_HD Words<W> philox(uint64_t seed, Words<W> c) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  FASTLM_UNROLL(10)
  for (int round = 0; round < 10; ++round) {
    const W p0 = mul32(c.w0, W(uint64_t(0xD2511F53))), p1 = mul32(c.w2, W(uint64_t(0xCD9E8D57)));
    c = {high32(p1) ^ c.w1 ^ W(uint64_t(k0)), p1, high32(p0) ^ c.w3 ^ W(uint64_t(k1)), p0};
    k0 += 0x9E3779B9;  // the golden ratio
    k1 += 0xBB67AE85;  // sqrt(3) - 1
  }
  return c;
}

// Returns the words of a block of the seed's stream: the block is the counter's low 64 bits.
template <class W>
FASTLM_HD Words<W> philox(uint64_t seed, W block) {
  return philox(seed, Words<W>{block, high32(block), W(uint64_t(0)), W(uint64_t(0))});
}

// Makes two standard normals of two words. F is float or a vector of floats; U is its type of unsigned 32-bit integers.
template <class F, class U>
FASTLM_HD void box_muller(U radius_word, U angle_word, F& cosine, F& sine) {
  // u = (word + 1/2) / 2^32, rounded to float. It is in (0, 1], never 0.
  const F u = fma(to_float(radius_word), F(0x1p-32f), F(0x1p-33f));
  const F turn = fma(to_float(angle_word), F(0x1p-32f), F(0x1p-33f));
  const F radius = sqrt(F(-2.0f) * log_unit(u));
  sincos_turn(turn, sine, cosine);
  cosine = radius * cosine;
  sine = radius * sine;
}

}  // namespace fastlm
