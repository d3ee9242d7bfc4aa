// Registers of 16 bytes, by the vector types of GCC and Clang, for every machine that has no header of its own.
#pragma once

namespace fastlm::FASTLM_ISA {

constexpr int kGemvColumns = 2, kGemvAhead = 2048, kGemvCache = 1;  // as with AVX2

#if defined(__x86_64__)
// gemm accumulates in 2 rows of 16 lanes: 8 of the 16 registers.
constexpr int kGemmRows = 2, kGemmVectors = 1;
// This multiplies pairs of bfloat16 too: not for speed (such a machine is older than AVX2), but so that the code around them is
// tested on every machine.
constexpr bool kBFloat16Pairs = true;
#else
constexpr int kGemmRows = 6, kGemmVectors = 1;  // 24 of 32 registers
constexpr bool kBFloat16Pairs = false;
#endif

typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x2 __attribute__((vector_size(16)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));

struct Word {
  using Scalar = uint32_t;
  using Bits = Word;
  static constexpr int lanes = 4;
  u32x4 v;
  FASTLM_MEMBER Word() = default;
  FASTLM_MEMBER Word(u32x4 v) : v(v) {}
  FASTLM_MEMBER explicit Word(uint32_t x) : v{x, x, x, x} {}
  static FASTLM_MEMBER Word load(const void* p) {  // p may have any alignment, because pairs of bfloat16 have
    Word w;
    __builtin_memcpy(&w.v, p, 16);
    return w;
  }
  FASTLM_MEMBER void store(uint32_t* p) const { __builtin_memcpy(p, &v, 16); }
};
FASTLM_SIMD Word operator+(Word a, Word b) { return a.v + b.v; }
FASTLM_SIMD Word operator-(Word a, Word b) { return a.v - b.v; }
FASTLM_SIMD Word operator&(Word a, Word b) { return a.v & b.v; }
FASTLM_SIMD Word operator^(Word a, Word b) { return a.v ^ b.v; }
template <int N>
FASTLM_SIMD Word shift_left(Word a) {
  return a.v << N;
}
template <int N>
FASTLM_SIMD Word shift_right(Word a) {
  return a.v >> N;
}

struct Float {
  using Scalar = float;
  using Bits = Word;
  static constexpr int lanes = 4;
  f32x4 v;
  FASTLM_MEMBER Float() = default;
  FASTLM_MEMBER Float(f32x4 v) : v(v) {}
  FASTLM_MEMBER explicit Float(float x) : v{x, x, x, x} {}
  static FASTLM_MEMBER Float load(const float* p) {
    Float x;
    __builtin_memcpy(&x.v, p, 16);
    return x;
  }
  template <class Half>
  static FASTLM_MEMBER Float load(const Half* p) {
    return f32x4{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }
  FASTLM_MEMBER void store(float* p) const { __builtin_memcpy(p, &v, 16); }
  template <class Half>
  FASTLM_MEMBER void store(Half* p) const {
    for (int i = 0; i < 4; ++i) narrow_to(p + i, v[i]);
  }
};
FASTLM_SIMD Float operator+(Float a, Float b) { return a.v + b.v; }
FASTLM_SIMD Float operator-(Float a, Float b) { return a.v - b.v; }
FASTLM_SIMD Float operator*(Float a, Float b) { return a.v * b.v; }
// Fused in hardware or, slowly, by the C library, so that every instruction set gives the same bits.
FASTLM_SIMD Float fma(Float a, Float b, Float c) {
  f32x4 r;
  for (int i = 0; i < 4; ++i) r[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
}
FASTLM_SIMD Float operator/(Float a, Float b) { return a.v / b.v; }
// Fused if that is one instruction, else rounded twice. Only for results whose bits may differ between machines.
FASTLM_SIMD Float mul_add(Float a, Float b, Float c) {
#if defined(__FP_FAST_FMAF)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}
// Returns c + a0 b0 + a1 b1. Each word holds two bfloat16, the first in its low half.
FASTLM_SIMD Float mul_add(Word a, Word b, Float c) {
  const u32x4 high = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
  const f32x4 low_product = (f32x4)(a.v << 16) * (f32x4)(b.v << 16);
  return c.v + (low_product + (f32x4)(a.v & high) * (f32x4)(b.v & high));
}
FASTLM_SIMD Float min(Float a, Float b) { return a.v < b.v ? a.v : b.v; }
FASTLM_SIMD Float max(Float a, Float b) { return a.v > b.v ? a.v : b.v; }
FASTLM_SIMD float largest(Float a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}
FASTLM_SIMD float sum(Float a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
// Returns the sum of each of 4 vectors in a lane of its own.
FASTLM_SIMD Float sum_each(const Float* a) { return f32x4{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])}; }
FASTLM_SIMD void hold(Float&) {}
FASTLM_SIMD void hold(Word&) {}
FASTLM_SIMD Float sqrt(Float a) {
  f32x4 r;
  for (int i = 0; i < 4; ++i) r[i] = __builtin_sqrtf(a.v[i]);
  return r;
}
FASTLM_SIMD bool any_less(Float a, Float b) {
  const auto less = a.v < b.v;
  return (less[0] | less[1] | less[2] | less[3]) != 0;
}
FASTLM_SIMD bool any_nan(Float a) {
  const auto same = a.v == a.v;
  return (same[0] & same[1] & same[2] & same[3]) == 0;
}
FASTLM_SIMD Float select_less(Float a, Float b, Float x, Float y) { return a.v < b.v ? x.v : y.v; }
FASTLM_SIMD Float select_negative(Word bits, Float x, Float y) { return (bits.v >> 31) != 0 ? x.v : y.v; }
FASTLM_SIMD Word as_bits(Float a) { return (u32x4)a.v; }
FASTLM_SIMD Float as_float(Word a) { return (f32x4)a.v; }
FASTLM_SIMD Float to_float(Word a) { return __builtin_convertvector(a.v, f32x4); }
// Multiplies in two steps of half the exponent, so that neither factor overflows or underflows, and only the last product
// rounds.
FASTLM_SIMD Float scale2(Float a, Float n) {
  f32x4 r;
  for (int i = 0; i < 4; ++i) {
    const int exponent = n.v[i] == n.v[i] ? int(n.v[i]) : 0, half = exponent >> 1;
    r[i] = a.v[i] * float_of(uint32_t(half + 127) << 23) * float_of(uint32_t(exponent - half + 127) << 23);
  }
  return r;
}

struct Double {
  using Scalar = double;
  using Bits = Word;  // unused
  static constexpr int lanes = 2;
  f64x2 v;
  FASTLM_MEMBER Double() = default;
  FASTLM_MEMBER Double(f64x2 v) : v(v) {}
  FASTLM_MEMBER explicit Double(double x) : v{x, x} {}
  static FASTLM_MEMBER Double load(const double* p) { return f64x2{p[0], p[1]}; }
  static FASTLM_MEMBER Double load(const float* p) { return f64x2{p[0], p[1]}; }
  template <class T>
  FASTLM_MEMBER void store(T* p) const {
    p[0] = T(v[0]);
    p[1] = T(v[1]);
  }
};
FASTLM_SIMD Double operator+(Double a, Double b) { return a.v + b.v; }
FASTLM_SIMD Double operator-(Double a, Double b) { return a.v - b.v; }
FASTLM_SIMD Double operator*(Double a, Double b) { return a.v * b.v; }
FASTLM_SIMD Double fma(Double a, Double b, Double c) {
  return f64x2{__builtin_fma(a.v[0], b.v[0], c.v[0]), __builtin_fma(a.v[1], b.v[1], c.v[1])};
}
FASTLM_SIMD Double min(Double a, Double b) { return a.v < b.v ? a.v : b.v; }
FASTLM_SIMD Double max(Double a, Double b) { return a.v > b.v ? a.v : b.v; }
FASTLM_SIMD Double select_less(Double a, Double b, Double x, Double y) { return a.v < b.v ? x.v : y.v; }
FASTLM_SIMD double scale2(double a, double n) {
  const int64_t exponent = n == n ? int64_t(n) : 0, half = exponent >> 1;
  const uint64_t first = uint64_t(half + 1023) << 52, second = uint64_t(exponent - half + 1023) << 52;
  double f, g;
  __builtin_memcpy(&f, &first, 8);
  __builtin_memcpy(&g, &second, 8);
  return a * f * g;
}
FASTLM_SIMD Double scale2(Double a, Double n) { return f64x2{scale2(a.v[0], n.v[0]), scale2(a.v[1], n.v[1])}; }

struct Long {
  using Scalar = uint64_t;
  using Bits = Long;
  static constexpr int lanes = 2;
  u64x2 v;
  FASTLM_MEMBER Long() = default;
  FASTLM_MEMBER Long(u64x2 v) : v(v) {}
  FASTLM_MEMBER explicit Long(uint64_t x) : v{x, x} {}
  static FASTLM_MEMBER Long load(const uint64_t* p) { return u64x2{p[0], p[1]}; }
};
FASTLM_SIMD Long operator+(Long a, Long b) { return a.v + b.v; }
FASTLM_SIMD Long operator^(Long a, Long b) { return a.v ^ b.v; }
FASTLM_SIMD Long mul32(Long a, Long b) { return (a.v & 0xffffffffu) * b.v; }
FASTLM_SIMD Long high32(Long a) { return a.v >> 32; }

// Interleaves the low words of two Longs.
FASTLM_SIMD Word pack(Long low, Long high) {
  return u32x4{uint32_t(low.v[0]), uint32_t(high.v[0]), uint32_t(low.v[1]), uint32_t(high.v[1])};
}

// Transposes a 4 x 4 block and stores it.
FASTLM_SIMD void store_interleaved(Float a, Float b, Float c, Float d, float* out) {
  for (int i = 0; i < 4; ++i) Float(f32x4{a.v[i], b.v[i], c.v[i], d.v[i]}).store(out + 4 * i);
}

// Stores out[j * row + i] = r[i][j].
FASTLM_SIMD void store_transposed(const Float (&r)[4], float* out, int64_t row) {
  for (int j = 0; j < 4; ++j) Float(f32x4{r[0].v[j], r[1].v[j], r[2].v[j], r[3].v[j]}).store(out + j * row);
}

}  // namespace fastlm::FASTLM_ISA
