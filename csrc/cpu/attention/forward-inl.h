// Attention forward: each row of a task goes over the keys, tile by tile, with online softmax (Milakov & Gimelshein, 2018;
// Dao et al., "FlashAttention", 2022). The scores stay in the first-level cache.
//
// Each block of keys and values is loaded into tiles once and used by every row of the task. Tiles that no row sees are
// skipped. In tiles that every row sees whole, the products need no further work: the exponential applies the scale. All
// exponentials are in base 2: p = 2^(factor (score - maximum)); scores-inl.h explains the unit of the scores and the factor.
#pragma once

#include "scores-inl.h"
#include "gemv-inl.h"
#include "row_stats-inl.h"

namespace fastlm::FASTLM_ISA {

// The arrays of a task of `count` rows. Shapes are in elements, rows padded to whole vectors; *_row are strides between rows.
template <class Elem>
struct ForwardArrays {
  int64_t query_row, key_row, value_row, out_row;
  ScoreRow* rows;    // (count,)
  KeyRange* ranges;  // (ceil(count / kBlockRows),): the keys that each block of rows sees
  char** pointers;
  Elem* query;     // (count, elems(head_dim))
  Elem* key;       // (elems(head_dim), kBlockKeys)
  Elem* value;     // (elems(kBlockKeys), value_dim)
  Elem* weights;   // (kBlockRows, elems(kBlockKeys)); floats are written over the scores
  float* scores;   // (kBlockRows, kBlockKeys)
  float* keep;     // (kBlockKeys,)
  float* out;      // (count, value_dim)
  float* maximum;  // (count,)
  float* sums;     // (count, kLanes): a sum per lane, which are added up at the end
  RowStats stats;

  FASTLM_MEMBER ForwardArrays(const Attention& a, int64_t count, Workspace& w) {
    query_row = padded(elems<Elem>(a.head_dim)) + kLanes;
    key_row = kTileRow + kLanes;
    out_row = padded(a.value_dim);
    value_row = out_row + kLanes;
    rows = w.take<ScoreRow>(count);
    ranges = w.take<KeyRange>(ceil_div(count, kBlockRows));
    pointers = w.take<char*>(count > 2 * kGemvPointers ? count : 2 * kGemvPointers);
    query = w.take<Elem>(count * query_row);
    key = w.take<Elem>(elems<Elem>(a.head_dim) * key_row);
    value = w.take<Elem>(elems<Elem>(kBlockKeys) * value_row);
    scores = w.take<float>(kBlockRows * kTileRow);
    weights = kValuesPerElem<Elem> == 2 ? w.take<Elem>(kBlockRows * kTileRow / 2) : reinterpret_cast<Elem*>(scores);
    keep = w.take<float>(kBlockKeys);
    out = w.take<float>(count * out_row);
    maximum = w.take<float>(padded(count));
    sums = w.take<float>(count * kLanes);
    if (a.has_row_stats)
      stats = {w.take<float>(count * kLanes), w.take<float>(count * kLanes), w.take<uint32_t>(count * kLanes)};
  }
};

// Stores weights in the form in which gemm multiplies them with the values.
FASTLM_SIMD void store_weights(F32 p, float* to, int64_t k) { p.store(to + k); }
FASTLM_SIMD void store_weights(F32 p, uint32_t* to, int64_t k) { store_flushed(p, reinterpret_cast<BFloat16*>(to) + k); }

// A row's maximum is raised only when a score exceeds it by more than this many powers of 2. So weights may reach 256, which
// floats represent as precisely as 1, and a row is hardly ever rescaled after its first tiles.
constexpr float kHeadroom = 8.0f;

// Returns the exponent of the factor that converts weights relative to maximum `from` into weights relative to the larger
// maximum `to`. It rounds as the weights are rounded, so that the rounding errors cancel.
FASTLM_SIMD float rescale_exponent(float from, float to, float factor) {
  return is_far(to, factor) ? (from - to) * factor : from * factor - to * factor;
}

// Sets the maximum of a row to `to`, and rescales the row's sums and output.
template <class Elem>
static void raise_maximum(ForwardArrays<Elem>& t, int64_t row, float to, float factor) {
  const float exponent = rescale_exponent(t.maximum[row], to, factor);
  const F32 shrink = exp2_nonpositive(F32(exponent));
  float *sums = t.sums + row * kLanes, *out = t.out + row * t.out_row;
  if (t.stats.exponents) shift_exponents(t.stats.exponents + row * kLanes, sums, exponent, shrink);
  (F32::load(sums) * shrink).store(sums);
  for (int64_t d = 0; d < t.out_row; d += kLanes) (F32::load(out + d) * shrink).store(out + d);
  t.maximum[row] = to;
}

// Raises the maximum of a row if one of its scores (keys,) exceeds it by more than the headroom.
template <class Arrays>
FASTLM_SIMD void raise_if_exceeded(Arrays& t, int64_t row, const float* scores, int64_t keys, float factor) {
  const float headroom = kHeadroom < factor * -kLowest ? kHeadroom / factor : -kLowest;  // finite: -inf + inf would be NaN
  F32 most = F32::load(scores);
  for (int64_t k = kLanes; k < padded(keys); k += kLanes) most = max(most, F32::load(scores + k));
  if (any_less(F32(t.maximum[row] + headroom), most)) raise_maximum(t, row, largest(most), factor);
}

// Returns the maximum of a row, or 0 if the row has not seen a key.
template <class Elem>
FASTLM_SIMD float finite_maximum(const ForwardArrays<Elem>& t, int64_t row) {
  return t.maximum[row] == -kInfinity ? 0.0f : t.maximum[row];
}

// Turns the tile's scores into weights (count, keys), and updates the running maxima, sums and outputs of the rows.
template <bool kDropout, bool kStats, class Elem, class Weight>
static void softmax_tile(const AttentionForward& a, const Sequence& s, ForwardArrays<Elem>& t, int64_t first_row, int64_t count,
                         int64_t first_key, int64_t keys, Weight* weights) {
  const float factor = exponent_factor(a);
  const F32 scale(factor);
  for (int64_t r = 0; r < count; ++r, weights += elems<Weight>(kTileRow)) {
    const int64_t row = first_row + r;
    const float* scores = t.scores + r * kTileRow;
    raise_if_exceeded(t, row, scores, keys, factor);
    const float maximum = finite_maximum(t, row);
    if (kDropout) draw_keep(a, s, t.rows[row], first_key, t.keep);
    F32 sum = F32::load(t.sums + row * kLanes), exponents(0.0f);
    if (kStats) {
      update_largest(t.stats, row, scores, first_key, keys, sum);
      exponents = F32::load(t.stats.exponents + row * kLanes);
    }
    const auto weigh = [&](const auto& exponent) FASTLM_LAMBDA {
      for (int64_t k = 0; k < padded(keys); k += kLanes) {
        const F32 e = exponent(F32::load(scores + k)), p = exp2_nonpositive(e);
        sum = sum + p;
        if (kStats) exponents = mul_add(p, finite_exponent(e), exponents);
        store_weights(kDropout ? p * F32::load(t.keep + k) : p, weights, k);
      }
    };
    if (is_far(maximum, factor)) {
      weigh([&](F32 x) FASTLM_LAMBDA { return (x - F32(maximum)) * scale; });
    } else {
      const F32 shift(-(maximum * factor));
      weigh([&](F32 x) FASTLM_LAMBDA { return mul_add(x, scale, shift); });
    }
    sum.store(t.sums + row * kLanes);
    if (kStats) exponents.store(t.stats.exponents + row * kLanes);
  }
}

template <bool kDropout, class Elem, class Weight>
static void softmax_tile(const AttentionForward& a, const Sequence& s, ForwardArrays<Elem>& t, int64_t first_row, int64_t count,
                         int64_t first_key, int64_t keys, Weight* weights) {
  a.has_row_stats ? softmax_tile<kDropout, true>(a, s, t, first_row, count, first_key, keys, weights)
                  : softmax_tile<kDropout, false>(a, s, t, first_row, count, first_key, keys, weights);
}

template <class Elem, class Weight>
static void softmax_tile(const AttentionForward& a, const Sequence& s, ForwardArrays<Elem>& t, int64_t first_row, int64_t count,
                         int64_t first_key, int64_t keys, Weight* weights) {
  a.seeds ? softmax_tile<true>(a, s, t, first_row, count, first_key, keys, weights)
          : softmax_tile<false>(a, s, t, first_row, count, first_key, keys, weights);
}

// Turns products into scores, unless they are the same.
template <class Elem>
static void finish_scores(const Attention& a, ForwardArrays<Elem>& t, int64_t first_row, int64_t count, int64_t first_key,
                          int64_t keys, Coverage covered, float* softcap_grad = nullptr) {
  if (covered == Coverage::kWhole && scores_are_products(a)) return;
  score_tile(a, t.rows + first_row, count, first_key, keys, t.scores, softcap_grad);
}

// Adds the tile's keys to the outputs of rows [first_row, first_row + count): scores = q k^T, softmax, out += weights v.
template <class Elem>
static void forward_tile(const AttentionForward& a, const Sequence& s, ForwardArrays<Elem>& t, int64_t first_row, int64_t count,
                         int64_t first_key, int64_t keys, Coverage covered) {
  const A<Elem> query{t.query + first_row * t.query_row, t.query_row, 1};
  gemm<false>(count, padded(keys), elems<Elem>(a.head_dim), query, B<Elem>{t.key, t.key_row}, t.scores, kTileRow);
  finish_scores(a, t, first_row, count, first_key, keys, covered);
  softmax_tile(a, s, t, first_row, count, first_key, keys, t.weights);
  const A<Elem> weights{t.weights, elems<Elem>(kTileRow), 1};
  gemm<true>(count, t.out_row, elems<Elem>(keys), weights, B<Elem>{t.value, t.value_row}, t.out + first_row * t.out_row,
             t.out_row);
}

// Does the same for a task of few rows, all of them at once: keys and values are read in place. `end` is the end of the task's
// keys.
template <class Elem>
static void gemv_tile(const AttentionForward& a, const Sequence& s, ForwardArrays<Elem>& t, int64_t kv_head, int64_t count,
                      int64_t first_key, int64_t keys, int64_t end, Coverage covered) {
  const GemvRows key = gemv_rows(a, s, a.key, a.head_dim, kv_head, first_key, keys, end, t.pointers);
  const GemvRows value = gemv_rows(a, s, a.value, a.value_dim, kv_head, first_key, keys, end, t.pointers + kGemvPointers);
  gemv_scores(a.key.dtype, t.query, t.query_row, count, key, keys, a.head_dim, t.scores, kTileRow);
  finish_scores(a, t, 0, count, first_key, keys, covered);
  softmax_tile(a, s, t, 0, count, first_key, keys, t.scores);
  gemv_values(a.value.dtype, t.scores, kTileRow, count, value, keys, a.value_dim, t.out, t.out_row);
}

// Loads keys and values [first_key, first_key + keys) into the tiles.
template <class Elem>
static void load_keys(const Attention& a, const Sequence& s, int64_t kv_head, ForwardArrays<Elem>& t, int64_t first_key,
                      int64_t keys) {
  key_rows(a, s, a.key, kv_head, first_key, keys, t.pointers);
  load_b_transposed(a.key.dtype, t.pointers, keys, a.head_dim, t.key, t.key_row);
  key_rows(a, s, a.value, kv_head, first_key, keys, t.pointers);
  load_b(a.value.dtype, t.pointers, keys, a.value_dim, t.value, t.value_row);
}

// Multiplies a row by the factor, and writes it in the tensor's dtype.
static void write_row(const Rows& to, const Sequence& s, int64_t query, int64_t head, const float* from, float factor,
                      int64_t dim) {
  with_float_dtype(to.dtype, [&](auto type) FASTLM_LAMBDA {
    narrow_row(from, factor, dim, reinterpret_cast<decltype(type)*>(to.at(s.batch, head, s.q_first + query)));
  });
}

// Adds the sink to the sum, divides the row by the sum, and writes the row, its statistics and its log-sum-exp. Returns the
// sum.
static RowTotal finish_row(const AttentionForward& a, const Sequence& s, int64_t query, int64_t head, const RowSums& sums,
                           const float* out) {
  const float maximum = sums.maximum;
  const bool needs_log = a.lse.data || a.statistics.data || a.has_row_stats;
  const RowTotal row = row_total(a, head, maximum, sums.total, needs_log);
  write_row(a.out, s, query, head, out, row.share, a.value_dim);
  if (a.lse.data) *a.lse.at(s.batch, head, s.q_first + query) = float((row.base + row.log_total) / kLog2EDouble);
  if (a.statistics.data) {
    float* to = a.statistics.at(s.batch, head, 2 * (s.q_first + query));
    to[0] = maximum;
    to[1] = float(row.log_total);
  }
  if (a.has_row_stats) write_row_stats(a, s, query, head, sums, row);
  return row;
}

// A partial row is the result of one split of the keys: the row's RowSums in the first vector, then its output, not yet divided
// by the sum. Returns its length in floats.
FASTLM_SIMD int64_t partial_row(const Attention& a) { return kLanes + padded(a.value_dim); }

static void store_partial(const Attention& a, const RowSums& sums, const float* out, float* to) {
  __builtin_memcpy(to, &sums, sizeof(sums));
  __builtin_memcpy(to + kLanes, out, padded(a.value_dim) * sizeof(float));
}

// Combines the partial rows of `count` splits, `stride` floats apart, in their order: the outputs into the first, and the sums,
// which it returns.
static RowSums combine_splits(const Attention& a, float* partials, int64_t count, int64_t stride) {
  const float factor = exponent_factor(a);
  const auto sums_of = [&](int64_t i) FASTLM_LAMBDA {
    RowSums sums;
    __builtin_memcpy(&sums, partials + i * stride, sizeof(sums));
    return sums;
  };
  RowSums whole = kNoKeys;
  for (int64_t i = 0; i < count; ++i) {
    const float maximum = partials[i * stride];
    whole.maximum = maximum > whole.maximum ? maximum : whole.maximum;
  }
  const float base = whole.maximum == -kInfinity ? 0.0f : whole.maximum;
  for (int64_t i = 0; i < count; ++i) {
    const RowSums part = sums_of(i);
    const float exponent = rescale_exponent(part.maximum, base, factor), share = __builtin_exp2f(exponent);
    if (a.has_row_stats) add_row_stats(whole, part, exponent, share);
    whole.total += share * part.total;
    const F32 factor(share);
    for (int64_t d = kLanes; d < partial_row(a); d += kLanes) {
      const F32 added = factor * F32::load(partials + i * stride + d);
      (i == 0 ? added : F32::load(partials + d) + added).store(partials + d);
    }
  }
  return whole;
}

void attention_combine(const AttentionForward& a, const AttentionTask& task) {
  const Sequence s = sequence(a, task.b);
  const int64_t row = partial_row(a), rows = task.row_end - task.row_begin;
  for_rows(a, task.kv_head, task.row_begin, rows, [&](int64_t r, int64_t query, int64_t head) FASTLM_LAMBDA {
    float* partials = task.partial + r * row;
    const RowSums sums = combine_splits(a, partials, task.num_splits, rows * row);
    finish_row(a, s, query, head, sums, partials + kLanes);
  });
}

// Loads a task's queries and clears its sums.
template <class Elem>
static void begin_rows(const Attention& a, const Sequence& s, const AttentionTask& task, ForwardArrays<Elem>& t) {
  const int64_t count = task.row_end - task.row_begin;
  fill_score_rows(a, s, task.kv_head, task.row_begin, count, t.rows);
  query_rows(a, s, a.query, task.kv_head, task.row_begin, count, t.pointers);
  load_a(a.query.dtype, t.pointers, count, a.head_dim, t.query, t.query_row);
  __builtin_memset(t.out, 0, count * t.out_row * sizeof(float));
  __builtin_memset(t.sums, 0, count * kLanes * sizeof(float));
  for (int64_t r = 0; r < count; ++r) t.maximum[r] = -kInfinity;
  if (a.has_row_stats) begin_row_stats(t.stats, count);
}

// Calls tile(first_row, rows, first_key, keys, end, covered) for every tile of a task that some row sees, after load(first_key,
// keys) for its block of keys. `end` is the end of the task's keys. Rows count from the task's first.
template <class Elem, class Load, class Tile>
FASTLM_SIMD void for_tiles(const Attention& a, const AttentionTask& task, ForwardArrays<Elem>& t, const Load& load,
                           const Tile& tile) {
  const int64_t count = task.row_end - task.row_begin;
  const auto rows_from = [&](int64_t row) FASTLM_LAMBDA { return count - row < kBlockRows ? count - row : kBlockRows; };
  for (int64_t row = 0; row < count; row += kBlockRows) {
    t.ranges[row / kBlockRows] = key_range(t.rows + row, rows_from(row));
  }
  const KeyRange range = key_range(t.rows, count);
  const int64_t begin = (range.any_low > task.key_begin ? range.any_low : task.key_begin) / kBlockKeys * kBlockKeys;
  const int64_t end = range.any_high < task.key_end ? range.any_high : task.key_end;
  for (int64_t key = begin; key < end; key += kBlockKeys) {
    const int64_t keys = end - key < kBlockKeys ? end - key : kBlockKeys;
    bool loaded = false;
    for (int64_t row = 0; row < count; row += kBlockRows) {
      const KeyRange& seen = t.ranges[row / kBlockRows];
      const Coverage covered = coverage(a, t.rows + row, rows_from(row), seen, key, keys);
      if (covered == Coverage::kEmpty) continue;
      if (!loaded) load(key, keys);
      loaded = true;
      tile(row, rows_from(row), key, keys, end, covered);
    }
  }
}

// Returns how many of a block's keys some row of a tile sees: a causal limit may end the block early.
template <class Elem>
FASTLM_SIMD int64_t seen_keys(const ForwardArrays<Elem>& t, int64_t first_row, int64_t first_key, int64_t keys) {
  const int64_t seen = t.ranges[first_row / kBlockRows].any_high - first_key;
  return seen < keys ? seen : keys;
}

template <class Elem>
static void forward_task(const AttentionForward& a, const AttentionTask& task, char* memory) {
  Workspace workspace(memory);
  const int64_t count = task.row_end - task.row_begin;
  ForwardArrays<Elem> t(a, count, workspace);
  const Sequence s = sequence(a, task.b);
  begin_rows(a, s, task, t);
  const bool gemv = s.q_len * a.group <= kGemvRows;  // not `count`, which depends on the number of threads
  if constexpr (kValuesPerElem<Elem> == 1) {
    if (gemv) split_queries(a.key.dtype, t.query, t.query_row, count, a.head_dim);
  }
  const auto load = [&](int64_t key, int64_t keys) FASTLM_LAMBDA {
    if (!gemv) load_keys(a, s, task.kv_head, t, key, keys);
  };
  for_tiles(a, task, t, load,
            [&](int64_t row, int64_t rows, int64_t key, int64_t keys, int64_t end, Coverage covered) FASTLM_LAMBDA {
              if (gemv) return gemv_tile(a, s, t, task.kv_head, count, key, keys, end, covered);
              forward_tile(a, s, t, row, rows, key, seen_keys(t, row, key, keys), covered);
            });
  if (gemv) merge_outputs(a.value.dtype, t.out, t.out_row, count, a.value_dim);
  for (int64_t r = 0; r < count; ++r) {
    RowSums sums = row_sums(t.maximum[r], sum(F32::load(t.sums + r * kLanes)));
    if (a.has_row_stats) load_row_stats(t.stats, r, sums);
    const float* out = t.out + r * t.out_row;
    if (task.partial) {
      store_partial(a, sums, out, task.partial + r * partial_row(a));
    } else {
      finish_row(a, s, t.rows[r].query, t.rows[r].head, sums, out);
    }
  }
}

void attention_forward(const AttentionForward& a, const AttentionTask& task, char* memory) {
  if constexpr (kBFloat16Pairs) {
    if (in_pairs(a)) return forward_task<uint32_t>(a, task, memory);
  }
  forward_task<float>(a, task, memory);
}

int64_t attention_forward_workspace(const Attention& a, int64_t rows) { return workspace_bytes<ForwardArrays>(a, rows); }

int64_t attention_partial_row(const Attention& a) { return partial_row(a); }

}  // namespace fastlm::FASTLM_ISA
