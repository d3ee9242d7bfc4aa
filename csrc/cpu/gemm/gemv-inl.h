// GEMV of a few rows: what linear and attention share. A matrix that is read once is read in place, because copying it into a
// tile first does not pay.
#pragma once

#include "tiles-inl.h"

namespace fastlm::FASTLM_ISA {

constexpr int kGemvRowsAtOnce = 4;  // rows whose dot products are computed together
constexpr int64_t kLine = 64;       // bytes that are prefetched at once

// Loads `left` values, fewer than a vector has, and fills up with zeros.
template <class V, class T>
FASTLM_SIMD V load_part(const T* from, int64_t left) {
  T rest[V::lanes] = {};
  __builtin_memcpy(rest, from, left * sizeof(T));
  return V::load(rest);
}

// Three ways to read a row, `parts` vectors at a time: values of any dtype T as Float, ...
template <class T>
struct RowVector {
  using V = Float;
  using Elem = float;
  static constexpr int parts = 1, elems = V::lanes;                       // elems: of all parts
  static constexpr int64_t values = V::lanes, step = values * sizeof(T);  // of all parts; the step is in bytes
  static FASTLM_MEMBER void load(const char* from, V (&to)[parts]) { to[0] = V::load(reinterpret_cast<const T*>(from)); }
  static FASTLM_MEMBER void load(const char* from, int64_t left, V (&to)[parts]) {
    to[0] = load_part<V>(reinterpret_cast<const T*>(from), left);
  }
};

// ... pairs of bfloat16 as Word, where an instruction multiplies them, ...
struct RowPairs {
  using V = Word;
  using Elem = uint32_t;
  static constexpr int parts = 1, elems = V::lanes;  // elems: of all parts
  static constexpr int64_t values = 2 * V::lanes, step = values * sizeof(BFloat16);
  static FASTLM_MEMBER void load(const char* from, V (&to)[parts]) { to[0] = V::load(from); }
  static FASTLM_MEMBER void load(const char* from, int64_t left, V (&to)[parts]) {
    uint32_t rest[V::lanes] = {};
    __builtin_memcpy(rest, from, left * sizeof(BFloat16));
    to[0] = V::load(rest);
  }
};

// ... or bfloat16 as Float, of a vector of pairs first those at even places, then those at odd places. So widening takes one
// instruction a vector; in order, it takes three. What they are multiplied with, or added to, must have that order too: split()
// makes it, and merge() undoes it.
struct RowHalves {
  using V = Float;
  using Elem = float;
  static constexpr int parts = 2, elems = 2 * V::lanes;
  static constexpr int64_t values = RowPairs::values, step = RowPairs::step;
  static FASTLM_MEMBER void load(const char* from, V (&to)[parts]) { halves(Word::load(from), to); }
  static FASTLM_MEMBER void load(const char* from, int64_t left, V (&to)[parts]) {
    Word pairs[1];
    RowPairs::load(from, left, pairs);
    halves(pairs[0], to);
  }
  static FASTLM_MEMBER void halves(Word pairs, V (&to)[parts]) {
    to[0] = as_float(shift_left<16>(pairs));
    to[1] = as_float(pairs & Word(0xffff0000u));
  }
};

// How rows of T are read as floats. Halves are used where two vectors fill a row that is padded to kLanes.
template <class T, bool kHalves = !kBFloat16Pairs && RowHalves::values <= kLanes>
struct FloatRow {
  using type = RowVector<T>;
};
template <>
struct FloatRow<BFloat16, true> {
  using type = RowHalves;
};

// Brings a row of `count` floats, padded to kLanes, into the order in which Row reads values; merge brings it back.
template <class Row>
static void split(float* row, int64_t count) {
  if constexpr (Row::parts == 2) {
    for (float* at = row; at < row + count; at += Row::values) {
      float even[Row::values / 2], odd[Row::values / 2];
      for (int i = 0; i < Row::values / 2; ++i) even[i] = at[2 * i], odd[i] = at[2 * i + 1];
      __builtin_memcpy(at, even, sizeof(even));
      __builtin_memcpy(at + Row::values / 2, odd, sizeof(odd));
    }
  }
}
template <class Row>
static void merge(float* row, int64_t count) {
  if constexpr (Row::parts == 2) {
    for (float* at = row; at < row + count; at += Row::values) {
      float pairs[Row::values];
      for (int i = 0; i < Row::values / 2; ++i) pairs[2 * i] = at[i], pairs[2 * i + 1] = at[Row::values / 2 + i];
      __builtin_memcpy(at, pairs, sizeof(pairs));
    }
  }
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

// The same for rows that meet the same matrix one step after the other: the first step is given `prefetch`, and the others what
// does nothing.
template <class Prefetch, class F>
FASTLM_SIMD void in_row_steps(int64_t count, const Prefetch& prefetch, const F& f) {
  in_row_steps(0, count, [&](auto m, int64_t row) FASTLM_LAMBDA {
    row == 0 ? f(m, row, prefetch) : f(m, row, [](int64_t) FASTLM_LAMBDA {});
  });
}

// Returns what prefetches a line of each of N rows, the one at a place that it is given.
template <int N>
FASTLM_SIMD auto prefetch_rows(const char* const (&rows)[N]) {
  return [&rows](int64_t at) FASTLM_LAMBDA {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) prefetch_line(rows[n] + at);
  };
}

// ---- dot products along the rows -------------------------------------------------------------------------------------------

// Adds to sums (M, N) the products of the rows of a and N rows, of which b is one step.
template <class Row, int M, int N, int R>
FASTLM_SIMD void add_step_of_dots(const typename Row::Elem* a, int64_t a_row, const typename Row::V (&b)[N][Row::parts],
                                  Float (&sums)[R][N]) {
  using V = typename Row::V;
#pragma GCC unroll 2
  for (int part = 0; part < Row::parts; ++part) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      V a_m = V::load(a + m * a_row + part * V::lanes);
      hold(a_m);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = mul_add(a_m, b[n][part], sums[m][n]);
    }
  }
}

// Adds to sums (M, N) the products of the rows of a and N rows, over the bytes [begin, end) of the latter, whole vectors. For
// each line of them it calls prefetch(at) before. `a` points to the elements for `begin`. Sums may have more rows.
template <class Row, int M, int N, int R, class Prefetch>
FASTLM_SIMD void add_dots(const typename Row::Elem* a, int64_t a_row, const char* const (&row)[N], Prefetch& prefetch,
                          int64_t begin, int64_t end, Float (&sums)[R][N]) {
  using V = typename Row::V;
  const auto add = [&](int64_t at) FASTLM_LAMBDA {
    V b[N][Row::parts];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) Row::load(row[n] + at, b[n]);
    add_step_of_dots<Row, M>(a, a_row, b, sums);
    a += Row::elems;
  };
  int64_t at = begin;
  for (; at + kLine <= end; at += kLine) {
    prefetch(at);
#pragma GCC unroll 8
    for (int64_t within = 0; within < kLine; within += Row::step) add(at + within);
  }
  if (at < end) prefetch(at);
  for (; at < end; at += Row::step) add(at);
}

// Adds the part of the rows behind their whole vectors: `left` values from the byte `at` on. `a` is padded with zeros.
template <class Row, int M, int N, int R>
FASTLM_SIMD void add_last_dots(const typename Row::Elem* a, int64_t a_row, const char* const (&row)[N], int64_t at,
                               int64_t left, Float (&sums)[R][N]) {
  typename Row::V b[N][Row::parts];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) Row::load(row[n] + at, left, b[n]);
  add_step_of_dots<Row, M>(a, a_row, b, sums);
}

// ---- sums of rows ----------------------------------------------------------------------------------------------------------

// Adds weights (M, K) value (K, dim) to out (M, dim), whose rows are padded to kLanes. For each line of the values it calls
// prefetch(at) before.
template <class Row, int M, int K, class Prefetch>
static void add_values(const float* weights, int64_t weights_row, const char* const* rows, Prefetch prefetch, int64_t dim,
                       float* out, int64_t out_row) {
  const int64_t vectors = dim / Row::values, whole = vectors * Row::step, left = dim % Row::values;
  const char* value[K];
  Float weight[M][K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    value[k] = rows[k];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) weight[m][k] = Float(weights[m * weights_row + k]);
  }
  Float values[K][Row::parts];
  const auto add = [&]() FASTLM_LAMBDA {
#pragma GCC unroll 2
    for (int part = 0; part < Row::parts; ++part, out += Float::lanes) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        Float sum = Float::load(out + m * out_row);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) sum = mul_add(weight[m][k], values[k][part], sum);
        sum.store(out + m * out_row);
      }
    }
  };
  const auto add_step = [&](int64_t at) FASTLM_LAMBDA {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) Row::load(value[k] + at, values[k]);
    add();
  };
  int64_t at = 0;
  for (; at + kLine <= whole; at += kLine) {
    prefetch(at);
#pragma GCC unroll 8
    for (int64_t within = 0; within < kLine; within += Row::step) add_step(at + within);
  }
  if (at < whole || left) prefetch(at);
  for (; at < whole; at += Row::step) add_step(at);
  if (left == 0) return;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) Row::load(value[k] + whole, left, values[k]);
  add();
}

// The same for `count` rows of weights and of out, of which the first ones prefetch.
template <class Row, int K, class Prefetch>
FASTLM_SIMD void add_values_to_rows(const float* weights, int64_t weights_row, int64_t count, const char* const* rows,
                                    const Prefetch& prefetch, int64_t dim, float* out, int64_t out_row) {
  in_row_steps(count, prefetch, [&](auto m, int64_t row, const auto& before) FASTLM_LAMBDA {
    add_values<Row, decltype(m)::value, K>(weights + row * weights_row, weights_row, rows, before, dim, out + row * out_row,
                                           out_row);
  });
}

}  // namespace fastlm::FASTLM_ISA
