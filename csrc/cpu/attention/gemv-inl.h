// GEMV for a few query rows, as in decoding: keys and values are read only once, so copying them into a tile first does not
// pay. Scores are dot products along the rows of keys, read in place; outputs are sums of the rows of values.
//
// Memory bandwidth is the limit. The hardware alone does not use all of it, because its instruction window is full of
// arithmetic; so the kernels prefetch. The ladder, in GB/s of float32 keys and values of 128 columns for 4 queries, read from
// memory (from the cache), on one core of a Zen 3 that can read 20:
//      9        rows one after the other
//     10.9 (19) prefetch the next tile's rows; 32 KiB ahead, they leave the first-level cache before they are read
//     11.5 (19) prefetch rows 2 KiB ahead, and read values along the row, in the order that memory is fastest, not by columns
//     12.0 (25) no test for the end of a row in the loop
//     12.6 (28) two rows of outputs at a time, whose weights stay in registers
// Two cores reach 24 of 33.
#pragma once

#include "attention.h"
#include "tiles-inl.h"

namespace fastlm::FASTLM_ISA {

constexpr int kGemvRowsAtOnce = 4;  // query rows whose scores are computed together

// Loads `left` values, fewer than a vector has, and fills up with zeros.
template <class V, class T>
FASTLM_SIMD V load_part(const T* from, int64_t left) {
  T rest[V::lanes] = {};
  __builtin_memcpy(rest, from, left * sizeof(T));
  return V::load(rest);
}

// Two ways to read keys: values of any dtype T as Float, or pairs of bfloat16 as Word.
template <class T>
struct KeyVector {
  using V = Float;
  using Elem = float;
  static constexpr int64_t values = V::lanes, bytes = sizeof(T);
  static FASTLM_MEMBER V load(const char* from) { return V::load(reinterpret_cast<const T*>(from)); }
  static FASTLM_MEMBER V load(const char* from, int64_t left) { return load_part<V>(reinterpret_cast<const T*>(from), left); }
};
struct KeyPairs {
  using V = Word;
  using Elem = uint32_t;
  static constexpr int64_t values = 2 * V::lanes, bytes = sizeof(BFloat16);
  static FASTLM_MEMBER V load(const char* from) { return V::load(from); }
  static FASTLM_MEMBER V load(const char* from, int64_t left) {
    uint32_t rest[V::lanes] = {};
    __builtin_memcpy(rest, from, left * bytes);
    return V::load(rest);
  }
};

// The addresses of a tile's rows, and of the rows to prefetch meanwhile, which are read kAheadBytes later.
constexpr int64_t kAheadBytes = 2048, kMostAhead = kBlockKeys, kGemvPointers = kBlockKeys + kMostAhead;
struct GemvRows {
  char** at;
  char** ahead;
};

// Returns rows [first, first + count) of the keys or values up to `end`. `pointers` must have room for kGemvPointers.
static GemvRows gemv_rows(const Attention& a, const Sequence& s, const Rows& t, int64_t dim, int64_t kv_head, int64_t first,
                          int64_t count, int64_t end, char** pointers) {
  const int64_t rows = kAheadBytes / (dim * bytes_of(t.dtype)) + 1, ahead = rows < kMostAhead ? rows : kMostAhead;
  const int64_t there = end - first < count + ahead ? end - first : count + ahead;
  key_rows(a, s, t, kv_head, first, there, pointers);
  for (int64_t k = there; k < count + ahead; ++k) pointers[k] = pointers[there - 1];
  return {pointers, pointers + ahead};
}

FASTLM_SIMD void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

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

// ---- keys ------------------------------------------------------------------------------------------------------------------

// Computes scores (M, keys) = query (M, dim) key^T (dim, keys). The query rows are padded with zeros to whole vectors.
template <class Keys, int M>
static void gemv_scores(const typename Keys::Elem* query, int64_t query_row, const GemvRows& rows, int64_t keys, int64_t dim,
                        float* scores, int64_t scores_row) {
  using V = typename Keys::V;
  constexpr int K = 2;  // keys computed together
  constexpr int64_t kStep = Keys::values * Keys::bytes;
  const int64_t end = dim * Keys::bytes, whole = end / kStep * kStep;
  for (int64_t k = 0; k < keys; k += K) {
    const int64_t last = k + 1 < keys ? k + 1 : k;
    const char *const key[K] = {rows.at[k], rows.at[last]}, *const ahead[K] = {rows.ahead[k], rows.ahead[last]};
    Float sums[M][K];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = Float(0.0f);
    const typename Keys::Elem* q = query;
    const auto add = [&](V first, V second) FASTLM_LAMBDA {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const V q_m = V::load(q + m * query_row);
        sums[m][0] = mul_add(q_m, first, sums[m][0]);
        sums[m][1] = mul_add(q_m, second, sums[m][1]);
      }
      q += V::lanes;
    };
    for (int64_t at = 0; at < whole; at += kStep) {
      __builtin_prefetch(ahead[0] + at);
      __builtin_prefetch(ahead[1] + at);
      add(Keys::load(key[0] + at), Keys::load(key[1] + at));
    }
    if (whole < end) {
      const int64_t left = dim % Keys::values;
      add(Keys::load(key[0] + whole, left), Keys::load(key[1] + whole, left));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      scores[m * scores_row + k] = sum(sums[m][0]);
      scores[m * scores_row + last] = sum(sums[m][1]);
    }
  }
}

// Computes scores (count, keys), with rows of keys of the given dtype.
template <class Elem>
static void gemv_scores(int dtype, const Elem* query, int64_t query_row, int64_t count, const GemvRows& rows, int64_t keys,
                        int64_t dim, float* scores, int64_t scores_row) {
  const auto call = [&](auto how) FASTLM_LAMBDA {
    in_row_steps(0, count, [&](auto m, int64_t first) FASTLM_LAMBDA {
      gemv_scores<decltype(how), decltype(m)::value>(query + first * query_row, query_row, rows, keys, dim,
                                                     scores + first * scores_row, scores_row);
    });
  };
  if constexpr (kValuesPerElem<Elem> == 2) {
    call(KeyPairs());
  } else {
    with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA { call(KeyVector<decltype(type)>()); });
  }
}

// ---- values ----------------------------------------------------------------------------------------------------------------

// Adds weights (M, K) value (K, dim) to out (M, dim), whose rows are padded to whole vectors. The weights stay in registers.
template <class T, int M, int K>
static void add_values(const float* weights, int64_t weights_row, const char* const* rows, int64_t dim, float* out,
                       int64_t out_row) {
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
    for (int k = 0; k < K; ++k) values[k] = Float::load(value[k] + d);
    add(d, values);
  }
  if (whole == dim) return;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) values[k] = load_part<Float>(value[k] + whole, dim - whole);
  add(whole, values);
}

// Adds the values from `first` on to all output rows, K values at a time, as long as K are left; returns the first one that it
// did not add. It reads values along the row, in the order that memory is fastest, and handles two output rows at a time; the
// few outputs stay in the first-level cache.
template <class T, int K>
static int64_t add_values(const float* weights, int64_t weights_row, int64_t count, const GemvRows& rows, int64_t first,
                          int64_t keys, int64_t dim, float* out, int64_t out_row) {
  for (; first + K <= keys; first += K) {
    for (int k = 0; k < K; ++k) prefetch_row(rows.ahead[first + k], dim * int64_t(sizeof(T)));
    in_row_steps<2>(0, count, [&](auto m, int64_t row) FASTLM_LAMBDA {
      add_values<T, decltype(m)::value, K>(weights + row * weights_row + first, weights_row, rows.at + first, dim,
                                           out + row * out_row, out_row);
    });
  }
  return first;
}

// Adds weights (count, keys) value (keys, dim) to out (count, dim).
static void gemv_values(int dtype, const float* weights, int64_t weights_row, int64_t count, const GemvRows& rows, int64_t keys,
                        int64_t dim, float* out, int64_t out_row) {
  with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    using T = decltype(type);
    const int64_t done = add_values<T, 4>(weights, weights_row, count, rows, 0, keys, dim, out, out_row);
    add_values<T, 1>(weights, weights_row, count, rows, done, keys, dim, out, out_row);
  });
}

}  // namespace fastlm::FASTLM_ISA
