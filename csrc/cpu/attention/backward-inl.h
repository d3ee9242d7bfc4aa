// Attention backward. The weights P are recomputed from the saved statistics. With delta_i = out_i . dO_i:
//   dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q
// The products dV, dQ and dK use the same tile of P and dS. So a task with all rows and all keys of a group computes five
// products per tile (Q K^T is the fifth). If there are too few groups for the threads, tasks of a block of keys compute dK and
// dV, and tasks of a block of rows compute dQ: seven products, but no thread waits, and no two threads add to the same element.
// Both ways add the same numbers in the same order.
#pragma once

#include "row_stats-inl.h"

namespace fastlm::FASTLM_ISA {

// A tile of rows of a tensor as both operands of gemm: as A (rows, elems(dim)), summed over along the row, and as B
// (elems(rows), dim), summed over from row to row. Floats need one copy for both.
template <class Elem>
struct RowOperand {
  Elem *a, *b;
  int64_t a_row, b_row;

  FASTLM_MEMBER RowOperand(int64_t rows, int64_t dim, Workspace& w) {
    a_row = padded(elems<Elem>(dim)) + kLanes;
    b_row = padded(dim) + kLanes;
    if constexpr (kValuesPerElem<Elem> == 1) a_row = b_row;
    b = w.take<Elem>(elems<Elem>(rows) * b_row);
    a = kValuesPerElem<Elem> == 1 ? b : w.take<Elem>(rows * a_row);
  }

  FASTLM_MEMBER void load(int dtype, const char* const* rows, int64_t count, int64_t dim) {
    load_b(dtype, rows, count, dim, b, b_row);
    if constexpr (kValuesPerElem<Elem> == 2) load_a(dtype, rows, count, dim, a, a_row);
  }
};

// A tile (kBlockRows, kBlockKeys) of P or dS as operand A of gemm: summed over keys, (kBlockRows, elems(kBlockKeys)), and
// transposed and summed over rows, (kBlockKeys, elems(kBlockRows)). Floats are used where they are; pack_scores makes pairs of
// neighbours along a row (by_key) and along a column (by_row).
template <class Elem>
struct ScoreOperand {
  Elem *by_key, *by_row;

  FASTLM_MEMBER ScoreOperand(float* tile, bool is_by_key, Workspace& w) {
    by_row = kValuesPerElem<Elem> == 1 ? reinterpret_cast<Elem*>(tile) : w.take<Elem>(kBlockRows / 2 * kTileRow);
    by_key = kValuesPerElem<Elem> == 1 || !is_by_key ? reinterpret_cast<Elem*>(tile) : w.take<Elem>(kBlockRows * kTileRow / 2);
  }

  FASTLM_MEMBER A<Elem> over_keys() const { return {by_key, elems<Elem>(kTileRow), 1}; }
  FASTLM_MEMBER A<Elem> over_rows() const { return {by_row, 1, kTileRow}; }
};

// The arrays of a task that computes dQ of `count` rows. Rows are padded to whole vectors; *_row are strides between rows.
template <class Elem>
struct BackwardArrays {
  ScoreRow rows[kBlockRows];
  char* pointers[kBlockKeys];
  int64_t key_row, head_row, value_row;
  RowOperand<Elem> query;     // (kBlockRows, head_dim)
  RowOperand<Elem> grad_out;  // (kBlockRows, value_dim)
  RowOperand<Elem> key;       // (kBlockKeys, head_dim)
  Elem* key_transposed;       // (elems(head_dim), kBlockKeys)
  Elem* value_transposed;     // (elems(value_dim), kBlockKeys)
  float* scores;              // (kBlockRows, kBlockKeys): q k^T, then P
  float* grads;               // (kBlockRows, kBlockKeys): dP, then dS
  float* softcap_grad;        // (kBlockRows, kBlockKeys); null without softcap
  float* keep;                // (kBlockKeys,)
  float* grad_key_mass;       // (group, kBlockKeys)
  float* grad_query;          // (count, head_dim)
  float* grad_key;            // (kBlockKeys, head_dim)
  float* grad_value;          // (kBlockKeys, value_dim)
  ScoreOperand<Elem> weights, grad_scores;

  FASTLM_MEMBER BackwardArrays(const Attention& a, int64_t count, Workspace& w)
      : key_row(kTileRow + kLanes),
        head_row(padded(a.head_dim)),
        value_row(padded(a.value_dim)),
        query(kBlockRows, a.head_dim, w),
        grad_out(kBlockRows, a.value_dim, w),
        key(kBlockKeys, a.head_dim, w),
        key_transposed(w.take<Elem>(elems<Elem>(a.head_dim) * key_row)),
        value_transposed(w.take<Elem>(elems<Elem>(a.value_dim) * key_row)),
        scores(w.take<float>(kBlockRows * kTileRow)),
        grads(w.take<float>(kBlockRows * kTileRow)),
        softcap_grad(a.softcap > 0.0f ? w.take<float>(kBlockRows * kTileRow) : nullptr),
        keep(w.take<float>(kBlockKeys)),
        grad_key_mass(w.take<float>(a.group * kTileRow)),
        grad_query(w.take<float>(count * head_row)),
        grad_key(w.take<float>(kBlockKeys * head_row)),
        grad_value(w.take<float>(kBlockKeys * value_row)),
        weights(scores, false, w),
        grad_scores(grads, true, w) {}
};

// Calls f(p, e, k) for the weights p = 2^e of keys k ... k + kLanes of a row of scores, recomputed from the saved statistics.
// Returns false, and calls nothing, if the row sees no key.
template <class F>
FASTLM_SIMD bool weigh_row(const Attention& a, const Statistic& saved, const Sequence& s, const ScoreRow& row,
                           const float* scores, int64_t keys, const F& f) {
  const float* statistics = saved.at(s.batch, row.head, 2 * (s.q_first + row.query));
  const float maximum = statistics[0], log_total = statistics[1], factor = exponent_factor(a);
  if (maximum == -kInfinity) {
    bool any_nan = false;  // Then all scores that the row sees are NaN.
    for (int64_t k = 0; k < keys; ++k) any_nan |= scores[k] != scores[k];
    if (!any_nan) return false;
    for (int64_t k = 0; k < padded(keys); k += kLanes) f(F32(log_total), F32(log_total), k);
    return true;
  }
  const F32 scale(factor), zero(0.0f);
  if (is_far(maximum, factor)) {
    // min: a weight is at most 1, but the score, summed in another order than in the forward, may be a rounding step higher.
    const F32 most(maximum), shift(-log_total);
    for (int64_t k = 0; k < padded(keys); k += kLanes) {
      const F32 exponent = min(zero, mul_add(F32::load(scores + k) - most, scale, shift));
      f(exp2_nonpositive(exponent), exponent, k);
    }
  } else {
    // The weights are the forward's own, to the bit, times their share: one rounded sum of the shift and log_total would make a
    // row of large scores weigh more or less than 1.
    const F32 shift(-(maximum * factor)), total(log_total), share = exp2_nonpositive(F32(-log_total));
    for (int64_t k = 0; k < padded(keys); k += kLanes) {
      const F32 exponent = mul_add(F32::load(scores + k), scale, shift);
      f(exp2_nonpositive(exponent) * share, exponent - total, k);
    }
  }
  return true;
}

// Returns a row's number, or 0 if there are none.
FASTLM_SIMD float number_of(const Statistic& numbers, const Sequence& s, const ScoreRow& row) {
  return numbers.data ? *numbers.at(s.batch, row.head, s.q_first + row.query) : 0.0f;
}

// Loads the numbers (batch, head, key) of keys [first_key, first_key + keys) into (group, kBlockKeys), or zeros if there are
// none.
static void load_key_numbers(const Attention& a, const Sequence& s, const Statistic& numbers, int64_t kv_head,
                             int64_t first_key, int64_t keys, float* to) {
  __builtin_memset(to, 0, a.group * kTileRow * sizeof(float));
  for (int64_t member = 0; numbers.data && member < a.group; ++member) {
    const float* from = numbers.at(s.batch, kv_head * a.group + member, s.k_first + first_key);
    __builtin_memcpy(to + member * kTileRow, from, keys * sizeof(float));
  }
}

// Adds a row of dS (keys,) to the mask's gradient, if it is wanted.
FASTLM_SIMD void add_to_mask_gradient(const AttentionBackward& a, const Sequence& s, const ScoreRow& row, const float* grads,
                                      int64_t first_key, int64_t keys) {
  if (!a.grad_mask.data) return;
  const int64_t block = a.grad_mask_by_block ? row.query / kBlockRows : row.query;
  float* to = reinterpret_cast<float*>(a.grad_mask.at(s.b, row.head, block));
  for (int64_t k = 0; k < keys; ++k) to[first_key + k] += grads[k];
}

// Turns a tile's scores into P, and its dP into dS, in place. Adds dS to the mask's gradient. With kStats, dP also holds what
// entropy and key mass add to it, and dS what the largest score does.
template <bool kStats, class Elem>
static void score_gradients(const AttentionBackward& a, const Sequence& s, BackwardArrays<Elem>& t, const AttentionTask& task,
                            int64_t count, int64_t first_key, int64_t keys) {
  for (int64_t r = 0; r < count; ++r) {
    const ScoreRow& row = t.rows[r];
    const F32 delta(*a.delta.at(s.batch, row.head, s.q_first + row.query));
    float *p_row = t.scores + r * kTileRow, *g_row = t.grads + r * kTileRow;
    const float* grad_key_mass = t.grad_key_mass + row.head % a.group * kTileRow;
    const F32 grad_entropy(kStats ? kLn2 * number_of(a.grad_entropy, s, row) : 0.0f);
    if (a.seeds) draw_keep(a, s, row, first_key, t.keep);
    const bool seen = weigh_row(a, a.statistics, s, row, p_row, keys, [&](F32 p, F32 e, int64_t k) FASTLM_LAMBDA {
      F32 g = F32::load(g_row + k);
      if (a.seeds) g = g * F32::load(t.keep + k);
      if (kStats) g = g + F32::load(grad_key_mass + k) - grad_entropy * finite_exponent(e);
      g = p * (g - delta);
      if (a.seeds) p = p * F32::load(t.keep + k);
      p.store(p_row + k);
      g.store(g_row + k);
    });
    if (!seen) {
      __builtin_memset(p_row, 0, padded(keys) * sizeof(float));
      __builtin_memset(g_row, 0, padded(keys) * sizeof(float));
      continue;
    }
    if (kStats && a.grad_max_logit.data) {
      const int64_t k = *a.max_key.at(s.batch, row.head, s.q_first + row.query) - first_key;
      if (k >= 0 && k < keys) g_row[k] += number_of(a.grad_max_logit, s, row);
    }
    if (task.computes_dq) add_to_mask_gradient(a, s, row, g_row, first_key, keys);
    if (t.softcap_grad) {
      for (int64_t k = 0; k < padded(keys); k += kLanes) {
        (F32::load(g_row + k) * F32::load(t.softcap_grad + r * kTileRow + k)).store(g_row + k);
      }
    }
  }
}

// Packs a tile into pairs: of neighbouring rows, and, if by_key, of neighbouring keys. Floats need no packing.
FASTLM_SIMD void pack_scores(const float*, int64_t, int64_t, ScoreOperand<float>&, bool) {}

static void pack_scores(float* tile, int64_t count, int64_t keys, ScoreOperand<uint32_t>& to, bool by_key) {
  if (count % 2) __builtin_memset(tile + count * kTileRow, 0, kTileRow * sizeof(float));
  BFloat16 half[2][kTileRow];
  for (int64_t r = 0; r < count; r += 2) {
    for (int64_t k = 0; k < padded(keys); k += kLanes) {
      store_flushed(F32::load(tile + r * kTileRow + k), half[0] + k);  // as vdpbf16ps reads subnormals
      store_flushed(F32::load(tile + (r + 1) * kTileRow + k), half[1] + k);
      load_pairs(half[0] + k, half[1] + k).store(to.by_row + r / 2 * kTileRow + k);
    }
    if (by_key) {
      __builtin_memcpy(to.by_key + r * kTileRow / 2, half[0], sizeof(half[0]));
      if (r + 1 < count) __builtin_memcpy(to.by_key + (r + 1) * kTileRow / 2, half[1], sizeof(half[1]));
    }
  }
}

// Adds to the gradients what rows [first_row, first_row + count) and keys [first_key, first_key + keys) contribute.
template <class Elem>
static void backward_tile(const AttentionBackward& a, const Sequence& s, BackwardArrays<Elem>& t, const AttentionTask& task,
                          int64_t first_row, int64_t count, int64_t first_key, int64_t keys, Coverage covered) {
  query_rows(a, s, a.query, task.kv_head, first_row, count, t.pointers);
  t.query.load(a.query.dtype, t.pointers, count, a.head_dim);
  query_rows(a, s, a.grad_out, task.kv_head, first_row, count, t.pointers);
  t.grad_out.load(a.grad_out.dtype, t.pointers, count, a.value_dim);
  const int64_t columns = padded(keys);
  gemm<false>(count, columns, elems<Elem>(a.head_dim), A<Elem>{t.query.a, t.query.a_row, 1},
              B<Elem>{t.key_transposed, t.key_row}, t.scores, kTileRow);
  gemm<false>(count, columns, elems<Elem>(a.value_dim), A<Elem>{t.grad_out.a, t.grad_out.a_row, 1},
              B<Elem>{t.value_transposed, t.key_row}, t.grads, kTileRow);
  if (covered != Coverage::kWhole || !scores_are_products(a)) {
    score_tile(a, t.rows, count, first_key, keys, t.scores, t.softcap_grad);
  }
  const bool stats = a.grad_entropy.data || a.grad_key_mass.data || a.grad_max_logit.data;
  stats ? score_gradients<true>(a, s, t, task, count, first_key, keys)
        : score_gradients<false>(a, s, t, task, count, first_key, keys);
  pack_scores(t.scores, count, keys, t.weights, false);
  pack_scores(t.grads, count, keys, t.grad_scores, true);
  if (task.computes_dkv) {
    gemm<true>(keys, t.value_row, elems<Elem>(count), t.weights.over_rows(), B<Elem>{t.grad_out.b, t.grad_out.b_row},
               t.grad_value, t.value_row);
    gemm<true>(keys, t.head_row, elems<Elem>(count), t.grad_scores.over_rows(), B<Elem>{t.query.b, t.query.b_row}, t.grad_key,
               t.head_row);
  }
  if (task.computes_dq) {
    gemm<true>(count, t.head_row, elems<Elem>(keys), t.grad_scores.over_keys(), B<Elem>{t.key.b, t.key.b_row},
               t.grad_query + (first_row - task.row_begin) * t.head_row, t.head_row);
  }
}

// Writes `count` rows of floats, multiplied by the factor, in the tensor's dtype.
static void write_rows(const Rows& to, char* const* rows, int64_t count, int64_t dim, const float* from, int64_t from_row,
                       float factor) {
  with_float_dtype(to.dtype, [&](auto type) FASTLM_LAMBDA {
    for (int64_t r = 0; r < count; ++r)
      narrow_row(from + r * from_row, factor, dim, reinterpret_cast<decltype(type)*>(rows[r]));
  });
}

// Loads keys and values [first_key, first_key + keys) into the tiles.
template <class Elem>
static void load_keys(const AttentionBackward& a, const Sequence& s, BackwardArrays<Elem>& t, const AttentionTask& task,
                      int64_t first_key, int64_t keys) {
  key_rows(a, s, a.key, task.kv_head, first_key, keys, t.pointers);
  load_b_transposed(a.key.dtype, t.pointers, keys, a.head_dim, t.key_transposed, t.key_row);
  if (task.computes_dq) load_b(a.key.dtype, t.pointers, keys, a.head_dim, t.key.b, t.key.b_row);
  key_rows(a, s, a.value, task.kv_head, first_key, keys, t.pointers);
  load_b_transposed(a.value.dtype, t.pointers, keys, a.value_dim, t.value_transposed, t.key_row);
  load_key_numbers(a, s, a.grad_key_mass, task.kv_head, first_key, keys, t.grad_key_mass);
}

// Goes over the task's rows for one block of keys, and writes dK and dV of the block. The Call decides what a tile adds to
// them.
template <class Call, class Arrays>
static void backward_keys(const Call& a, const Sequence& s, Arrays& t, const AttentionTask& task, int64_t first_key,
                          int64_t keys) {
  if (task.computes_dkv) {
    __builtin_memset(t.grad_key, 0, keys * t.head_row * sizeof(float));
    __builtin_memset(t.grad_value, 0, keys * t.value_row * sizeof(float));
  }
  bool loaded = false;
  for (int64_t row = task.row_begin; row < task.row_end; row += kBlockRows) {
    const int64_t rows = task.row_end - row < kBlockRows ? task.row_end - row : kBlockRows;
    fill_score_rows(a, s, task.kv_head, row, rows, t.rows);
    const Coverage covered = coverage(a, t.rows, rows, key_range(t.rows, rows), first_key, keys);
    if (covered == Coverage::kEmpty) continue;
    if (!loaded) load_keys(a, s, t, task, first_key, keys);
    loaded = true;
    backward_tile(a, s, t, task, row, rows, first_key, keys, covered);
  }
  if (task.computes_dkv) {
    key_rows(a, s, a.grad_key, task.kv_head, first_key, keys, t.pointers);
    write_rows(a.grad_key, t.pointers, keys, a.head_dim, t.grad_key, t.head_row, a.scale);
    key_rows(a, s, a.grad_value, task.kv_head, first_key, keys, t.pointers);
    write_rows(a.grad_value, t.pointers, keys, a.value_dim, t.grad_value, t.value_row, 1.0f);
  }
}

template <class Arrays, class Call>
static void backward_task(const Call& a, const AttentionTask& task, char* memory) {
  Workspace workspace(memory);
  const int64_t count = task.row_end - task.row_begin;
  Arrays t(a, task.computes_dq ? count : 0, workspace);
  const Sequence s = sequence(a, task.b);
  if (task.computes_dq) __builtin_memset(t.grad_query, 0, count * t.head_row * sizeof(float));
  for (int64_t key = task.key_begin; key < task.key_end; key += kBlockKeys) {
    backward_keys(a, s, t, task, key, task.key_end - key < kBlockKeys ? task.key_end - key : kBlockKeys);
  }
  if (!task.computes_dq) return;
  for (int64_t row = 0; row < count; row += kBlockRows) {
    const int64_t rows = count - row < kBlockRows ? count - row : kBlockRows;
    query_rows(a, s, a.grad_query, task.kv_head, task.row_begin + row, rows, t.pointers);
    write_rows(a.grad_query, t.pointers, rows, a.head_dim, t.grad_query + row * t.head_row, t.head_row, a.scale);
  }
}

void attention_backward(const AttentionBackward& a, const AttentionTask& task, char* memory) {
  if constexpr (kBFloat16Pairs) {
    if (in_pairs(a)) return backward_task<BackwardArrays<uint32_t>>(a, task, memory);
  }
  backward_task<BackwardArrays<float>>(a, task, memory);
}

int64_t attention_backward_workspace(const Attention& a, int64_t rows) { return workspace_bytes<BackwardArrays>(a, rows); }

// Computes delta of the task's rows, of which there are kBlockRows at most. Columns are added one after the other, as gemm
// adds them in dP: if all weight of a row is on one key, out is its value, and dP - delta is 0 to the bit. Else the rounding of
// both would be all that there is of dS, and for large scores up to 200 times PyTorch's error.
void attention_delta(const AttentionBackward& a, const AttentionTask& task) {
  constexpr int64_t kColumns = 32;  // columns that are transposed at a time
  alignas(64) float out[kColumns * kBlockRows], grad_out[kColumns * kBlockRows], delta[kBlockRows] = {};
  char *out_rows[kBlockRows], *grad_rows[kBlockRows];
  const Sequence s = sequence(a, task.b);
  const int64_t first = task.row_begin, count = task.row_end - first;
  query_rows(a, s, a.out, task.kv_head, first, count, out_rows);
  query_rows(a, s, a.grad_out, task.kv_head, first, count, grad_rows);
  for (int64_t d = 0; d < a.value_dim; d += kColumns) {
    const int64_t columns = a.value_dim - d < kColumns ? a.value_dim - d : kColumns;
    load_b_transposed(a.out.dtype, out_rows, count, columns, out, kBlockRows);
    load_b_transposed(a.grad_out.dtype, grad_rows, count, columns, grad_out, kBlockRows);
    for (int64_t r = 0; r < padded(count); r += kLanes) {
      F32 total = F32::load(delta + r);
      for (int64_t at = r; at < columns * kBlockRows; at += kBlockRows) {
        total = mul_add(F32::load(grad_out + at), F32::load(out + at), total);
      }
      total.store(delta + r);
    }
    for (int64_t r = 0; r < count; ++r) {
      out_rows[r] += columns * bytes_of(a.out.dtype);
      grad_rows[r] += columns * bytes_of(a.grad_out.dtype);
    }
  }
  for_rows(a, task.kv_head, first, count, [&](int64_t r, int64_t query, int64_t head) FASTLM_LAMBDA {
    const int64_t row = s.q_first + query;
    *a.delta.at(s.batch, head, row) = delta[r] - (a.grad_lse.data ? *a.grad_lse.at(s.batch, head, row) : 0.0f);
  });
}

}  // namespace fastlm::FASTLM_ISA
