// The Gaussian latent: the arguments of its kernels.
#pragma once

#include "view.h"

namespace fastlm {

// What the forward and the backward share. Elements are counted in the row-major order of `shape`, whatever the strides.
struct Latent {
  Shape shape;
  int64_t elements;
  View mu, logvar, prior_mu, prior_logvar;  // the priors may be absent; all are broadcast to `shape`
  const int64_t* seeds;                     // one per stream
  int64_t stream;                           // elements of one sample in one stream: element e is drawn from stream e / stream
  int64_t samples;
  double free_bits, low, high, temperature;
};

struct LatentForward : Latent {
  void* z;         // (samples, *shape) in mu's dtype, contiguous; null: not wanted
  void* kl;        // one per row of `event` elements: float, or double for float64; null: not wanted
  double* pieces;  // partial sums of rows longer than a unit, one per unit; null where rows are shorter
  int64_t event;   // elements per row
  int64_t unit;    // elements per unit: whole rows, or a piece of one
};

struct LatentBackward : Latent {
  View grad_z;                              // absent: no gradient
  int64_t grad_z_sample;                    // stride between samples
  const void* grad_kl;                      // one per row of `event` elements: float, or double for float64; null: no gradient
  int64_t event;                            // elements per row
  void *grad_mu, *grad_logvar;              // mu's dtype, contiguous
  void *grad_prior_mu, *grad_prior_logvar;  // null: not wanted
  int prior_mu_dtype, prior_logvar_dtype;   // of the gradients
  int64_t unit;
};

}  // namespace fastlm
