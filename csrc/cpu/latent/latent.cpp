#include "latent.h"

#if defined(FASTLM_ISA)
#include "latent-inl.h"
#else

#include <algorithm>
#include <vector>

#include "../../common/sizes.h"
#include "../parallel.h"
#include "../simd/isa.h"

namespace fastlm {

FASTLM_ISA_TABLE(LatentForwardKernel, latent_forward)
FASTLM_ISA_TABLE(LatentBackwardKernel, latent_backward)

// Elements per unit: about 10 us of work on one core. A row longer than this is summed piece by piece. It is a constant,
// because the pieces, and so the bits of the sum, must not depend on the number of threads.
constexpr int64_t kUnit = 8192;

void latent_forward(LatentForward& a) {
  const auto kernel = latent_forward_kernels[current_isa()];
  const bool long_rows = a.kl && a.event > kUnit;
  a.unit = a.kl && !long_rows ? kUnit / a.event * a.event : kUnit;
  const int64_t rows = a.elements / a.event, pieces_per_row = ceil_div(a.event, kUnit);
  const int64_t units = long_rows ? rows * pieces_per_row : ceil_div(a.elements, a.unit);
  std::vector<double> pieces(long_rows ? units : 0);
  a.pieces = long_rows ? pieces.data() : nullptr;
  parallel_for(units, [&, kernel](int64_t begin, int64_t end) { kernel(a, begin, end); });
  if (!long_rows) return;
  for (int64_t row = 0; row < rows; ++row) {
    double total = 0;
    for (int64_t piece = 0; piece < pieces_per_row; ++piece) total += pieces[row * pieces_per_row + piece];
    a.mu.dtype == kFloat64 ? void(static_cast<double*>(a.kl)[row] = total)
                           : void(static_cast<float*>(a.kl)[row] = float(total));
  }
}

void latent_backward(LatentBackward& a) {
  const auto kernel = latent_backward_kernels[current_isa()];
  a.unit = kUnit;
  parallel_for(ceil_div(a.elements, kUnit), [&, kernel](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace fastlm

#endif
