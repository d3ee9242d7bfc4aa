// What host compilers, their ISA-specific units and nvcc are told of a function.
#pragma once

// Without sanitizers all is inlined into a few kernels; with them that would take ten minutes to compile.
#if defined(FASTLM_SANITIZE)
#define FASTLM_FORCE_INLINE
#else
#define FASTLM_FORCE_INLINE __attribute__((always_inline))
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FASTLM_HD static __host__ __device__ __forceinline__
#define FASTLM_MEMBER __host__ __device__ __forceinline__  // of a class
#else
// static: a copy compiled for one instruction set must never be picked by the linker for another.
#define FASTLM_HD static inline FASTLM_FORCE_INLINE
#define FASTLM_MEMBER FASTLM_FORCE_INLINE inline
#endif

// Before a loop: whose number of turns the compiler knows, at most that many; which is to stay one. nvcc hands the host's half
// of its work to a compiler that knows neither, and to which they do not matter.
#define FASTLM_PRAGMA(text) _Pragma(#text)
#if defined(__CUDA_ARCH__)
#define FASTLM_UNROLL(turns) FASTLM_PRAGMA(unroll)
#define FASTLM_ROLLED FASTLM_PRAGMA(unroll 1)
#elif defined(__CUDACC__)
#define FASTLM_UNROLL(turns)
#define FASTLM_ROLLED
#else
#define FASTLM_UNROLL(turns) FASTLM_PRAGMA(GCC unroll turns)
#define FASTLM_ROLLED
#endif
