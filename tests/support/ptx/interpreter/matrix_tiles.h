// Fragments of matrices in a warp's registers, and products of tiles.
#pragma once

#include "warp.h"

namespace ptx {

// Read A (16, k). A register holds neighbours of a row, `per` in number: lane 4 r + c has columns per c to per c + per - 1 of
// row r. Registers alternate between rows 0 to 7 and rows 8 to 15, then go on to the next 4 per columns.
void read_a(Warp& warp, const int* registers, Type type, int k, float* a);

// Read B (k, 8). Lane 4 c + r has rows per r to per r + per - 1 of column c.
void read_b(Warp& warp, const int* registers, Type type, int k, float* b);

// Read or write a float32 accumulator (16, n). Lane 4 r + c has columns 2 c and 2 c + 1 of each 8, of rows r and r + 8.
void read_accumulator(Warp& warp, const int* registers, int n, float* d);
void write_accumulator(Warp& warp, const int* registers, int n, const float* d);

// d (m, n) += a (m, k) b (k, n), in float32, over k in its order.
void multiply_add(const float* a, const float* b, int m, int n, int k, float* d);

}  // namespace ptx
