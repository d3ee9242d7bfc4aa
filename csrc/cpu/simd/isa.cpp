#include "isa.h"

#include <atomic>

namespace fastlm {

#define FASTLM_ISA_STRING(isa, ...) #isa,
const char* const isa_names[isa_count] = {FASTLM_FOR_EACH_ISA(FASTLM_ISA_STRING)};
#undef FASTLM_ISA_STRING

// CMakeLists.txt has the flags that each instruction set is compiled with. The check includes the operating system's support.
bool isa_runs_here(int isa) {
#if defined(__x86_64__)
  if (isa == isa_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == isa_avx512) return avx512;
  if (isa == isa_avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == isa_baseline;
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// vdpbf16ps runs at half of its width on Intel's processors, which have AMX for bfloat16: there, products of floats are 1.6
// times as fast, in attention 1.7 to 1.9 times (measured on a Sapphire Rapids).
int fastest_isa() {
  int isa = isa_count - 1;
  while (!isa_runs_here(isa)) --isa;
  return isa == isa_avx512_bf16 && is_intel() ? isa_avx512 : isa;
}

static std::atomic<int> current{isa_baseline};
int current_isa() { return current.load(std::memory_order_relaxed); }
void set_current_isa(int isa) { current.store(isa, std::memory_order_relaxed); }

}  // namespace fastlm
