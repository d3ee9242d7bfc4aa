// Functions that the launchers share: they choose a kernel by dtype, find out which tensors are packed, and launch.
#pragma once

#include <cstdint>

#include "../common/sizes.h"
#include "groups.cuh"

namespace fastlm {

// Calls f with a value of the dtype's storage type.
template <class F>
cudaError_t with_dtype(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(float());
    case kFloat64: return f(double());
    case kBFloat16: return f(__nv_bfloat16());
    default: return f(__half());
  }
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Returns whether the elements of every group are contiguous in memory, aligned to 16 bytes, and within one row.
inline bool is_packed(const Shape& shape, const View& view, int dtype, int group) {
  if (view.dtype != dtype || !is_aligned(view.data)) return false;
  const int last = shape.dims - 1;
  if (view.stride[last] != 1 || (last > 0 && shape.size[last] % group != 0)) return false;
  for (int d = 0; d < last; ++d) {
    if (view.stride[d] % group != 0) return false;
  }
  return true;
}

inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Launches a kernel. The source has no <<<>>>, so that a host compiler can compile it too.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, Arguments arguments, void* stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* pointers[] = {&arguments};
  return cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(kThreads), pointers, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace fastlm
