// Products of small matrices, the arithmetic of attention: C (m x n) = or += A (m x depth) B (depth x n), C in float32.
//
// A and B are made of units of 32 bits: one float, or two bfloat16 that are neighbours in depth, whose products vdpbf16ps adds
// two at a time. B is read a vector of columns at a time; A one unit, which is spread over a vector, so its strides are free
// and a transposed A costs nothing.
//
// The ladder, in GFLOP/s on one core of a Zen 3 (AVX2, 16 registers of 8 lanes, 2 fused multiply-adds a cycle: 102 at most),
// 48 x 64 x 64, data in the first-level cache:
//     3.4  the plain loop: one sum at a time, which waits for itself
//      41  16 columns of a row at a time: two sums, each waiting for itself
//      83  64 columns of a row: eight sums hide the wait, but each vector of B is read for one row alone
//      91  16 columns of 6 rows: 12 registers of sums, and one reading of B serves six rows
//      97  the same, inlined: a call of eight arguments was 40 of a tile's 430 cycles
//      56  16 columns of 8 rows: more sums than registers, which spill
// The same at depth 128 reaches 100: what is left is the start and the end of each tile.
#pragma once

#include "../simd/simd.h"

namespace fastlm::FASTLM_ISA {

template <class Elem>
struct ElemVector;
template <>
struct ElemVector<float> {
  using type = F32;
};
template <>
struct ElemVector<uint32_t> {
  using type = U32;
};

template <class Elem>
struct A {  // A: unit (i, k) is at data[i * row + k * depth]
  const Elem* data;
  int64_t row, depth;
};

template <class Elem>
struct B {  // B: units (k, j ...) are at data[k * depth + j ...]
  const Elem* data;
  int64_t depth;
};

// M rows and N vectors of columns of C, held in registers while the depth is walked. What is added to joins at the end, so that
// a long sum made of many tiles rounds as often as a tile is deep and as there are tiles, not as it is long.
template <class Elem, int M, int N, bool kAdd>
FASTLM_SIMD void gemm_tile(int64_t depth, const A<Elem>& a, const B<Elem>& b, float* c, int64_t c_row) {
  using V = typename ElemVector<Elem>::type;
  F32 sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sums[i][j] = F32(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    V right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) right[j] = V::load(b.data + k * b.depth + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const V left(a.data[i * a.row + k * a.depth]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j] = mul_add(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      float* to = c + i * c_row + j * kLanes;
      (kAdd ? F32::load(to) + sums[i][j] : sums[i][j]).store(to);
    }
  }
}

// N vectors of columns, all rows: kGemmRows at a time, then what is left.
template <class Elem, int N, bool kAdd, int M = kGemmRows>
static void gemm_columns(int64_t m, int64_t depth, A<Elem> a, B<Elem> b, float* c, int64_t c_row) {
  for (; m >= M; m -= M) {
    gemm_tile<Elem, M, N, kAdd>(depth, a, b, c, c_row);
    a.data += M * a.row;
    c += M * c_row;
  }
  if constexpr (M > 1) {
    if (m > 0) gemm_columns<Elem, N, kAdd, M - 1>(m, depth, a, b, c, c_row);
  }
}

// n is a multiple of kLanes.
template <bool kAdd, class Elem>
static void gemm(int64_t m, int64_t n, int64_t depth, A<Elem> a, B<Elem> b, float* c, int64_t c_row) {
  constexpr int N = kGemmVectors;
  for (; n >= N * kLanes; n -= N * kLanes, b.data += N * kLanes, c += N * kLanes) {
    gemm_columns<Elem, N, kAdd>(m, depth, a, b, c, c_row);
  }
  for (; n > 0; n -= kLanes, b.data += kLanes, c += kLanes) gemm_columns<Elem, 1, kAdd>(m, depth, a, b, c, c_row);
}

}  // namespace fastlm::FASTLM_ISA
