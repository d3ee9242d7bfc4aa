// linear for many rows: a GEMM of blocks that are copied into tiles, on the way to which half precision becomes float, or pairs
// of bfloat16 where those have an instruction.
//
// The operands are named by their part in gemm: it broadcasts single elements of the left one, and reads the right one by
// vectors. A left tile costs a copy, a right tile a transposition if the depth is contiguous. So weights whose depth is
// contiguous (torch.nn.Linear's) are the left operand, the rows of the input are the right one, and the block is transposed
// when it is written; transposed weights (Conv1D's, and those of the gradients) are the right operand.
#pragma once

#include "few_rows-inl.h"

namespace fastlm::FASTLM_ISA {

// Elements of the depth at a time, at most 256: the columns that gemm reads together take 32 KiB of the first-level cache.
constexpr int64_t kCachedDepth = (32 << 10) / (kGemmVectors * kLanes * 4), kGemmDepth = kCachedDepth < 256 ? kCachedDepth : 256;
constexpr int64_t kLeftRows = 48;    // left rows per tile: 24 KiB at a depth of 128
constexpr int64_t kTransposed = 64;  // left rows that are transposed at a time when a block is written

struct Operands {
  Matrix left, right;
  int64_t left_begin, left_end, right_begin, right_end;
  bool transposed;  // the block is (columns of out, rows of out)
};

FASTLM_SIMD Operands operands(const Linear& l, const LinearBlock& b) {
  if (is_transposed(l.b, l.dtype)) return {l.a, l.b, b.row_begin, b.row_end, b.column_begin, b.column_end, false};
  return {l.b, l.a, b.column_begin, b.column_end, b.row_begin, b.row_end, true};
}

template <class Elem>
struct GemmMemory {
  Elem *left, *right;  // (kLeftRows, kGemmDepth) or transposed, (kGemmDepth, right rows)
  float* block;        // (left rows, right rows)
  float* turned;       // (right rows, kTransposed)
  const char** pointers;
  int64_t block_row, bytes;

  FASTLM_MEMBER GemmMemory(int64_t left_rows, int64_t right_rows, char* memory) {
    Workspace w(memory);
    block_row = padded(right_rows) + kLanes;
    left = w.take<Elem>((kLeftRows + kLanes) * (kGemmDepth + kLanes));
    right = w.take<Elem>(kGemmDepth * block_row);
    block = w.take<float>(left_rows * block_row);
    turned = w.take<float>(padded(right_rows) * (kTransposed + kLanes));
    pointers = w.take<const char*>(2 * kGemmDepth + kMostRight);  // an element is at most 2 values of the depth
    bytes = w.bytes();
  }
};

// Points to `count` rows from `at` on.
FASTLM_SIMD void point(const char** pointers, const char* at, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) pointers[i] = at + i * step;
}

// Returns whether gemm reads rows of x where they lie. They must be floats. A copy pays if gemm reads it more than four times,
// once for each step of columns: it is one stretch of memory, and the rows are far apart.
static bool is_read_in_place(const Matrix& x, int dtype, int64_t columns) {
  return dtype == kFloat32 && !is_transposed(x, dtype) && padded(columns) <= 4 * kGemmVectors * kLanes;
}

// Copies rows [first, first + count) of x, values [from, from + depth), to a left tile, unless they are read in place.
template <class Elem>
static A<Elem> load_left(const Matrix& x, int dtype, int64_t first, int64_t count, int64_t from, int64_t depth, bool in_place,
                         const GemmMemory<Elem>& m) {
  const char* at = x.data + first * x.row + from * x.depth;
  if (is_transposed(x, dtype)) {
    const int64_t to_row = padded(count) + kLanes;
    point(m.pointers, at, x.depth, depth);
    load_b(dtype, m.pointers, depth, count, m.left, to_row);
    return {m.left, 1, to_row};
  }
  if (in_place) return {reinterpret_cast<const Elem*>(at), x.row / int64_t(sizeof(Elem)), 1};
  const int64_t to_row = padded(elems<Elem>(depth)) + kLanes;
  point(m.pointers, at, x.row, count);
  load_a(dtype, m.pointers, count, depth, m.left, to_row);
  return {m.left, to_row, 1};
}

// The same for a right tile, (elems(depth), count).
template <class Elem>
static B<Elem> load_right(const Matrix& x, int dtype, int64_t first, int64_t count, int64_t from, int64_t depth,
                          const GemmMemory<Elem>& m) {
  const char* at = x.data + first * x.row + from * x.depth;
  if (is_transposed(x, dtype)) {
    point(m.pointers, at, x.depth, depth);
    load_b(dtype, m.pointers, depth, count, m.right, m.block_row);
  } else {
    point(m.pointers, at, x.row, count);
    load_b_transposed(dtype, m.pointers, count, depth, m.right, m.block_row);
  }
  return {m.right, m.block_row};
}

// Prefetches what load_left will read: rows of weights, a few lines of each, which the processor does not foresee.
static void prefetch_left(const Matrix& x, int dtype, int64_t first, int64_t count, int64_t from, int64_t depth) {
  const char* at = x.data + first * x.row + from * x.depth;
  const bool turned = is_transposed(x, dtype);
  const int64_t lines = turned ? depth : count, step = turned ? x.depth : x.row;
  const int64_t bytes = (turned ? count : depth) * bytes_of(dtype);
  for (int64_t i = 0; i < lines; ++i, at += step) {
    for (int64_t byte = 0; byte < bytes; byte += 64) prefetch_line(at + byte);
  }
}

// Computes the block (left rows, right rows).
template <class Elem>
static void gemm_block(const Linear& l, const Operands& o, const GemmMemory<Elem>& m) {
  const int64_t columns = o.right_end - o.right_begin, step = kValuesPerElem<Elem> * kGemmDepth;
  const bool in_place = is_read_in_place(o.left, l.dtype, columns);
  for (int64_t k = 0; k < l.depth; k += step) {
    const int64_t depth = l.depth - k < step ? l.depth - k : step;
    const B<Elem> right = load_right(o.right, l.dtype, o.right_begin, columns, k, depth, m);
    for (int64_t row = o.left_begin; row < o.left_end; row += kLeftRows) {
      const int64_t rows = o.left_end - row < kLeftRows ? o.left_end - row : kLeftRows;
      const A<Elem> left = load_left(o.left, l.dtype, row, rows, k, depth, in_place, m);
      if (row + kLeftRows < o.left_end) {
        const int64_t next = o.left_end - row - kLeftRows;
        prefetch_left(o.left, l.dtype, row + kLeftRows, next < kLeftRows ? next : kLeftRows, k, depth);
      }
      float* to = m.block + (row - o.left_begin) * m.block_row;
      if (k == 0) {
        gemm<false>(rows, padded(columns), elems<Elem>(depth), left, right, to, m.block_row);
      } else {
        gemm<true>(rows, padded(columns), elems<Elem>(depth), left, right, to, m.block_row);
      }
    }
  }
  if (l.depth > 0) return;
  for (int64_t i = 0; i < (o.left_end - o.left_begin) * m.block_row; i += kLanes) F32(0.0f).store(m.block + i);
}

template <class T, class Elem>
static void write_block(const Linear& l, const Operands& o, const GemmMemory<Elem>& m) {
  const int64_t rows = o.left_end - o.left_begin, columns = o.right_end - o.right_begin;
  if (!o.transposed) {
    for (int64_t r = 0; r < rows; ++r) write_row<T>(l, m.block + r * m.block_row, o.left_begin + r, o.right_begin, columns);
    return;
  }
  for (int64_t first = 0; first < rows; first += kTransposed) {
    const int64_t count = rows - first < kTransposed ? rows - first : kTransposed, to_row = kTransposed + kLanes;
    point(m.pointers, reinterpret_cast<const char*>(m.block + first * m.block_row), m.block_row * int64_t(sizeof(float)),
          count);
    transpose<float>(m.pointers, count, columns * int64_t(sizeof(float)), m.turned, to_row);
    for (int64_t c = 0; c < columns; ++c)
      write_row<T>(l, m.turned + c * to_row, o.right_begin + c, o.left_begin + first, count);
  }
}

void linear_many_rows(const Linear& l, const LinearBlock& block, char* memory) {
  const Operands o = operands(l, block);
  with_float_dtype(l.dtype, [&](auto type) FASTLM_LAMBDA {
    using T = decltype(type);
    const GemmMemory<typename DotRow<T>::type::Elem> m(o.left_end - o.left_begin, o.right_end - o.right_begin, memory);
    gemm_block(l, o, m);
    write_block<T>(l, o, m);
  });
}

int64_t linear_many_rows_workspace(const Linear&) { return GemmMemory<float>(kMostLeft, kMostRight, nullptr).bytes; }

}  // namespace fastlm::FASTLM_ISA
