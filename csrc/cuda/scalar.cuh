// The scalars of one thread: a float, a double or a 32-bit word, with the operations that csrc/common needs of a vector. So a
// GPU does exactly the arithmetic of the CPU's lanes. Products and sums are fused only where the source says so (CMakeLists.txt
// passes
// --fmad=false to nvcc), so the bits are the same too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/macros.h"

namespace fastlm {

template <class To, class From>
FASTLM_HD To bits_as(From x) {
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

struct Word {
  uint32_t v;
  Word() = default;
  FASTLM_MEMBER explicit Word(uint32_t v) : v(v) {}
};
FASTLM_HD Word operator+(Word a, Word b) { return Word(a.v + b.v); }
FASTLM_HD Word operator-(Word a, Word b) { return Word(a.v - b.v); }
FASTLM_HD Word operator&(Word a, Word b) { return Word(a.v & b.v); }
FASTLM_HD Word operator^(Word a, Word b) { return Word(a.v ^ b.v); }
FASTLM_HD Word operator<<(Word a, int n) { return Word(a.v << n); }
FASTLM_HD Word operator>>(Word a, int n) { return Word(a.v >> n); }

template <class T>
struct Number {
  using Scalar = T;
  using Bits = Word;
  T v;
  Number() = default;
  FASTLM_MEMBER explicit Number(T v) : v(v) {}
};
using Float = Number<float>;
using Double = Number<double>;

template <class T>
FASTLM_HD Number<T> operator+(Number<T> a, Number<T> b) {
  return Number<T>(a.v + b.v);
}
template <class T>
FASTLM_HD Number<T> operator-(Number<T> a, Number<T> b) {
  return Number<T>(a.v - b.v);
}
template <class T>
FASTLM_HD Number<T> operator*(Number<T> a, Number<T> b) {
  return Number<T>(a.v * b.v);
}
template <class T>
FASTLM_HD Number<T> min(Number<T> a, Number<T> b) {
  return a.v < b.v ? a : b;
}
template <class T>
FASTLM_HD Number<T> max(Number<T> a, Number<T> b) {
  return a.v > b.v ? a : b;
}
template <class T>
FASTLM_HD Number<T> select_less(Number<T> a, Number<T> b, Number<T> x, Number<T> y) {
  return a.v < b.v ? x : y;
}
FASTLM_HD Float fma(Float a, Float b, Float c) { return Float(::fmaf(a.v, b.v, c.v)); }
FASTLM_HD Double fma(Double a, Double b, Double c) { return Double(::fma(a.v, b.v, c.v)); }
FASTLM_HD Float sqrt(Float a) { return Float(::sqrtf(a.v)); }
FASTLM_HD Word as_bits(Float a) { return Word(bits_as<uint32_t>(a.v)); }
FASTLM_HD Float as_float(Word a) { return Float(bits_as<float>(a.v)); }
FASTLM_HD Float to_float(Word a) { return Float(float(a.v)); }
FASTLM_HD Float select_negative(Word bits, Float x, Float y) { return bits.v >> 31 ? x : y; }

// Multiplies in two steps of half the exponent, so that neither factor overflows or underflows, and only the last product
// rounds.
FASTLM_HD Float scale2(Float a, Float n) {
  const int exponent = n.v == n.v ? int(n.v) : 0, half = exponent >> 1;
  return Float(a.v * bits_as<float>(uint32_t(half + 127) << 23) * bits_as<float>(uint32_t(exponent - half + 127) << 23));
}
FASTLM_HD Double scale2(Double a, Double n) {
  const int exponent = n.v == n.v ? int(n.v) : 0, half = exponent >> 1;
  return Double(a.v * bits_as<double>(uint64_t(half + 1023) << 52) * bits_as<double>(uint64_t(exponent - half + 1023) << 52));
}

// ---- dtypes: storage types, and the type of the arithmetic ------------------------------------------------------------------

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <class C>
FASTLM_HD C widened(float x) {
  return C(x);
}
template <class C>
FASTLM_HD C widened(double x) {
  return C(x);
}
template <class C>
FASTLM_HD C widened(__half x) {
  return C(__half2float(x));
}
template <class C>
FASTLM_HD C widened(__nv_bfloat16 x) {
  return C(__bfloat162float(x));
}

FASTLM_HD void narrow(float* to, float x) { *to = x; }
FASTLM_HD void narrow(double* to, double x) { *to = x; }
FASTLM_HD void narrow(float* to, double x) { *to = float(x); }
FASTLM_HD void narrow(double* to, float x) { *to = double(x); }
template <class C>
FASTLM_HD void narrow(__half* to, C x) {
  *to = __float2half(float(x));
}
template <class C>
FASTLM_HD void narrow(__nv_bfloat16* to, C x) {
  *to = __float2bfloat16(float(x));
}

}  // namespace fastlm
