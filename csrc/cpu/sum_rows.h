// Column sums in an order that does not depend on the number of threads: the gradient of a broadcast tensor.
#pragma once

#include <cstdint>

namespace fastlm {

// Computes total[c] = sum over r of matrix[r][c], accumulated in double. matrix: (rows, columns), contiguous; total:
// (columns,).
template <class T>
void sum_rows(const T* matrix, int64_t rows, int64_t columns, T* total);

}  // namespace fastlm
