// The keys with the largest weights of each row. A row keeps a sorted list of scores while the forward's loop goes over its
// keys, and its total, which turns scores into weights. There are no values.
#pragma once

#include "forward-inl.h"

namespace fastlm::FASTLM_ISA {

template <class Elem>
struct TopKeysArrays : ForwardArrays<Elem> {
  float* scores_of_top;  // (count, k): the largest scores, in order
  int64_t* keys_of_top;  // (count, k): their keys, or -1

  FASTLM_MEMBER TopKeysArrays(const Attention& a, int64_t count, Workspace& w) : ForwardArrays<Elem>(a, count, w) {
    scores_of_top = w.take<float>(count * kMostTopKeys);
    keys_of_top = w.take<int64_t>(count * kMostTopKeys);
  }
};

// Returns whether a score comes before another. NaN comes first, as in torch.
FASTLM_SIMD bool is_above(float a, float b) { return a > b || (a != a && b == b); }

// Puts the scores (keys,) of a row that are above the last of its list into the list, behind equal ones.
static void insert_scores(const float* scores, int64_t first_key, int64_t keys, int64_t k, float* top, int64_t* keys_of_top) {
  for (int64_t first = 0; first < keys; first += kLanes) {
    const F32 x = F32::load(scores + first);
    if (!any_less(F32(top[k - 1]), x) && !any_nan(x)) continue;
    for (int64_t j = first; j < first + kLanes && j < keys; ++j) {
      if (!is_above(scores[j], top[k - 1])) continue;
      int64_t at = k - 1;
      for (; at > 0 && is_above(scores[j], top[at - 1]); --at) {
        top[at] = top[at - 1];
        keys_of_top[at] = keys_of_top[at - 1];
      }
      top[at] = scores[j];
      keys_of_top[at] = first_key + j;
    }
  }
}

// Writes a row's keys and their weights. Where the row's own total is the given log-sum-exp to rounding, it takes its place:
// beside scores near -1e9, a float has no room for the logarithm of the number of keys. Elsewhere, the given one counts keys
// that are not here.
static void write_top_keys(const AttentionTopKeys& a, const Sequence& s, int64_t query, int64_t head, const RowTotal& row,
                           const float* top, const int64_t* keys) {
  const double factor = exponent_factor(a), lse = *a.given_lse.at(s.batch, head, query) * kLog2EDouble;
  const double own = row.base + row.log_total, size = lse < 0.0 ? -lse : lse, difference = lse - own;
  const double rounding = 4.0 * 0x1p-23 * (size > kLog2EDouble ? size : kLog2EDouble);
  const bool is_whole = difference <= rounding && difference >= -rounding;
  float* weights = a.weights.at(s.batch, head, query * a.k);
  int64_t* to = a.indices.at(s.batch, head, query * a.k);
  for (int64_t i = 0; i < a.k; ++i) {
    const double above = factor * double(top[i]);
    const double exponent = is_whole ? (above - row.base) - row.log_total : above - lse;
    weights[i] = keys[i] < 0 ? 0.0f : float(__builtin_exp2(exponent));
    to[i] = keys[i];
  }
}

template <class Elem>
static void top_keys_task(const AttentionTopKeys& a, const AttentionTask& task, char* memory) {
  Workspace workspace(memory);
  const int64_t count = task.row_end - task.row_begin;
  TopKeysArrays<Elem> t(a, count, workspace);
  const Sequence s = sequence(a, task.b);
  begin_rows(a, s, task, t);
  for (int64_t i = 0; i < count * a.k; ++i) {
    t.scores_of_top[i] = -kInfinity;
    t.keys_of_top[i] = -1;
  }
  const auto load = [&](int64_t key, int64_t keys) FASTLM_LAMBDA {
    key_rows(a, s, a.key, task.kv_head, key, keys, t.pointers);
    load_b_transposed(a.key.dtype, t.pointers, keys, a.head_dim, t.key, t.key_row);
  };
  for_tiles(
      a, task, t, load, [&](int64_t row, int64_t rows, int64_t key, int64_t keys, int64_t, Coverage covered) FASTLM_LAMBDA {
        const A<Elem> query{t.query + row * t.query_row, t.query_row, 1};
        keys = seen_keys(t, row, key, keys);
        gemm<false>(rows, padded(keys), elems<Elem>(a.head_dim), query, B<Elem>{t.key, t.key_row}, t.scores, kTileRow);
        finish_scores(a, t, row, rows, key, keys, covered);
        for (int64_t r = row; r < row + rows; ++r) {
          insert_scores(t.scores + (r - row) * kTileRow, key, keys, a.k, t.scores_of_top + r * a.k, t.keys_of_top + r * a.k);
        }
        softmax_tile(a, s, t, row, rows, key, keys, t.weights);
      });
  for (int64_t r = 0; r < count; ++r) {
    const RowTotal total = row_total(a, t.rows[r].head, t.maximum[r], sum(F32::load(t.sums + r * kLanes)), true);
    write_top_keys(a, s, t.rows[r].query, t.rows[r].head, total, t.scores_of_top + r * a.k, t.keys_of_top + r * a.k);
  }
}

void attention_top_keys(const AttentionTopKeys& a, const AttentionTask& task, char* memory) {
  if constexpr (kBFloat16Pairs) {
    if (in_pairs(a)) return top_keys_task<uint32_t>(a, task, memory);
  }
  top_keys_task<float>(a, task, memory);
}

int64_t attention_top_keys_workspace(const Attention& a, int64_t rows) { return workspace_bytes<TopKeysArrays>(a, rows); }

}  // namespace fastlm::FASTLM_ISA
