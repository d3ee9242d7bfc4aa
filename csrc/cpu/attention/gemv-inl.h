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

// Computes scores (M, keys) = query (M, dim) key^T (dim, keys). The query rows are padded with zeros to whole vectors.
template <class Keys, int M>
static void gemv_scores(const typename Keys::Elem* query, int64_t query_row, const GemvRows& rows, int64_t keys, int64_t dim,
                        float* scores, int64_t scores_row) {
  constexpr int K = 2;  // keys computed together
  const int64_t vectors = dim / Keys::values, whole = vectors * Keys::step, left = dim % Keys::values;
  for (int64_t k = 0; k < keys; k += K) {
    const int64_t last = k + 1 < keys ? k + 1 : k;
    const char *const key[K] = {rows.at[k], rows.at[last]}, *const ahead[K] = {rows.ahead[k], rows.ahead[last]};
    Float sums[M][K];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = Float(0.0f);
    add_dots<Keys>(query, query_row, key, ahead, 0, whole, sums);
    if (left) add_last_dots<Keys>(query + vectors * Keys::V::lanes, query_row, key, whole, left, sums);
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
    call(RowPairs());
  } else {
    with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA { call(RowVector<decltype(type)>()); });
  }
}

// ---- values ----------------------------------------------------------------------------------------------------------------

// Adds the values from `first` on to all output rows, K values at a time, as long as K are left; returns the first one that it
// did not add. It reads values along the row, in the order that memory is fastest, and handles two output rows at a time; the
// few outputs stay in the first-level cache.
template <class T, int K>
static int64_t add_values(const float* weights, int64_t weights_row, int64_t count, const GemvRows& rows, int64_t first,
                          int64_t keys, int64_t dim, float* out, int64_t out_row) {
  for (; first + K <= keys; first += K) {
    add_values_to_rows<T, K>(weights + first, weights_row, count, rows.at + first, rows.ahead + first, dim, out, out_row);
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
