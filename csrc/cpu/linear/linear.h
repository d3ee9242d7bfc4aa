// linear: out (m, n) = a (m, depth) b (n, depth)^T + bias, every sum in float32.
//
// Few rows (m) are limited by the memory that b is read from, many by the arithmetic; so there are two algorithms, in
// few_rows-inl.h and many_rows-inl.h. Both sum up an element of out in an order that depends on the depth alone.
#pragma once

#include <cstdint>

#include "../../common/sizes.h"

namespace fastlm {

// A matrix (rows, depth). One of its strides is one element: that of the depth, or that of the rows (a transposed matrix).
struct Matrix {
  char* data;
  int64_t rows;
  int64_t row, depth;  // strides in bytes
};

FASTLM_HD bool is_transposed(const Matrix& x, int dtype) { return x.depth != bytes_of(dtype); }

struct Linear {
  Matrix a, b;  // (m, depth), (n, depth)
  int64_t depth;
  int dtype;         // of all tensors: float32, bfloat16 or float16
  const char* bias;  // (n,), or nullptr
  char* out;         // (m, n), contiguous
};

// A block of out: rows [row_begin, row_end) of it, and columns [column_begin, column_end).
struct LinearBlock {
  int64_t row_begin, row_end, column_begin, column_end;
};

using LinearWorkspace = int64_t(const Linear&);           // bytes
using LinearPrepare = void(const Linear&, char* shared);  // fills what all tasks of few rows share
using LinearFewRows = void(const Linear&, const LinearBlock&, const char* shared, char* memory);
using LinearManyRows = void(const Linear&, const LinearBlock&, char* memory);

constexpr int64_t kColumnBlock = 64;     // columns of out that few rows compute before they are written
constexpr int64_t kStripColumns = 1024;  // the same, where b is transposed: 4 KiB of a row of it
constexpr int64_t kMostLeft = 480;       // many rows: left rows per block (many_rows-inl.h)
constexpr int64_t kMostRight = 256;      // right rows per block. A block (480, 256) of float takes 480 KiB

// Returns up to how many rows of out count as few. Many rows read floats in place, too, and compute faster.
FASTLM_HD int64_t most_few_rows(int dtype, bool b_is_transposed) { return b_is_transposed ? 16 : dtype == kFloat32 ? 24 : 32; }

// Computes the product on at most so many of torch's threads.
void linear(const Linear& l, int64_t threads);

}  // namespace fastlm
