// Sums of the weights, which are recomputed from the saved statistics: along the rows, a key's mass sum_i p_ij, and along the
// keys, a row's mean of given numbers sum_j p_ij c_j, which the gradient of the mass needs. One product per tile, where the
// forward has two.
#pragma once

#include "backward-inl.h"

namespace fastlm::FASTLM_ISA {

constexpr int64_t kMassBlocks = kMassKeys / kBlockKeys;  // blocks of keys that share one loading of the queries

// The arrays of a task. Rows are padded to whole vectors; *_row are strides between rows.
template <class Elem>
struct MassArrays {
  ScoreRow rows[kBlockRows];
  char* pointers[kBlockKeys];
  int64_t query_row, key_row, key_block;
  Elem* query;     // (kBlockRows, elems(head_dim))
  Elem* key;       // (kMassBlocks, elems(head_dim), kBlockKeys)
  float* scores;   // (kBlockRows, kBlockKeys)
  float* numbers;  // (kMassBlocks, group, kBlockKeys): the given numbers of the keys
  float* part;     // (kMassBlocks, group, kBlockKeys): the mass by some rows,
  float* mass;     // (kMassBlocks, group, kBlockKeys): by all rows before them,
  float* error;    // (kMassBlocks, group, kBlockKeys): and what its sum has lost to rounding
  float* means;    // (count, kLanes): sums per lane

  FASTLM_MEMBER MassArrays(const Attention& a, int64_t count, Workspace& w) {
    const int64_t sums = kMassBlocks * a.group * kTileRow;
    query_row = padded(elems<Elem>(a.head_dim)) + kLanes;
    key_row = kTileRow + kLanes;
    key_block = elems<Elem>(a.head_dim) * key_row;
    query = w.take<Elem>(kBlockRows * query_row);
    key = w.take<Elem>(kMassBlocks * key_block);
    scores = w.take<float>(kBlockRows * kTileRow);
    numbers = w.take<float>(sums);
    part = w.take<float>(sums);
    mass = w.take<float>(sums);
    error = w.take<float>(sums);
    means = w.take<float>(count * kLanes);
  }
};

// Adds the parts to the mass, with what earlier sums lost (Kahan), and clears them: thousands of rows cost no digits.
template <class Elem>
static void add_parts(const Attention& a, MassArrays<Elem>& t) {
  for (int64_t k = 0; k < kMassBlocks * a.group * kTileRow; k += kLanes) {
    const F32 before = F32::load(t.mass + k), added = F32::load(t.part + k) - F32::load(t.error + k), after = before + added;
    ((after - before) - added).store(t.error + k);
    after.store(t.mass + k);
    F32(0.0f).store(t.part + k);
  }
}

// Adds the weights of a tile (count, keys) to the sums of its keys, (group, kBlockKeys) from `part` on, or to those of the rows
// from `means` on, by the keys' numbers.
template <class Elem>
static void sum_tile(const AttentionMass& a, const Sequence& s, MassArrays<Elem>& t, int64_t count, int64_t keys,
                     const float* numbers, float* part, float* means) {
  for (int64_t r = 0; r < count; ++r) {
    const ScoreRow& row = t.rows[r];
    const float* scores = t.scores + r * kTileRow;
    const int64_t member = row.head % a.group * kTileRow;
    if (a.key_mass.data) {
      float* to = part + member;
      weigh_row(a, a.statistics, s, row, scores, keys,
                [&](F32 p, F32, int64_t k) FASTLM_LAMBDA { (F32::load(to + k) + p).store(to + k); });
    } else {
      F32 sum = F32::load(means + r * kLanes);
      weigh_row(a, a.statistics, s, row, scores, keys,
                [&](F32 p, F32, int64_t k) FASTLM_LAMBDA { sum = mul_add(p, F32::load(numbers + member + k), sum); });
      sum.store(means + r * kLanes);
    }
  }
}

// Loads keys [first_key, end), and their numbers, into the blocks of tiles.
template <class Elem>
static void load_keys(const AttentionMass& a, const Sequence& s, int64_t kv_head, MassArrays<Elem>& t, int64_t first_key,
                      int64_t end) {
  for (int64_t block = 0, key = first_key; key < end; ++block, key += kBlockKeys) {
    const int64_t keys = end - key < kBlockKeys ? end - key : kBlockKeys;
    key_rows(a, s, a.key, kv_head, key, keys, t.pointers);
    load_b_transposed(a.key.dtype, t.pointers, keys, a.head_dim, t.key + block * t.key_block, t.key_row);
    load_key_numbers(a, s, a.of_keys, kv_head, key, keys, t.numbers + block * a.group * kTileRow);
  }
}

// Adds the weights of rows [first_row, first_row + count) to the sums of, or by, the keys [first_key, end), which are loaded.
template <class Elem>
static void mass_rows(const AttentionMass& a, const Sequence& s, MassArrays<Elem>& t, const AttentionTask& task,
                      int64_t first_row, int64_t count, const KeyRange& range, int64_t first_key, int64_t end) {
  query_rows(a, s, a.query, task.kv_head, first_row, count, t.pointers);
  load_a(a.query.dtype, t.pointers, count, a.head_dim, t.query, t.query_row);
  float* means = t.means + (first_row - task.row_begin) * kLanes;
  if (range.any_high < end) end = range.any_high;
  for (int64_t block = 0, key = first_key; key < end; ++block, key += kBlockKeys) {
    const int64_t keys = end - key < kBlockKeys ? end - key : kBlockKeys;
    const Coverage covered = coverage(a, t.rows, count, range, key, keys);
    if (covered == Coverage::kEmpty) continue;
    const B<Elem> b{t.key + block * t.key_block, t.key_row};
    gemm<false>(count, padded(keys), elems<Elem>(a.head_dim), A<Elem>{t.query, t.query_row, 1}, b, t.scores, kTileRow);
    if (covered != Coverage::kWhole || !scores_are_products(a)) score_tile(a, t.rows, count, key, keys, t.scores);
    const int64_t sums = block * a.group * kTileRow;
    sum_tile(a, s, t, count, keys, t.numbers + sums, t.part + sums, means);
  }
}

// Goes over the task's rows for the keys [first_key, end), and writes their mass if it is wanted.
template <class Elem>
static void mass_keys(const AttentionMass& a, const Sequence& s, MassArrays<Elem>& t, const AttentionTask& task,
                      int64_t first_key, int64_t end) {
  const int64_t bytes = a.key_mass.data ? kMassBlocks * a.group * kTileRow * int64_t(sizeof(float)) : 0;
  __builtin_memset(t.part, 0, bytes);
  __builtin_memset(t.mass, 0, bytes);
  __builtin_memset(t.error, 0, bytes);
  bool loaded = false;
  for (int64_t row = task.row_begin, blocks = 0; row < task.row_end; row += kBlockRows) {
    const int64_t rows = task.row_end - row < kBlockRows ? task.row_end - row : kBlockRows;
    fill_score_rows(a, s, task.kv_head, row, rows, t.rows);
    const KeyRange range = key_range(t.rows, rows);
    if (range.any_high <= first_key || range.any_low >= end) continue;
    if (!loaded) load_keys(a, s, task.kv_head, t, first_key, end);
    loaded = true;
    mass_rows(a, s, t, task, row, rows, range, first_key, end);
    if (a.key_mass.data && ++blocks % a.group == 0) add_parts(a, t);  // kBlockRows rows of each head
  }
  if (!a.key_mass.data) return;
  add_parts(a, t);
  for (int64_t key = first_key, block = 0; key < end; key += kBlockKeys) {
    const int64_t keys = end - key < kBlockKeys ? end - key : kBlockKeys;
    for (int64_t member = 0; member < a.group; ++member, ++block) {
      float* to = a.key_mass.at(s.batch, task.kv_head * a.group + member, s.k_first + key);
      __builtin_memcpy(to, t.mass + block * kTileRow, keys * sizeof(float));
    }
  }
}

template <class Elem>
static void mass_task(const AttentionMass& a, const AttentionTask& task, char* memory) {
  Workspace workspace(memory);
  const int64_t count = a.key_mass.data ? 0 : task.row_end - task.row_begin;
  MassArrays<Elem> t(a, count, workspace);
  const Sequence s = sequence(a, task.b);
  __builtin_memset(t.means, 0, count * kLanes * sizeof(float));
  for (int64_t key = task.key_begin; key < task.key_end; key += kMassKeys) {
    mass_keys(a, s, t, task, key, task.key_end - key < kMassKeys ? task.key_end : key + kMassKeys);
  }
  for_rows(a, task.kv_head, task.row_begin, count, [&](int64_t r, int64_t query, int64_t head) FASTLM_LAMBDA {
    *a.mean_of_keys.at(s.batch, head, s.q_first + query) = sum(F32::load(t.means + r * kLanes));
  });
}

void attention_mass(const AttentionMass& a, const AttentionTask& task, char* memory) {
  if constexpr (kBFloat16Pairs) {
    if (in_pairs(a)) return mass_task<uint32_t>(a, task, memory);
  }
  mass_task<float>(a, task, memory);
}

int64_t attention_mass_workspace(const Attention& a, int64_t rows) { return workspace_bytes<MassArrays>(a, rows); }

}  // namespace fastlm::FASTLM_ISA
