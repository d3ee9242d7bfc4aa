// Exact attention over tensors (batch, head, row, column) with a contiguous last dimension. With position(i) = i + k_len -
// q_len (or as Place has it) it computes:
//   s_ij = scale q_i k_j;  s = softcap tanh(s / softcap);  s += mask_ij - slope |position(i) - j|;  s = -inf where masked
//   p_ij = e^(s_ij - lse_i), lse_i = log(sum_j e^s_ij + e^sink);  out_i = sum_j keep_ij p_ij v_j
//
// A *group* is the query heads that share one head of keys and values. The kernels work on the rows of a group together: row r
// of the group is query r / group of its head r % group. So each key and value is read once for all heads of the group, and
// neighbouring rows see nearly the same keys.
#pragma once

#include <cstdint>

#include "../../common/view.h"

namespace fastlm {

constexpr int64_t kUnlimited = int64_t(1) << 48;  // a side of the window that has no limit

// The rows of a tensor (batch, head, row, column). Strides are in bytes; data is null if the tensor is absent.
struct Rows {
  char* data = nullptr;
  int dtype = kFloat32;
  int64_t batch = 0, head = 0, row = 0;

  __attribute__((always_inline)) char* at(int64_t b, int64_t h, int64_t r) const {
    return data + b * batch + h * head + r * row;
  }
};

// A tensor (batch, head, row) with contiguous rows. Strides are in elements.
template <class T>
struct PerRow {
  T* data = nullptr;
  int64_t batch = 0, head = 0;

  __attribute__((always_inline)) T* at(int64_t b, int64_t h, int64_t r) const { return data + b * batch + h * head + r; }
};
using Statistic = PerRow<float>;

struct Attention {
  int64_t batch, heads, kv_heads, group;  // group = heads / kv_heads
  int64_t head_dim, value_dim;
  int64_t q_len, k_len;                        // lengths of every sequence, unless cu_seqlens or lengths is given
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (batch + 1,): packed sequences; or null
  const int64_t* lengths;                      // (batch,): number of cached keys of each sequence; or null
  const int64_t* places;                       // (batch, 4): a Place for each sequence; or null
  Rows query, key, value;
  const int32_t* block_table;  // (batch, table_row): key j of sequence b is row j % page of page block_table[b][j / page]
  int64_t table_row, page;     // with a block_table, key.batch and value.batch are strides over pages
  Rows mask;                   // bytes (bool) or floats, broadcast by strides of 0
  bool mask_is_bool;
  int64_t mask_key;      // stride over keys: 0, or 1 element
  const float* slopes;   // ALiBi's slopes, (heads,) or (batch, heads)
  int64_t slope_batch;   // stride of the slopes over the batch, in elements
  const float* sinks;    // (heads,)
  int64_t left, right;   // query i sees key j if position(i) - left <= j <= position(i) + right
  float scale, softcap;  // softcap 0 means none
  const int64_t* seeds;  // null means no dropout
  int64_t seed_stride;   // 0: one seed for all; 1: one seed per sequence
  uint64_t drop_below;   // a key is dropped if its random word is below this; 2^32 drops every key
  float keep_scale;      // 1 / (1 - dropout_p)
  bool has_row_stats;    // Forward only: also compute entropy, max_logit and max_key.
};

// Where the rows of a sequence stand in a larger call, of which this call computes a part.
struct Place {
  int64_t position;                // Query i stands at key i + position of this call's keys.
  int64_t first_query, first_key;  // Dropout's counters count rows from these; first_key is a multiple of 4.
  int64_t stream;                  // The dropout of head h has the stream of number stream + h.
};

// Sequence b of the batch, and where its rows are in the tensors: at index `batch`, from row q_first or k_first on.
struct Sequence {
  int64_t b;
  int64_t q_len, k_len;
  int64_t batch, q_first, k_first;
  Place place;
};

static inline Sequence sequence(const Attention& a, int64_t b) {
  Sequence s{b, a.q_len, a.lengths ? a.lengths[b] : a.k_len, b, 0, 0, {}};
  if (a.cu_seqlens_q) {
    const int64_t q = a.cu_seqlens_q[b], k = a.cu_seqlens_k[b];
    s = {b, a.cu_seqlens_q[b + 1] - q, a.cu_seqlens_k[b + 1] - k, 0, q, k, {}};
  }
  if (a.places) {
    const int64_t* place = a.places + 4 * b;
    s.place = {place[0], place[1], place[2], place[3]};
  } else {
    s.place = {s.k_len - s.q_len, 0, 0, a.seed_stride ? 0 : b * a.heads};
  }
  return s;
}

// Returns the address of row j of a sequence in a tensor of keys or values.
static inline char* key_row(const Attention& a, const Sequence& s, const Rows& t, int64_t kv_head, int64_t j) {
  if (a.block_table) return t.at(a.block_table[s.b * a.table_row + j / a.page], kv_head, j % a.page);
  return t.at(s.batch, kv_head, s.k_first + j);
}

constexpr int64_t kBlockRows = 48;   // Query rows per block.
constexpr int64_t kBlockKeys = 64;   // Keys per block. A 48 x 64 float score tile takes 12 KiB.
constexpr int64_t kGemvRows = 8;     // Up to this many query rows in a group, keys and values are read in place, without tiles.
constexpr int64_t kSplitRows = 48;   // Split the keys (flash-decoding) only when a group has at most this many query rows.
constexpr int64_t kSplitKeys = 512;  // Keys per split.
constexpr int64_t kMostTopKeys = 32;
constexpr int64_t kMassKeys = 256;  // Keys per task of the pass that sums up their weights.

// Rows [row_begin, row_end) of a group against keys [key_begin, key_end).
struct AttentionTask {
  int64_t b, kv_head, row_begin, row_end, key_begin, key_end;
  bool computes_dq, computes_dkv;  // Backward only: which gradients the task computes.
  int64_t cost;
  float* partial;      // Split-KV only. Forward: output buffer of this split. Combine: base of all splits, stored split-major.
  int64_t num_splits;  // Of the keys of the whole group; 1 without split-KV.
};

struct AttentionForward : Attention {
  Rows out;
  Statistic lse;  // may be absent
  // May be absent. (batch, head, row, 2): the maximum subtracted from the row's scores, and log2 of the sum of the row's
  // weights, which includes the sink.
  Statistic statistics;
  // Present if has_row_stats. Of the weights before dropout, and of the scores without the sink: -inf and -1 for a row that
  // sees no key.
  Statistic entropy, max_logit;
  PerRow<int32_t> max_key;  // the first key that has the largest score
};

// A pass that recomputes the weights from the saved statistics, and sums them up.
struct AttentionMass : Attention {
  Statistic statistics;
  Statistic key_mass;      // (batch, head, key): written, the sum of a key's weights
  Statistic of_keys;       // (batch, head, key): or numbers for the keys,
  Statistic mean_of_keys;  // (batch, head, row): whose mean by a row's weights is written
};

// The k keys with the largest weights of each row. value_dim is 0.
struct AttentionTopKeys : AttentionForward {
  int64_t k;
  PerRow<const float> given_lse;
  PerRow<int64_t> indices;  // (batch, head, row, k)
  Statistic weights;        // (batch, head, row, k)
};

struct AttentionBackward : Attention {
  Rows out, grad_out, grad_query, grad_key, grad_value;
  Statistic statistics, grad_lse, delta;  // delta_i = out_i . grad_out_i - grad_lse_i
  // Gradients of the statistics; each may be absent. grad_lse holds what they subtract from all of a row's scores.
  Statistic grad_entropy, grad_key_mass;  // (batch, head, row) and (batch, head, key)
  Statistic grad_max_logit;
  PerRow<const int32_t> max_key;  // where grad_max_logit goes
  Rows grad_mask;                 // float32, filled with zeros before the call, broadcast by strides of 0; absent if not wanted
  bool grad_mask_by_block;        // The mask is broadcast over queries: row i of grad_mask sums up kBlockRows queries.
};

// The tangents of the inputs, laid out as these are; each may be absent.
struct Tangents {
  Rows query, key, value;
  Rows mask;             // floats, broadcast by strides of 0
  int64_t mask_key = 0;  // stride over keys: 0, or 1 element
  const float* sinks = nullptr;
};

// Forward-mode: also the tangents of out and lse.
struct AttentionJvp : AttentionForward {
  Tangents tangent;
  Rows out_tangent;
  Statistic lse_tangent;
};

// The gradients of <grad_out, out_tangent> + <grad_lse, lse_tangent>, where these are functions of the inputs.
struct AttentionJvpBackward : AttentionBackward {
  Tangents tangent;
  Rows out_tangent;
  Statistic lse_tangent, tangent_delta;  // tangent_delta_i = out_tangent_i . grad_out_i
};

using AttentionForwardKernel = void(const AttentionForward&, const AttentionTask&, char* workspace);
using AttentionBackwardKernel = void(const AttentionBackward&, const AttentionTask&, char* workspace);
using AttentionJvpKernel = void(const AttentionJvp&, const AttentionTask&, char* workspace);
using AttentionJvpBackwardKernel = void(const AttentionJvpBackward&, const AttentionTask&, char* workspace);
using AttentionMassKernel = void(const AttentionMass&, const AttentionTask&, char* workspace);
using AttentionTopKeysKernel = void(const AttentionTopKeys&, const AttentionTask&, char* workspace);
using AttentionDeltaKernel = void(const AttentionBackward&, const AttentionTask&);
using AttentionCombineKernel = void(const AttentionForward&, const AttentionTask&);
using AttentionPartialRow = int64_t(const Attention&);               // returns the floats per row of a partial result
using AttentionWorkspace = int64_t(const Attention&, int64_t rows);  // returns the bytes that a task of so many rows needs

// Copies `rows` new keys and values of every sequence behind the cached ones. `lengths` already count the new rows.
void append_to_cache(const Attention&, const Rows& key, const Rows& value, int64_t rows);

void attention_forward(const AttentionForward&, int64_t threads);
void attention_backward(const AttentionBackward&, int64_t threads);
void attention_key_mass(const AttentionMass&);
void attention_mean_of_keys(const AttentionMass&, int64_t threads);
void attention_top_keys(const AttentionTopKeys&, int64_t threads);
void attention_jvp(const AttentionJvp&, int64_t threads);
void attention_jvp_backward(const AttentionJvpBackward&, int64_t threads);

}  // namespace fastlm
