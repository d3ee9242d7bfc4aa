// Attention forward with its tangents (forward-mode derivative), in one pass. With ds the tangent of a score,
//   ds_ij = scale softcap'(q_i k_j) (dq_i k_j + q_i dk_j) + dmask_ij
//   dlse_i = sum_j p_ij ds_ij,  dout_i = sum_j keep_ij p_ij (ds_ij v_j + dv_j) - dlse_i out_i
// where the sink takes part in the first sum. The sums over keys go along with the online softmax, as out does: six products
// per tile where the forward has two. Products get p (ds - mean), with the mean of ds over the keys so far: p ds alone would
// lose digits in half precision where ds is large. When the mean changes, the sum of p (ds - mean) v changes by the difference
// times out.
#pragma once

#include "forward-inl.h"

namespace fastlm::FASTLM_ISA {

// The arrays of a task, besides those of the forward.
template <class Elem>
struct JvpArrays : ForwardArrays<Elem> {
  using Base = ForwardArrays<Elem>;
  Elem* query_tangent;    // (count, elems(head_dim))
  Elem* key_tangent;      // (elems(head_dim), kBlockKeys)
  Elem* value_tangent;    // (elems(kBlockKeys), value_dim)
  Elem* weights_by_ds;    // (kBlockRows, elems(kBlockKeys)): p (ds - mean), dropped as the weights are
  float* score_tangents;  // (kBlockRows, kBlockKeys): ds; floats of weights_by_ds are written over it
  float* softcap_grad;    // (kBlockRows, kBlockKeys); null without softcap
  float* out_tangent;     // (count, value_dim): sums of p ((ds - mean) v + dv)
  float* mean;            // (count,): of ds, weighted with p

  FASTLM_MEMBER JvpArrays(const Attention& a, int64_t count, Workspace& w) : Base(a, count, w) {
    query_tangent = w.take<Elem>(count * Base::query_row);
    key_tangent = w.take<Elem>(elems<Elem>(a.head_dim) * Base::key_row);
    value_tangent = w.take<Elem>(elems<Elem>(kBlockKeys) * Base::value_row);
    score_tangents = w.take<float>(kBlockRows * kTileRow);
    weights_by_ds =
        kValuesPerElem<Elem> == 2 ? w.take<Elem>(kBlockRows * kTileRow / 2) : reinterpret_cast<Elem*>(score_tangents);
    softcap_grad = a.softcap > 0.0f ? w.take<float>(kBlockRows * kTileRow) : nullptr;
    out_tangent = w.take<float>(count * Base::out_row);
    mean = w.take<float>(count);
  }
};

// Sets the maximum of a row to `to`, and rescales all of its sums.
template <class Elem>
static void raise_maximum(JvpArrays<Elem>& t, int64_t row, float to, float factor) {
  const F32 shrink = exp2_nonpositive(F32(rescale_exponent(t.maximum[row], to, factor)));
  float* out = t.out_tangent + row * t.out_row;
  for (int64_t d = 0; d < t.out_row; d += kLanes) (F32::load(out + d) * shrink).store(out + d);
  raise_maximum(static_cast<ForwardArrays<Elem>&>(t), row, to, factor);
}

// Adds a tile's tangents to a row's mean, given its weights p (keys,), and corrects the row's sums.
template <class Elem>
static void update_mean(JvpArrays<Elem>& t, int64_t row, const float* p, const float* tangents, int64_t keys) {
  F32 added(0.0f);
  const F32 before(t.mean[row]);
  for (int64_t k = 0; k < padded(keys); k += kLanes) {
    added = mul_add(F32::load(p + k), F32::load(tangents + k) - before, added);
  }
  const float total = sum(F32::load(t.sums + row * kLanes));
  const float change = total == 0.0f ? 0.0f : sum(added) / total;
  t.mean[row] += change;
  float *out = t.out + row * t.out_row, *out_tangent = t.out_tangent + row * t.out_row;
  for (int64_t d = 0; d < t.out_row; d += kLanes) {
    mul_add(F32(-change), F32::load(out + d), F32::load(out_tangent + d)).store(out_tangent + d);
  }
}

// Turns the tile's scores and their tangents into weights p and p (ds - mean), (count, keys), and updates the maxima, means and
// sums of the rows.
template <class Elem>
static void softmax_jvp_tile(const Attention& a, const Sequence& s, JvpArrays<Elem>& t, int64_t first_row, int64_t count,
                             int64_t first_key, int64_t keys) {
  const float factor = exponent_factor(a);
  const F32 scale(factor);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = first_row + r;
    float *scores = t.scores + r * kTileRow, *tangents = t.score_tangents + r * kTileRow;  // scores become p
    Elem *weights = t.weights + r * elems<Elem>(kTileRow), *by_ds = t.weights_by_ds + r * elems<Elem>(kTileRow);
    raise_if_exceeded(t, row, scores, keys, factor);
    const float maximum = finite_maximum(t, row);
    if (a.seeds) draw_keep(a, s, t.rows[row], first_key, t.keep);
    F32 sum = F32::load(t.sums + row * kLanes);
    const auto weigh = [&](const auto& exponent) FASTLM_LAMBDA {
      for (int64_t k = 0; k < padded(keys); k += kLanes) {
        const F32 p = exp2_nonpositive(exponent(F32::load(scores + k)));
        sum = sum + p;
        p.store(scores + k);
      }
    };
    if (is_far(maximum, factor)) {
      weigh([&](F32 x) FASTLM_LAMBDA { return (x - F32(maximum)) * scale; });
    } else {
      const F32 shift(-(maximum * factor));
      weigh([&](F32 x) FASTLM_LAMBDA { return mul_add(x, scale, shift); });
    }
    sum.store(t.sums + row * kLanes);
    update_mean(t, row, scores, tangents, keys);
    const F32 mean(t.mean[row]);
    for (int64_t k = 0; k < padded(keys); k += kLanes) {
      const F32 p = a.seeds ? F32::load(scores + k) * F32::load(t.keep + k) : F32::load(scores + k);
      const F32 p_ds = p * (F32::load(tangents + k) - mean);
      store_weights(p, weights, k);
      store_weights(p_ds, by_ds, k);
    }
  }
}

// Adds the tile's keys to the sums of rows [first_row, first_row + count).
template <class Elem>
static void jvp_tile(const AttentionJvp& a, const Sequence& s, JvpArrays<Elem>& t, int64_t first_row, int64_t count,
                     int64_t first_key, int64_t keys, Coverage covered) {
  const int64_t columns = padded(keys), depth = elems<Elem>(a.head_dim);
  const A<Elem> query{t.query + first_row * t.query_row, t.query_row, 1};
  const A<Elem> query_tangent{t.query_tangent + first_row * t.query_row, t.query_row, 1};
  const B<Elem> key{t.key, t.key_row}, key_tangent{t.key_tangent, t.key_row};
  gemm<false>(count, columns, depth, query, key, t.scores, kTileRow);
  product_tangents(a.tangent, count, columns, depth, query, query_tangent, key, key_tangent, t.score_tangents);
  finish_scores(a, t, first_row, count, first_key, keys, covered, t.softcap_grad);
  score_tangent_tile(a, s, a.tangent, t.rows + first_row, count, first_key, keys, t.scores, t.softcap_grad, t.score_tangents);
  softmax_jvp_tile(a, s, t, first_row, count, first_key, keys);
  const A<Elem> weights{t.weights, elems<Elem>(kTileRow), 1}, by_ds{t.weights_by_ds, elems<Elem>(kTileRow), 1};
  const B<Elem> value{t.value, t.value_row}, value_tangent{t.value_tangent, t.value_row};
  float *out = t.out + first_row * t.out_row, *out_tangent = t.out_tangent + first_row * t.out_row;
  gemm<true>(count, t.out_row, elems<Elem>(keys), weights, value, out, t.out_row);
  gemm<true>(count, t.out_row, elems<Elem>(keys), by_ds, value, out_tangent, t.out_row);
  if (a.tangent.value.data) gemm<true>(count, t.out_row, elems<Elem>(keys), weights, value_tangent, out_tangent, t.out_row);
}

// Loads keys and values [first_key, first_key + keys) and their tangents into the tiles.
template <class Elem>
static void load_keys(const AttentionJvp& a, const Sequence& s, int64_t kv_head, JvpArrays<Elem>& t, int64_t first_key,
                      int64_t keys) {
  load_keys(a, s, kv_head, static_cast<ForwardArrays<Elem>&>(t), first_key, keys);
  if (a.tangent.key.data) {
    key_rows(a, s, a.tangent.key, kv_head, first_key, keys, t.pointers);
    load_b_transposed(a.key.dtype, t.pointers, keys, a.head_dim, t.key_tangent, t.key_row);
  }
  if (a.tangent.value.data) {
    key_rows(a, s, a.tangent.value, kv_head, first_key, keys, t.pointers);
    load_b(a.value.dtype, t.pointers, keys, a.value_dim, t.value_tangent, t.value_row);
  }
}

// Finishes row r of a task: out as the forward does, then its tangent and that of the log-sum-exp.
template <class Elem>
static void finish_jvp_row(const AttentionJvp& a, const Sequence& s, JvpArrays<Elem>& t, int64_t r) {
  const int64_t query = t.rows[r].query, head = t.rows[r].head;
  float *out = t.out + r * t.out_row, *out_tangent = t.out_tangent + r * t.out_row;
  const float weights = sum(F32::load(t.sums + r * kLanes));
  const RowTotal total = finish_row(a, s, query, head, row_sums(t.maximum[r], weights), out);
  float lse_tangent = t.mean[r] * (weights * total.share);  // A sink has the rest of the weights.
  if (a.sinks && a.tangent.sinks && a.sinks[head] != -kInfinity) {
    const double sink = double(a.sinks[head]) * kLog2EDouble;
    lse_tangent += float(__builtin_exp2(sink - total.base - total.log_total)) * a.tangent.sinks[head];
  }
  for (int64_t d = 0; d < t.out_row; d += kLanes) {
    mul_add(F32(t.mean[r] - lse_tangent), F32::load(out + d), F32::load(out_tangent + d)).store(out_tangent + d);
  }
  write_row(a.out_tangent, s, query, head, out_tangent, total.share, a.value_dim);
  *a.lse_tangent.at(s.batch, head, s.q_first + query) = lse_tangent;
}

template <class Elem>
static void jvp_task(const AttentionJvp& a, const AttentionTask& task, char* memory) {
  Workspace workspace(memory);
  const int64_t count = task.row_end - task.row_begin;
  JvpArrays<Elem> t(a, count, workspace);
  const Sequence s = sequence(a, task.b);
  begin_rows(a, s, task, t);
  if (a.tangent.query.data) {
    query_rows(a, s, a.tangent.query, task.kv_head, task.row_begin, count, t.pointers);
    load_a(a.query.dtype, t.pointers, count, a.head_dim, t.query_tangent, t.query_row);
  }
  __builtin_memset(t.out_tangent, 0, count * t.out_row * sizeof(float));
  __builtin_memset(t.mean, 0, count * sizeof(float));
  const auto load = [&](int64_t key, int64_t keys) FASTLM_LAMBDA { load_keys(a, s, task.kv_head, t, key, keys); };
  for_tiles(a, task, t, load,
            [&](int64_t row, int64_t rows, int64_t key, int64_t keys, int64_t, Coverage covered)
                FASTLM_LAMBDA { jvp_tile(a, s, t, row, rows, key, seen_keys(t, row, key, keys), covered); });
  for (int64_t r = 0; r < count; ++r) finish_jvp_row(a, s, t, r);
}

void attention_jvp(const AttentionJvp& a, const AttentionTask& task, char* memory) {
  if constexpr (kBFloat16Pairs) {
    if (in_pairs(a)) return jvp_task<uint32_t>(a, task, memory);
  }
  jvp_task<float>(a, task, memory);
}

int64_t attention_jvp_workspace(const Attention& a, int64_t rows) { return workspace_bytes<JvpArrays>(a, rows); }

}  // namespace fastlm::FASTLM_ISA
