// The Gaussian latent: the arguments of its kernels.
#pragma once

#include "view.h"

namespace fastlm {

// The arguments that forward and backward share. Elements are numbered in the row-major order of `shape`.
struct Latent {
  Shape shape;
  int64_t elements;
  View mu, logvar, prior_mu, prior_logvar;  // the priors may be absent; all are broadcast to `shape`
  const int64_t* seeds;                     // one per stream
  int64_t stream;  // elements per stream in one sample: the noise of element e is from stream e / stream
  int64_t samples;
  // Sample k begins at element first + k * sample_stride of each stream: 0 and `stream`, but for a part of a larger call.
  int64_t first, sample_stride;
  double free_bits, low, high, temperature;
};

struct LatentForward : Latent {
  void* z;         // (samples, *shape) in mu's dtype, contiguous; null if not wanted
  void* kl;        // (rows,): float, or double for float64; null if not wanted
  double* pieces;  // (units,): partial sums of rows that are longer than a unit; null if rows are shorter
  int64_t event;   // elements per row
  int64_t unit;    // elements per unit: whole rows, or a piece of one
};

struct LatentBackward : Latent {
  View grad_z;                              // may be absent
  int64_t grad_z_sample;                    // stride between samples
  const void* grad_kl;                      // (rows,): float, or double for float64; may be null
  int64_t event;                            // elements per row
  void *grad_mu, *grad_logvar;              // mu's dtype, contiguous
  void *grad_prior_mu, *grad_prior_logvar;  // null if not wanted
  int prior_mu_dtype, prior_logvar_dtype;   // dtypes of the gradients of the priors
  int64_t unit;
};

}  // namespace fastlm
