// The Gaussian latent, forward and backward. Both work on a tile (kTile,) at a time, in the first-level cache: they convert the
// inputs, draw the noise, and go over the tile in one of the short loops below. C is the type of the arithmetic: float, or
// double for float64 tensors.
//
// The ladder, forward + backward in ns per float32 element on one core of a Zen 4 (AVX-512), data in the first-level cache:
//   1.7 + 3.9  a loop for each step (deviation, z, kl, gradients), each with its own buffers
//   1.8 + 2.3  no buffer for what a register can hold, grad_kl broadcast row by row, outputs written in place
//   1.6 + 1.9  one loop forward, one backward; e^logvar is the square of the deviation, which sampling needs anyway
// Of this the noise, which each of them draws, takes 0.8 + 0.8. With data in memory (1M elements, two cores), prefetching the
// next tile brought forward + backward from 3.2 to 2.3 ms.
#pragma once

#include "../../common/gaussian.h"
#include "../noise/noise-inl.h"
#include "latent.h"
#include "staging-inl.h"

namespace fastlm::FASTLM_ISA {

// Draws the noise of elements [first, first + count) of sample k into eps (count,), one stream after the other.
static void draw(const Latent& a, int64_t k, int64_t first, int64_t count, float* eps) {
  const int64_t sample = a.first + k * a.sample_stride;
  for (int64_t done = 0; done < count;) {
    const int64_t stream = (first + done) / a.stream, position = (first + done) % a.stream;
    const int64_t left = a.stream - position, run = left < count - done ? left : count - done;
    normals(uint64_t(a.seeds[stream]), uint64_t(sample + position), run, eps + done);
    done += run;
  }
}

// The inputs of a tile, each (count,), and the KL's terms of 16 elements at a time.
template <class C>
struct Inputs {
  using V = Vector<C>;
  const Latent& a;
  const C *mu, *logvar, *prior_mu, *prior_logvar;
  Tile<C> mu_tile, logvar_tile, prior_mu_tile, prior_logvar_tile;

  FASTLM_MEMBER explicit Inputs(const Latent& a) : a(a) {}

  FASTLM_MEMBER void read_all(int64_t first, int64_t count) {
    mu = read(mu_tile, a.shape, a.mu, first, count);
    logvar = read(logvar_tile, a.shape, a.logvar, first, count);
    prior_mu = a.prior_mu.data ? read(prior_mu_tile, a.shape, a.prior_mu, first, count) : nullptr;
    prior_logvar = a.prior_logvar.data ? read(prior_logvar_tile, a.shape, a.prior_logvar, first, count) : nullptr;
  }

  FASTLM_MEMBER V clamped_logvar(int64_t i) const { return clamp(V::load(logvar + i), V(C(a.low)), V(C(a.high))); }

  FASTLM_MEMBER V deviation(int64_t i) const { return standard_deviation(clamped_logvar(i)); }

  template <bool kPrior>
  FASTLM_MEMBER Kl<V> kl_at(int64_t i, V deviation) const {
    V difference = V::load(mu + i), log_ratio = clamped_logvar(i), ratio = deviation * deviation, precision(C(1));
    if constexpr (kPrior) {
      if (prior_mu) difference = difference - V::load(prior_mu + i);
      if (prior_logvar) {
        const V p = V::load(prior_logvar + i);
        log_ratio = log_ratio - p;
        ratio = exp(log_ratio);
        precision = exp(V(C(0)) - p);
      }
    }
    return kl(difference, log_ratio, ratio, precision);
  }

  FASTLM_MEMBER bool has_prior() const { return prior_mu || prior_logvar; }
};

// Returns the sum of `count` values, in an order that depends on count alone.
template <class C>
static C sum(const C* values, int64_t count) {
  if (count == 1) return values[0];
  using V = Vector<C>;
  V total(C(0));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) total = total + V::load(values + i);
  alignas(64) C lanes[kLanes] = {};
  if (i < count) {
    __builtin_memcpy(lanes, values + i, (count - i) * sizeof(C));
    total = total + V::load(lanes);
  }
  total.store(lanes);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Goes over a tile once and computes z from eps and the KL's terms, each (count,) and only if it is not null.
template <class C, bool kPrior>
static void forward_elements(const Inputs<C>& in, int64_t count, const float* eps, C* z, C* kl) {
  using V = Vector<C>;
  const V free_bits(C(in.a.free_bits)), temperature(C(in.a.temperature));
  for (int64_t i = 0; i < count; i += kLanes) {
    const V deviation = in.deviation(i);
    if (z) fma(temperature * deviation, V::load(eps + i), V::load(in.mu + i)).store(z + i);
    if (kl) max(free_bits, in.template kl_at<kPrior>(i, deviation).value).store(kl + i);
  }
}

// Computes all samples of a tile, and, with the first sample, the KL's terms (count,).
template <class C>
static void forward_tile(const LatentForward& a, Inputs<C>& in, int64_t first, int64_t count, C* kl) {
  in.read_all(first, count);
  const auto elements = in.has_prior() ? forward_elements<C, true> : forward_elements<C, false>;
  if (!a.z) return elements(in, count, nullptr, nullptr, kl);
  Output<C> z;
  alignas(64) float eps[kTile];
  for (int64_t k = 0; k < a.samples; ++k) {
    const int64_t to = k * a.elements + first;
    draw(a, k, first, count, eps);
    z.open(a.z, a.mu.dtype, to, count);
    elements(in, count, eps, z.values, k == 0 ? kl : nullptr);
    commit(z, a.z, a.mu.dtype, to, count);
  }
}

// Computes elements [begin, end): whole rows, or, if `piece` is given, a piece of one row, whose sum is written there. A tile
// holds whole rows or starts at a fixed distance from its row's start, so that no sum depends on what is around the row.
template <class C>
static void forward_unit(const LatentForward& a, int64_t begin, int64_t end, double* piece) {
  Inputs<C> in(a);
  alignas(64) C kl[kTile];
  const int64_t tile = a.event <= kTile ? kTile / a.event * a.event : kTile;
  int64_t row = begin / a.event, row_end = (row + 1) * a.event;
  double total = 0;
  for (int64_t first = begin; first < end;) {
    const int64_t limit = a.event <= kTile || row_end > end ? end : row_end;
    const int64_t count = tile < limit - first ? tile : limit - first;
    forward_tile(a, in, first, count, a.kl ? kl : nullptr);
    if (a.kl) {
      for (int64_t done = 0; done < count;) {
        const int64_t left = row_end - first - done, run = left < count - done ? left : count - done;
        total += sum(kl + done, run);
        done += run;
        if (first + done == row_end && !piece) {
          static_cast<C*>(a.kl)[row++] = C(total);
          row_end += a.event;
          total = 0;
        }
      }
    }
    first += count;
  }
  if (piece) *piece = total;
}

void latent_forward(const LatentForward& a, int64_t unit_begin, int64_t unit_end) {
  const int64_t pieces = a.pieces ? ceil_div(a.event, a.unit) : 1;  // units per row
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t begin = a.pieces ? unit / pieces * a.event + unit % pieces * a.unit : unit * a.unit;
    const int64_t limit = a.pieces ? (unit / pieces + 1) * a.event : a.elements;
    const int64_t end = begin + a.unit < limit ? begin + a.unit : limit;
    double* piece = a.pieces ? a.pieces + unit : nullptr;
    a.mu.dtype == kFloat64 ? forward_unit<double>(a, begin, end, piece) : forward_unit<float>(a, begin, end, piece);
  }
}

// The gradients that come through z, each (count,): sum_k g_k, which is mu's gradient, and sum_k g_k eps_k.
template <class C>
struct SampleGradient {
  const C *sum = nullptr, *noisy_sum = nullptr;
  Tile<C> tile;
  alignas(64) C sums[kTile], noisy_sums[kTile];
};

template <class C>
static void sum_samples(const LatentBackward& a, int64_t first, int64_t count, SampleGradient<C>& out) {
  using V = Vector<C>;
  alignas(64) float eps[kTile];
  View grad_z = a.grad_z;
  const int64_t sample_bytes = a.grad_z_sample * bytes_of(grad_z.dtype);
  for (int64_t k = 0; k < a.samples; ++k, grad_z.data += sample_bytes) {
    draw(a, k, first, count, eps);
    const C* g = read(out.tile, a.shape, grad_z, first, count);
    for (int64_t i = 0; i < count; i += kLanes) {
      const V noisy = V::load(g + i) * V::load(eps + i);
      (k == 0 ? noisy : V::load(out.noisy_sums + i) + noisy).store(out.noisy_sums + i);
      if (a.samples > 1) (k == 0 ? V::load(g + i) : V::load(out.sums + i) + V::load(g + i)).store(out.sums + i);
    }
    out.sum = a.samples > 1 ? out.sums : g;
  }
  out.noisy_sum = out.noisy_sums;
}

// Copies each row's gradient of the KL to the row's elements, out (count,).
template <class C>
static void spread(const LatentBackward& a, int64_t first, int64_t count, C* out) {
  const C* grad_kl = static_cast<const C*>(a.grad_kl);
  int64_t row = first / a.event, row_end = (row + 1) * a.event;
  for (int64_t done = 0; done < count; ++row, row_end += a.event) {
    const int64_t left = row_end - first - done, run = left < count - done ? left : count - done;
    for (int64_t i = 0; i < run; ++i) out[done + i] = grad_kl[row];
    done += run;
  }
}

template <class C>
struct BackwardTile {
  Inputs<C> in;
  SampleGradient<C> z;
  Output<C> mu, logvar, prior_mu, prior_logvar;
  alignas(64) C grad_kl[kTile];
  FASTLM_MEMBER explicit BackwardTile(const Latent& a) : in(a) {}
};

// Computes all gradients of the tile in one loop: those through z, with d z / d logvar = temperature deviation eps / 2, plus
// those of the KL.
template <class C, bool kPrior>
static void gradients(const LatentBackward& a, BackwardTile<C>& t, int64_t count) {
  using V = Vector<C>;
  const V free_bits(C(a.free_bits)), low(C(a.low)), high(C(a.high)), half_temperature(C(0.5 * a.temperature));
  for (int64_t i = 0; i < count; i += kLanes) {
    const V deviation = t.in.deviation(i);
    V mu(C(0)), logvar(C(0));
    KlGradient<V> kl{mu, mu, mu, mu};
    if (a.grad_z.data) {
      mu = V::load(t.z.sum + i);
      logvar = V::load(t.z.noisy_sum + i) * (half_temperature * deviation);
    }
    if (a.grad_kl) kl = kl_gradient(t.in.template kl_at<kPrior>(i, deviation), free_bits, V::load(t.grad_kl + i));
    (mu + kl.mu).store(t.mu.values + i);
    clamp_gradient(logvar + kl.logvar, V::load(t.in.logvar + i), low, high).store(t.logvar.values + i);
    if constexpr (kPrior) {
      kl.prior_mu.store(t.prior_mu.values + i);
      kl.prior_logvar.store(t.prior_logvar.values + i);
    }
  }
}

template <class C>
static void backward_tile(const LatentBackward& a, BackwardTile<C>& t, int64_t first, int64_t count) {
  t.in.read_all(first, count);
  if (a.grad_z.data) sum_samples(a, first, count, t.z);
  if (a.grad_kl) spread(a, first, count, t.grad_kl);
  t.mu.open(a.grad_mu, a.mu.dtype, first, count);
  t.logvar.open(a.grad_logvar, a.mu.dtype, first, count);
  t.prior_mu.values = t.prior_mu.tile;
  t.prior_logvar.values = t.prior_logvar.tile;
  t.in.has_prior() ? gradients<C, true>(a, t, count) : gradients<C, false>(a, t, count);
  commit(t.mu, a.grad_mu, a.mu.dtype, first, count);
  commit(t.logvar, a.grad_logvar, a.mu.dtype, first, count);
  if (a.grad_prior_mu) commit(t.prior_mu, a.grad_prior_mu, a.prior_mu_dtype, first, count);
  if (a.grad_prior_logvar) commit(t.prior_logvar, a.grad_prior_logvar, a.prior_logvar_dtype, first, count);
}

template <class C>
static void backward_range(const LatentBackward& a, int64_t begin, int64_t end) {
  BackwardTile<C> tile(a);
  for (int64_t first = begin; first < end; first += kTile) {
    backward_tile(a, tile, first, end - first < kTile ? end - first : int64_t(kTile));
  }
}

void latent_backward(const LatentBackward& a, int64_t unit_begin, int64_t unit_end) {
  const int64_t begin = unit_begin * a.unit, end = unit_end * a.unit < a.elements ? unit_end * a.unit : a.elements;
  a.mu.dtype == kFloat64 ? backward_range<double>(a, begin, end) : backward_range<float>(a, begin, end);
}

}  // namespace fastlm::FASTLM_ISA
