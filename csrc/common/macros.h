// Function attributes for host compilers, for code of one instruction set, and for nvcc.
#pragma once

// Everything is inlined into a few kernels, except under sanitizers, where that would take ten minutes to compile.
#if defined(FASTLM_SANITIZE)
#define FASTLM_FORCE_INLINE
#else
#define FASTLM_FORCE_INLINE __attribute__((always_inline))
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FASTLM_HD static __host__ __device__ __forceinline__
#define FASTLM_MEMBER __host__ __device__ __forceinline__  // a member function
#else
// static: the linker must never use a copy compiled for one instruction set in code for another.
#define FASTLM_HD static inline FASTLM_FORCE_INLINE
#define FASTLM_MEMBER FASTLM_FORCE_INLINE inline
#endif

// FASTLM_UNROLL(turns) unrolls the loop behind it, which has a constant number of turns, at most `turns`. FASTLM_ROLLED keeps
// the compiler from unrolling the loop. nvcc compiles host code with a compiler that has neither, and does not need them.
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
