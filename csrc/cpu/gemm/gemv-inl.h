// GEMV of a few rows: what linear and attention share. A matrix that is read once is read in place, because copying it into a
// tile first does not pay.
#pragma once

#include "tiles-inl.h"

namespace fastlm::FASTLM_ISA {

constexpr int kGemvRowsAtOnce = 4;  // rows whose dot products are computed together

// Loads `left` values, fewer than a vector has, and fills up with zeros.
template <class V, class T>
FASTLM_SIMD V load_part(const T* from, int64_t left) {
  T rest[V::lanes] = {};
  __builtin_memcpy(rest, from, left * sizeof(T));
  return V::load(rest);
}

// Two ways to read a row: values of any dtype T as Float, or pairs of bfloat16 as Word.
template <class T>
struct RowVector {
  using V = Float;
  using Elem = float;
  static constexpr int64_t values = V::lanes, step = values * sizeof(T);  // of a vector; the step is in bytes
  static FASTLM_MEMBER V load(const char* from) { return V::load(reinterpret_cast<const T*>(from)); }
  static FASTLM_MEMBER V load(const char* from, int64_t left) { return load_part<V>(reinterpret_cast<const T*>(from), left); }
};
struct RowPairs {
  using V = Word;
  using Elem = uint32_t;
  static constexpr int64_t values = 2 * V::lanes, step = values * sizeof(BFloat16);
  static FASTLM_MEMBER V load(const char* from) { return V::load(from); }
  static FASTLM_MEMBER V load(const char* from, int64_t left) {
    uint32_t rest[V::lanes] = {};
    __builtin_memcpy(rest, from, left * sizeof(BFloat16));
    return V::load(rest);
  }
};

// A number of rows as a type.
template <int M>
struct RowCount {
  static constexpr int value = M;
};

// Calls f(RowCount<M>(), first) for M rows at a time, then for the rest with a smaller M.
template <int M = kGemvRowsAtOnce, class F>
FASTLM_SIMD void in_row_steps(int64_t first, int64_t count, const F& f) {
  for (; first + M <= count; first += M) f(RowCount<M>(), first);
  if constexpr (M > 1) {
    if (first < count) in_row_steps<M - 1>(first, count, f);
  }
}

// ---- dot products along the rows -------------------------------------------------------------------------------------------

// Adds to sums (M, N) the products of the rows of a and N rows, over the bytes [begin, end) of the latter, whole vectors, and
// prefetches the same bytes of `ahead`. `a` points to the elements for `begin`.
template <class Row, int M, int N>
FASTLM_SIMD void add_dots(const typename Row::Elem* a, int64_t a_row, const char* const (&row)[N],
                          const char* const (&ahead)[N], int64_t begin, int64_t end, Float (&sums)[M][N]) {
  using V = typename Row::V;
  for (int64_t at = begin; at < end; at += Row::step, a += V::lanes) {
    V b[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      prefetch_line(ahead[n] + at);
      b[n] = Row::load(row[n] + at);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V a_m = V::load(a + m * a_row);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = mul_add(a_m, b[n], sums[m][n]);
    }
  }
}

// Adds the part of the rows behind their whole vectors: `left` values from the byte `at` on. `a` is padded with zeros.
template <class Row, int M, int N>
FASTLM_SIMD void add_last_dots(const typename Row::Elem* a, int64_t a_row, const char* const (&row)[N], int64_t at,
                               int64_t left, Float (&sums)[M][N]) {
  using V = typename Row::V;
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const V b = Row::load(row[n] + at, left);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m][n] = mul_add(V::load(a + m * a_row), b, sums[m][n]);
  }
}

// ---- sums of rows ----------------------------------------------------------------------------------------------------------

// Adds weights (M, K) value (K, dim) to out (M, dim), whose rows are padded to whole vectors. The weights stay in registers.
// With kPrefetch, it prefetches the rows at `ahead` meanwhile.
template <class T, int M, int K, bool kPrefetch>
static void add_values(const float* weights, int64_t weights_row, const char* const* rows, const char* const* ahead,
                       int64_t dim, float* out, int64_t out_row) {
  const int64_t whole = dim / Float::lanes * Float::lanes;
  const T* value[K];
  Float weight[M][K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    value[k] = reinterpret_cast<const T*>(rows[k]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) weight[m][k] = Float(weights[m * weights_row + k]);
  }
  const auto add = [&](int64_t d, const Float* values) FASTLM_LAMBDA {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Float sum = Float::load(out + m * out_row + d);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sum = mul_add(weight[m][k], values[k], sum);
      sum.store(out + m * out_row + d);
    }
  };
  Float values[K];
  for (int64_t d = 0; d < whole; d += Float::lanes) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      if constexpr (kPrefetch) prefetch_line(ahead[k] + d * int64_t(sizeof(T)));
      values[k] = Float::load(value[k] + d);
    }
    add(d, values);
  }
  if (whole == dim) return;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) values[k] = load_part<Float>(value[k] + whole, dim - whole);
  add(whole, values);
}

// The same for `count` rows of weights and of out, two at a time; the first two prefetch.
template <class T, int K>
FASTLM_SIMD void add_values_to_rows(const float* weights, int64_t weights_row, int64_t count, const char* const* rows,
                                    const char* const* ahead, int64_t dim, float* out, int64_t out_row) {
  in_row_steps<2>(0, count, [&](auto m, int64_t row) FASTLM_LAMBDA {
    constexpr int M = decltype(m)::value;
    const float* w = weights + row * weights_row;
    float* to = out + row * out_row;
    if (row == 0) {
      add_values<T, M, K, true>(w, weights_row, rows, ahead, dim, to, out_row);
    } else {
      add_values<T, M, K, false>(w, weights_row, rows, ahead, dim, to, out_row);
    }
  });
}

}  // namespace fastlm::FASTLM_ISA
