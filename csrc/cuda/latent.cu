#include "latent.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.cuh"

namespace fastlm {

// Elements per tile of short rows: enough for every thread of a block, and few enough for many blocks.
constexpr int64_t kShortTile = 1024;

// Returns whether every group consists of whole blocks of the noise, in every sample: four neighbours of one stream that start
// at a multiple of four.
static bool draws_blocks(const Latent& a) {
  const bool one_sample = a.samples == 1 || a.sample_stride % 4 == 0;
  return (a.stream == a.elements || a.stream % 4 == 0) && one_sample && a.first % 4 == 0;
}

static Packed packed_inputs(const Latent& a, int group) {
  const auto check = [&](const View& view) { return is_packed(a.shape, view, a.mu.dtype, group); };
  Packed packed = {};
  packed.mu = check(a.mu);
  packed.logvar = check(a.logvar);
  packed.prior_mu = check(a.prior_mu);
  packed.prior_logvar = check(a.prior_logvar);
  return packed;
}

// Returns the smallest power of two, at most 32, with which a lane adds at most four terms of a strip, if there is one.
static int lanes_of(int64_t event) {
  int lanes = 1;
  while (lanes < 32 && 4 * lanes < event) lanes *= 2;
  return lanes;
}

int64_t latent_pieces(const LatentForward& a) {
  return a.kl && a.event > kTile ? a.elements / a.event * ceil_div(a.event, kTile) : 0;
}

// Launches the kernel that sums the pieces of each row.
static cudaError_t total(const LatentForward& a, int64_t pieces, void* stream) {
  const int64_t rows = a.elements / a.event;
  const TotalArguments arguments{a.pieces, pieces / rows, a.kl};
  return launch(a.mu.dtype == kFloat64 ? latent_total_kernel<double> : latent_total_kernel<float>, rows, arguments, stream);
}

const char* latent_forward(LatentForward a, void* stream) {
  const int64_t pieces = latent_pieces(a);
  if (pieces == 0) {
    const int64_t rows = std::max<int64_t>(kShortTile / a.event, 1);
    a.unit = (rows > 8 ? rows / 8 * 8 : rows) * a.event;  // so that tiles start with a group
    a.pieces = nullptr;
  } else {
    a.unit = kTile;
  }
  cudaError_t error = with_dtype(a.mu.dtype, [&](auto type) {
    using T = decltype(type);
    ForwardArguments arguments{a, packed_inputs(a, kGroup<T>), draws_blocks(a), lanes_of(a.event)};
    arguments.packed.z = is_aligned(a.z) && (a.samples == 1 || a.elements % kGroup<T> == 0);
    const bool prior = a.prior_mu.data || a.prior_logvar.data;
    const auto kernel = prior ? latent_forward_kernel<T, true> : latent_forward_kernel<T, false>;
    return launch(kernel, pieces ? pieces : ceil_div(a.elements, a.unit), arguments, stream);
  });
  if (error == cudaSuccess && pieces) error = total(a, pieces, stream);
  return message(error);
}

const char* latent_backward(const LatentBackward& a, void* stream) {
  const cudaError_t error = with_dtype(a.mu.dtype, [&](auto type) {
    using T = decltype(type);
    BackwardArguments arguments{a, packed_inputs(a, kGroup<T>), draws_blocks(a)};
    Packed& packed = arguments.packed;
    packed.grad_z = is_packed(a.shape, a.grad_z, a.mu.dtype, kGroup<T>) && a.grad_z_sample % kGroup<T> == 0;
    packed.grad_mu = is_aligned(a.grad_mu);
    packed.grad_logvar = is_aligned(a.grad_logvar);
    packed.grad_prior_mu = is_aligned(a.grad_prior_mu);
    packed.grad_prior_logvar = is_aligned(a.grad_prior_logvar);
    const bool prior = a.prior_mu.data || a.prior_logvar.data;
    const auto kernel = prior ? latent_backward_kernel<T, true> : latent_backward_kernel<T, false>;
    return launch(kernel, ceil_div(a.elements, int64_t(kThreads) * kGroup<T>), arguments, stream);
  });
  return message(error);
}

}  // namespace fastlm
