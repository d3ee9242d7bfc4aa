// The kernel that only draws noise: device code.
#pragma once

#include "normals.cuh"

namespace fastlm {

struct NormalArguments {
  const int64_t* seed;
  uint64_t position;
  int64_t count;
  float* out;
  bool packed;
};

// Fills out (count,) with elements position, position + 1, ... of the seed's stream. Each thread draws one block of four.
__global__ void __launch_bounds__(kThreads) normal_kernel(NormalArguments a) {
  const uint64_t block = a.position / 4 + uint64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = int64_t(4 * block - a.position);
  if (first >= a.count) return;
  float normals[4];
  normal_block(uint64_t(*a.seed), block, normals);
  store(a.out, a.packed, group_at<4>(first, 0, a.count, a.count), normals);
}

}  // namespace fastlm
