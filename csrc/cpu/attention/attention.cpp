#include "attention.h"

#if defined(FASTLM_ISA)
#include "backward-inl.h"
#include "forward-inl.h"
#include "jvp-inl.h"
#include "jvp_backward-inl.h"
#include "mass-inl.h"
#include "top_keys-inl.h"
#else

#include <algorithm>
#include <cstring>
#include <vector>

#include "../../common/sizes.h"
#include "../parallel.h"
#include "../simd/isa.h"
#include "../tasks.h"

namespace fastlm {

FASTLM_ISA_TABLE(AttentionForwardKernel, attention_forward)
FASTLM_ISA_TABLE(AttentionWorkspace, attention_forward_workspace)
FASTLM_ISA_TABLE(AttentionCombineKernel, attention_combine)
FASTLM_ISA_TABLE(AttentionPartialRow, attention_partial_row)
FASTLM_ISA_TABLE(AttentionDeltaKernel, attention_delta)
FASTLM_ISA_TABLE(AttentionBackwardKernel, attention_backward)
FASTLM_ISA_TABLE(AttentionWorkspace, attention_backward_workspace)
FASTLM_ISA_TABLE(AttentionJvpKernel, attention_jvp)
FASTLM_ISA_TABLE(AttentionWorkspace, attention_jvp_workspace)
FASTLM_ISA_TABLE(AttentionTopKeysKernel, attention_top_keys)
FASTLM_ISA_TABLE(AttentionWorkspace, attention_top_keys_workspace)
FASTLM_ISA_TABLE(AttentionMassKernel, attention_mass)
FASTLM_ISA_TABLE(AttentionWorkspace, attention_mass_workspace)
FASTLM_ISA_TABLE(AttentionJvpBackwardKernel, attention_jvp_backward)
FASTLM_ISA_TABLE(AttentionWorkspace, attention_jvp_backward_workspace)

// Runs the tasks, the costliest first.
template <class Run>
static void run_sorted(std::vector<AttentionTask>& tasks, int64_t workspace, const Run& run) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });
  run_tasks(int64_t(tasks.size()), workspace, [&](int64_t i, char* memory) { run(tasks[size_t(i)], memory); });
}

constexpr int64_t kCacheBytes = 192 << 10;  // the part of the second-level cache that a task's outputs may take

// Returns the number of rows per task. More rows amortize the loading of keys and values better; but the outputs should stay in
// the cache, and every thread should get several tasks.
static int64_t rows_per_task(const Attention& a, int64_t rows, int64_t groups, int64_t threads) {
  const int64_t most = std::max<int64_t>(kCacheBytes / (4 * a.value_dim + 1), kBlockRows);
  const int64_t shared = threads > 1 ? ceil_div(rows * groups, 4 * threads) : rows;
  return std::max<int64_t>(std::min(most, shared) / kBlockRows, 1) * kBlockRows;
}

// Returns how many keys at least one of the rows [begin, end) of a group sees, without regard to the mask.
static int64_t keys_seen(const Attention& a, const Sequence& s, int64_t begin, int64_t end) {
  const int64_t first = begin / a.group + s.place.position, last = (end - 1) / a.group + s.place.position;
  return std::max<int64_t>(std::min(last + a.right + 1, s.k_len) - std::max<int64_t>(first - a.left, 0), 0);
}

// Returns the number of rows of the largest group.
static int64_t max_rows(const Attention& a) {
  int64_t rows = 0;
  for (int64_t b = 0; b < a.batch; ++b) rows = std::max(rows, sequence(a, b).q_len * a.group);
  return rows;
}

// Returns the number of rows per task of a pass over rows.
static int64_t row_step(const Attention& a, int64_t threads) {
  const int64_t rows = max_rows(a);
  return std::min(rows_per_task(a, rows, a.batch * a.kv_heads, threads), std::max<int64_t>(rows, 1));
}

// Adds a task for every `step` rows of every group.
static void add_row_tasks(const Attention& a, int64_t step, std::vector<AttentionTask>& tasks) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const Sequence s = sequence(a, b);
    const int64_t rows = s.q_len * a.group;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      for (int64_t row = 0; row < rows; row += step) {
        const int64_t end = std::min(row + step, rows);
        tasks.push_back({b, head, row, end, 0, s.k_len, true, false, (end - row) * keys_seen(a, s, row, end), nullptr, 1});
      }
    }
  }
}

// Adds a task for every `step` keys of every group. A group without keys gets one task too, which writes its dq.
static void add_key_tasks(const Attention& a, int64_t step, bool computes_dq, std::vector<AttentionTask>& tasks) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const Sequence s = sequence(a, b);
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      for (int64_t key = 0; key < s.k_len || key == 0; key += step) {
        const int64_t end = std::min(key + step, s.k_len), rows = s.q_len * a.group;
        tasks.push_back(
            {b, head, 0, rows, key, end, computes_dq, true, rows * (s.k_len - (a.right < s.k_len ? key : 0)), nullptr, 1});
      }
    }
  }
}

void append_to_cache(const Attention& a, const Rows& key, const Rows& value, int64_t rows) {
  const int64_t bytes = bytes_of(key.dtype);
  parallel_for(a.batch * a.kv_heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence s = sequence(a, i / a.kv_heads);
      const int64_t head = i % a.kv_heads;
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(key_row(a, s, a.key, head, s.k_len - rows + r), key.at(s.b, head, r), size_t(a.head_dim * bytes));
        std::memcpy(key_row(a, s, a.value, head, s.k_len - rows + r), value.at(s.b, head, r), size_t(a.value_dim * bytes));
      }
    }
  });
}

// Splits groups of few rows and many keys, as in decoding, over the keys (flash-decoding), so that one sequence can use all
// threads. The bounds of the splits depend on the sequence alone. Replaces the tasks of such groups by one task per split, and
// returns the tasks that combine the splits.
static std::vector<AttentionTask> split_keys(const Attention& a, int64_t partial_row, std::vector<AttentionTask>& tasks,
                                             std::vector<float>& partials) {
  std::vector<AttentionTask> whole, splits, combined;
  int64_t size = 0;
  for (const AttentionTask& task : tasks) {
    const Sequence s = sequence(a, task.b);
    if (s.q_len * a.group > kSplitRows || s.k_len <= kSplitKeys) {
      whole.push_back(task);
      continue;
    }
    combined.push_back(task);
    combined.back().num_splits = ceil_div(s.k_len, kSplitKeys);
    size += combined.back().num_splits * (task.row_end - task.row_begin) * partial_row;
  }
  partials.resize(size);
  float* at = partials.data();
  for (AttentionTask& task : combined) {
    task.partial = at;
    for (int64_t key = task.key_begin; key < task.key_end; key += kSplitKeys) {
      splits.push_back(task);
      splits.back().partial = at;
      splits.back().key_begin = key;
      splits.back().key_end = std::min(key + kSplitKeys, task.key_end);
      splits.back().cost = task.cost / task.num_splits;
      at += (task.row_end - task.row_begin) * partial_row;
    }
  }
  tasks = whole;
  tasks.insert(tasks.end(), splits.begin(), splits.end());
  return combined;
}

void attention_forward(const AttentionForward& a, int64_t threads) {
  const int isa = current_isa();
  const int64_t step = row_step(a, threads);
  std::vector<AttentionTask> tasks;
  std::vector<float> partials;
  add_row_tasks(a, step, tasks);
  std::vector<AttentionTask> combined = split_keys(a, attention_partial_row_kernels[isa](a), tasks, partials);
  run_sorted(tasks, attention_forward_workspace_kernels[isa](a, step),
             [&](const AttentionTask& task, char* memory) { attention_forward_kernels[isa](a, task, memory); });
  if (combined.empty()) return;
  run_sorted(combined, 0, [&](const AttentionTask& task, char*) { attention_combine_kernels[isa](a, task); });
}

// Returns whether tasks of whole groups, with five products each, keep the threads busy for at least 5/7 of the time. If not,
// the other way, with seven products (backward-inl.h), is faster.
static bool whole_groups(const AttentionBackward& a, int64_t threads) {
  const int64_t groups = a.batch * a.kv_heads, rounds = ceil_div(groups, threads);
  return !a.grad_mask.data && 7 * groups >= 5 * rounds * threads;
}

// Tasks that add to the same elements of the mask's gradient must not run side by side. So only the task of the first batch
// and head among them is run, and runs the others one after the other.
static bool owns_mask_grad(const AttentionBackward& a, const AttentionTask& task) {
  return (a.grad_mask.batch || task.b == 0) && (a.grad_mask.head || task.kv_head == 0);
}

template <class Run>
static void for_each_sharing_task(const AttentionBackward& a, AttentionTask task, const Run& run) {
  const int64_t batches = a.grad_mask.batch ? 1 : a.batch, heads = a.grad_mask.head ? 1 : a.kv_heads;
  const AttentionTask first = task;
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t head = 0; head < heads; ++head) {
      task.b = first.b + b;
      task.kv_head = first.kv_head + head;
      run(task);
    }
  }
}

// Writes the rows' deltas.
static void compute_delta(const AttentionBackward& a) {
  std::vector<AttentionTask> tasks;
  add_row_tasks(a, kBlockRows, tasks);
  const int isa = current_isa();
  run_sorted(tasks, 0, [&](const AttentionTask& task, char*) { attention_delta_kernels[isa](a, task); });
}

// Runs the tasks of a backward, of which there are two kinds.
template <class Call, class Kernel>
static void run_backward(const Call& a, int64_t threads, Kernel* kernel, AttentionWorkspace* workspace) {
  std::vector<AttentionTask> tasks;
  int64_t step = std::max<int64_t>(max_rows(a), 1);
  if (whole_groups(a, threads)) {
    add_key_tasks(a, std::max<int64_t>(a.k_len, 1), true, tasks);
  } else {
    step = row_step(a, threads);
    if (a.grad_mask.data) step = kBlockRows * a.group;  // kBlockRows whole queries, which a row of grad_mask may sum up
    add_row_tasks(a, step, tasks);
    if (a.grad_mask.data) {
      tasks.erase(std::remove_if(tasks.begin(), tasks.end(), [&](const auto& task) { return !owns_mask_grad(a, task); }),
                  tasks.end());
    }
    add_key_tasks(a, kBlockKeys, false, tasks);
  }
  run_sorted(tasks, workspace(a, step), [&](const AttentionTask& task, char* memory) {
    if (a.grad_mask.data && task.computes_dq) {
      for_each_sharing_task(a, task, [&](const AttentionTask& each) { kernel(a, each, memory); });
    } else {
      kernel(a, task, memory);
    }
  });
}

void attention_backward(const AttentionBackward& a, int64_t threads) {
  const int isa = current_isa();
  compute_delta(a);
  run_backward(a, threads, attention_backward_kernels[isa], attention_backward_workspace_kernels[isa]);
}

// Runs the tasks of a pass over rows.
template <class Call, class Kernel>
static void run_rows(const Call& a, int64_t threads, Kernel* kernel, AttentionWorkspace* workspace) {
  const int64_t step = row_step(a, threads);
  std::vector<AttentionTask> tasks;
  add_row_tasks(a, step, tasks);
  run_sorted(tasks, workspace(a, step), [&](const AttentionTask& task, char* memory) { kernel(a, task, memory); });
}

void attention_key_mass(const AttentionMass& a) {
  if (!a.key_mass.data) return;  // There are no keys.
  const int isa = current_isa();
  std::vector<AttentionTask> tasks;
  add_key_tasks(a, kMassKeys, false, tasks);
  run_sorted(tasks, attention_mass_workspace_kernels[isa](a, 0),
             [&](const AttentionTask& task, char* memory) { attention_mass_kernels[isa](a, task, memory); });
}

void attention_mean_of_keys(const AttentionMass& a, int64_t threads) {
  const int isa = current_isa();
  run_rows(a, threads, attention_mass_kernels[isa], attention_mass_workspace_kernels[isa]);
}

void attention_top_keys(const AttentionTopKeys& a, int64_t threads) {
  const int isa = current_isa();
  run_rows(a, threads, attention_top_keys_kernels[isa], attention_top_keys_workspace_kernels[isa]);
}

void attention_jvp(const AttentionJvp& a, int64_t threads) {
  const int isa = current_isa();
  run_rows(a, threads, attention_jvp_kernels[isa], attention_jvp_workspace_kernels[isa]);
}

void attention_jvp_backward(const AttentionJvpBackward& a, int64_t threads) {
  const int isa = current_isa();
  compute_delta(a);
  AttentionBackward tangent = a;
  tangent.out = a.out_tangent;
  tangent.grad_lse = {};
  tangent.delta = a.tangent_delta;
  compute_delta(tangent);
  run_backward(a, threads, attention_jvp_backward_kernels[isa], attention_jvp_backward_workspace_kernels[isa]);
}

}  // namespace fastlm

#endif
