// GEMM of small matrices: C (m, n) = or += A (m, depth) B (depth, n), with C in float32.
//
// The elements of A and B have 32 bits: one float, or a pair of bfloat16 that are neighbours in depth, whose two products
// vdpbf16ps adds at once. The kernel reads B by vectors of columns. It reads A by single elements, each broadcast to a vector;
// so A may have any strides, and a transposed A costs nothing.
//
// The ladder, in GFLOP/s on one core of a Zen 3 (AVX2, 16 registers of 8 lanes, 2 fused multiply-adds a cycle: at most 102),
// 48 x 64 x 64, data in the first-level cache:
//     3.4  the plain loop: one sum at a time, and each addition waits for the one before
//      41  16 columns of a row at a time: two sums, which wait in the same way
//      83  64 columns of a row: eight sums hide the latency, but each vector of B is read for one row only
//      91  16 columns of 6 rows: 12 registers of sums, and each vector of B that is read serves six rows
//      97  the same, inlined: a call with eight arguments took 40 of a tile's 430 cycles
//      56  16 columns of 8 rows: more sums than registers, so the compiler spills
// At depth 128 the same code reaches 100. The rest is the start and the end of each tile.
#pragma once

#include "../simd/simd.h"

namespace fastlm::FASTLM_ISA {

template <class Elem>
struct A {  // (m, depth): element (i, k) is at data[i * row + k * depth]
  const Elem* data;
  int64_t row, depth;
};

template <class Elem>
struct B {  // (depth, n): element (k, j) is at data[k * depth + j]
  const Elem* data;
  int64_t depth;
};

// Computes M rows and N vectors of columns of C. The sums over the depth stay in registers. With kAdd the old C is added at the
// end, so a sum over many tiles rounds (depth of a tile + number of tiles) times, not once for each of its terms.
template <class Elem, int M, int N, bool kAdd>
FASTLM_SIMD void gemm_tile(int64_t depth, const A<Elem>& a, const B<Elem>& b, float* c, int64_t c_row) {
  using V = Vector<Elem>;
  F32 sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sums[i][j] = F32(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    V b_row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) b_row[j] = V::load(b.data + k * b.depth + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const V a_ik(a.data[i * a.row + k * a.depth]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j] = mul_add(a_ik, b_row[j], sums[i][j]);
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

// Computes N vectors of columns of all m rows: kGemmRows rows at a time, then the rest.
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

// Computes C = A B, or C += A B with kAdd. n must be a multiple of kLanes; c_row is C's stride between rows. It computes
// kGemmVectors vectors of columns at a time, then the rest.
template <bool kAdd, class Elem, int N = kGemmVectors>
static void gemm(int64_t m, int64_t n, int64_t depth, A<Elem> a, B<Elem> b, float* c, int64_t c_row) {
  for (; n >= N * kLanes; n -= N * kLanes, b.data += N * kLanes, c += N * kLanes) {
    gemm_columns<Elem, N, kAdd>(m, depth, a, b, c, c_row);
  }
  if constexpr (N > 1) {
    if (n > 0) gemm<kAdd, Elem, N - 1>(m, n, depth, a, b, c, c_row);
  }
}

}  // namespace fastlm::FASTLM_ISA
