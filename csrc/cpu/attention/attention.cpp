#include "attention.h"

#if defined(FASTLM_ISA)
#include "backward-inl.h"
#include "forward-inl.h"
#else

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../../common/sizes.h"
#include "../parallel.h"
#include "../simd/isa.h"

namespace fastlm {

FASTLM_ISA_TABLE(AttentionForwardKernel, attention_forward)
FASTLM_ISA_TABLE(AttentionWorkspace, attention_forward_workspace)
FASTLM_ISA_TABLE(AttentionCombineKernel, attention_combine)
FASTLM_ISA_TABLE(AttentionPartialRow, attention_partial_row)
FASTLM_ISA_TABLE(AttentionDeltaKernel, attention_delta)
FASTLM_ISA_TABLE(AttentionBackwardKernel, attention_backward)
FASTLM_ISA_TABLE(AttentionWorkspace, attention_backward_workspace)

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// Runs the units on all threads, the costliest first: each thread takes the next when it is done with one, in memory of its
// own. Which thread runs a unit changes nothing in its results.
template <class Run>
static void run_units(std::vector<AttentionUnit>& units, int64_t workspace, const Run& run) {
  const size_t bytes = size_t(round_up(workspace, 64)) + 64;
  std::stable_sort(units.begin(), units.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  parallel_for(int64_t(units.size()), [&](int64_t, int64_t) {
    const Memory memory(static_cast<char*>(std::aligned_alloc(64, bytes)));
    if (!memory) {
      failed = true;
      return;
    }
    for (size_t i = next++; i < units.size(); i = next++) run(units[i], memory.get());
  });
  if (failed && next < units.size()) throw std::bad_alloc();
}

constexpr int64_t kCacheBytes = 192 << 10;  // of the second-level cache, for a unit's outputs

// Rows per unit: the more, the less the loading of keys and values weighs; but their outputs should stay in the cache, and
// there should be units enough for the threads.
static int64_t rows_per_unit(const Attention& a, int64_t rows, int64_t groups, int64_t threads) {
  const int64_t most = std::max<int64_t>(kCacheBytes / (4 * a.value_dim + 1), kBlockRows);
  const int64_t shared = threads > 1 ? ceil_div(rows * groups, 4 * threads) : rows;
  return std::max<int64_t>(std::min(most, shared) / kBlockRows, 1) * kBlockRows;
}

// The keys that rows [begin, end) of a group see between them, as if there were no mask.
static int64_t keys_seen(const Attention& a, const Sequence& s, int64_t begin, int64_t end) {
  const int64_t first = begin / a.group + s.k_len - s.q_len, last = (end - 1) / a.group + s.k_len - s.q_len;
  return std::max<int64_t>(std::min(last + a.right + 1, s.k_len) - std::max<int64_t>(first - a.left, 0), 0);
}

static int64_t longest(const Attention& a) {
  int64_t rows = 0;
  for (int64_t b = 0; b < a.batch; ++b) rows = std::max(rows, sequence(a, b).q_len * a.group);
  return rows;
}

// A unit for every `step` rows of every group.
static void add_row_units(const Attention& a, int64_t step, std::vector<AttentionUnit>& units) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const Sequence s = sequence(a, b);
    const int64_t rows = s.q_len * a.group;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      for (int64_t row = 0; row < rows; row += step) {
        const int64_t end = std::min(row + step, rows);
        units.push_back({b, head, row, end, 0, s.k_len, true, false, (end - row) * keys_seen(a, s, row, end), nullptr, 1});
      }
    }
  }
}

// A unit for every `step` keys of every group, or for all of them.
static void add_key_units(const Attention& a, int64_t step, bool of_queries, std::vector<AttentionUnit>& units) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const Sequence s = sequence(a, b);
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      for (int64_t key = 0; key < s.k_len || key == 0; key += step) {
        const int64_t end = std::min(key + step, s.k_len), rows = s.q_len * a.group;
        units.push_back(
            {b, head, 0, rows, key, end, of_queries, true, rows * (s.k_len - (a.right < s.k_len ? key : 0)), nullptr, 1});
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

// Groups of few rows and many keys, as in decoding, are split over the keys, so that one sequence can use all threads. Where
// they are split depends on the sequence alone. The units become those of the parts; returned are those that combine them.
static std::vector<AttentionUnit> split_keys(const Attention& a, int64_t partial_row, std::vector<AttentionUnit>& units,
                                             std::vector<float>& partials) {
  std::vector<AttentionUnit> whole, parts, combined;
  int64_t size = 0;
  for (const AttentionUnit& u : units) {
    const Sequence s = sequence(a, u.b);
    if (s.q_len * a.group > kSplitRows || s.k_len <= kSplitKeys) {
      whole.push_back(u);
      continue;
    }
    combined.push_back(u);
    combined.back().parts = ceil_div(s.k_len, kSplitKeys);
    size += combined.back().parts * (u.row_end - u.row_begin) * partial_row;
  }
  partials.resize(size);
  float* at = partials.data();
  for (AttentionUnit& u : combined) {
    u.partial = at;
    for (int64_t key = u.key_begin; key < u.key_end; key += kSplitKeys) {
      parts.push_back(u);
      parts.back().partial = at;
      parts.back().key_begin = key;
      parts.back().key_end = std::min(key + kSplitKeys, u.key_end);
      parts.back().cost = u.cost / u.parts;
      at += (u.row_end - u.row_begin) * partial_row;
    }
  }
  units = whole;
  units.insert(units.end(), parts.begin(), parts.end());
  return combined;
}

void attention_forward(const AttentionForward& a, int64_t threads) {
  const int isa = current_isa();
  const int64_t rows = longest(a);
  const int64_t step = std::min(rows_per_unit(a, rows, a.batch * a.kv_heads, threads), std::max<int64_t>(rows, 1));
  std::vector<AttentionUnit> units;
  std::vector<float> partials;
  add_row_units(a, step, units);
  std::vector<AttentionUnit> combined = split_keys(a, attention_partial_row_kernels[isa](a), units, partials);
  run_units(units, attention_forward_workspace_kernels[isa](a, step),
            [&](const AttentionUnit& u, char* memory) { attention_forward_kernels[isa](a, u, memory); });
  if (!combined.empty()) run_units(combined, 0, [&](const AttentionUnit& u, char*) { attention_combine_kernels[isa](a, u); });
}

// Whether units of whole groups keep the threads busy: at least five sevenths of the time, which is what the other way costs.
static bool whole_groups(const AttentionBackward& a, int64_t threads) {
  const int64_t groups = a.batch * a.kv_heads, rounds = ceil_div(groups, threads);
  return !a.grad_mask.data && 7 * groups >= 5 * rounds * threads;
}

// Units of queries that add to the same numbers of the mask's gradient become one, that of the first batch and head.
static bool leads_mask(const AttentionBackward& a, const AttentionUnit& u) {
  return (a.grad_mask.batch || u.b == 0) && (a.grad_mask.head || u.kv_head == 0);
}

template <class Run>
static void for_followers(const AttentionBackward& a, AttentionUnit u, const Run& run) {
  const int64_t batches = a.grad_mask.batch ? 1 : a.batch, heads = a.grad_mask.head ? 1 : a.kv_heads;
  const AttentionUnit leader = u;
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t head = 0; head < heads; ++head) {
      u.b = leader.b + b;
      u.kv_head = leader.kv_head + head;
      run(u);
    }
  }
}

void attention_backward(const AttentionBackward& a, int64_t threads) {
  const int isa = current_isa();
  const int64_t rows = longest(a);
  std::vector<AttentionUnit> units;
  add_row_units(a, kBlockRows, units);
  run_units(units, 0, [&](const AttentionUnit& u, char*) { attention_delta_kernels[isa](a, u); });
  units.clear();
  int64_t step = std::max<int64_t>(rows, 1);
  if (whole_groups(a, threads)) {
    add_key_units(a, std::max<int64_t>(a.k_len, 1), true, units);
  } else {
    step = std::min(rows_per_unit(a, rows, a.batch * a.kv_heads, threads), step);
    if (a.grad_mask.data) step = kBlockRows * a.group;  // whole queries, as many as a row of its gradient may stand for
    add_row_units(a, step, units);
    if (a.grad_mask.data) {
      units.erase(std::remove_if(units.begin(), units.end(), [&](const auto& u) { return !leads_mask(a, u); }), units.end());
    }
    add_key_units(a, kBlockKeys, false, units);
  }
  run_units(units, attention_backward_workspace_kernels[isa](a, step), [&](const AttentionUnit& u, char* memory) {
    if (a.grad_mask.data && u.of_queries) {
      for_followers(a, u, [&](const AttentionUnit& each) { attention_backward_kernels[isa](a, each, memory); });
    } else {
      attention_backward_kernels[isa](a, u, memory);
    }
  });
}

}  // namespace fastlm

#endif
