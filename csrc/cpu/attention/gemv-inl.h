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
//
// A Zen 3 hides the memory only behind a stream of requests in the order of the addresses: the hardware then prefetches beyond
// the 24 lines that the first-level cache can wait for. Two cores that read 24 to 31, 4 queries, 128 columns, as a part of
// that, float32 and bfloat16, medians of pairs in one run:
//     0.60 - 0.66, 0.55 - 0.66  lines of K rows prefetched at once, from K places
//     0.68 - 0.75, 0.58 - 0.62  in the order of their addresses (NextLines), 2 KiB ahead, into the first-level cache; 4 values
//                               at a time, whose weights do not fit in registers
//     0.74 - 0.82, 0.67 - 0.73  a query is loaded once for two keys (hold)
// kvcache_attention reaches 0.71 - 0.76 and 0.52 - 0.67. With AVX2, 4 queries do 4 floating-point operations for each byte of
// bfloat16: from the cache, one core reads 16 GB/s of it, two thirds of its multiply-adds.
#pragma once

#include "attention.h"
#include "../gemm/gemv-inl.h"

namespace fastlm::FASTLM_ISA {

// The addresses of a tile's rows, and of the rows to prefetch meanwhile, which are read kGemvAhead bytes later.
constexpr int64_t kMostAhead = kBlockKeys, kGemvPointers = kBlockKeys + kMostAhead;
struct GemvRows {
  char** at;
  char** ahead;
};

// Returns rows [first, first + count) of the keys or values up to `end`. Behind these, up to whole vectors of rows, stands the
// last one. `pointers` must have room for kGemvPointers.
static GemvRows gemv_rows(const Attention& a, const Sequence& s, const Rows& t, int64_t dim, int64_t kv_head, int64_t first,
                          int64_t count, int64_t end, char** pointers) {
  const int64_t rows = kGemvAhead / (dim * bytes_of(t.dtype)) + 1, ahead = rows < kMostAhead ? rows : kMostAhead;
  const int64_t all = padded(count) + ahead, there = end - first < all ? end - first : all;
  key_rows(a, s, t, kv_head, first, there, pointers);
  for (int64_t k = there; k < all; ++k) pointers[k] = pointers[there - 1];
  return {pointers, pointers + ahead};
}

// Prefetches the next N lines of rows whenever it is called, in the order of their addresses.
template <int N>
struct NextLines {
  char* const* row;
  int64_t bytes, at = 0;  // of a row; from the row on
  FASTLM_MEMBER void operator()(int64_t) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      prefetch_line<kGemvCache>(*row + at);
      at += kLine;
      if (at >= bytes) at = 0, ++row;
    }
  }
};

// ---- keys ------------------------------------------------------------------------------------------------------------------

// Computes scores (M, kLanes) = query (M, dim) key^T (dim, kLanes), of which the keys' rows are given. The query rows are
// padded with zeros to whole vectors. As many keys are computed together as fill a vector with sums.
template <class Keys, int M, class Prefetch>
static void add_scores(const typename Keys::Elem* query, int64_t query_row, char* const* keys, Prefetch prefetch, int64_t dim,
                       float* scores, int64_t scores_row) {
  constexpr int K = kGemvColumns, R = M == 3 ? 4 : M;  // keys of a step; rows of its sums
  constexpr int kSteps = Float::lanes > R * K ? Float::lanes / (R * K) : 1, kSums = kSteps * R * K;
  const int64_t vectors = dim / Keys::values, whole = vectors * Keys::step, left = dim % Keys::values;
  for (int64_t first = 0; first < kLanes; first += kSteps * K) {
    Float sums[kSteps][R][K];
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      const char* key[K];
#pragma GCC unroll 8
      for (int n = 0; n < K; ++n) {
        key[n] = keys[first + step * K + n];
#pragma GCC unroll 8
        for (int m = 0; m < R; ++m) sums[step][m][n] = Float(0.0f);
      }
      add_dots<Keys, M>(query, query_row, key, prefetch, 0, whole, sums[step]);
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

// Computes scores (count, keys), with rows of keys of the given dtype. Behind the last key, up to whole vectors, the scores are
// that key's.
template <class Elem>
static void gemv_scores(int dtype, const Elem* query, int64_t query_row, int64_t count, const GemvRows& rows, int64_t keys,
                        int64_t dim, float* scores, int64_t scores_row) {
  const auto call = [&](auto how) FASTLM_LAMBDA {
    for (int64_t first = 0; first < keys; first += kLanes) {
      const NextLines<kGemvColumns> next{rows.ahead + first, dim * bytes_of(dtype)};
      in_row_steps(count, next, [&](auto m, int64_t row, const auto& prefetch) FASTLM_LAMBDA {
        add_scores<decltype(how), decltype(m)::value>(query + row * query_row, query_row, rows.at + first, prefetch, dim,
                                                      scores + row * scores_row + first, scores_row);
      });
    }
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
    const NextLines<K> next{rows.ahead + first, dim * (Row::step / Row::values)};
    add_values_to_rows<Row, K>(weights + first, weights_row, count, rows.at + first, next, dim, out, out_row);
  }
  return first;
}

// Adds weights (count, keys) value (keys, dim) to out (count, dim).
static void gemv_values(int dtype, const float* weights, int64_t weights_row, int64_t count, const GemvRows& rows, int64_t keys,
                        int64_t dim, float* out, int64_t out_row) {
  with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    using Row = typename FloatRow<decltype(type)>::type;
    const int64_t done = add_values<Row, 4>(weights, weights_row, count, rows, 0, keys, dim, out, out_row);
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
