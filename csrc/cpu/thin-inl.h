// Products for a handful of rows, as in decoding: what is read once is not worth bringing into a tile first. Keys are
// multiplied along the row, where they lie, and values are added up from row to row. Memory is the limit, so each loop asks for
// the rows that the next one reads, `ahead`: the hardware alone, thrown off by every page and row, reaches half as much.
#pragma once

#include "attention.h"
#include "tiles-inl.h"

namespace fastlm::FASTLM_ISA {

constexpr int kThinMost = 4;  // rows at a time

// A vector's worth of units, from a row that holds `left` of numbers from there on.
template <class V, class T>
FASTLM_SIMD V load_part(const T* from, int64_t left) {
  if (left >= int64_t(V::lanes)) return V::load(from);
  T rest[V::lanes] = {};
  if (left > 0) __builtin_memcpy(rest, from, left * sizeof(T));
  return V::load(rest);
}

// How keys are read: as Float, whatever they are stored as; or two bfloat16 to a Word.
template <class T>
struct KeyVector {
  using V = Float;
  using Unit = float;
  static constexpr int64_t numbers = V::lanes, bytes = sizeof(T);
  static FASTLM_MEMBER V load(const char* row, int64_t d, int64_t dim) {
    return load_part<V>(reinterpret_cast<const T*>(row) + d, dim - d);
  }
};
struct KeyPairs {
  using V = Word;
  using Unit = uint32_t;
  static constexpr int64_t numbers = 2 * V::lanes, bytes = sizeof(BFloat16);
  static FASTLM_MEMBER V load(const char* row, int64_t d, int64_t dim) {
    if (dim - d >= numbers) return V::load(row + d * bytes);
    uint32_t rest[V::lanes] = {};
    __builtin_memcpy(rest, row + d * int64_t(sizeof(BFloat16)), (dim - d) * sizeof(BFloat16));
    return V::load(rest);
  }
};

FASTLM_SIMD void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

// scores[m][k] = query_m . key_k for M rows; queries are padded with zeros to whole vectors.
template <class Keys, int M>
static void thin_scores(const typename Keys::Unit* query, int64_t query_row, const char* const* rows, const char* const* ahead,
                        int64_t keys, int64_t dim, float* scores, int64_t scores_row) {
  using V = typename Keys::V;
  constexpr int kAtOnce = 2;
  for (int64_t k = 0; k < keys; k += kAtOnce) {
    const int64_t next = k + 1 < keys ? k + 1 : k;
    const char* pair[kAtOnce] = {rows[k], rows[next]};
    prefetch_row(ahead[k], dim * Keys::bytes);
    prefetch_row(ahead[next], dim * Keys::bytes);
    Float sums[M][kAtOnce];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = Float(0.0f);
    for (int64_t d = 0; d < dim; d += Keys::numbers) {
      const V first = Keys::load(pair[0], d, dim), second = Keys::load(pair[1], d, dim);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const V q = V::load(query + m * query_row + d / (Keys::numbers / V::lanes));
        sums[m][0] = mul_add(q, first, sums[m][0]);
        sums[m][1] = mul_add(q, second, sums[m][1]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      scores[m * scores_row + k] = sum(sums[m][0]);
      if (k + 1 < keys) scores[m * scores_row + k + 1] = sum(sums[m][1]);
    }
  }
}

// out[m] += sum_k weights[m][k] value_k for M rows, C vectors of columns at a time.
template <class T, int M, int C>
static int64_t thin_columns(const float* weights, int64_t weights_row, const char* const* rows, const char* const* ahead,
                            int64_t keys, int64_t first, int64_t dim, float* out, int64_t out_row) {
  constexpr int n = Float::lanes;
  for (; first + C * n <= dim || (C == 1 && first < dim); first += C * n) {
    Float sums[M][C];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[m][c] = Float(0.0f);
    }
    for (int64_t k = 0; k < keys; ++k) {
      const T* value = reinterpret_cast<const T*>(rows[k]) + first;
      __builtin_prefetch(ahead[k] + first * int64_t(sizeof(T)));
      Float v[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) v[c] = C == 1 ? load_part<Float>(value, dim - first) : Float::load(value + c * n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Float w(weights[m * weights_row + k]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[m][c] = mul_add(w, v[c], sums[m][c]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        float* to = out + m * out_row + first + c * n;
        (Float::load(to) + sums[m][c]).store(to);
      }
    }
  }
  return first;
}

template <class T, int M>
static void thin_values(const float* weights, int64_t weights_row, const char* const* rows, const char* const* ahead,
                        int64_t keys, int64_t dim, float* out, int64_t out_row) {
  constexpr int C = M < 3 ? 4 : 2;
  const int64_t done = thin_columns<T, M, C>(weights, weights_row, rows, ahead, keys, 0, dim, out, out_row);
  thin_columns<T, M, 1>(weights, weights_row, rows, ahead, keys, done, dim, out, out_row);
}

// Calls f with the number of rows as a type: kThinMost at a time, then what is left.
template <int M>
struct RowCount {
  static constexpr int value = M;
};
template <int M = kThinMost, class F>
FASTLM_SIMD void in_thin_steps(int64_t first, int64_t count, const F& f) {
  for (; first + M <= count; first += M) f(RowCount<M>(), first);
  if constexpr (M > 1) {
    if (first < count) in_thin_steps<M - 1>(first, count, f);
  }
}

template <class Unit>
static void thin_scores(int dtype, const Unit* query, int64_t query_row, int64_t count, const char* const* rows,
                        const char* const* ahead, int64_t keys, int64_t dim, float* scores, int64_t scores_row) {
  const auto call = [&](auto how) FASTLM_LAMBDA {
    in_thin_steps(0, count, [&](auto m, int64_t first) FASTLM_LAMBDA {
      thin_scores<decltype(how), decltype(m)::value>(query + first * query_row, query_row, rows, ahead, keys, dim,
                                                     scores + first * scores_row, scores_row);
    });
  };
  if constexpr (kNumbers<Unit> == 2) {
    call(KeyPairs());
  } else {
    with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA { call(KeyVector<decltype(type)>()); });
  }
}

static void thin_values(int dtype, const float* weights, int64_t weights_row, int64_t count, const char* const* rows,
                        const char* const* ahead, int64_t keys, int64_t dim, float* out, int64_t out_row) {
  with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    in_thin_steps(0, count, [&](auto m, int64_t first) FASTLM_LAMBDA {
      thin_values<decltype(type), decltype(m)::value>(weights + first * weights_row, weights_row, rows, ahead, keys, dim,
                                                      out + first * out_row, out_row);
    });
  });
}

}  // namespace fastlm::FASTLM_ISA
