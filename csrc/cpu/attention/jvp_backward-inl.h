// The backward of the forward-mode pass (jvp-inl.h), and so the backward of the backward: with u = grad_out and w = grad_lse,
// the gradients of sum_i u_i dout_i + w_i dlse_i for the inputs. Those for the tangents are what the plain backward gives for u
// and w. With a = keep (u v), b = keep (u dv), delta = out . u - w and ds the tangents of the scores (jvp-inl.h):
//   F = p (a - delta)                                  the gradient of ds
//   G = (ds - dlse) F + p (b - dout . u)               the gradient of a score
//   W = keep p (ds - dlse)
//   dV = W^T u,   dQ = scale (X K + Y dK),   dK = scale (X^T Q + Y^T dQ)
// where X and Y are the gradients of a product x = q k and of its tangent. Without a softcap they are G and F. With it, as ds
// has the factor c = 1 - t^2, t = tanh(scale x / softcap): Y = c F and X = c (G - 2 t / softcap F scale dx). The tasks are
// those of the backward, with ten products where it has five.
#pragma once

#include "backward-inl.h"

namespace fastlm::FASTLM_ISA {

// The arrays of a task, besides those of the backward, whose `scores` become W and `grads` X.
template <class Elem>
struct JvpBackwardArrays : BackwardArrays<Elem> {
  using Base = BackwardArrays<Elem>;
  RowOperand<Elem> query_tangent;      // (kBlockRows, head_dim)
  RowOperand<Elem> key_tangent;        // (kBlockKeys, head_dim)
  Elem* key_tangent_transposed;        // (elems(head_dim), kBlockKeys)
  Elem* value_tangent_transposed;      // (elems(value_dim), kBlockKeys)
  float* score_tangents;               // (kBlockRows, kBlockKeys): ds
  float* tangent_grads;                // (kBlockRows, kBlockKeys): b, then Y
  float *product_tangents, *squashed;  // (kBlockRows, kBlockKeys): scale dx and t; null without softcap
  ScoreOperand<Elem> grad_tangents;

  FASTLM_MEMBER JvpBackwardArrays(const Attention& a, int64_t count, Workspace& w)
      : Base(a, count, w),
        query_tangent(kBlockRows, a.head_dim, w),
        key_tangent(kBlockKeys, a.head_dim, w),
        key_tangent_transposed(w.take<Elem>(elems<Elem>(a.head_dim) * Base::key_row)),
        value_tangent_transposed(w.take<Elem>(elems<Elem>(a.value_dim) * Base::key_row)),
        score_tangents(w.take<float>(kBlockRows * kTileRow)),
        tangent_grads(w.take<float>(kBlockRows * kTileRow)),
        product_tangents(a.softcap > 0.0f ? w.take<float>(kBlockRows * kTileRow) : nullptr),
        squashed(a.softcap > 0.0f ? w.take<float>(kBlockRows * kTileRow) : nullptr),
        grad_tangents(tangent_grads, true, w) {}
};

template <class Elem>
static void load_keys(const AttentionJvpBackward& a, const Sequence& s, JvpBackwardArrays<Elem>& t, const AttentionTask& task,
                      int64_t first_key, int64_t keys) {
  load_keys(a, s, static_cast<BackwardArrays<Elem>&>(t), task, first_key, keys);
  if (a.tangent.key.data) {
    key_rows(a, s, a.tangent.key, task.kv_head, first_key, keys, t.pointers);
    load_b_transposed(a.key.dtype, t.pointers, keys, a.head_dim, t.key_tangent_transposed, t.key_row);
    if (task.computes_dq) load_b(a.key.dtype, t.pointers, keys, a.head_dim, t.key_tangent.b, t.key_tangent.b_row);
  }
  if (a.tangent.value.data) {
    key_rows(a, s, a.tangent.value, task.kv_head, first_key, keys, t.pointers);
    load_b_transposed(a.value.dtype, t.pointers, keys, a.value_dim, t.value_tangent_transposed, t.key_row);
  }
}

// Keeps, before products (count, keys) become scores, what the second derivative of the softcap takes of them: t and scale dx.
template <class Elem>
static void keep_products(const Attention& a, JvpBackwardArrays<Elem>& t, int64_t count, int64_t keys) {
  const F32 inner(softcap_factor(a)), scale(a.scale);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t k = r * kTileRow; k < r * kTileRow + padded(keys); k += kLanes) {
      tanh(inner * F32::load(t.scores + k)).store(t.squashed + k);
      (scale * F32::load(t.score_tangents + k)).store(t.product_tangents + k);
    }
  }
}

// Turns a tile's scores into W, its a into X and its b into Y, in place. Adds G to the mask's gradient.
template <class Elem>
static void score_gradients(const AttentionJvpBackward& a, const Sequence& s, JvpBackwardArrays<Elem>& t,
                            const AttentionTask& task, int64_t count, int64_t first_key, int64_t keys) {
  for (int64_t r = 0; r < count; ++r) {
    const ScoreRow& row = t.rows[r];
    const int64_t query = s.q_first + row.query, at = r * kTileRow;
    const F32 delta(*a.delta.at(s.batch, row.head, query)), lse_tangent(*a.lse_tangent.at(s.batch, row.head, query)),
        tangent_delta(*a.tangent_delta.at(s.batch, row.head, query));
    float *const w_row = t.scores + at, *const x_row = t.grads + at, *const y_row = t.tangent_grads + at;
    if (a.seeds) draw_keep(a, s, row, first_key, t.keep);
    const bool seen = weigh_row(a, a.statistics, s, row, w_row, keys, [&](F32 p, F32, int64_t k) FASTLM_LAMBDA {
      const F32 keep = a.seeds ? F32::load(t.keep + k) : F32(1.0f);
      const F32 f = p * (F32::load(x_row + k) * keep - delta);
      const F32 centred = F32::load(t.score_tangents + at + k) - lse_tangent;
      (keep * p * centred).store(w_row + k);
      mul_add(centred, f, p * (F32::load(y_row + k) * keep - tangent_delta)).store(x_row + k);
      f.store(y_row + k);
    });
    if (!seen) {
      float* const tiles[] = {w_row, x_row, y_row};
      for (float* tile : tiles) __builtin_memset(tile, 0, padded(keys) * sizeof(float));
      continue;
    }
    if (task.computes_dq) add_to_mask_gradient(a, s, row, x_row, first_key, keys);
    if (!t.softcap_grad) continue;
    const F32 bend(-2.0f / a.softcap);
    for (int64_t k = 0; k < padded(keys); k += kLanes) {
      const F32 f = F32::load(y_row + k), slope = F32::load(t.softcap_grad + at + k);
      const F32 bent = bend * F32::load(t.squashed + at + k) * F32::load(t.product_tangents + at + k);
      // Where the softcap is flat, its other derivatives are zeros too, though a factor of theirs may be infinite.
      const F32 x = slope * mul_add(bent, f, F32::load(x_row + k));
      select_less(slope, F32(kSmallest), F32(0.0f), x).store(x_row + k);
      (slope * f).store(y_row + k);
    }
  }
}

// Adds to the gradients what rows [first_row, first_row + count) and keys [first_key, first_key + keys) contribute.
template <class Elem>
static void backward_tile(const AttentionJvpBackward& a, const Sequence& s, JvpBackwardArrays<Elem>& t,
                          const AttentionTask& task, int64_t first_row, int64_t count, int64_t first_key, int64_t keys,
                          Coverage covered) {
  const auto load = [&](RowOperand<Elem>& to, const Rows& from, int64_t dim) FASTLM_LAMBDA {
    query_rows(a, s, from, task.kv_head, first_row, count, t.pointers);
    to.load(from.dtype, t.pointers, count, dim);
  };
  load(t.query, a.query, a.head_dim);
  load(t.grad_out, a.grad_out, a.value_dim);
  if (a.tangent.query.data) load(t.query_tangent, a.tangent.query, a.head_dim);
  const int64_t columns = padded(keys), depth = elems<Elem>(a.head_dim), value_depth = elems<Elem>(a.value_dim);
  const A<Elem> query{t.query.a, t.query.a_row, 1}, query_tangent{t.query_tangent.a, t.query_tangent.a_row, 1};
  const A<Elem> grad_out{t.grad_out.a, t.grad_out.a_row, 1};
  const B<Elem> key{t.key_transposed, t.key_row}, key_tangent{t.key_tangent_transposed, t.key_row};
  gemm<false>(count, columns, depth, query, key, t.scores, kTileRow);
  product_tangents(a.tangent, count, columns, depth, query, query_tangent, key, key_tangent, t.score_tangents);
  gemm<false>(count, columns, value_depth, grad_out, B<Elem>{t.value_transposed, t.key_row}, t.grads, kTileRow);
  if (a.tangent.value.data) {
    gemm<false>(count, columns, value_depth, grad_out, B<Elem>{t.value_tangent_transposed, t.key_row}, t.tangent_grads,
                kTileRow);
  } else {
    __builtin_memset(t.tangent_grads, 0, count * kTileRow * sizeof(float));
  }
  if (t.softcap_grad) keep_products(a, t, count, keys);
  if (covered != Coverage::kWhole || !scores_are_products(a)) {
    score_tile(a, t.rows, count, first_key, keys, t.scores, t.softcap_grad);
  }
  score_tangent_tile(a, s, a.tangent, t.rows, count, first_key, keys, t.scores, t.softcap_grad, t.score_tangents);
  score_gradients(a, s, t, task, count, first_key, keys);
  pack_scores(t.scores, count, keys, t.weights, false);
  pack_scores(t.grads, count, keys, t.grad_scores, true);
  pack_scores(t.tangent_grads, count, keys, t.grad_tangents, true);
  if (task.computes_dkv) {
    const int64_t rows = elems<Elem>(count);
    gemm<true>(keys, t.value_row, rows, t.weights.over_rows(), B<Elem>{t.grad_out.b, t.grad_out.b_row}, t.grad_value,
               t.value_row);
    gemm<true>(keys, t.head_row, rows, t.grad_scores.over_rows(), B<Elem>{t.query.b, t.query.b_row}, t.grad_key, t.head_row);
    if (a.tangent.query.data) {
      gemm<true>(keys, t.head_row, rows, t.grad_tangents.over_rows(), B<Elem>{t.query_tangent.b, t.query_tangent.b_row},
                 t.grad_key, t.head_row);
    }
  }
  if (task.computes_dq) {
    float* to = t.grad_query + (first_row - task.row_begin) * t.head_row;
    gemm<true>(count, t.head_row, elems<Elem>(keys), t.grad_scores.over_keys(), B<Elem>{t.key.b, t.key.b_row}, to, t.head_row);
    if (a.tangent.key.data) {
      gemm<true>(count, t.head_row, elems<Elem>(keys), t.grad_tangents.over_keys(),
                 B<Elem>{t.key_tangent.b, t.key_tangent.b_row}, to, t.head_row);
    }
  }
}

void attention_jvp_backward(const AttentionJvpBackward& a, const AttentionTask& task, char* memory) {
  if constexpr (kBFloat16Pairs) {
    if (in_pairs(a)) return backward_task<JvpBackwardArrays<uint32_t>>(a, task, memory);
  }
  backward_task<JvpBackwardArrays<float>>(a, task, memory);
}

int64_t attention_jvp_backward_workspace(const Attention& a, int64_t rows) {
  return workspace_bytes<JvpBackwardArrays>(a, rows);
}

}  // namespace fastlm::FASTLM_ISA
