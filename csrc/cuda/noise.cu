#include "noise.cuh"

#include "kernels.h"
#include "launch.cuh"

namespace fastlm {

const char* why_not() {
  cudaFuncAttributes attributes;
  return message(cudaFuncGetAttributes(&attributes, normal_kernel));
}

const char* normal(const int64_t* seed, uint64_t position, int64_t count, float* out, void* stream) {
  if (count == 0) return nullptr;
  const int64_t blocks = ceil_div(int64_t(position % 4) + count, 4);
  const NormalArguments arguments{seed, position, count, out, position % 4 == 0 && is_aligned(out)};
  return message(launch(normal_kernel, ceil_div(blocks, kThreads), arguments, stream));
}

}  // namespace fastlm
