// The noise, four normals at a time: csrc/common/philox.h with a thread's scalars.
#pragma once

#include "../common/philox.h"
#include "groups.cuh"

namespace fastlm {

// Draws the four normals of a block of the seed's stream into out (4,).
FASTLM_DEVICE void normal_block(uint64_t seed, uint64_t block, float* out) {
  const Words<uint64_t> words = philox(seed, block);
  Float n[4];
  box_muller(Word(uint32_t(words.w0)), Word(uint32_t(words.w1)), n[0], n[1]);
  box_muller(Word(uint32_t(words.w2)), Word(uint32_t(words.w3)), n[2], n[3]);
  for (int i = 0; i < 4; ++i) out[i] = n[i].v;
}

// Returns the normal at one position of the seed's stream.
FASTLM_DEVICE float normal_at(uint64_t seed, uint64_t position) {
  const Words<uint64_t> words = philox(seed, position / 4);
  const bool second_pair = position & 2, second_of_pair = position & 1;
  Float cosine, sine;
  box_muller(Word(uint32_t(second_pair ? words.w2 : words.w0)), Word(uint32_t(second_pair ? words.w3 : words.w1)), cosine,
             sine);
  return second_of_pair ? sine.v : cosine.v;
}

}  // namespace fastlm
