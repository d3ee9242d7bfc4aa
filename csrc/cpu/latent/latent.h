// The Gaussian latent on CPUs. A unit of work is whole rows, or a piece of a long row (common/latent.h).
#pragma once

#include "../../common/latent.h"

namespace fastlm {

// Computes units [unit_begin, unit_end). Units are independent of each other.
using LatentForwardKernel = void(const LatentForward&, int64_t unit_begin, int64_t unit_end);
using LatentBackwardKernel = void(const LatentBackward&, int64_t unit_begin, int64_t unit_end);

// Both run on all threads, and fill in `unit` and `pieces`.
void latent_forward(LatentForward&);
void latent_backward(LatentBackward&);

}  // namespace fastlm
