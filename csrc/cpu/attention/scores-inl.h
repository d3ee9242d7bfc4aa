// The scores of a tile: which keys each row sees, how products become scores, and dropout.
#pragma once

#include "../../common/philox.h"
#include "attention.h"
#include "../gemm/tiles-inl.h"
#include "../workspace.h"

namespace fastlm::FASTLM_ISA {

constexpr float kInfinity = __builtin_inff(), kLowest = -0x1.fffffep+127f, kSmallest = 0x1p-126f;
constexpr float kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e43p-1f;
constexpr int64_t kTileRow = kBlockKeys;  // stride between the rows of a tile of scores

// Returns whether the elements of tiles are pairs of bfloat16.
static bool in_pairs(const Attention& a) { return kBFloat16Pairs && a.query.dtype == kBFloat16; }

// Returns the bytes of Arrays<Elem> for a task of so many rows.
template <template <class> class Arrays>
static int64_t workspace_bytes(const Attention& a, int64_t rows) {
  Workspace workspace(nullptr);
  if (in_pairs(a)) {
    Arrays<uint32_t>(a, rows, workspace);
  } else {
    Arrays<float>(a, rows, workspace);
  }
  return workspace.bytes();
}

// A row of a group: which query and head it is, and what its scores depend on.
struct ScoreRow {
  int64_t low, high;  // the row sees the keys [low, high)
  int64_t query, head, position;
  float slope;
  const char* mask;  // the mask's row, from key 0 on
};

// Calls f(row, query, head) for `count` rows of a group, from row `first` on.
template <class F>
FASTLM_SIMD void for_rows(const Attention& a, int64_t kv_head, int64_t first, int64_t count, const F& f) {
  int64_t query = first / a.group, member = first % a.group;
  for (int64_t r = 0; r < count; ++r) {
    f(r, query, kv_head * a.group + member);
    if (++member == a.group) {
      member = 0;
      ++query;
    }
  }
}

static void fill_score_rows(const Attention& a, const Sequence& s, int64_t kv_head, int64_t first, int64_t count,
                            ScoreRow* rows) {
  for_rows(a, kv_head, first, count, [&](int64_t r, int64_t query, int64_t head) FASTLM_LAMBDA {
    const int64_t position = query + s.place.position;
    const int64_t low = position - a.left, high = position + a.right + 1;
    rows[r] = {low > 0 ? low : 0, high < s.k_len ? high : s.k_len, query, head, position, 0.0f, nullptr};
    if (a.slopes) rows[r].slope = a.slopes[s.b * a.slope_batch + head];
    if (a.mask.data) rows[r].mask = a.mask.at(s.b, head, query);
  });
}

// Fills `rows` with the addresses of rows [first, first + count) of a group in a tensor of queries.
static void query_rows(const Attention& a, const Sequence& s, const Rows& t, int64_t kv_head, int64_t first, int64_t count,
                       char** rows) {
  for_rows(a, kv_head, first, count,
           [&](int64_t r, int64_t query, int64_t head) FASTLM_LAMBDA { rows[r] = t.at(s.batch, head, s.q_first + query); });
}

// Fills `rows` with the addresses of keys [first, first + count) in a tensor of keys or values. The rows of a page, or of a
// sequence without pages, lie t.row apart.
static void key_rows(const Attention& a, const Sequence& s, const Rows& t, int64_t kv_head, int64_t first, int64_t count,
                     char** rows) {
  for (int64_t k = 0; k < count;) {
    const int64_t in_page = a.block_table ? a.page - (first + k) % a.page : count;
    const int64_t end = k + in_page < count ? k + in_page : count;
    for (char* at = key_row(a, s, t, kv_head, first + k); k < end; ++k, at += t.row) rows[k] = at;
  }
}

// ---- which tiles need work -------------------------------------------------------------------------------------------------

// Every key that some row of a block sees is in [any_low, any_high). Every row sees the keys in [all_low, all_high).
struct KeyRange {
  int64_t any_low, any_high, all_low, all_high;
};

static KeyRange key_range(const ScoreRow* rows, int64_t count) {
  KeyRange range{kUnlimited, 0, 0, kUnlimited};
  for (int64_t r = 0; r < count; ++r) {
    if (rows[r].low < rows[r].high) {
      range.any_low = rows[r].low < range.any_low ? rows[r].low : range.any_low;
      range.any_high = rows[r].high > range.any_high ? rows[r].high : range.any_high;
    }
    range.all_low = rows[r].low > range.all_low ? rows[r].low : range.all_low;
    range.all_high = rows[r].high < range.all_high ? rows[r].high : range.all_high;
  }
  return range;
}

enum class Coverage { kEmpty, kPartial, kWhole };

// Returns whether the mask hides all, some or none of a tile's keys. A mask row that several queries share is read once.
static Coverage mask_coverage(const Attention& a, const ScoreRow* rows, int64_t count, int64_t first_key, int64_t keys) {
  if (!a.mask.data) return Coverage::kWhole;
  bool any = false, all = a.mask_is_bool;  // a float mask adds something
  const char* seen = nullptr;
  for (int64_t r = 0; r < count && !(any && !all); ++r) {
    if (rows[r].mask == seen) continue;
    seen = rows[r].mask;
    const int64_t n = a.mask_key ? keys : 1;
    if (a.mask_is_bool) {
      const char* m = seen + (a.mask_key ? first_key : 0);
      unsigned some = 0, every = 1;
      for (int64_t k = 0; k < n; ++k) {
        some |= m[k] != 0;
        every &= m[k] != 0;
      }
      any |= some != 0;
      all &= every != 0;
    } else {
      with_float_dtype(a.mask.dtype, [&](auto type) FASTLM_LAMBDA {
        using T = decltype(type);
        const T* m = reinterpret_cast<const T*>(seen) + (a.mask_key ? first_key : 0);
        float values[kBlockKeys];
        widen_row(m, n, values);
        for (int64_t k = 0; k < n; ++k) any |= !(values[k] < kLowest);  // -inf alone is masked; NaN is not
      });
    }
  }
  return all ? Coverage::kWhole : any ? Coverage::kPartial : Coverage::kEmpty;
}

// Returns whether the rows of a block see none, some or all of the keys [first_key, first_key + keys).
static Coverage coverage(const Attention& a, const ScoreRow* rows, int64_t count, const KeyRange& range, int64_t first_key,
                         int64_t keys) {
  if (range.any_high <= first_key || range.any_low >= first_key + keys) return Coverage::kEmpty;
  const Coverage mask = mask_coverage(a, rows, count, first_key, keys);
  const bool whole = range.all_low <= first_key && range.all_high >= first_key + kBlockKeys;
  return mask == Coverage::kWhole && !whole ? Coverage::kPartial : mask;
}

// ---- from products to scores -----------------------------------------------------------------------------------------------
//
// All scores of a call have the same unit, and a weight is 2^(factor (score - maximum)). If the score is the product times a
// positive scale, with nothing added, scores are kept as products, and a tile that every row sees whole needs no further work.
// Otherwise scores are in natural units, summed as torch sums them: in units of log2, the most negative float of a mask would
// overflow.

static bool scores_are_products(const Attention& a) {
  const bool has_bias = a.slopes || (a.mask.data && !a.mask_is_bool);
  return a.softcap == 0.0f && !has_bias && a.scale > 0.0f && a.scale < 0x1p+127f;
}

static float exponent_factor(const Attention& a) { return scores_are_products(a) ? a.scale * kLog2E : kLog2E; }

// Returns whether a row's maximum is far from 0. Then factor * score - factor * maximum, in one fused multiply-add, would show
// the rounding error of the second product, which at 2^31 exceeds any exponent. Such rows subtract first, which is exact near
// the maximum.
constexpr float kFar = 128.0f;
FASTLM_SIMD bool is_far(float maximum, float factor) {
  const float exponent = maximum * factor;
  return exponent > kFar || exponent < -kFar;
}

struct Lanes {
  float lane[kBlockKeys];
  constexpr Lanes() : lane() {
    for (int k = 0; k < kBlockKeys; ++k) lane[k] = float(k);
  }
};
alignas(64) constexpr Lanes kKeyOfLane;

// Loads a row of a float mask, whose keys are `stride` elements apart, into bias (keys,), padded to whole vectors.
static void load_floats(int dtype, const char* row, int64_t stride, int64_t first_key, int64_t keys, float* bias) {
  with_float_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    widen_row(reinterpret_cast<const decltype(type)*>(row) + stride * first_key, stride ? keys : 1, bias);
  });
  for (int64_t k = 1; !stride && k < padded(keys); ++k) bias[k] = bias[0];
}

// Loads what the mask adds to the scores of a row, -inf where it hides a key, into bias (keys,), padded to whole vectors.
static void load_bias(const Attention& a, const char* mask, int64_t first_key, int64_t keys, float* bias) {
  if (!a.mask_is_bool) return load_floats(a.mask.dtype, mask, a.mask_key, first_key, keys, bias);
  const int64_t n = a.mask_key ? keys : 1;
  widen_row(reinterpret_cast<const uint8_t*>(mask) + a.mask_key * first_key, n, bias);
  for (int64_t k = 0; k < padded(n); ++k) bias[k] = bias[k] != 0.0f ? 0.0f : -kInfinity;
  for (int64_t k = 1; !a.mask_key && k < padded(keys); ++k) bias[k] = bias[0];
}

// Returns the factor of products in the softcap's tanh, limited to finite values, so that a product of 0 stays 0.
static float softcap_factor(const Attention& a) {
  const float factor = a.scale / a.softcap;
  return factor > -kLowest ? -kLowest : factor < kLowest ? kLowest : factor;
}

// Turns a tile of products (count, keys) into scores, -inf where a row does not see a key. If softcap_grad is given, it gets
// the derivative of the softcap, 1 - tanh^2, in the same shape.
template <bool kCap, bool kSlope, bool kMask>
static void score_tile(const Attention& a, const ScoreRow* rows, int64_t count, int64_t first_key, int64_t keys, float* scores,
                       float* softcap_grad) {
  const F32 factor(kCap ? softcap_factor(a) : scores_are_products(a) ? 1.0f : a.scale);
  const F32 cap(a.softcap), hidden(-kInfinity), one(1.0f);
  alignas(64) float bias[kBlockKeys];
  const char* loaded = nullptr;
  for (int64_t r = 0; r < count; ++r) {
    const ScoreRow& row = rows[r];
    if (kMask && row.mask != loaded) load_bias(a, loaded = row.mask, first_key, keys, bias);
    const F32 low(float(row.low - first_key)), high(float(row.high - first_key)), slope(row.slope);
    const F32 position(float(row.position - first_key));  // an integer, which a float holds exactly up to 2^24
    for (int64_t k = 0; k < padded(keys); k += kLanes) {
      float* at = scores + r * kTileRow + k;
      const F32 lane = F32::load(kKeyOfLane.lane + k);
      F32 x = factor * F32::load(at);
      if (kCap) {
        const F32 t = tanh(x);
        if (softcap_grad) (one - t * t).store(softcap_grad + r * kTileRow + k);
        x = cap * t;
      }
      if (kSlope) {
        const F32 distance = position - lane;
        x = x - slope * max(distance, F32(0.0f) - distance);
      }
      if (kMask) {
        const F32 b = F32::load(bias + k);
        x = select_less(b, F32(kLowest), hidden, x + b);
      }
      x = select_less(lane, low, hidden, select_less(lane, high, x, hidden));
      x.store(at);
    }
  }
}

template <bool kCap, bool kSlope>
static void score_tile(const Attention& a, const ScoreRow* rows, int64_t count, int64_t first_key, int64_t keys, float* scores,
                       float* softcap_grad) {
  a.mask.data ? score_tile<kCap, kSlope, true>(a, rows, count, first_key, keys, scores, softcap_grad)
              : score_tile<kCap, kSlope, false>(a, rows, count, first_key, keys, scores, softcap_grad);
}

static void score_tile(const Attention& a, const ScoreRow* rows, int64_t count, int64_t first_key, int64_t keys, float* scores,
                       float* softcap_grad = nullptr) {
  const auto tile = a.softcap > 0.0f ? (a.slopes ? score_tile<true, true> : score_tile<true, false>)
                                     : (a.slopes ? score_tile<false, true> : score_tile<false, false>);
  tile(a, rows, count, first_key, keys, scores, softcap_grad);
}

// ---- tangents ---------------------------------------------------------------------------------------------------------------

// Computes the tangents of products, dq k^T + q dk^T, of rows and keys in tiles.
template <class Elem>
static void product_tangents(const Tangents& t, int64_t count, int64_t columns, int64_t depth, A<Elem> query,
                             A<Elem> query_tangent, B<Elem> key, B<Elem> key_tangent, float* to) {
  if (t.query.data) {
    gemm<false>(count, columns, depth, query_tangent, key, to, kTileRow);
  } else {
    __builtin_memset(to, 0, count * kTileRow * sizeof(float));
  }
  if (t.key.data) gemm<true>(count, columns, depth, query, key_tangent, to, kTileRow);
}

// Turns a tile of the products' tangents (count, keys) into the tangents of the natural scores, 0 where a row does not see a
// key. `scores` is the tile of scores, and softcap_grad the softcap's derivative, or null.
static void score_tangent_tile(const Attention& a, const Sequence& s, const Tangents& t, const ScoreRow* rows, int64_t count,
                               int64_t first_key, int64_t keys, const float* scores, const float* softcap_grad, float* tile) {
  const F32 scale(a.scale), lowest(kLowest), zero(0.0f);
  alignas(64) float bias[kBlockKeys] = {};
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = r * kTileRow;
    if (t.mask.data) {
      load_floats(t.mask.dtype, t.mask.at(s.b, rows[r].head, rows[r].query), t.mask_key, first_key, keys, bias);
    }
    for (int64_t k = 0; k < padded(keys); k += kLanes) {
      F32 x = scale * F32::load(tile + at + k);
      if (softcap_grad) x = x * F32::load(softcap_grad + at + k);
      x = x + F32::load(bias + k);
      select_less(F32::load(scores + at + k), lowest, zero, x).store(tile + at + k);
    }
  }
}

// ---- dropout ---------------------------------------------------------------------------------------------------------------

// Fills keep (kBlockKeys,) with 1 / (1 - dropout_p) for the keys of a row that are kept, and 0 for those that are dropped. The
// 64 keys use the four words of each of 16 counters. first_key must be a multiple of 64.
static void draw_keep(const Attention& a, const Sequence& s, const ScoreRow& row, int64_t first_key, float* keep) {
  const uint64_t seed = uint64_t(a.seeds[s.b * a.seed_stride]);
  const U64 stream(uint64_t(s.place.stream + row.head)), query(uint64_t(s.place.first_query + row.query));
  const U64 zero(uint64_t(0));
  const U64 counter = U64(uint64_t((s.place.first_key + first_key) / 4)) + U64::load(kBlockOfLane.block);
  const Words<U64> words = philox(seed, Words<U64>{counter, query, stream, zero});
  const auto kept = [&](U64 word) FASTLM_LAMBDA {  // compared by halves: a float holds only 24 bits of a word
    const U32 w = narrow(word);
    const F32 high = to_float(shift_right<16>(w)), low = to_float(w & U32(0xffffu));
    const F32 limit_high(float(a.drop_below >> 16)), limit_low(float(a.drop_below & 0xffffu));
    const F32 zero(0.0f), scale(a.keep_scale);
    return select_less(high, limit_high, zero, select_less(limit_high, high, scale, select_less(low, limit_low, zero, scale)));
  };
  store_interleaved(kept(words.w0), kept(words.w1), kept(words.w2), kept(words.w3), keep);
}

}  // namespace fastlm::FASTLM_ISA
