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
// Two cores reach 24 of 33. Since then the values are prefetched line by line between the sums, as in linear/few_rows-inl.h,
// which has what that gained there. Two cores of a Zen 4 that read 25 to 31, 8192 keys of 64 or 128 columns in float32 and
// bfloat16:
//     11 - 21  prefetch into the first-level cache, which waits for few lines at a time, from 2 to 16 KiB ahead
//     17 - 24  prefetch into the second-level cache, 2 KiB ahead
//     22 - 26  the same, 8 KiB ahead
// With 4 queries the arithmetic limits it next. Old and new, in one run, on a Zen 5 whose two cores read 72 with AVX2 and 44
// with AVX512-BF16 (from the cache, on one core), float32 and bfloat16, 128 columns:
//     40, 25 (42, 21) -> 43, 31 (42, 21)   with AVX2
//     30, 31 (59, 39) -> 31, 31 (70, 51)   with AVX512-BF16, where the memory is the limit
// What did it: each line is prefetched once, values are read once for all 4 rows, the sums of a vector's worth of scores are
// added up together (sum_each), and bfloat16 is widened by halves (RowHalves).
#pragma once

#include "attention.h"
#include "../gemm/gemv-inl.h"

namespace fastlm::FASTLM_ISA {

// The addresses of a tile's rows, and of the rows to prefetch meanwhile, which are read kAheadBytes later.
constexpr int64_t kAheadBytes = 8192, kMostAhead = kBlockKeys, kGemvPointers = kBlockKeys + kMostAhead;
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

// ---- keys ------------------------------------------------------------------------------------------------------------------

// Computes scores (M, keys) = query (M, dim) key^T (dim, keys). The query rows are padded with zeros to whole vectors. As many
// keys are computed together as fill a vector with sums; behind the last key, the scores are that key's.
template <class Keys, int M>
static void gemv_scores(const typename Keys::Elem* query, int64_t query_row, const GemvRows& rows, int64_t keys, int64_t dim,
                        float* scores, int64_t scores_row) {
  constexpr int K = kGemvColumns, R = M == 3 ? 4 : M;  // keys of a step; rows of its sums
  constexpr int kSteps = Float::lanes > R * K ? Float::lanes / (R * K) : 1, kSums = kSteps * R * K;
  const int64_t vectors = dim / Keys::values, whole = vectors * Keys::step, left = dim % Keys::values;
  for (int64_t first = 0; first < keys; first += kSteps * K) {
    Float sums[kSteps][R][K];
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      const char *key[K], *ahead[K];
#pragma GCC unroll 8
      for (int n = 0; n < K; ++n) {
        const int64_t k = first + step * K + n < keys ? first + step * K + n : keys - 1;
        key[n] = rows.at[k];
        ahead[n] = rows.ahead[k];
#pragma GCC unroll 8
        for (int m = 0; m < R; ++m) sums[step][m][n] = Float(0.0f);
      }
      add_dots<Keys, M>(query, query_row, key, ahead, 0, whole, sums[step]);
      if (left) add_last_dots<Keys, M>(query + vectors * Keys::elems, query_row, key, whole, left, sums[step]);
    }
    float summed[kSums];  // (kSteps, R, K)
#pragma GCC unroll 8
    for (int i = 0; i < kSums; i += Float::lanes) sum_each(&sums[0][0][0] + i).store(summed + i);
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        __builtin_memcpy(scores + m * scores_row + first + step * K, summed + (step * R + m) * K, K * sizeof(float));
      }
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
    call(RowPairs());
  } else {
    with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA { call(typename FloatRow<decltype(type)>::type()); });
  }
}

// ---- values ----------------------------------------------------------------------------------------------------------------

// Adds the values from `first` on to all output rows, K values at a time, as long as K are left; returns the first one that it
// did not add. It reads values along the row, in the order that memory is fastest; the few outputs stay in the first-level
// cache.
template <class Row, int K>
static int64_t add_values(const float* weights, int64_t weights_row, int64_t count, const GemvRows& rows, int64_t first,
                          int64_t keys, int64_t dim, float* out, int64_t out_row) {
  for (; first + K <= keys; first += K) {
    add_values_to_rows<Row, K>(weights + first, weights_row, count, rows.at + first, rows.ahead + first, dim, out, out_row);
  }
  return first;
}

// Adds weights (count, keys) value (keys, dim) to out (count, dim).
static void gemv_values(int dtype, const float* weights, int64_t weights_row, int64_t count, const GemvRows& rows, int64_t keys,
                        int64_t dim, float* out, int64_t out_row) {
  with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    using Row = typename FloatRow<decltype(type)>::type;
    // Reading the values once for all rows is worth more than loading and storing the outputs once for more values.
    constexpr int kFew = kGemvWeights / kGemvRowsAtOnce;
    const int64_t done = count > 2 ? add_values<Row, kFew>(weights, weights_row, count, rows, 0, keys, dim, out, out_row)
                                   : add_values<Row, 4>(weights, weights_row, count, rows, 0, keys, dim, out, out_row);
    add_values<Row, 1>(weights, weights_row, count, rows, done, keys, dim, out, out_row);
  });
}

// Brings the queries into the order in which keys of the given dtype are read.
static void split_queries(int dtype, float* query, int64_t query_row, int64_t count, int64_t dim) {
  with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    for (int64_t r = 0; r < count; ++r) split<typename FloatRow<decltype(type)>::type>(query + r * query_row, dim);
  });
}

// Brings the outputs back from the order in which values of the given dtype are read.
static void merge_outputs(int dtype, float* out, int64_t out_row, int64_t count, int64_t dim) {
  with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    for (int64_t r = 0; r < count; ++r) merge<typename FloatRow<decltype(type)>::type>(out + r * out_row, dim);
  });
}

}  // namespace fastlm::FASTLM_ISA
