#include "sum_rows.h"

#include <algorithm>
#include <vector>

#include "../common/sizes.h"
#include "parallel.h"

namespace fastlm {

// Sums each block of 1024 rows and 256 columns, then adds up the blocks of each column, one after the other.
template <class T>
void sum_rows(const T* matrix, int64_t rows, int64_t columns, T* total) {
  constexpr int64_t block_rows = 1024, block_columns = 256;
  const int64_t row_blocks = ceil_div(rows, block_rows), column_blocks = ceil_div(columns, block_columns);
  std::vector<double> partial(row_blocks * columns, 0.0);
  parallel_for(row_blocks * column_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row_block = block / column_blocks, first_column = block % column_blocks * block_columns;
      const int64_t last_column = std::min(first_column + block_columns, columns);
      const int64_t last_row = std::min((row_block + 1) * block_rows, rows);
      double* sums = partial.data() + row_block * columns;
      for (int64_t r = row_block * block_rows; r < last_row; ++r) {
        for (int64_t c = first_column; c < last_column; ++c) sums[c] += matrix[r * columns + c];
      }
    }
  });
  for (int64_t c = 0; c < columns; ++c) {
    double sum = 0;
    for (int64_t b = 0; b < row_blocks; ++b) sum += partial[b * columns + c];
    total[c] = T(sum);
  }
}

template void sum_rows<float>(const float*, int64_t, int64_t, float*);
template void sum_rows<double>(const double*, int64_t, int64_t, double*);

}  // namespace fastlm
