// Column sums whose order no thread count changes: the gradient of a broadcast tensor.
#pragma once

#include <cstdint>

namespace fastlm {

// total[c] = sum over r of matrix[r][c], accumulated in double; the matrix is contiguous (rows, columns).
template <class T>
void sum_rows(const T* matrix, int64_t rows, int64_t columns, T* total);

}  // namespace fastlm
