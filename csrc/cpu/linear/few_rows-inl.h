// linear for few rows, as in decoding: b, the weights, is read once, where it lies, at the speed of the memory.
//
// Where the depth is contiguous, an element of out is a dot product along a row of b. Where the rows are (b is transposed, as
// the weights of transformers' Conv1D), out is a sum of rows of b^T.
//
// The ladder for one row, float32, 896 x 4864, in GB/s of weights, on two cores of a Sapphire Rapids that read 24 to 29:
//     24 - 29  dot products of 4 rows of b, prefetched 4 KiB ahead
//     16       sums of 4 rows of b^T, the rows behind them prefetched all at once
//     24 - 26  the same, prefetched line by line between the sums
// On two cores of a Zen 4 that read 25 to 33, 2048 x 16384:
//     22       dot products, prefetched into the first-level cache
//     28 - 33  prefetched into the second-level cache
#pragma once

#include "linear.h"
#include "../gemm/gemv-inl.h"
#include "../workspace.h"

namespace fastlm::FASTLM_ISA {

// The rows of a, as elements that the kernels multiply: floats or pairs of bfloat16, padded with zeros to whole vectors.
template <class Elem>
FASTLM_SIMD int64_t prepared_row(const Linear& l) {
  return padded(elems<Elem>(l.depth));
}

// How dot products read rows of T: as pairs of bfloat16, where those have an instruction.
template <class T, bool kPairs = kBFloat16Pairs>
struct DotRow {
  using type = typename FloatRow<T>::type;
};
template <>
struct DotRow<BFloat16, true> {
  using type = RowPairs;
};

// ---- dot products along the rows of b --------------------------------------------------------------------------------------

// b's rows are read so many bytes ahead. Of rows that are shorter, the same part of the next rows is.
constexpr int64_t kDotAhead = 4096;

// Computes the products (M, N) of rows of a and N rows of b, at b_at; b_next is what will be read next.
template <class Row, int M, int N>
static void dot_tile(const typename Row::Elem* a, int64_t a_row, const char* b_at, const char* b_next, int64_t b_row,
                     int64_t depth, float* to, int64_t to_row) {
  const int64_t vectors = depth / Row::values, whole = vectors * Row::step, left = depth % Row::values;
  const int64_t near = whole > kDotAhead ? (whole - kDotAhead) / Row::step : 0;  // vectors
  const char *row[N], *ahead[N], *next[N];
  Float sums[M][N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    row[n] = b_at + n * b_row;
    ahead[n] = row[n] + kDotAhead;
    next[n] = b_next + n * b_row - near * Row::step;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m][n] = Float(0.0f);
  }
  const auto before = prefetch_rows(ahead), before_next = prefetch_rows(next);
  add_dots<Row, M>(a, a_row, row, before, 0, near * Row::step, sums);
  add_dots<Row, M>(a + near * Row::elems, a_row, row, before_next, near * Row::step, whole, sums);
  if (left) add_last_dots<Row, M>(a + vectors * Row::elems, a_row, row, whole, left, sums);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) to[m * to_row + n] = sum(sums[m][n]);
  }
}

// Computes `count` columns of out from `column` on, into tile (m, kColumnBlock).
template <class Row>
static void dot_columns(const Linear& l, const typename Row::Elem* a, int64_t column, int64_t count, float* tile) {
  const int64_t a_row = prepared_row<typename Row::Elem>(l);
  const auto run = [&](auto n, int64_t first) FASTLM_LAMBDA {
    constexpr int N = decltype(n)::value;
    const char* at = l.b.data + (column + first) * l.b.row;
    const char* next = column + first + 2 * N <= l.b.rows ? at + N * l.b.row : at;
    in_row_steps(0, l.a.rows, [&](auto m, int64_t row) FASTLM_LAMBDA {
      dot_tile<Row, decltype(m)::value, N>(a + row * a_row, a_row, at, next, l.b.row, l.depth,
                                           tile + row * kColumnBlock + first, kColumnBlock);
    });
  };
  in_row_steps<kGemvColumns>(0, count, run);
}

// ---- sums of rows of b^T ---------------------------------------------------------------------------------------------------

constexpr int kStripRows = 4;   // rows of b^T that are added together
constexpr int kStripAhead = 8;  // rows of b^T from the one that is read to the one that is prefetched

// Rows of b^T whose sum is added to the other sums at once. One sum over the whole depth would round thousands of times, twice
// as much as torch's.
constexpr int64_t kSumRows = 256;

// Adds rows [first, first + K) of b^T, and more as long as K are left before `end`, to tile (m, kStripColumns). Returns the
// first row that it did not add.
template <class T, int K>
static int64_t add_strip(const Linear& l, const float* a, int64_t column, int64_t count, int64_t first, int64_t end,
                         float* tile) {
  const int64_t a_row = prepared_row<float>(l);
  for (; first + K <= end; first += K) {
    const char *rows[K], *ahead[K];
    for (int k = 0; k < K; ++k) {
      rows[k] = l.b.data + column * int64_t(sizeof(T)) + (first + k) * l.b.depth;
      ahead[k] = rows[k] + (first + k + kStripAhead < l.depth ? kStripAhead * l.b.depth : 0);
    }
    add_values_to_rows<typename FloatRow<T>::type, K>(a + first, a_row, l.a.rows, rows, prefetch_rows(ahead), count, tile,
                                                      kStripColumns);
  }
  return first;
}

// ---- out -------------------------------------------------------------------------------------------------------------------

// Writes (count,) floats plus the bias, from the column on, to a row of out.
template <class T>
FASTLM_SIMD void write_row(const Linear& l, const float* from, int64_t row, int64_t column, int64_t count) {
  T* to = reinterpret_cast<T*>(l.out) + row * l.b.rows + column;
  const T* bias = l.bias ? reinterpret_cast<const T*>(l.bias) + column : nullptr;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 x = F32::load(from + i);
    (bias ? x + F32::load(bias + i) : x).store(to + i);
  }
  if (i == count) return;
  T rest[kLanes] = {};
  if (bias) __builtin_memcpy(rest, bias + i, (count - i) * sizeof(T));
  F32 x = F32::load(from + i);
  if (bias) x = x + F32::load(rest);
  x.store(rest);
  __builtin_memcpy(to + i, rest, (count - i) * sizeof(T));
}

// ---- kernels ---------------------------------------------------------------------------------------------------------------

template <class Row>
static void prepare(const Linear& l, char* shared) {
  using Elem = typename Row::Elem;
  const int64_t to_row = prepared_row<Elem>(l);
  for (int64_t r = 0; r < l.a.rows; ++r) {
    const char* row = l.a.data + r * l.a.row;
    Elem* to = reinterpret_cast<Elem*>(shared) + r * to_row;
    load_a(l.dtype, &row, 1, l.depth, to, to_row);
    if constexpr (Row::parts == 2) split<Row>(to, l.depth);
  }
}

void linear_prepare(const Linear& l, char* shared) {
  if (is_transposed(l.b, l.dtype)) return prepare<RowVector<float>>(l, shared);
  with_float_dtype(l.dtype, [&](auto type) FASTLM_LAMBDA { prepare<typename DotRow<decltype(type)>::type>(l, shared); });
}

int64_t linear_shared(const Linear& l) { return l.a.rows * prepared_row<float>(l) * int64_t(sizeof(float)); }

int64_t linear_few_rows_workspace(const Linear& l) {
  return l.a.rows * (is_transposed(l.b, l.dtype) ? 2 * kStripColumns : kColumnBlock) * int64_t(sizeof(float));
}

// Computes `count` columns of out from `column` on, as floats, into tile: (m, kColumnBlock), or, if b is transposed, the first
// half of (2, m, kStripColumns).
template <class T>
static void fill_tile(const Linear& l, const char* shared, int64_t column, int64_t count, float* tile) {
  if (!is_transposed(l.b, l.dtype)) {
    using Row = typename DotRow<T>::type;
    return dot_columns<Row>(l, reinterpret_cast<const typename Row::Elem*>(shared), column, count, tile);
  }
  const float* a = reinterpret_cast<const float*>(shared);
  const int64_t size = l.a.rows * kStripColumns;
  float* part = tile + size;  // the tile's second half
  for (int64_t i = 0; i < size; i += kLanes) F32(0.0f).store(tile + i);
  for (int64_t first = 0; first < l.depth; first += kSumRows) {
    const int64_t end = first + kSumRows < l.depth ? first + kSumRows : l.depth;
    for (int64_t i = 0; i < size; i += kLanes) F32(0.0f).store(part + i);
    const int64_t done = add_strip<T, kStripRows>(l, a, column, count, first, end, part);
    add_strip<T, 1>(l, a, column, count, done, end, part);
    for (int64_t i = 0; i < size; i += kLanes) (F32::load(tile + i) + F32::load(part + i)).store(tile + i);
  }
}

void linear_few_rows(const Linear& l, const LinearBlock& block, const char* shared, char* memory) {
  float* tile = reinterpret_cast<float*>(memory);
  const int64_t step = is_transposed(l.b, l.dtype) ? kStripColumns : kColumnBlock;
  with_float_dtype(l.dtype, [&](auto type) FASTLM_LAMBDA {
    using T = decltype(type);
    for (int64_t column = block.column_begin; column < block.column_end; column += step) {
      const int64_t left = block.column_end - column, count = left < step ? left : step;
      fill_tile<T>(l, shared, column, count, tile);
      for (int64_t row = 0; row < l.a.rows; ++row) {
        if (is_transposed(l.b, l.dtype)) merge<typename FloatRow<T>::type>(tile + row * step, count);
        write_row<T>(l, tile + row * step, row, column, count);
      }
    }
  });
}

}  // namespace fastlm::FASTLM_ISA
