#include "linear.h"

#if defined(FASTLM_ISA)
#include "many_rows-inl.h"
#else

#include <algorithm>

#include "../../common/sizes.h"
#include "../simd/isa.h"
#include "../tasks.h"

namespace fastlm {

FASTLM_ISA_TABLE(LinearWorkspace, linear_shared)
FASTLM_ISA_TABLE(LinearPrepare, linear_prepare)
FASTLM_ISA_TABLE(LinearWorkspace, linear_few_rows_workspace)
FASTLM_ISA_TABLE(LinearFewRows, linear_few_rows)
FASTLM_ISA_TABLE(LinearWorkspace, linear_many_rows_workspace)
FASTLM_ISA_TABLE(LinearManyRows, linear_many_rows)

constexpr int64_t kTaskBytes = 256 << 10;   // weights that a task of few rows reads at least: it takes some 10 us
constexpr int64_t kTaskProducts = 1 << 20;  // multiply-adds that a task of many rows has at least: some 10 us, too

// The largest part of `size` that is at most `most`, of equal parts that are multiples of `unit`.
static int64_t part_of(int64_t size, int64_t most, int64_t unit) {
  return std::max(std::min(round_up(ceil_div(size, ceil_div(size, most)), unit), most), unit);
}

static void few_rows(const Linear& l, int isa, int64_t threads) {
  const Memory inputs = allocate(linear_shared_kernels[isa](l));
  if (!inputs) throw std::bad_alloc();
  linear_prepare_kernels[isa](l, inputs.get());
  const int64_t column_bytes = std::max<int64_t>(l.depth * bytes_of(l.dtype), 1), least = ceil_div(kTaskBytes, column_bytes);
  const int64_t share = ceil_div(l.b.rows, std::max<int64_t>(threads, 1));
  const int64_t most = is_transposed(l.b, l.dtype) ? kStripColumns : std::max(least, kColumnBlock);
  const int64_t step = std::max(part_of(share, most, kColumnBlock), std::min(least, most));
  run_tasks(ceil_div(l.b.rows, step), linear_few_rows_workspace_kernels[isa](l), [&](int64_t i, char* memory) {
    const LinearBlock block{0, l.a.rows, i * step, std::min((i + 1) * step, l.b.rows)};
    linear_few_rows_kernels[isa](l, block, inputs.get(), memory);
  });
}

static void many_rows(const Linear& l, int isa, int64_t threads) {
  const bool rows_are_left = is_transposed(l.b, l.dtype);
  const int64_t left = rows_are_left ? l.a.rows : l.b.rows, right = rows_are_left ? l.b.rows : l.a.rows;
  const int64_t right_step = part_of(right, kMostRight, 64), rights = ceil_div(right, right_step);
  // Enough blocks that every thread has several, but none too small to be worth it.
  const int64_t wanted = threads > 1 ? ceil_div(4 * threads, rights) : 1;
  const int64_t least = kTaskProducts / std::max<int64_t>(right_step * l.depth, 1) + 1;
  const int64_t most = std::min(std::max(ceil_div(left, wanted), least), kMostLeft);
  const int64_t left_step = part_of(left, most, 48), lefts = ceil_div(left, left_step);
  run_tasks(lefts * rights, linear_many_rows_workspace_kernels[isa](l), [&](int64_t i, char* memory) {
    const int64_t l0 = i % lefts * left_step, r0 = i / lefts * right_step;
    const int64_t l1 = std::min(l0 + left_step, left), r1 = std::min(r0 + right_step, right);
    linear_many_rows_kernels[isa](l, rows_are_left ? LinearBlock{l0, l1, r0, r1} : LinearBlock{r0, r1, l0, l1}, memory);
  });
}

void linear(const Linear& l, int64_t threads) {
  if (l.a.rows == 0 || l.b.rows == 0) return;
  const bool few = l.a.rows <= most_few_rows(l.dtype, is_transposed(l.b, l.dtype));
  if (few && !is_transposed(l.a, l.dtype)) return few_rows(l, current_isa(), threads);
  many_rows(l, current_isa(), threads);
}

}  // namespace fastlm

#endif
