// Attention forward: the rows of a unit walk over the keys, tile by tile, with online softmax (Milakov & Gimelshein, 2018;
// Dao et al., "FlashAttention", 2022). The scores live in the first-level cache alone.
//
// A block of keys and values is brought into tiles once and used by every row of the unit; tiles that no row sees are skipped,
// and tiles that every row sees whole go from the product straight to the exponential, which takes the scale along.
// Everything is in base 2: p = 2^(factor (score - maximum)), the unit of scores and the factor as in scores-inl.h.
#pragma once

#include "scores-inl.h"
#include "gemv-inl.h"
#include "../workspace.h"

namespace fastlm::FASTLM_ISA {

// The arrays of a unit. `rows` of them; a row of `out` is padded to whole vectors.
template <class Unit>
struct ForwardArrays {
  int64_t query_row, key_row, value_row, out_row;  // from one row of an array to the next
  ScoreRow* rows;
  char** pointers;
  Unit *query, *key, *value, *weights;
  float *scores, *keep, *out, *maximum, *sums;

  FASTLM_MEMBER ForwardArrays(const Attention& a, int64_t count, Workspace& w) {
    query_row = padded(units<Unit>(a.head_dim)) + kLanes;
    key_row = kTileRow + kLanes;
    out_row = padded(a.value_dim);
    value_row = out_row + kLanes;
    rows = w.take<ScoreRow>(count);
    pointers = w.take<char*>(count > 2 * kThinPointers ? count : 2 * kThinPointers);
    query = w.take<Unit>(count * query_row);
    key = w.take<Unit>(units<Unit>(a.head_dim) * key_row);
    value = w.take<Unit>(units<Unit>(kBlockKeys) * value_row);
    scores = w.take<float>(kBlockRows * kTileRow);
    weights = kNumbers<Unit> == 2 ? w.take<Unit>(kBlockRows * kTileRow / 2) : reinterpret_cast<Unit*>(scores);
    keep = w.take<float>(kBlockKeys);
    out = w.take<float>(count * out_row);
    maximum = w.take<float>(padded(count));
    sums = w.take<float>(count * kLanes);  // by lane, to be added up at the end
  }
};

// Weights of a row, as they are multiplied with the values.
FASTLM_SIMD void store_weights(F32 p, float* to, int64_t k) { p.store(to + k); }
FASTLM_SIMD void store_weights(F32 p, uint32_t* to, int64_t k) { p.store(reinterpret_cast<BFloat16*>(to) + k); }

// A row's maximum is raised only when a score is past it by more than this many powers of 2: weights may be up to 256, which
// floats hold as well as 1, and after its first tiles a row is hardly ever rescaled.
constexpr float kHeadroom = 8.0f;

// The exponent of what turns weights against one maximum into weights against a larger one. It takes the same roundings as the
// weights do, so that they cancel.
FASTLM_SIMD float rescale_exponent(float from, float to, float factor) {
  return is_far(to, factor) ? (from - to) * factor : from * factor - to * factor;
}

template <class Unit>
static void raise_maximum(ForwardArrays<Unit>& t, int64_t row, float to, float factor) {
  const F32 shrink = exp2_nonpositive(F32(rescale_exponent(t.maximum[row], to, factor)));
  float *sums = t.sums + row * kLanes, *out = t.out + row * t.out_row;
  (F32::load(sums) * shrink).store(sums);
  for (int64_t d = 0; d < t.out_row; d += kLanes) (F32::load(out + d) * shrink).store(out + d);
  t.maximum[row] = to;
}

// Turns scores into weights; the running maxima, sums and outputs of the rows follow.
template <bool kDropout, class Unit, class Weight>
static void softmax_tile(const Attention& a, const Sequence& s, ForwardArrays<Unit>& t, int64_t first_row, int64_t count,
                         int64_t first_key, int64_t keys, Weight* weights) {
  const float factor = exponent_factor(a);
  const float headroom = kHeadroom < factor * -kLowest ? kHeadroom / factor : -kLowest;  // finite: -inf + inf would be NaN
  const F32 scale(factor);
  for (int64_t r = 0; r < count; ++r, weights += units<Weight>(kTileRow)) {
    const int64_t row = first_row + r;
    const float* scores = t.scores + r * kTileRow;
    F32 most = F32::load(scores);
    for (int64_t k = kLanes; k < padded(keys); k += kLanes) most = max(most, F32::load(scores + k));
    if (any_less(F32(t.maximum[row] + headroom), most)) raise_maximum(t, row, largest(most), factor);
    const float maximum = t.maximum[row] == -kInfinity ? 0.0f : t.maximum[row];  // 0 for a row that has not seen a key
    if (kDropout) draw_keep(a, s, t.rows[row], first_key, t.keep);
    F32 sum = F32::load(t.sums + row * kLanes);
    const auto weigh = [&](const auto& exponent) FASTLM_LAMBDA {
      for (int64_t k = 0; k < padded(keys); k += kLanes) {
        const F32 p = exp2_nonpositive(exponent(F32::load(scores + k)));
        sum = sum + p;
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
  }
}

template <class Unit, class Weight>
static void softmax_tile(const Attention& a, const Sequence& s, ForwardArrays<Unit>& t, int64_t first_row, int64_t count,
                         int64_t first_key, int64_t keys, Weight* weights) {
  a.seeds ? softmax_tile<true>(a, s, t, first_row, count, first_key, keys, weights)
          : softmax_tile<false>(a, s, t, first_row, count, first_key, keys, weights);
}

// Turns products into scores, where something is between the two.
template <class Unit>
static void finish_scores(const Attention& a, ForwardArrays<Unit>& t, int64_t first_row, int64_t count, int64_t first_key,
                          int64_t keys, Coverage covered) {
  if (covered == Coverage::kWhole && scores_are_products(a)) return;
  score_tile(a, t.rows + first_row, count, first_key, keys, t.scores);
}

template <class Unit>
static void forward_tile(const Attention& a, const Sequence& s, ForwardArrays<Unit>& t, int64_t first_row, int64_t count,
                         int64_t first_key, int64_t keys, Coverage covered) {
  const Left<Unit> query{t.query + first_row * t.query_row, t.query_row, 1};
  product<false>(count, padded(keys), units<Unit>(a.head_dim), query, Right<Unit>{t.key, t.key_row}, t.scores, kTileRow);
  finish_scores(a, t, first_row, count, first_key, keys, covered);
  softmax_tile(a, s, t, first_row, count, first_key, keys, t.weights);
  const Left<Unit> weights{t.weights, units<Unit>(kTileRow), 1};
  product<true>(count, t.out_row, units<Unit>(keys), weights, Right<Unit>{t.value, t.value_row}, t.out + first_row * t.out_row,
                t.out_row);
}

// The same for a few rows, which are all of the unit: keys and values stay where they are. `end` is that of the unit's keys.
template <class Unit>
static void thin_tile(const Attention& a, const Sequence& s, ForwardArrays<Unit>& t, int64_t kv_head, int64_t count,
                      int64_t first_key, int64_t keys, int64_t end, Coverage covered) {
  const ThinRows key = thin_rows(a, s, a.key, a.head_dim, kv_head, first_key, keys, end, t.pointers);
  const ThinRows value = thin_rows(a, s, a.value, a.value_dim, kv_head, first_key, keys, end, t.pointers + kThinPointers);
  thin_scores(a.key.dtype, t.query, t.query_row, count, key, keys, a.head_dim, t.scores, kTileRow);
  finish_scores(a, t, 0, count, first_key, keys, covered);
  softmax_tile(a, s, t, 0, count, first_key, keys, t.scores);
  thin_values(a.value.dtype, t.scores, kTileRow, count, value, keys, a.value_dim, t.out, t.out_row);
}

template <class Unit>
static void load_keys(const Attention& a, const Sequence& s, int64_t kv_head, ForwardArrays<Unit>& t, int64_t first_key,
                      int64_t keys) {
  key_rows(a, s, a.key, kv_head, first_key, keys, t.pointers);
  load_transposed(a.key.dtype, t.pointers, keys, a.head_dim, t.key, t.key_row);
  key_rows(a, s, a.value, kv_head, first_key, keys, t.pointers);
  load_right(a.value.dtype, t.pointers, keys, a.value_dim, t.value, t.value_row);
}

// log2(2^a + 2^b); neither is +inf, and NaN stays.
FASTLM_SIMD double log2_of_sum(double a, double b) {
  const double high = b > a ? b : a, low = b > a ? a : b;
  return low == -double(kInfinity) ? high : high + __builtin_log2(1.0 + __builtin_exp2(low - high));
}

// Lets the sink join, divides by the sum, and writes the row with its statistics and its log-sum-exp.
static void finish_row(const AttentionForward& a, const Sequence& s, int64_t query, int64_t head, float maximum, float total,
                       const float* out) {
  constexpr double kLog2EDouble = 1.4426950408889634;
  const float factor = exponent_factor(a);
  const bool empty = total == 0.0f;  // of what a row sees, one weight is near 1
  // What weights are relative to, as an exponent of 2, and log2 of their sum.
  const double base = empty ? 0.0 : is_far(maximum, factor) ? double(maximum) * factor : double(maximum * factor);
  const bool read = a.sinks || a.lse.data || a.statistics.data;  // a logarithm takes as long as a short row's output
  double log_total = empty || !read ? -double(kInfinity) : __builtin_log2(double(total));
  float share = empty ? 0.0f : 1.0f / total;
  if (a.sinks) {
    const double sink = double(a.sinks[head]) * kLog2EDouble;
    log_total = sink != sink ? sink : log2_of_sum(log_total, sink - base);
    if (!empty) share = float(__builtin_exp2(-log_total));
    if (sink != sink) share = float(sink);
  }
  with_float_dtype(a.out.dtype, [&](auto type) FASTLM_LAMBDA {
    auto* to = reinterpret_cast<decltype(type)*>(a.out.at(s.batch, head, s.q_first + query));
    narrow_row(out, share, a.value_dim, to);
  });
  if (a.lse.data) *a.lse.at(s.batch, head, s.q_first + query) = float((base + log_total) / kLog2EDouble);
  if (a.statistics.data) {
    float* to = a.statistics.at(s.batch, head, 2 * (s.q_first + query));
    to[0] = maximum;
    to[1] = float(log_total);
  }
}

// What a unit with a part of the keys leaves of a row: its maximum, its sum and its output, not yet divided by the sum.
FASTLM_SIMD int64_t partial_row(const Attention& a) { return kLanes + padded(a.value_dim); }

static void store_partial(const Attention& a, float maximum, float total, const float* out, float* to) {
  to[0] = maximum;
  to[1] = total;
  __builtin_memcpy(to + kLanes, out, padded(a.value_dim) * sizeof(float));
}

// The parts of a row, `stride` apart, become one, in their order, in the first.
static void combine_parts(const Attention& a, float* parts, int64_t count, int64_t stride) {
  const float factor = exponent_factor(a);
  float maximum = -kInfinity;
  for (int64_t i = 0; i < count; ++i) maximum = parts[i * stride] > maximum ? parts[i * stride] : maximum;
  const float base = maximum == -kInfinity ? 0.0f : maximum;
  float total = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float share = __builtin_exp2f(rescale_exponent(parts[i * stride], base, factor));
    total += share * parts[i * stride + 1];
    const F32 factor(share);
    for (int64_t d = kLanes; d < partial_row(a); d += kLanes) {
      const F32 part = factor * F32::load(parts + i * stride + d);
      (i == 0 ? part : F32::load(parts + d) + part).store(parts + d);
    }
  }
  parts[0] = maximum;
  parts[1] = total;
}

void attention_combine(const AttentionForward& a, const AttentionUnit& u) {
  const Sequence s = sequence(a, u.b);
  const int64_t row = partial_row(a), rows = u.row_end - u.row_begin;
  for_rows(a, u.kv_head, u.row_begin, rows, [&](int64_t r, int64_t query, int64_t head) FASTLM_LAMBDA {
    float* parts = u.partial + r * row;
    combine_parts(a, parts, u.parts, rows * row);
    finish_row(a, s, query, head, parts[0], parts[1], parts + kLanes);
  });
}

template <class Unit>
static void forward_unit(const AttentionForward& a, const AttentionUnit& u, char* memory) {
  Workspace workspace(memory);
  const int64_t count = u.row_end - u.row_begin;
  ForwardArrays<Unit> t(a, count, workspace);
  const Sequence s = sequence(a, u.b);
  fill_score_rows(a, s, u.kv_head, u.row_begin, count, t.rows);
  query_rows(a, s, a.query, u.kv_head, u.row_begin, count, t.pointers);
  load_left(a.query.dtype, t.pointers, count, a.head_dim, t.query, t.query_row);
  __builtin_memset(t.out, 0, count * t.out_row * sizeof(float));
  __builtin_memset(t.sums, 0, count * kLanes * sizeof(float));
  for (int64_t r = 0; r < count; ++r) t.maximum[r] = -kInfinity;
  const bool thin = s.q_len * a.group <= kThinRows;  // of the sequence, not of the unit, which depends on the threads
  const KeyRange range = key_range(t.rows, count);
  const int64_t begin = (range.any_low > u.key_begin ? range.any_low : u.key_begin) / kBlockKeys * kBlockKeys;
  const int64_t end = range.any_high < u.key_end ? range.any_high : u.key_end;
  for (int64_t key = begin; key < end; key += kBlockKeys) {
    const int64_t keys = end - key < kBlockKeys ? end - key : kBlockKeys;
    bool loaded = false;
    for (int64_t row = 0; row < count; row += kBlockRows) {
      const int64_t rows = count - row < kBlockRows ? count - row : kBlockRows;
      const KeyRange seen = key_range(t.rows + row, rows);
      const Coverage covered = coverage(a, t.rows + row, rows, seen, key, keys);
      if (covered == Coverage::kEmpty) continue;
      if (thin) {
        thin_tile(a, s, t, u.kv_head, count, key, keys, end, covered);
        continue;
      }
      if (!loaded) load_keys(a, s, u.kv_head, t, key, keys);
      loaded = true;
      const int64_t seen_keys = seen.any_high - key < keys ? seen.any_high - key : keys;  // causality ends blocks early
      forward_tile(a, s, t, row, rows, key, seen_keys, covered);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const float total = sum(F32::load(t.sums + r * kLanes)), *out = t.out + r * t.out_row;
    if (u.partial) {
      store_partial(a, t.maximum[r], total, out, u.partial + r * partial_row(a));
    } else {
      finish_row(a, s, t.rows[r].query, t.rows[r].head, t.maximum[r], total, out);
    }
  }
}

void attention_forward(const AttentionForward& a, const AttentionUnit& u, char* memory) {
  if constexpr (kBFloat16Pairs) {
    if (in_pairs(a)) return forward_unit<uint32_t>(a, u, memory);
  }
  forward_unit<float>(a, u, memory);
}

int64_t attention_forward_workspace(const Attention& a, int64_t rows) {
  Workspace workspace(nullptr);
  if (in_pairs(a)) {
    ForwardArrays<uint32_t>(a, rows, workspace);
  } else {
    ForwardArrays<float>(a, rows, workspace);
  }
  return workspace.bytes();
}

int64_t attention_partial_row(const Attention& a) { return partial_row(a); }

}  // namespace fastlm::FASTLM_ISA
