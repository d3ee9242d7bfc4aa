// The arithmetic of one element of a Gaussian latent, the same for SIMD lanes and GPU threads. V is a float or double, or a
// vector of them.
//   z  = mu + temperature e^(logvar/2) eps
//   kl = max(free_bits, (d^2 w + e^x - 1 - x) / 2)   with d = mu - prior_mu, x = logvar - prior_logvar, w = e^-prior_logvar
#pragma once

#include "math.h"

namespace fastlm {

// NaN stays NaN, because min and max return their second argument then.
template <class V>
FASTLM_HD V clamp(V x, V low, V high) {
  return min(high, max(low, x));
}

// Returns the gradient, or 0 where x was clamped.
template <class V>
FASTLM_HD V clamp_gradient(V gradient, V x, V low, V high) {
  const V zero(typename V::Scalar(0));
  return select_less(x, low, zero, select_less(high, x, zero, gradient));
}

template <class V>
FASTLM_HD V standard_deviation(V logvar) {
  return exp(V(typename V::Scalar(0.5)) * logvar);
}

template <class V>
struct Kl {
  V value;    // before free bits
  V expm1;    // e^x - 1
  V scaled;   // d w
  V squared;  // d^2 w
};

// Returns the KL, given x = log_ratio and ratio = e^x. Without a prior, ratio is the variance, which sampling computes anyway.
template <class V>
FASTLM_HD Kl<V> kl(V difference, V log_ratio, V ratio, V precision) {
  const auto e = expm1(log_ratio, ratio);
  const V scaled = difference * precision, squared = difference * scaled;
  return {V(typename V::Scalar(0.5)) * (squared + e.minus_x), e.value, scaled, squared};
}

template <class V>
struct KlGradient {
  V mu, logvar, prior_mu, prior_logvar;
};

// Returns the KL's derivatives times `gradient`, the gradient of the KL. A dimension below its free bits has none.
template <class V>
FASTLM_HD KlGradient<V> kl_gradient(const Kl<V>& kl, V free_bits, V gradient) {
  const V zero(typename V::Scalar(0)), half(typename V::Scalar(0.5));
  gradient = select_less(kl.value, free_bits, zero, gradient);
  const V mu = gradient * kl.scaled, half_gradient = half * gradient;
  return {mu, half_gradient * kl.expm1, zero - mu, zero - half_gradient * (kl.squared + kl.expm1)};
}

}  // namespace fastlm
