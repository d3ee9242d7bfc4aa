// What a forward knows of a row when it has gone over the keys: the sum of the weights and, if they are wanted, the row's
// entropy and largest score.
//
// Weights are relative to 2^base here, p_j = 2^e_j. With the total P = sum_j p_j, and T = sum_j p_j e_j, which is summed up
// along with P, the entropy is -sum_j (p_j / P) log (p_j / P) = ln 2 (log2 P - T / P). A sink takes part as one more key.
#pragma once

#include "scores-inl.h"

namespace fastlm::FASTLM_ISA {

constexpr double kLog2EDouble = 1.4426950408889634;

// Returns log2(2^a + 2^b). Neither may be +inf; NaN stays NaN.
FASTLM_SIMD double log2_of_sum(double a, double b) {
  const double high = b > a ? b : a, low = b > a ? a : b;
  return low == -double(kInfinity) ? high : high + __builtin_log2(1.0 + __builtin_exp2(low - high));
}

// The sums of a row.
struct RowSums {
  float maximum;        // of the scores, or lower by less than the headroom; weights are relative to it
  float total;          // of the weights
  float exponents;      // of p times log2 p
  float largest;        // the largest score
  int32_t largest_key;  // and its key
};
constexpr RowSums kNoKeys{-kInfinity, 0.0f, 0.0f, -kInfinity, -1};

// Returns the sums of a row without entropy and largest score.
FASTLM_SIMD RowSums row_sums(float maximum, float total) {
  RowSums sums = kNoKeys;
  sums.maximum = maximum;
  sums.total = total;
  return sums;
}

// The total of a row's weights and its sink.
struct RowTotal {
  double base, log_total;  // Weights are relative to 2^base; log_total is log2 of their sum.
  float share;             // 1 / sum
};

// A logarithm takes as long as the output of a short row, so it is computed only if something reads it.
static RowTotal row_total(const Attention& a, int64_t head, float maximum, float total, bool needs_log) {
  const float factor = exponent_factor(a);
  const bool empty = total == 0.0f;  // The row sees no key: otherwise its largest weight is near 1 or above.
  const double base = empty ? 0.0 : is_far(maximum, factor) ? double(maximum) * factor : double(maximum * factor);
  double log_total = empty || !(needs_log || a.sinks) ? -double(kInfinity) : __builtin_log2(double(total));
  float share = empty ? 0.0f : 1.0f / total;
  if (a.sinks) {
    const double sink = double(a.sinks[head]) * kLog2EDouble;
    log_total = sink != sink ? sink : log2_of_sum(log_total, sink - base);
    if (!empty) share = float(__builtin_exp2(-log_total));
    if (sink != sink) share = float(sink);
  }
  return {base, log_total, share};
}

// ---- entropy and largest score ----------------------------------------------------------------------------------------------

// The rows' statistics while a task runs, by lane. The pointers are null if they are not wanted.
struct RowStats {
  float* exponents = nullptr;       // (count, kLanes): sums of p times its exponent
  float* largest = nullptr;         // (count, kLanes): the largest score; NaN if one is NaN and another +inf
  uint32_t* largest_key = nullptr;  // (count, kLanes): the first key of the vector that has it
};

static void begin_row_stats(RowStats& t, int64_t count) {
  __builtin_memset(t.exponents, 0, count * kLanes * sizeof(float));
  for (int64_t i = 0; i < count * kLanes; ++i) t.largest[i] = -kInfinity;
}

// Returns exponents, raised where the weight is 0, so that its product with them is 0.
FASTLM_SIMD F32 finite_exponent(F32 e) { return max(F32(-1000.0f), e); }

// Corrects the sums of p times its exponent when a row's maximum is raised, which adds `exponent` to each: p becomes p shrink.
// `sums` are those of p before.
FASTLM_SIMD void shift_exponents(float* exponents, const float* sums, float exponent, F32 shrink) {
  (mul_add(finite_exponent(F32(exponent)), F32::load(sums), F32::load(exponents)) * shrink).store(exponents);
}

// Updates the largest score of a row, and its key, by the scores (keys,). `sums` are the sums of the row's weights before them:
// they show a NaN that came before, but not one beside +inf, which makes them NaN itself.
FASTLM_SIMD void update_largest(const RowStats& t, int64_t row, const float* scores, int64_t first_key, int64_t keys,
                                F32 sums) {
  float* at = t.largest + row * kLanes;
  const F32 before = F32::load(at), finite(-kLowest);
  F32 largest = before, key = as_float(U32::load(t.largest_key + row * kLanes));
  for (int64_t k = 0; k < padded(keys); k += kLanes) {
    const F32 x = F32::load(scores + k);
    key = select_less(largest, x, as_float(U32(uint32_t(first_key + k))), key);
    largest = select_less(largest, x, x, largest);
  }
  if (any_less(finite, largest)) {
    bool has_nan = any_nan(sums) && !any_less(finite, before);
    for (int64_t k = 0; k < padded(keys); k += kLanes) has_nan |= any_nan(F32::load(scores + k));
    if (has_nan) largest = F32(__builtin_nanf(""));
  }
  largest.store(at);
  as_bits(key).store(t.largest_key + row * kLanes);
}

// Adds up a row's statistics over the lanes. sums.total is known.
static void load_row_stats(const RowStats& t, int64_t row, RowSums& sums) {
  sums.exponents = sum(F32::load(t.exponents + row * kLanes));
  const float* score = t.largest + row * kLanes;
  const uint32_t* key = t.largest_key + row * kLanes;
  sums.largest = largest(F32::load(score));
  uint32_t first = uint32_t(-1);
  for (uint32_t lane = 0; lane < uint32_t(kLanes); ++lane) {
    const uint32_t at = score[lane] == sums.largest ? key[lane] + lane : uint32_t(-1);
    first = at < first ? at : first;
  }
  if (sums.largest != -kInfinity) sums.largest_key = int32_t(first);
  // A total of NaN comes from a score of NaN, or of +inf, which is larger than the finite ones.
  if (sums.total != sums.total && sums.largest != kInfinity) sums.largest = sums.total;
}

// Adds the statistics of a split of the keys, whose weights are multiplied by share = 2^exponent, to those of the whole row.
static void add_row_stats(RowSums& whole, const RowSums& part, float exponent, float share) {
  const float finite = exponent < -1000.0f ? -1000.0f : exponent;
  whole.exponents += share * (part.exponents + finite * part.total);
  if (part.largest <= whole.largest || whole.largest != whole.largest) return;
  whole.largest = part.largest;
  whole.largest_key = part.largest_key;
}

// Writes the row's entropy, its largest score in natural units, and that one's key.
static void write_row_stats(const AttentionForward& a, const Sequence& s, int64_t query, int64_t head, const RowSums& sums,
                            const RowTotal& row) {
  const int64_t at = s.q_first + query;
  const double keys = double(sums.total) * row.share;  // the share of the keys in the row's weights
  double entropy = sums.total == 0.0f ? 0.0 : keys * row.log_total - double(sums.exponents) * row.share;
  if (a.sinks && a.sinks[head] != -kInfinity) {
    const double exponent = double(a.sinks[head]) * kLog2EDouble - row.base - row.log_total;
    if (!(exponent <= -1000.0)) entropy -= __builtin_exp2(exponent) * exponent;
  }
  *a.entropy.at(s.batch, head, at) = entropy < 0.0 ? 0.0f : float(entropy / kLog2EDouble);
  *a.max_logit.at(s.batch, head, at) = sums.largest * (scores_are_products(a) ? a.scale : 1.0f);
  *a.max_key.at(s.batch, head, at) = sums.largest_key;
}

}  // namespace fastlm::FASTLM_ISA
