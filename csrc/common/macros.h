// What host compilers, their ISA-specific units and nvcc are told of a function.
#pragma once

#if defined(__CUDACC__)
#define FASTLM_HD static __host__ __device__ __forceinline__
#else
// static and always inlined: a copy compiled for one instruction set must never be picked by the linker for another.
#define FASTLM_HD static inline __attribute__((always_inline))
#endif
