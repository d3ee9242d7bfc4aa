// The Gaussian latent on CPUs: its kernels, and how their work is cut into units.
#pragma once

#include "../../common/latent.h"

namespace fastlm {

// A unit's work; units are independent of each other.
using LatentForwardKernel = void(const LatentForward&, int64_t unit_begin, int64_t unit_end);
using LatentBackwardKernel = void(const LatentBackward&, int64_t unit_begin, int64_t unit_end);

// Run on all threads; they fill in the unit and the pieces.
void latent_forward(LatentForward&);
void latent_backward(LatentBackward&);

}  // namespace fastlm
