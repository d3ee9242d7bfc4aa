// The Gaussian latent on a GPU: device code. T is a tensor's dtype, C the type of the arithmetic (float or double), and V the
// same type in the form that csrc/common takes (scalar.cuh).
//
// A block works on a tile: whole rows, or a piece of a long row. Each thread reads groups of neighbouring elements once, draws
// their noise, and writes z from registers. The KL's terms go through shared memory: each strip of a row is summed by lanes of
// a warp, and, after a barrier, a thread sums the strips. A second kernel sums the pieces of long rows. So the order of a sum
// depends only on the length of its row, and no bit depends on the batch.
#pragma once

#include "../common/gaussian.h"
#include "../common/latent.h"
#include "normals.cuh"

namespace fastlm {

constexpr int kTile = 2048;  // elements per block, at most
constexpr int kStrip = 256;  // elements of a row that one warp sums
#if defined(__HIPCC__)
constexpr unsigned long long kAllLanes = ~0ull;  // AMD's warps may have 64 lanes
#else
constexpr unsigned kAllLanes = ~0u;
#endif

// Which tensors the kernel reads and writes in whole groups.
struct Packed {
  bool mu, logvar, prior_mu, prior_logvar, z, grad_z, grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar;
};

struct ForwardArguments {
  LatentForward a;
  Packed packed;
  bool blocks;  // whether every group consists of whole blocks of the noise
  int lanes;    // lanes of a warp that sum a strip together: a power of two
};

struct BackwardArguments {
  LatentBackward a;
  Packed packed;
  bool blocks;
};

static_assert(sizeof(ForwardArguments) <= 4096 && sizeof(BackwardArguments) <= 4096, "the limit of a kernel's arguments");

// Draws the noise of the group's elements in sample k into eps (N,).
template <int N>
FASTLM_DEVICE void draw(const Latent& a, bool blocks, int64_t k, const Group& group, float (&eps)[N]) {
  const int64_t sample = a.first + k * a.sample_stride;
  if (blocks) {
    FASTLM_UNROLL(2)
    for (int i = 0; i < N; i += 4) {
      if (i >= group.high) return;
      const int64_t stream = quotient(group.first + i, a.stream), position = group.first + i - stream * a.stream;
      normal_block(uint64_t(a.seeds[stream]), uint64_t(sample + position) / 4, eps + i);
    }
    return;
  }
  FASTLM_ROLLED
  for (int i = group.low; i < group.high; ++i) {
    const int64_t stream = quotient(group.first + i, a.stream), position = group.first + i - stream * a.stream;
    put(eps, i, normal_at(uint64_t(a.seeds[stream]), uint64_t(sample + position)));
  }
}

// The inputs of a group, each (N,), and the KL's terms from them.
template <class T, bool kPrior>
struct Inputs {
  using C = typename Accumulator<T>::type;
  using V = Number<C>;
  static constexpr int N = kGroup<T>;
  const Latent& a;
  C mu[N], logvar[N], prior_mu[N], prior_logvar[N];

  FASTLM_DEVICE_MEMBER explicit Inputs(const Latent& a) : a(a) {}

  // Loads the inputs. Their views are the first four of the place.
  template <int kViews>
  FASTLM_DEVICE_MEMBER void read_all(const Packed& packed, const Group& group, const Place<kViews>& at) {
    load<T>(a.shape, a.mu, a.mu.data, packed.mu, group, at.offset[0], at.inner, mu);
    load<T>(a.shape, a.logvar, a.logvar.data, packed.logvar, group, at.offset[1], at.inner, logvar);
    if constexpr (kPrior) {
      if (a.prior_mu.data) {
        load<T>(a.shape, a.prior_mu, a.prior_mu.data, packed.prior_mu, group, at.offset[2], at.inner, prior_mu);
      }
      if (a.prior_logvar.data) {
        load<T>(a.shape, a.prior_logvar, a.prior_logvar.data, packed.prior_logvar, group, at.offset[3], at.inner, prior_logvar);
      }
    }
  }

  FASTLM_DEVICE_MEMBER V deviation(int i) const { return standard_deviation(clamp(V(logvar[i]), V(C(a.low)), V(C(a.high)))); }

  FASTLM_DEVICE_MEMBER Kl<V> kl_at(int i, V deviation) const {
    V difference(mu[i]), log_ratio = clamp(V(logvar[i]), V(C(a.low)), V(C(a.high)));
    V ratio = deviation * deviation, precision(C(1));
    if constexpr (kPrior) {
      if (a.prior_mu.data) difference = difference - V(prior_mu[i]);
      if (a.prior_logvar.data) {
        log_ratio = log_ratio - V(prior_logvar[i]);
        ratio = exp(log_ratio);
        precision = exp(V(C(0)) - V(prior_logvar[i]));
      }
    }
    return kl(difference, log_ratio, ratio, precision);
  }
};

// ---- forward ----------------------------------------------------------------------------------------------------------------

// Elements [begin, end) of a block: whole rows, or a piece of one.
struct Tile {
  int64_t begin, end;
};

FASTLM_DEVICE Tile tile_of(const LatentForward& a, int64_t block) {
  const int64_t pieces = a.pieces ? quotient(a.event + a.unit - 1, a.unit) : 1;  // pieces per row
  const int64_t row = a.pieces ? quotient(block, pieces) : 0;
  const int64_t begin = row * a.event + (block - row * pieces) * a.unit, limit = a.pieces ? (row + 1) * a.event : a.elements;
  return {begin, begin + a.unit < limit ? begin + a.unit : limit};
}

// Computes z of a group in every sample, and, if `terms` is not null, the KL's terms of the group in those of the tile.
template <class T, bool kPrior, class C>
FASTLM_DEVICE void forward_group(const ForwardArguments& arguments, const Tile& tile, int64_t first, C* terms) {
  constexpr int N = kGroup<T>;
  using V = Number<C>;
  const LatentForward& a = arguments.a;
  const Group group = group_at<N>(first, tile.begin, tile.end, a.elements);
  Inputs<T, kPrior> in(a);
  const View* const views[] = {&a.mu, &a.logvar, &a.prior_mu, &a.prior_logvar};
  in.read_all(arguments.packed, group, locate(a.shape, views, first));
  C scaled[N];
  FASTLM_UNROLL(8)
  for (int i = 0; i < N; ++i) {
    const V deviation = in.deviation(i);
    scaled[i] = (V(C(a.temperature)) * deviation).v;
    if (terms && group.has(i)) terms[first + i - tile.begin] = max(V(C(a.free_bits)), in.kl_at(i, deviation).value).v;
  }
  if (!a.z) return;
  FASTLM_ROLLED
  for (int64_t k = 0; k < a.samples; ++k) {
    float eps[N] = {};
    draw(a, arguments.blocks, k, group, eps);
    C z[N];
    FASTLM_UNROLL(8)
    for (int i = 0; i < N; ++i) z[i] = fma(V(scaled[i]), V(C(eps[i])), V(in.mu[i])).v;
    store(static_cast<T*>(a.z) + k * a.elements, arguments.packed.z, group, z);
  }
}

// Sums the rows of the tile, or the piece of a row that the tile is. All threads of the block take part in every turn.
template <class C>
FASTLM_DEVICE void sum_terms(const LatentForward& a, int lanes, const Tile& tile, const C* terms, C* strips) {
  const int length = int(a.pieces ? tile.end - tile.begin : a.event), rows = int(tile.end - tile.begin) / length;
  const int strips_per_row = (length + kStrip - 1) / kStrip, at_once = kThreads / lanes;
  const int lane = int(threadIdx.x) % lanes;
  const int64_t first_row = quotient(tile.begin, a.event);
  const auto write = [&](int row, C sum) {
    a.pieces ? void(a.pieces[blockIdx.x] = double(sum)) : void(static_cast<C*>(a.kl)[first_row + row] = sum);
  };
  for (int turn = 0; turn < rows * strips_per_row; turn += at_once) {
    const int strip = turn + int(threadIdx.x) / lanes, row = strip / strips_per_row;
    const int begin = strip % strips_per_row * kStrip, end = begin + kStrip < length ? begin + kStrip : length;
    C sum(0);
    if (row < rows) {
      for (int i = begin + lane; i < end; i += lanes) sum += terms[row * length + i];
    }
    for (int half = lanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half, lanes);
    if (lane == 0 && row < rows) strips_per_row == 1 ? write(row, sum) : void(strips[strip] = sum);
  }
  if (strips_per_row == 1) return;
  __syncthreads();
  for (int row = int(threadIdx.x); row < rows; row += kThreads) {
    C sum(0);
    for (int i = 0; i < strips_per_row; ++i) sum += strips[row * strips_per_row + i];
    write(row, sum);
  }
}

template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads, 4) latent_forward_kernel(ForwardArguments arguments) {
  using C = typename Accumulator<T>::type;
  constexpr int N = kGroup<T>;
  __shared__ C terms[kTile];
  __shared__ C strips[kTile / kStrip * 2];  // used only for rows longer than a strip
  const LatentForward& a = arguments.a;
  const Tile tile = tile_of(a, blockIdx.x);
  for (int64_t first = tile.begin / N * N + int(threadIdx.x) * N; first < tile.end; first += kThreads * N) {
    forward_group<T, kPrior>(arguments, tile, first, a.kl ? terms : nullptr);
  }
  if (!a.kl) return;
  __syncthreads();
  sum_terms(a, arguments.lanes, tile, terms, strips);
}

struct TotalArguments {
  const double* pieces;
  int64_t count;  // pieces per row
  void* kl;
};

// Sums the pieces of a row; each block sums one row.
template <class C>
__global__ void __launch_bounds__(kThreads) latent_total_kernel(TotalArguments a) {
  __shared__ double sums[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < a.count; i += kThreads) sum += a.pieces[blockIdx.x * a.count + i];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) static_cast<C*>(a.kl)[blockIdx.x] = C(sums[0]);
}

// ---- backward ---------------------------------------------------------------------------------------------------------------

// Computes the gradients that come through z, each (N,): sum_k g_k, which is mu's gradient, and sum_k g_k eps_k.
template <class T, class C, int N>
FASTLM_DEVICE void sum_samples(const BackwardArguments& arguments, const Group& group, int64_t offset, int64_t inner,
                               C (&sum)[N], C (&noisy_sum)[N]) {
  using V = Number<C>;
  const LatentBackward& a = arguments.a;
  FASTLM_ROLLED
  for (int64_t k = 0; k < a.samples; ++k) {
    float eps[N] = {};
    draw(a, arguments.blocks, k, group, eps);
    C g[N];
    const char* data = a.grad_z.data + k * a.grad_z_sample * int64_t(sizeof(T));
    load<T>(a.shape, a.grad_z, data, arguments.packed.grad_z, group, offset, inner, g);
    FASTLM_UNROLL(8)
    for (int i = 0; i < N; ++i) {
      sum[i] = sum[i] + g[i];
      noisy_sum[i] = (V(noisy_sum[i]) + V(g[i]) * V(C(eps[i]))).v;
    }
  }
}

// Copies the gradient of each element's row, that of its KL, to out (N,).
template <class C, int N>
FASTLM_DEVICE void spread(const LatentBackward& a, const Group& group, C (&out)[N]) {
  const C* grad_kl = static_cast<const C*>(a.grad_kl);
  int64_t row = quotient(group.first, a.event), row_end = (row + 1) * a.event;
  FASTLM_UNROLL(8)
  for (int i = 0; i < N; ++i) {
    if (group.first + i == row_end) {
      ++row;
      row_end += a.event;
    }
    out[i] = group.has(i) ? grad_kl[row] : C(0);
  }
}

// Computes all gradients of a group: those through z, with d z / d logvar = temperature deviation eps / 2, plus those of the
// KL.
template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads, 4) latent_backward_kernel(BackwardArguments arguments) {
  using C = typename Accumulator<T>::type;
  using V = Number<C>;
  constexpr int N = kGroup<T>;
  const LatentBackward& a = arguments.a;
  const Packed& packed = arguments.packed;
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (first >= a.elements) return;
  const Group group = group_at<N>(first, 0, a.elements, a.elements);
  const View* const views[] = {&a.mu, &a.logvar, &a.prior_mu, &a.prior_logvar, &a.grad_z};
  const auto at = locate(a.shape, views, first);
  Inputs<T, kPrior> in(a);
  in.read_all(packed, group, at);
  C mu[N] = {}, logvar[N] = {}, grad_kl[N] = {};
  if (a.grad_z.data) sum_samples<T>(arguments, group, at.offset[4], at.inner, mu, logvar);
  if (a.grad_kl) spread(a, group, grad_kl);
  FASTLM_UNROLL(8)
  for (int i = 0; i < N; ++i) {
    const V deviation = in.deviation(i);
    KlGradient<V> kl{V(C(0)), V(C(0)), V(C(0)), V(C(0))};
    if (a.grad_kl) kl = kl_gradient(in.kl_at(i, deviation), V(C(a.free_bits)), V(grad_kl[i]));
    const V through_z = a.grad_z.data ? V(logvar[i]) * (V(C(0.5 * a.temperature)) * deviation) : V(C(0));
    mu[i] = (V(mu[i]) + kl.mu).v;
    logvar[i] = clamp_gradient(through_z + kl.logvar, V(in.logvar[i]), V(C(a.low)), V(C(a.high))).v;
    if constexpr (kPrior) {  // The gradients take the place of the priors.
      in.prior_mu[i] = kl.prior_mu.v;
      in.prior_logvar[i] = kl.prior_logvar.v;
    }
  }
  store(static_cast<T*>(a.grad_mu), packed.grad_mu, group, mu);
  store(static_cast<T*>(a.grad_logvar), packed.grad_logvar, group, logvar);
  if constexpr (kPrior) {
    if (a.grad_prior_mu) store_as(a.prior_mu_dtype, a.grad_prior_mu, packed.grad_prior_mu, group, in.prior_mu);
    if (a.grad_prior_logvar) {
      store_as(a.prior_logvar_dtype, a.grad_prior_logvar, packed.grad_prior_logvar, group, in.prior_logvar);
    }
  }
}

}  // namespace fastlm
