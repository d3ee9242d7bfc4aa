// The instruction sets that the kernels are compiled for, slowest first, and the one in use.
//
// An op's source is compiled once for each, with FASTLM_ISA set to the namespace of its functions, and once without, for the
// table of them: FASTLM_ISA_TABLE(Signature, name) is {&baseline::name, &avx2::name, ...}, to be indexed by current_isa().
#pragma once

#if defined(__x86_64__)
#define FASTLM_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512) X(avx512_bf16)
#else
#define FASTLM_FOR_EACH_ISA(X) X(baseline)
#endif

namespace fastlm {

enum Isa {
#define FASTLM_ISA_NAME(isa) isa_##isa,
  FASTLM_FOR_EACH_ISA(FASTLM_ISA_NAME)
#undef FASTLM_ISA_NAME
      isa_count
};

extern const char* const isa_names[isa_count];
bool isa_runs_here(int isa);
int current_isa();
void set_current_isa(int isa);

}  // namespace fastlm
