// AVX-512 registers (F, BW, DQ, VL), and the bfloat16 products of AVX-512 BF16.
#pragma once

#include <immintrin.h>

#include "../../common/math.h"

namespace fastlm::FASTLM_ISA {

// gemm accumulates in 6 rows of 4 vectors: 24 of the 32 registers.
constexpr int kGemmRows = 6, kGemmVectors = 4;
// Dot products of 4 rows with 4 others take 16 registers.
constexpr int kGemvColumns = 4;
// Where a few rows meet keys and values, these are prefetched so many bytes ahead, into the second-level cache.
constexpr int kGemvAhead = 8192, kGemvCache = 2;

struct Word {
  using Scalar = uint32_t;
  using Bits = Word;
  static constexpr int lanes = 16;
  __m512i v;
  FASTLM_MEMBER Word() = default;
  FASTLM_MEMBER Word(__m512i v) : v(v) {}
  FASTLM_MEMBER explicit Word(uint32_t x) : v(_mm512_set1_epi32(int(x))) {}
  static FASTLM_MEMBER Word load(const void* p) { return _mm512_loadu_si512(p); }
  FASTLM_MEMBER void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
};
FASTLM_SIMD Word operator+(Word a, Word b) { return _mm512_add_epi32(a.v, b.v); }
FASTLM_SIMD Word operator-(Word a, Word b) { return _mm512_sub_epi32(a.v, b.v); }
FASTLM_SIMD Word operator&(Word a, Word b) { return _mm512_and_si512(a.v, b.v); }
FASTLM_SIMD Word operator^(Word a, Word b) { return _mm512_xor_si512(a.v, b.v); }
template <int N>
FASTLM_SIMD Word shift_left(Word a) {
  return _mm512_slli_epi32(a.v, N);
}
template <int N>
FASTLM_SIMD Word shift_right(Word a) {
  return _mm512_srli_epi32(a.v, N);
}

struct Float {
  using Scalar = float;
  using Bits = Word;
  static constexpr int lanes = 16;
  __m512 v;
  FASTLM_MEMBER Float() = default;
  FASTLM_MEMBER Float(__m512 v) : v(v) {}
  FASTLM_MEMBER explicit Float(float x) : v(_mm512_set1_ps(x)) {}
  static FASTLM_MEMBER Float load(const float* p) { return _mm512_loadu_ps(p); }
  static FASTLM_MEMBER Float load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static FASTLM_MEMBER Float load(const BFloat16* p) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  static FASTLM_MEMBER Float load(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  FASTLM_MEMBER void store(float* p) const { _mm512_storeu_ps(p, v); }
  FASTLM_MEMBER void store(Float16* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Rounds to nearest, ties to even. vcvtneps2bf16 would turn subnormals into zero.
  FASTLM_MEMBER void store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
};
FASTLM_SIMD Float operator+(Float a, Float b) { return _mm512_add_ps(a.v, b.v); }
FASTLM_SIMD Float operator-(Float a, Float b) { return _mm512_sub_ps(a.v, b.v); }
FASTLM_SIMD Float operator*(Float a, Float b) { return _mm512_mul_ps(a.v, b.v); }
FASTLM_SIMD Float operator/(Float a, Float b) { return _mm512_div_ps(a.v, b.v); }
FASTLM_SIMD Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FASTLM_SIMD Float mul_add(Float a, Float b, Float c) { return fma(a, b, c); }
#if defined(__AVX512BF16__)
FASTLM_SIMD Float mul_add(Word a, Word b, Float c) { return _mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v); }
// Stores as store(BFloat16*) does, but subnormals as zeros, in one instruction.
FASTLM_SIMD void store_flushed(Float a, BFloat16* p) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
constexpr bool kBFloat16Pairs = true;
#else
constexpr bool kBFloat16Pairs = false;
#endif
FASTLM_SIMD Float min(Float a, Float b) { return _mm512_min_ps(a.v, b.v); }
FASTLM_SIMD Float max(Float a, Float b) { return _mm512_max_ps(a.v, b.v); }
FASTLM_SIMD float largest(Float a) { return _mm512_reduce_max_ps(a.v); }
FASTLM_SIMD float sum(Float a) { return _mm512_reduce_add_ps(a.v); }
// Returns the sum of each of 16 vectors in a lane of its own, by halves: 45 instructions, where 16 single sums take 128.
FASTLM_SIMD Float sum_each(const Float* a) {
  __m512 quarters[4];  // in its 128-bit lane l, what is left of a[4 i + l]
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Float* of = a + 4 * i;
    const __m512 halves01 =
        _mm512_add_ps(_mm512_shuffle_f32x4(of[0].v, of[1].v, 0x44), _mm512_shuffle_f32x4(of[0].v, of[1].v, 0xee));
    const __m512 halves23 =
        _mm512_add_ps(_mm512_shuffle_f32x4(of[2].v, of[3].v, 0x44), _mm512_shuffle_f32x4(of[2].v, of[3].v, 0xee));
    quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(halves01, halves23, 0x88), _mm512_shuffle_f32x4(halves01, halves23, 0xdd));
  }
  const __m512 pairs01 =
      _mm512_add_ps(_mm512_unpacklo_ps(quarters[0], quarters[1]), _mm512_unpackhi_ps(quarters[0], quarters[1]));
  const __m512 pairs23 =
      _mm512_add_ps(_mm512_unpacklo_ps(quarters[2], quarters[3]), _mm512_unpackhi_ps(quarters[2], quarters[3]));
  // In its 128-bit lane l, the sums of a[l], a[4 + l], a[8 + l] and a[12 + l].
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(pairs01, pairs23, 0x44), _mm512_shuffle_ps(pairs01, pairs23, 0xee));
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums);
}
FASTLM_SIMD void hold(Float&) {}  // there are registers enough
FASTLM_SIMD void hold(Word&) {}
FASTLM_SIMD Float sqrt(Float a) { return _mm512_sqrt_ps(a.v); }
FASTLM_SIMD Float scale2(Float a, Float n) { return _mm512_scalef_ps(a.v, n.v); }
FASTLM_SIMD bool any_less(Float a, Float b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) != 0; }
FASTLM_SIMD bool any_nan(Float a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
FASTLM_SIMD Float select_less(Float a, Float b, Float x, Float y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
}
FASTLM_SIMD Float select_negative(Word bits, Float x, Float y) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(bits.v), y.v, x.v);
}

// Does what exp2_nonpositive of math.h does, by instructions that take a number apart at the binary point and put it together
// again. For -inf the fraction is 0, and so is the result.
FASTLM_SIMD Float exp2_nonpositive(Float x) {
  const Float r = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return scale2(exp2_fraction(r), x - r);
}

FASTLM_SIMD Word as_bits(Float a) { return _mm512_castps_si512(a.v); }
FASTLM_SIMD Float as_float(Word a) { return _mm512_castsi512_ps(a.v); }
FASTLM_SIMD Float to_float(Word a) { return _mm512_cvtepu32_ps(a.v); }

struct Double {
  using Scalar = double;
  using Bits = Word;  // unused
  static constexpr int lanes = 8;
  __m512d v;
  FASTLM_MEMBER Double() = default;
  FASTLM_MEMBER Double(__m512d v) : v(v) {}
  FASTLM_MEMBER explicit Double(double x) : v(_mm512_set1_pd(x)) {}
  static FASTLM_MEMBER Double load(const double* p) { return _mm512_loadu_pd(p); }
  static FASTLM_MEMBER Double load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  FASTLM_MEMBER void store(double* p) const { _mm512_storeu_pd(p, v); }
  FASTLM_MEMBER void store(float* p) const { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
};
FASTLM_SIMD Double operator+(Double a, Double b) { return _mm512_add_pd(a.v, b.v); }
FASTLM_SIMD Double operator-(Double a, Double b) { return _mm512_sub_pd(a.v, b.v); }
FASTLM_SIMD Double operator*(Double a, Double b) { return _mm512_mul_pd(a.v, b.v); }
FASTLM_SIMD Double fma(Double a, Double b, Double c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
FASTLM_SIMD Double min(Double a, Double b) { return _mm512_min_pd(a.v, b.v); }
FASTLM_SIMD Double max(Double a, Double b) { return _mm512_max_pd(a.v, b.v); }
FASTLM_SIMD Double scale2(Double a, Double n) { return _mm512_scalef_pd(a.v, n.v); }
FASTLM_SIMD Double select_less(Double a, Double b, Double x, Double y) {
  return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
}

struct Long {
  using Scalar = uint64_t;
  using Bits = Long;
  static constexpr int lanes = 8;
  __m512i v;
  FASTLM_MEMBER Long() = default;
  FASTLM_MEMBER Long(__m512i v) : v(v) {}
  FASTLM_MEMBER explicit Long(uint64_t x) : v(_mm512_set1_epi64(int64_t(x))) {}
  static FASTLM_MEMBER Long load(const uint64_t* p) { return _mm512_loadu_si512(p); }
};
FASTLM_SIMD Long operator+(Long a, Long b) { return _mm512_add_epi64(a.v, b.v); }
FASTLM_SIMD Long operator^(Long a, Long b) { return _mm512_xor_si512(a.v, b.v); }
FASTLM_SIMD Long mul32(Long a, Long b) { return _mm512_mul_epu32(a.v, b.v); }
FASTLM_SIMD Long high32(Long a) { return _mm512_srli_epi64(a.v, 32); }

// Interleaves the low words of two Longs: low[0], high[0], low[1], high[1], ...
FASTLM_SIMD Word pack(Long low, Long high) { return _mm512_mask_shuffle_epi32(low.v, 0xaaaa, high.v, _MM_PERM_CCAA); }

// Transposes the 4 x 4 block in each quad of lanes, and stores all of them.
FASTLM_SIMD void store_interleaved(Float a, Float b, Float c, Float d, float* out) {
  const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a.v, b.v)),
                ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a.v, b.v));
  const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c.v, d.v)),
                cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c.v, d.v));
  _mm512_storeu_pd((double*)out, _mm512_unpacklo_pd(ab_low, cd_low));
  _mm512_storeu_pd((double*)(out + 16), _mm512_unpackhi_pd(ab_low, cd_low));
  _mm512_storeu_pd((double*)(out + 32), _mm512_unpacklo_pd(ab_high, cd_high));
  _mm512_storeu_pd((double*)(out + 48), _mm512_unpackhi_pd(ab_high, cd_high));
}

// Stores out[j * row + i] = r[i][j]. It shuffles pairs, then quads within 128 bits, then the 4 x 4 block of those.
FASTLM_SIMD void store_transposed(const Float (&r)[16], float* out, int64_t row) {
  __m512 pairs[16], quads[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  // quads[4 i + j] holds, in its 128-bit lane l, column 4 l + j of rows 4 i ... 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low01 = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0x44),  // lanes 0, 1 of rows 0-3 and 4-7
        high01 = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0xee),          // lanes 2, 3
        low23 = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0x44),      // of rows 8-11 and 12-15
        high23 = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0xee);
    _mm512_storeu_ps(out + j * row, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(out + (j + 4) * row, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(out + (j + 8) * row, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(out + (j + 12) * row, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
}

}  // namespace fastlm::FASTLM_ISA
