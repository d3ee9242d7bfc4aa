// Attention backward. With the weights P drawn again from the saved statistics, and delta_i = out_i . dO_i:
//   dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q
// A tile of P and dS serves all three products, so a unit that has all rows and all keys of a group does five of them. Where
// there are too few groups for the threads, units of a block of keys compute dK and dV, and units of a block of rows dQ: seven
// products, but no thread waits, and none adds to what another one adds to. Both ways add the same numbers in the same order.
#pragma once

#include "scores-inl.h"
#include "../workspace.h"

namespace fastlm::FASTLM_ISA {

// A tile of rows as both sides of a product: summed over along the row (left), and from row to row (right). Floats are one.
template <class Unit>
struct TwoSided {
  Unit *left, *right;
  int64_t left_row, right_row;

  FASTLM_MEMBER TwoSided(int64_t rows, int64_t dim, Workspace& w) {
    left_row = padded(units<Unit>(dim)) + kLanes;
    right_row = padded(dim) + kLanes;
    if constexpr (kNumbers<Unit> == 1) left_row = right_row;
    right = w.take<Unit>(units<Unit>(rows) * right_row);
    left = kNumbers<Unit> == 1 ? right : w.take<Unit>(rows * left_row);
  }

  FASTLM_MEMBER void load(int dtype, const char* const* rows, int64_t count, int64_t dim) {
    load_right(dtype, rows, count, dim, right, right_row);
    if constexpr (kNumbers<Unit> == 2) load_left(dtype, rows, count, dim, left, left_row);
  }
};

// A tile of numbers between rows and keys, as left sides of products that sum over keys and over rows (transposed).
// Floats are one; pairs are neighbours in a row, and in a column.
template <class Unit>
struct Crossed {
  Unit *by_key, *by_row;

  FASTLM_MEMBER Crossed(float* tile, bool is_by_key, Workspace& w) {
    by_row = kNumbers<Unit> == 1 ? reinterpret_cast<Unit*>(tile) : w.take<Unit>(kBlockRows / 2 * kTileRow);
    by_key = kNumbers<Unit> == 1 || !is_by_key ? reinterpret_cast<Unit*>(tile) : w.take<Unit>(kBlockRows * kTileRow / 2);
  }

  FASTLM_MEMBER Left<Unit> over_keys() const { return {by_key, units<Unit>(kTileRow), 1}; }
  FASTLM_MEMBER Left<Unit> over_rows() const { return {by_row, 1, kTileRow}; }
};

template <class Unit>
struct BackwardArrays {
  ScoreRow rows[kBlockRows];
  char* pointers[kBlockKeys];
  int64_t key_row, head_row, value_row;
  TwoSided<Unit> query, grad_out, key;
  Unit *key_transposed, *value_transposed;
  float *scores, *grads, *cap_slope, *keep, *grad_query, *grad_key, *grad_value;
  Crossed<Unit> weights, grad_scores;

  FASTLM_MEMBER BackwardArrays(const Attention& a, int64_t count, Workspace& w)
      : key_row(kTileRow + kLanes),
        head_row(padded(a.head_dim)),
        value_row(padded(a.value_dim)),
        query(kBlockRows, a.head_dim, w),
        grad_out(kBlockRows, a.value_dim, w),
        key(kBlockKeys, a.head_dim, w),
        key_transposed(w.take<Unit>(units<Unit>(a.head_dim) * key_row)),
        value_transposed(w.take<Unit>(units<Unit>(a.value_dim) * key_row)),
        scores(w.take<float>(kBlockRows * kTileRow)),
        grads(w.take<float>(kBlockRows * kTileRow)),
        cap_slope(a.softcap > 0.0f ? w.take<float>(kBlockRows * kTileRow) : nullptr),
        keep(w.take<float>(kBlockKeys)),
        grad_query(w.take<float>(count * head_row)),
        grad_key(w.take<float>(kBlockKeys * head_row)),
        grad_value(w.take<float>(kBlockKeys * value_row)),
        weights(scores, false, w),
        grad_scores(grads, true, w) {}
};

// P and dS of a tile, from its products, in place; the mask's gradient is added to.
template <class Unit>
static void score_gradients(const AttentionBackward& a, const Sequence& s, BackwardArrays<Unit>& t, const AttentionUnit& u,
                            int64_t count, int64_t first_key, int64_t keys) {
  const float factor = exponent_factor(a);
  const F32 scale(factor), zero(0.0f);
  for (int64_t r = 0; r < count; ++r) {
    const ScoreRow& row = t.rows[r];
    const float* statistics = a.statistics.at(s.batch, row.head, 2 * (s.q_first + row.query));
    const float maximum = statistics[0], log_total = statistics[1];
    const F32 delta(*a.delta.at(s.batch, row.head, s.q_first + row.query));
    float *p_row = t.scores + r * kTileRow, *g_row = t.grads + r * kTileRow;
    if (maximum == -kInfinity) {  // the row sees nothing
      __builtin_memset(p_row, 0, padded(keys) * sizeof(float));
      __builtin_memset(g_row, 0, padded(keys) * sizeof(float));
      continue;
    }
    if (a.seeds) draw_keep(a, s, row, first_key, t.keep);
    const auto weigh = [&](const auto& exponent) FASTLM_LAMBDA {
      for (int64_t k = 0; k < padded(keys); k += kLanes) {
        F32 p = exp2_nonpositive(exponent(F32::load(p_row + k))), g = F32::load(g_row + k);
        if (a.seeds) g = g * F32::load(t.keep + k);
        g = p * (g - delta);
        if (a.seeds) p = p * F32::load(t.keep + k);
        p.store(p_row + k);
        g.store(g_row + k);
      }
    };
    if (is_far(maximum, factor)) {
      // No weight is above 1, though a score that is added up in another order than in the forward may be a step higher.
      weigh([&](F32 x) FASTLM_LAMBDA { return min(zero, mul_add(x - F32(maximum), scale, F32(-log_total))); });
    } else {
      const F32 shift(-(maximum * factor + log_total));
      weigh([&](F32 x) FASTLM_LAMBDA { return mul_add(x, scale, shift); });
    }
    if (a.grad_mask.data && u.of_queries) {
      float* to =
          reinterpret_cast<float*>(a.grad_mask.at(s.b, row.head, a.grad_mask_by_block ? row.query / kBlockRows : row.query));
      for (int64_t k = 0; k < keys; ++k) to[first_key + k] += g_row[k];
    }
    if (t.cap_slope) {
      for (int64_t k = 0; k < padded(keys); k += kLanes) {
        (F32::load(g_row + k) * F32::load(t.cap_slope + r * kTileRow + k)).store(g_row + k);
      }
    }
  }
}

// Floats are multiplied as they are; pairs are put together, of rows that are one below the other and along a row.
FASTLM_SIMD void cross(const float*, int64_t, int64_t, Crossed<float>&, bool) {}

static void cross(float* tile, int64_t count, int64_t keys, Crossed<uint32_t>& to, bool by_key) {
  if (count % 2) __builtin_memset(tile + count * kTileRow, 0, kTileRow * sizeof(float));
  BFloat16 half[2][kTileRow];
  for (int64_t r = 0; r < count; r += 2) {
    for (int64_t k = 0; k < padded(keys); k += kLanes) {
      F32::load(tile + r * kTileRow + k).store(half[0] + k);
      F32::load(tile + (r + 1) * kTileRow + k).store(half[1] + k);
      const U32 even = as_bits(F32::load(half[0] + k)), odd = as_bits(F32::load(half[1] + k));
      (shift_right<16>(even) + odd).store(to.by_row + r / 2 * kTileRow + k);
    }
    if (by_key) {
      __builtin_memcpy(to.by_key + r * kTileRow / 2, half[0], sizeof(half[0]));
      if (r + 1 < count) __builtin_memcpy(to.by_key + (r + 1) * kTileRow / 2, half[1], sizeof(half[1]));
    }
  }
}

template <class Unit>
static void backward_tile(const AttentionBackward& a, const Sequence& s, BackwardArrays<Unit>& t, const AttentionUnit& u,
                          int64_t first_row, int64_t count, int64_t first_key, int64_t keys, Coverage covered) {
  query_rows(a, s, a.query, u.kv_head, first_row, count, t.pointers);
  t.query.load(a.query.dtype, t.pointers, count, a.head_dim);
  query_rows(a, s, a.grad_out, u.kv_head, first_row, count, t.pointers);
  t.grad_out.load(a.grad_out.dtype, t.pointers, count, a.value_dim);
  const int64_t columns = padded(keys);
  product<false>(count, columns, units<Unit>(a.head_dim), Left<Unit>{t.query.left, t.query.left_row, 1},
                 Right<Unit>{t.key_transposed, t.key_row}, t.scores, kTileRow);
  product<false>(count, columns, units<Unit>(a.value_dim), Left<Unit>{t.grad_out.left, t.grad_out.left_row, 1},
                 Right<Unit>{t.value_transposed, t.key_row}, t.grads, kTileRow);
  if (covered != Coverage::kWhole || !scores_are_products(a)) {
    score_tile(a, t.rows, count, first_key, keys, t.scores, t.cap_slope);
  }
  score_gradients(a, s, t, u, count, first_key, keys);
  cross(t.scores, count, keys, t.weights, false);
  cross(t.grads, count, keys, t.grad_scores, true);
  if (u.of_keys) {
    product<true>(keys, t.value_row, units<Unit>(count), t.weights.over_rows(),
                  Right<Unit>{t.grad_out.right, t.grad_out.right_row}, t.grad_value, t.value_row);
    product<true>(keys, t.head_row, units<Unit>(count), t.grad_scores.over_rows(),
                  Right<Unit>{t.query.right, t.query.right_row}, t.grad_key, t.head_row);
  }
  if (u.of_queries) {
    product<true>(count, t.head_row, units<Unit>(keys), t.grad_scores.over_keys(), Right<Unit>{t.key.right, t.key.right_row},
                  t.grad_query + (first_row - u.row_begin) * t.head_row, t.head_row);
  }
}

static void write_rows(const Rows& to, char* const* rows, int64_t count, int64_t dim, const float* from, int64_t from_row,
                       float factor) {
  with_float_dtype(to.dtype, [&](auto type) FASTLM_LAMBDA {
    for (int64_t r = 0; r < count; ++r)
      narrow_row(from + r * from_row, factor, dim, reinterpret_cast<decltype(type)*>(rows[r]));
  });
}

template <class Unit>
static void backward_keys(const AttentionBackward& a, const Sequence& s, BackwardArrays<Unit>& t, const AttentionUnit& u,
                          int64_t first_key, int64_t keys) {
  if (u.of_keys) {
    __builtin_memset(t.grad_key, 0, keys * t.head_row * sizeof(float));
    __builtin_memset(t.grad_value, 0, keys * t.value_row * sizeof(float));
  }
  bool loaded = false;
  for (int64_t row = u.row_begin; row < u.row_end; row += kBlockRows) {
    const int64_t rows = u.row_end - row < kBlockRows ? u.row_end - row : kBlockRows;
    fill_score_rows(a, s, u.kv_head, row, rows, t.rows);
    const Coverage covered = coverage(a, t.rows, rows, key_range(t.rows, rows), first_key, keys);
    if (covered == Coverage::kEmpty) continue;
    if (!loaded) {
      key_rows(a, s, a.key, u.kv_head, first_key, keys, t.pointers);
      load_transposed(a.key.dtype, t.pointers, keys, a.head_dim, t.key_transposed, t.key_row);
      if (u.of_queries) load_right(a.key.dtype, t.pointers, keys, a.head_dim, t.key.right, t.key.right_row);
      key_rows(a, s, a.value, u.kv_head, first_key, keys, t.pointers);
      load_transposed(a.value.dtype, t.pointers, keys, a.value_dim, t.value_transposed, t.key_row);
      loaded = true;
    }
    backward_tile(a, s, t, u, row, rows, first_key, keys, covered);
  }
  if (u.of_keys) {
    key_rows(a, s, a.grad_key, u.kv_head, first_key, keys, t.pointers);
    write_rows(a.grad_key, t.pointers, keys, a.head_dim, t.grad_key, t.head_row, a.scale);
    key_rows(a, s, a.grad_value, u.kv_head, first_key, keys, t.pointers);
    write_rows(a.grad_value, t.pointers, keys, a.value_dim, t.grad_value, t.value_row, 1.0f);
  }
}

template <class Unit>
static void backward_unit(const AttentionBackward& a, const AttentionUnit& u, char* memory) {
  Workspace workspace(memory);
  const int64_t count = u.row_end - u.row_begin;
  BackwardArrays<Unit> t(a, u.of_queries ? count : 0, workspace);
  const Sequence s = sequence(a, u.b);
  if (u.of_queries) __builtin_memset(t.grad_query, 0, count * t.head_row * sizeof(float));
  for (int64_t key = u.key_begin; key < u.key_end; key += kBlockKeys) {
    backward_keys(a, s, t, u, key, u.key_end - key < kBlockKeys ? u.key_end - key : kBlockKeys);
  }
  if (!u.of_queries) return;
  for (int64_t row = 0; row < count; row += kBlockRows) {
    const int64_t rows = count - row < kBlockRows ? count - row : kBlockRows;
    query_rows(a, s, a.grad_query, u.kv_head, u.row_begin + row, rows, t.pointers);
    write_rows(a.grad_query, t.pointers, rows, a.head_dim, t.grad_query + row * t.head_row, t.head_row, a.scale);
  }
}

void attention_backward(const AttentionBackward& a, const AttentionUnit& u, char* memory) {
  if constexpr (kBFloat16Pairs) {
    if (in_pairs(a)) return backward_unit<uint32_t>(a, u, memory);
  }
  backward_unit<float>(a, u, memory);
}

int64_t attention_backward_workspace(const Attention& a, int64_t rows) {
  Workspace workspace(nullptr);
  if (in_pairs(a)) {
    BackwardArrays<uint32_t>(a, rows, workspace);
  } else {
    BackwardArrays<float>(a, rows, workspace);
  }
  return workspace.bytes();
}

// delta of a unit's rows.
void attention_delta(const AttentionBackward& a, const AttentionUnit& u) {
  const Sequence s = sequence(a, u.b);
  for_rows(a, u.kv_head, u.row_begin, u.row_end - u.row_begin, [&](int64_t, int64_t query, int64_t head) FASTLM_LAMBDA {
    const int64_t row = s.q_first + query;
    with_float_dtype(a.out.dtype, [&](auto type) FASTLM_LAMBDA {
      using T = decltype(type);
      const auto *out = reinterpret_cast<const T*>(a.out.at(s.batch, head, row)),
                 *grad = reinterpret_cast<const T*>(a.grad_out.at(s.batch, head, row));
      F32 total(0.0f);
      float x[kLanes], y[kLanes];
      for (int64_t d = 0; d < a.value_dim; d += kLanes) {
        const int64_t left = a.value_dim - d < kLanes ? a.value_dim - d : kLanes;
        widen_row(out + d, left, x);
        widen_row(grad + d, left, y);
        total = mul_add(F32::load(x), F32::load(y), total);
      }
      *a.delta.at(s.batch, head, row) = sum(total) - (a.grad_lse.data ? *a.grad_lse.at(s.batch, head, row) : 0.0f);
    });
  });
}

}  // namespace fastlm::FASTLM_ISA
