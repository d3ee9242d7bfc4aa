// Copies rows of tensors, which may be anywhere in memory, into the tiles that gemm (gemm-inl.h) reads, and results back.
//
// The elements of a tile are floats, to which half precision is converted on the way, or pairs of bfloat16 that are neighbours
// in the direction of the sum. Tile rows have one spare vector at the end: with a stride that is a power of two, all rows would
// fall into a few sets of the first-level cache.
#pragma once

#include "gemm-inl.h"
#include "../../common/view.h"

namespace fastlm::FASTLM_ISA {

template <class Elem>
constexpr int64_t kValuesPerElem = 2;  // uint32_t: a pair of bfloat16
template <>
constexpr int64_t kValuesPerElem<float> = 1;

// Returns the number of elements that hold so many values.
template <class Elem>
FASTLM_SIMD int64_t elems(int64_t values) {
  return ceil_div(values, kValuesPerElem<Elem>);
}

// Calls f with a value of the storage type of float32, bfloat16 or float16.
template <class F>
FASTLM_SIMD void with_float_dtype(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(float());
    case kBFloat16: return f(BFloat16());
    default: return f(Float16());
  }
}

// Converts a row to floats, padded with zeros to whole vectors.
template <class T>
FASTLM_SIMD void widen_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) F32::load(from + i).store(to + i);
  if (i < count) {
    T rest[kLanes] = {};
    __builtin_memcpy(rest, from + i, (count - i) * sizeof(T));
    F32::load(rest).store(to + i);
  }
}

// Multiplies a row of floats by the factor and converts it to the tensor's type.
template <class T>
FASTLM_SIMD void narrow_row(const float* from, float factor, int64_t count, T* to) {
  const F32 f(factor);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) (f * F32::load(from + i)).store(to + i);
  if (i < count) {
    T rest[kLanes];
    (f * F32::load(from + i)).store(rest);
    __builtin_memcpy(to + i, rest, (count - i) * sizeof(T));
  }
}

// ---- operand A: (count, elems(dim)), padded with zeros to whole vectors -----------------------------------------------------

static void load_a(int dtype, const char* const* rows, int64_t count, int64_t dim, float* to, int64_t to_row) {
  with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    using T = decltype(type);
    for (int64_t r = 0; r < count; ++r) widen_row(reinterpret_cast<const T*>(rows[r]), dim, to + r * to_row);
  });
}

static void load_a(int, const char* const* rows, int64_t count, int64_t dim, uint32_t* to, int64_t to_row) {
  const int64_t whole = padded(elems<uint32_t>(dim));
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = dim / 2; i < whole; ++i) to[r * to_row + i] = 0;
    __builtin_memcpy(to + r * to_row, rows[r], dim * sizeof(BFloat16));
  }
}

// ---- operand B: (elems(count), dim), summed over from row to row -----------------------------------------------------------

static void load_b(int dtype, const char* const* rows, int64_t count, int64_t dim, float* to, int64_t to_row) {
  load_a(dtype, rows, count, dim, to, to_row);
}

// Returns pairs of the values of two rows.
FASTLM_SIMD U32 load_pairs(const BFloat16* low, const BFloat16* high) {
  return shift_right<16>(as_bits(F32::load(low))) + as_bits(F32::load(high));
}

// A pair is a value of an even row and the value below it.
static void load_b(int, const char* const* rows, int64_t count, int64_t dim, uint32_t* to, int64_t to_row) {
  for (int64_t r = 0; r < count; r += 2, to += to_row) {
    const auto *even = reinterpret_cast<const BFloat16*>(rows[r]), *odd = reinterpret_cast<const BFloat16*>(rows[r + 1]);
    const bool alone = r + 1 == count;
    int64_t i = 0;
    if (!alone) {
      for (; i + kLanes <= dim; i += kLanes) load_pairs(even + i, odd + i).store(to + i);
    }
    for (; i < dim; i += kLanes) {
      BFloat16 rest[2][kLanes] = {};
      const int64_t left = dim - i < kLanes ? dim - i : kLanes;
      __builtin_memcpy(rest[0], even + i, left * sizeof(BFloat16));
      if (!alone) __builtin_memcpy(rest[1], odd + i, left * sizeof(BFloat16));
      load_pairs(rest[0], rest[1]).store(to + i);
    }
  }
}

// ---- operand B, transposed: (elems(dim), count), whose columns are the tensor's rows, padded with zeros ---------------------

// Transposes rows of elements that are stored as T. A row has `bytes` bytes; its last element may be half a pair.
template <class T>
static void transpose(const char* const* rows, int64_t count, int64_t bytes, float* to, int64_t to_row) {
  constexpr int n = Float::lanes;
  const int64_t dim = ceil_div(bytes, int64_t(sizeof(T)));
  Float block[n];
  for (int64_t i = 0; i < padded(count); i += n) {
    for (int64_t d = 0; d < dim; d += n) {
      const int64_t left = bytes - d * int64_t(sizeof(T));
      if (left >= int64_t(n * sizeof(T)) && i + n <= count) {
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r) block[r] = Float::load(reinterpret_cast<const T*>(rows[i + r]) + d);
        store_transposed(block, to + d * to_row + i, to_row);
        continue;
      }
      const int64_t kept = left < int64_t(n * sizeof(T)) ? left : int64_t(n * sizeof(T));
      for (int r = 0; r < n; ++r) {
        T rest[n] = {};
        if (i + r < count) __builtin_memcpy(rest, rows[i + r] + d * int64_t(sizeof(T)), kept);
        block[r] = Float::load(rest);
      }
      float columns[n * n];
      store_transposed(block, columns, n);
      for (int64_t c = 0; c < n && d + c < dim; ++c) Float::load(columns + c * n).store(to + (d + c) * to_row + i);
    }
  }
}

static void load_b_transposed(int dtype, const char* const* rows, int64_t count, int64_t dim, float* to, int64_t to_row) {
  with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    using T = decltype(type);
    transpose<T>(rows, count, dim * int64_t(sizeof(T)), to, to_row);
  });
}

// Moves a pair of bfloat16 as the float with the same bits.
static void load_b_transposed(int, const char* const* rows, int64_t count, int64_t dim, uint32_t* to, int64_t to_row) {
  transpose<float>(rows, count, dim * int64_t(sizeof(BFloat16)), reinterpret_cast<float*>(to), to_row);
}

}  // namespace fastlm::FASTLM_ISA
