// Elementary functions, computed by additions, multiplications and explicit fused multiply-adds alone, so that they give the
// same bits on every machine. V is a float or double, or a vector of them. Each type needs fma, min, max, sqrt, select_less(a,
// b, x, y) = a < b ? x : y, scale2(x, n) = x * 2^n, and for float vectors the bit casts. min and max return their second
// argument if one is NaN. The polynomials are minimax: Remez' algorithm minimized the relative error of the function that uses
// them.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fastlm {

// Shifts of scalars; vectors have their own.
template <int N, class U>
FASTLM_HD U shift_left(U x) {
  return x << N;
}
template <int N, class U>
FASTLM_HD U shift_right(U x) {
  return x >> N;
}

// Evaluates a polynomial by Horner's rule.
template <class V, class T, int N>
FASTLM_HD V horner(V x, const T (&coefficients)[N]) {
  V p(coefficients[N - 1]);
  FASTLM_UNROLL(18)
  for (int k = N - 2; k >= 0; --k) p = fma(p, x, V(coefficients[k]));
  return p;
}

// Does the same for results whose bits may differ between machines: mul_add is fused only if that is one instruction.
template <class V, class T, int N>
FASTLM_HD V horner_fast(V x, const T (&coefficients)[N]) {
  V p(coefficients[N - 1]);
  FASTLM_UNROLL(18)
  for (int k = N - 2; k >= 0; --k) p = mul_add(p, x, V(coefficients[k]));
  return p;
}

// The constants of exp for a scalar type.
template <class T>
struct Exponential;

template <>
struct Exponential<float> {
  static constexpr float lowest = -104.0f, highest = 89.0f;  // e^x is 0 below, inf above
  static constexpr float log2e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float to_integer = 0x1.8p+23f;  // adding and then subtracting it rounds to the nearest integer
};

template <>
struct Exponential<double> {
  static constexpr double lowest = -746.0, highest = 710.0;
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42fefa0000p-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double to_integer = 0x1.8p+52;
};

// Returns (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2. The error is 2^-28 (float) and 2^-57 (double) of e^r.
template <class V>
FASTLM_HD V exp_tail(V r, float) {
  constexpr float c[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f0p-5f, 0x1.1239d4p-7f, 0x1.6a247ep-10f};
  return horner(r, c);
}
template <class V>
FASTLM_HD V exp_tail(V r, double) {
  constexpr double c[] = {0x1.000000000000ap-1,  0x1.55555555554fap-3,  0x1.555555555088bp-5,  0x1.1111111127b77p-7,
                          0x1.6c16c18426874p-10, 0x1.a01a012a73b36p-13, 0x1.a0199a1698f63p-16, 0x1.71df252768968p-19,
                          0x1.28ad68e98de0dp-22, 0x1.ad7f94af5cccbp-26};
  return horner(r, c);
}

// Returns (e^x - 1 - x) / x^2 for -1 <= x <= 2.5, with a relative error of 2^-28 (float) and 2^-62 (double).
template <class V>
FASTLM_HD V expm1_minus_series(V x, float) {
  constexpr float c[] = {0x1p-1f,         0x1.555554p-3f,  0x1.555560p-5f,  0x1.111180p-7f,  0x1.6c117ap-10f,
                         0x1.9ff35ep-13f, 0x1.a2096ep-16f, 0x1.72ab18p-19f, 0x1.da3dbap-23f, 0x1.97a49cp-25f};
  return horner(x, c);
}
template <class V>
FASTLM_HD V expm1_minus_series(V x, double) {
  constexpr double c[] = {0x1p-1,
                          0x1.5555555555555p-3,
                          0x1.5555555555555p-5,
                          0x1.1111111111102p-7,
                          0x1.6c16c16c16cabp-10,
                          0x1.a01a01a01b6c8p-13,
                          0x1.a01a01a00c3ebp-16,
                          0x1.71de3a5490b93p-19,
                          0x1.27e4fb819caa2p-22,
                          0x1.ae6456e234036p-26,
                          0x1.1eed87b31bfb9p-29,
                          0x1.61246c4eb89d6p-33,
                          0x1.939befa5c3f89p-37,
                          0x1.ae54e4375e376p-41,
                          0x1.adfd0cc7947b5p-45,
                          0x1.a5a9ffa62daeap-49,
                          0x1.f91c0d6671bb8p-54,
                          0x1.2c6ebf051125ap-56};
  return horner(x, c);
}

// Returns e^x to about one ulp, also in the subnormal range.
template <class V>
FASTLM_HD V exp(V x) {
  using T = typename V::Scalar;
  using E = Exponential<T>;
  x = min(V(E::highest), max(V(E::lowest), x));
  const V n = fma(x, V(E::log2e), V(E::to_integer)) - V(E::to_integer);
  const V r = fma(n, V(-E::ln2_low), fma(n, V(-E::ln2_high), x));
  return scale2(fma(r * r, exp_tail(r, T()), r) + V(T(1)), n);
}

// Returns 2^r for |r| <= 1/2, float only. The polynomial is (2^r - 1) / r; the error is 2^-23 of 2^r.
template <class F>
FASTLM_HD F exp2_fraction(F r) {
  constexpr float c[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba18p-10f};
  return mul_add(horner_fast(r, c), r, F(1.0f));
}

// Returns 2^x for x <= 0 to about one ulp, float only; softmax uses it. Results below 2^-126 are 0 or subnormal.
template <class F>
FASTLM_HD F exp2_nonpositive(F x) {
  using U = typename F::Bits;
  x = max(F(-127.0f), x);
  const F to_integer(Exponential<float>::to_integer);
  const F shifted = x + to_integer;  // its low bits hold the nearest integer n
  const F r = x - (shifted - to_integer);
  const F scale = as_float(shift_left<23>(as_bits(shifted)) + U(127u << 23));  // 2^n; for n = -127 the bits of 0
  return exp2_fraction(r) * scale;
}

template <class V>
struct Expm1 {
  V minus_x;  // e^x - 1 - x, never negative
  V value;    // e^x - 1
};

// Returns both without cancellation, given e = e^x: by the series where e^x and 1 + x are close, and from e elsewhere, where an
// error of a few ulps in e causes no larger error in the result.
template <class V>
FASTLM_HD Expm1<V> expm1(V x, V e) {
  using T = typename V::Scalar;
  const V near = x * x * expm1_minus_series(x, T());
  const V far = e - (V(T(1)) + min(V(T(1e30)), x));  // capped, so that x = inf gives inf, not inf - inf
  const V off_centre = x - V(T(0.75)), distance = max(V(T(0)) - off_centre, off_centre);
  const V reach(T(1.75));
  return {select_less(distance, reach, near, far), select_less(distance, reach, x + near, e - V(T(1)))};
}

// Returns log(u) for 2^-126 <= u <= 1, float only, to about one ulp; log_unit(1) is exactly 0.
// With u = 2^e m and m in [sqrt(1/2), sqrt(2)): log(u) = e log(2) + f - f^2/2 + f^3 L(f), f = m - 1. The error of L is 2^-27.
template <class F>
FASTLM_HD F log_unit(F u) {
  constexpr float L[] = {0x1.555554p-2f, -0x1.000228p-2f, 0x1.99a00ap-3f, -0x1.547246p-3f,
                         0x1.22d9f8p-3f, -0x1.0d8518p-3f, 0x1.055c40p-3f, -0x1.38b852p-4f};
  using U = typename F::Bits;
  constexpr uint32_t one = 0x3f800000, sqrt_half = 0x3f3504f3;
  const U bits = as_bits(u);
  const U biased = shift_right<23>(bits + U(one - sqrt_half));
  const F e = to_float(biased) - F(127.0f);
  const F f = as_float(bits - shift_left<23>(biased) + U(one)) - F(1.0f);
  const F tail = fma(f * f, fma(f, horner(f, L), F(-0.5f)), e * F(Exponential<float>::ln2_low));
  return fma(e, F(Exponential<float>::ln2_high), f + tail);
}

// Returns sin and cos of 2 pi t for 0 <= t <= 1. It subtracts the nearest quarter turn exactly; the rest is at most 1/8 turn.
template <class F>
FASTLM_HD void sincos_turn(F t, F& sine, F& cosine) {
  constexpr float S[] = {0x1.921fb6p+0f, -0x1.4abbbap-1f, 0x1.465e92p-4f, -0x1.2d9302p-8f};         // sin(pi f/2) / f
  constexpr float C[] = {1.0f, -0x1.3bd3ccp+0f, 0x1.03c1dap-2f, -0x1.55c4eap-6f, 0x1.d99f54p-11f};  // cos(pi f/2)
  using U = typename F::Bits;
  const F to_integer(Exponential<float>::to_integer);
  const F shifted = fma(t, F(4.0f), to_integer);
  const U quarter = as_bits(shifted);  // its low bits count the quarter turns
  const F f = fma(t, F(4.0f), to_integer - shifted);
  const F square = f * f;
  const F s = f * horner(square, S), c = horner(square, C);
  const U odd = shift_left<31>(quarter);
  sine = as_float(as_bits(select_negative(odd, c, s)) ^ shift_left<30>(quarter & U(2u)));
  cosine = as_float(as_bits(select_negative(odd, s, c)) ^ shift_left<30>((quarter + U(1u)) & U(2u)));
}

// Returns tanh(x) = e / (e + 2) with e = e^2x - 1, without cancellation near 0. Beyond |x| = 10 it is +-1 in float.
template <class F>
FASTLM_HD F tanh(F x) {
  const F twice = min(F(20.0f), max(F(-20.0f), x + x));
  const F e = expm1(twice, exp(twice)).value;
  return e / (e + F(2.0f));
}

}  // namespace fastlm
