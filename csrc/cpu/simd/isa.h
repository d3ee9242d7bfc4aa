// The instruction sets that the kernels are compiled for, slowest first, and the one in use.
//
// An op's source is compiled once for each instruction set, with FASTLM_ISA set to the namespace of its functions, and once
// without, for the tables of them:
//   FASTLM_ISA_TABLE(NormalKernel, normal)     declares baseline::normal, avx2::normal, ... and makes normal_kernels[]
//   normal_kernels[current_isa()](seed, ...)   calls the one for this machine
#pragma once

// Expands to X(isa, ...) for each instruction set.
#if defined(__x86_64__)
#define FASTLM_FOR_EACH_ISA(X, ...) \
  X(baseline, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__) X(avx512_bf16, __VA_ARGS__)
#else
#define FASTLM_FOR_EACH_ISA(X, ...) X(baseline, __VA_ARGS__)
#endif

// Signature is a function type, such as void(int).
#define FASTLM_ISA_TABLE(Signature, name)                  \
  FASTLM_FOR_EACH_ISA(FASTLM_ISA_DECLARE, Signature, name) \
  static Signature* const name##_kernels[] = {FASTLM_FOR_EACH_ISA(FASTLM_ISA_ENTRY, Signature, name)};
#define FASTLM_ISA_DECLARE(isa, Signature, name) \
  namespace isa {                                \
  Signature name;                                \
  }
#define FASTLM_ISA_ENTRY(isa, Signature, name) &isa::name,

namespace fastlm {

enum Isa {
#define FASTLM_ISA_NAME(isa, ...) isa_##isa,
  FASTLM_FOR_EACH_ISA(FASTLM_ISA_NAME)
#undef FASTLM_ISA_NAME
      isa_count
};

extern const char* const isa_names[isa_count];
bool isa_runs_here(int isa);
bool is_intel();  // whether the processor is Intel's
int fastest_isa();
int current_isa();
void set_current_isa(int isa);

}  // namespace fastlm
