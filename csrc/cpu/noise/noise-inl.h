// Standard normals, 64 at a time: each of 16 lanes draws a block of four.
//
// Time per normal on one core of a Zen 4 at 2.5 GHz: 24 ns if the C library computes the fused multiply-adds (baseline), 1.17
// ns with AVX2, 0.78 ns with AVX-512. With AVX-512, 64 normals take some 290 vector instructions, 2.2 a cycle. That is about as
// many as this core issues at 512 bits, so only fewer instructions could make it faster.
#pragma once

#include "../../common/philox.h"
#include "../simd/simd.h"

namespace fastlm::FASTLM_ISA {

constexpr int kBatch = 4 * kLanes;

// Draws the 64 normals of the 16 blocks from `block` on.
FASTLM_SIMD void normal_batch(uint64_t seed, uint64_t block, float* out) {
  const Words<U64> words = philox(seed, U64(block) + U64::load(kBlockOfLane.block));
  F32 n0, n1, n2, n3;
  box_muller(narrow(words.w0), narrow(words.w1), n0, n1);
  box_muller(narrow(words.w2), narrow(words.w3), n2, n3);
  store_interleaved(n0, n1, n2, n3, out);
}

// Draws `count` normals from any position on. A batch that is needed only in part is drawn into a temporary array.
static void normals(uint64_t seed, uint64_t position, int64_t count, float* out) {
  uint64_t block = position / 4;
  int64_t skip = position % 4;
  for (int64_t done = 0; done < count; block += kLanes, skip = 0) {
    if (skip == 0 && count - done >= kBatch) {
      normal_batch(seed, block, out + done);
      done += kBatch;
    } else {
      alignas(64) float batch[kBatch];
      normal_batch(seed, block, batch);
      const int64_t wanted = count - done < kBatch - skip ? count - done : kBatch - skip;
      __builtin_memcpy(out + done, batch + skip, wanted * sizeof(float));
      done += wanted;
    }
  }
}

}  // namespace fastlm::FASTLM_ISA
