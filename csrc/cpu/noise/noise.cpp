#include "noise.h"

#if defined(FASTLM_ISA)
#include "noise-inl.h"

namespace fastlm::FASTLM_ISA {
void normal(uint64_t seed, uint64_t position, int64_t count, float* out) { normals(seed, position, count, out); }
}  // namespace fastlm::FASTLM_ISA

#else

#include "../../common/sizes.h"
#include "../parallel.h"
#include "../simd/isa.h"

namespace fastlm {

FASTLM_ISA_TABLE(NormalKernel, normal)

void normal(uint64_t seed, uint64_t position, int64_t count, float* out) {
  constexpr int64_t unit = 1 << 14;
  const auto kernel = normal_kernels[current_isa()];
  parallel_for(ceil_div(count, unit), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * unit, last = end * unit < count ? end * unit : count;
    kernel(seed, position + first, last - first, out + first);
  });
}

}  // namespace fastlm

#endif
