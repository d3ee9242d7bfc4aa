// AVX2 registers, with FMA and F16C, which every such machine has.
#pragma once

#include <immintrin.h>

namespace fastlm::FASTLM_ISA {

// gemm accumulates in 6 rows of 16 lanes: 12 of the 16 registers.
constexpr int kGemmRows = 6, kGemmVectors = 1;
// Dot products of 4 rows with 2 others take 8 registers.
constexpr int kGemvColumns = 2;
// Where a few rows meet keys and values, these are prefetched so many bytes ahead, into the first-level cache.
constexpr int kGemvAhead = 2048, kGemvCache = 1;
constexpr bool kBFloat16Pairs = false;

struct Word {
  using Scalar = uint32_t;
  using Bits = Word;
  static constexpr int lanes = 8;
  __m256i v;
  FASTLM_MEMBER Word() = default;
  FASTLM_MEMBER Word(__m256i v) : v(v) {}
  FASTLM_MEMBER explicit Word(uint32_t x) : v(_mm256_set1_epi32(int(x))) {}
  static FASTLM_MEMBER Word load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
  FASTLM_MEMBER void store(uint32_t* p) const { _mm256_storeu_si256((__m256i*)p, v); }
};
FASTLM_SIMD Word operator+(Word a, Word b) { return _mm256_add_epi32(a.v, b.v); }
FASTLM_SIMD Word operator-(Word a, Word b) { return _mm256_sub_epi32(a.v, b.v); }
FASTLM_SIMD Word operator&(Word a, Word b) { return _mm256_and_si256(a.v, b.v); }
FASTLM_SIMD Word operator^(Word a, Word b) { return _mm256_xor_si256(a.v, b.v); }
template <int N>
FASTLM_SIMD Word shift_left(Word a) {
  return _mm256_slli_epi32(a.v, N);
}
template <int N>
FASTLM_SIMD Word shift_right(Word a) {
  return _mm256_srli_epi32(a.v, N);
}

struct Float {
  using Scalar = float;
  using Bits = Word;
  static constexpr int lanes = 8;
  __m256 v;
  FASTLM_MEMBER Float() = default;
  FASTLM_MEMBER Float(__m256 v) : v(v) {}
  FASTLM_MEMBER explicit Float(float x) : v(_mm256_set1_ps(x)) {}
  static FASTLM_MEMBER Float load(const float* p) { return _mm256_loadu_ps(p); }
  static FASTLM_MEMBER Float load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static FASTLM_MEMBER Float load(const BFloat16* p) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  }
  static FASTLM_MEMBER Float load(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  FASTLM_MEMBER void store(float* p) const { _mm256_storeu_ps(p, v); }
  FASTLM_MEMBER void store(Float16* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Rounds to nearest, ties to even.
  FASTLM_MEMBER void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  }
};
FASTLM_SIMD Float operator+(Float a, Float b) { return _mm256_add_ps(a.v, b.v); }
FASTLM_SIMD Float operator-(Float a, Float b) { return _mm256_sub_ps(a.v, b.v); }
FASTLM_SIMD Float operator*(Float a, Float b) { return _mm256_mul_ps(a.v, b.v); }
FASTLM_SIMD Float operator/(Float a, Float b) { return _mm256_div_ps(a.v, b.v); }
FASTLM_SIMD Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
FASTLM_SIMD Float mul_add(Float a, Float b, Float c) { return fma(a, b, c); }
FASTLM_SIMD Float min(Float a, Float b) { return _mm256_min_ps(a.v, b.v); }
FASTLM_SIMD Float max(Float a, Float b) { return _mm256_max_ps(a.v, b.v); }
FASTLM_SIMD float largest(Float a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
FASTLM_SIMD float sum(Float a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// Returns the sum of each of 8 vectors in a lane of its own.
FASTLM_SIMD Float sum_each(const Float* a) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
// Has a value stay in a register that the compiler would load again for each use, from memory that is busy enough.
FASTLM_SIMD void hold(Float& a) { asm("" : "+x"(a.v)); }
FASTLM_SIMD void hold(Word&) {}
FASTLM_SIMD Float sqrt(Float a) { return _mm256_sqrt_ps(a.v); }
FASTLM_SIMD bool any_less(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)) != 0; }
FASTLM_SIMD bool any_nan(Float a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) != 0; }
FASTLM_SIMD Float select_less(Float a, Float b, Float x, Float y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
FASTLM_SIMD Float select_negative(Word bits, Float x, Float y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_castsi256_ps(bits.v));
}
FASTLM_SIMD Word as_bits(Float a) { return _mm256_castps_si256(a.v); }
FASTLM_SIMD Float as_float(Word a) { return _mm256_castsi256_ps(a.v); }
// Both halves of a word convert exactly, so only the sum rounds.
FASTLM_SIMD Float to_float(Word a) {
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(a.v, 16));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(0xffff)));
  return _mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
}
// Multiplies in two steps of half the exponent, so that neither factor overflows or underflows, and only the last product
// rounds.
FASTLM_SIMD Float scale2(Float a, Float n) {
  const __m256i exponent = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(exponent, 1), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(exponent, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

struct Double {
  using Scalar = double;
  using Bits = Word;  // unused
  static constexpr int lanes = 4;
  __m256d v;
  FASTLM_MEMBER Double() = default;
  FASTLM_MEMBER Double(__m256d v) : v(v) {}
  FASTLM_MEMBER explicit Double(double x) : v(_mm256_set1_pd(x)) {}
  static FASTLM_MEMBER Double load(const double* p) { return _mm256_loadu_pd(p); }
  static FASTLM_MEMBER Double load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  FASTLM_MEMBER void store(double* p) const { _mm256_storeu_pd(p, v); }
  FASTLM_MEMBER void store(float* p) const { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
};
FASTLM_SIMD Double operator+(Double a, Double b) { return _mm256_add_pd(a.v, b.v); }
FASTLM_SIMD Double operator-(Double a, Double b) { return _mm256_sub_pd(a.v, b.v); }
FASTLM_SIMD Double operator*(Double a, Double b) { return _mm256_mul_pd(a.v, b.v); }
FASTLM_SIMD Double fma(Double a, Double b, Double c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
FASTLM_SIMD Double min(Double a, Double b) { return _mm256_min_pd(a.v, b.v); }
FASTLM_SIMD Double max(Double a, Double b) { return _mm256_max_pd(a.v, b.v); }
FASTLM_SIMD Double select_less(Double a, Double b, Double x, Double y) {
  return _mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ));
}
FASTLM_SIMD Double scale2(Double a, Double n) {
  const __m128i exponent = _mm256_cvtpd_epi32(n.v), half = _mm_srai_epi32(exponent, 1), bias = _mm_set1_epi32(1023);
  const __m256i first = _mm256_cvtepi32_epi64(_mm_add_epi32(half, bias));
  const __m256i second = _mm256_cvtepi32_epi64(_mm_add_epi32(_mm_sub_epi32(exponent, half), bias));
  const __m256d once = _mm256_mul_pd(a.v, _mm256_castsi256_pd(_mm256_slli_epi64(first, 52)));
  return _mm256_mul_pd(once, _mm256_castsi256_pd(_mm256_slli_epi64(second, 52)));
}

struct Long {
  using Scalar = uint64_t;
  using Bits = Long;
  static constexpr int lanes = 4;
  __m256i v;
  FASTLM_MEMBER Long() = default;
  FASTLM_MEMBER Long(__m256i v) : v(v) {}
  FASTLM_MEMBER explicit Long(uint64_t x) : v(_mm256_set1_epi64x(int64_t(x))) {}
  static FASTLM_MEMBER Long load(const uint64_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
};
FASTLM_SIMD Long operator+(Long a, Long b) { return _mm256_add_epi64(a.v, b.v); }
FASTLM_SIMD Long operator^(Long a, Long b) { return _mm256_xor_si256(a.v, b.v); }
FASTLM_SIMD Long mul32(Long a, Long b) { return _mm256_mul_epu32(a.v, b.v); }
FASTLM_SIMD Long high32(Long a) { return _mm256_srli_epi64(a.v, 32); }

// Interleaves the low words of two Longs: low[0], high[0], low[1], high[1], ...
FASTLM_SIMD Word pack(Long low, Long high) { return _mm256_blend_epi32(low.v, _mm256_slli_epi64(high.v, 32), 0xaa); }

// Transposes the 4 x 4 block in each quad of lanes, and stores all of them.
FASTLM_SIMD void store_interleaved(Float a, Float b, Float c, Float d, float* out) {
  const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a.v, b.v)),
                ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a.v, b.v));
  const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c.v, d.v)),
                cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c.v, d.v));
  _mm256_storeu_pd((double*)out, _mm256_unpacklo_pd(ab_low, cd_low));
  _mm256_storeu_pd((double*)(out + 8), _mm256_unpackhi_pd(ab_low, cd_low));
  _mm256_storeu_pd((double*)(out + 16), _mm256_unpacklo_pd(ab_high, cd_high));
  _mm256_storeu_pd((double*)(out + 24), _mm256_unpackhi_pd(ab_high, cd_high));
}

// Stores out[j * row + i] = r[i][j]. It shuffles pairs, then quads within 128 bits, then the halves of registers.
FASTLM_SIMD void store_transposed(const Float (&r)[8], float* out, int64_t row) {
  __m256 pairs[8], quads[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(out + j * row, _mm256_permute2f128_ps(quads[j], quads[j + 4], 0x20));
    _mm256_storeu_ps(out + (j + 4) * row, _mm256_permute2f128_ps(quads[j], quads[j + 4], 0x31));
  }
}

}  // namespace fastlm::FASTLM_ISA
