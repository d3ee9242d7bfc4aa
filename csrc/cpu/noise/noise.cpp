#include "noise.h"

#if defined(FASTLM_ISA)
#include "noise-inl.h"

namespace fastlm::FASTLM_ISA {
void normal(uint64_t seed, uint64_t position, int64_t count, float* out) { normals(seed, position, count, out); }
}  // namespace fastlm::FASTLM_ISA

#else

#include "../simd/isa.h"
#include "../parallel.h"

namespace fastlm {

#define FASTLM_DECLARE(isa) \
  namespace isa {           \
  NormalKernel normal;      \
  }
FASTLM_FOR_EACH_ISA(FASTLM_DECLARE)
#define FASTLM_ENTRY(isa) &isa::normal,
static NormalKernel* const kernels[] = {FASTLM_FOR_EACH_ISA(FASTLM_ENTRY)};

void normal(uint64_t seed, uint64_t position, int64_t count, float* out) {
  constexpr int64_t unit = 1 << 14;
  const auto kernel = kernels[current_isa()];
  parallel_for((count + unit - 1) / unit, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * unit, last = end * unit < count ? end * unit : count;
    kernel(seed, position + first, last - first, out + first);
  });
}

}  // namespace fastlm

#endif
