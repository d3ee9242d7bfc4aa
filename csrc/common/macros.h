// What host compilers, their ISA-specific units and nvcc are told of a function.
#pragma once

// Without sanitizers all is inlined into a few kernels; with them that would take ten minutes to compile.
#if defined(FASTLM_SANITIZE)
#define FASTLM_FORCE_INLINE
#else
#define FASTLM_FORCE_INLINE __attribute__((always_inline))
#endif

#if defined(__CUDACC__)
#define FASTLM_HD static __host__ __device__ __forceinline__
#else
// static: a copy compiled for one instruction set must never be picked by the linker for another.
#define FASTLM_HD static inline FASTLM_FORCE_INLINE
#endif

// A loop whose number of turns the compiler knows.
#define FASTLM_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__)
#define FASTLM_UNROLL(turns) FASTLM_PRAGMA(unroll)
#else
#define FASTLM_UNROLL(turns) FASTLM_PRAGMA(GCC unroll turns)
#endif
