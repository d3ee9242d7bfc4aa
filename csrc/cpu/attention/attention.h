// Exact attention over tensors of (batch, head, row, column) with a contiguous last dimension. What is computed, with
// position(i) = i + k_len - q_len:
//   s_ij = scale q_i k_j;  s = softcap tanh(s / softcap);  s += mask_ij - slope |position(i) - j|;  what is masked is -inf
//   p_ij = e^(s_ij - lse_i), lse_i = log(sum_j e^s_ij + e^sink);  out_i = sum_j keep_ij p_ij v_j
//
// The rows of a *group*, the query heads that share a head of keys and values, are worked on together: row r of it is query
// r / group of head r % group of them. So keys and values are read once for all, and rows that are near see nearly the same
// keys.
#pragma once

#include <cstdint>

#include "../../common/view.h"

namespace fastlm {

constexpr int64_t kUnlimited = int64_t(1) << 48;  // a window's side that is none

// Rows of a tensor: strides in bytes. data is null where the tensor is absent.
struct Rows {
  char* data = nullptr;
  int dtype = kFloat32;
  int64_t batch = 0, head = 0, row = 0;

  __attribute__((always_inline)) char* at(int64_t b, int64_t h, int64_t r) const {
    return data + b * batch + h * head + r * row;
  }
};

// float32 (batch, head, row), contiguous rows.
struct Statistic {
  float* data = nullptr;
  int64_t batch = 0, head = 0;

  __attribute__((always_inline)) float* at(int64_t b, int64_t h, int64_t r) const { return data + b * batch + h * head + r; }
};

struct Attention {
  int64_t batch, heads, kv_heads, group;  // group = heads / kv_heads
  int64_t head_dim, value_dim;
  int64_t q_len, k_len;  // of every sequence, unless one of these says otherwise, by sequence:
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  const int64_t* lengths;  // of the cached keys
  Rows query, key, value;
  const int32_t* block_table;  // key j is row j % page of page table[j / page]; the pages' stride is key.batch and value.batch
  int64_t table_row, page;
  Rows mask;  // bytes (bool) or floats, broadcast by strides of 0
  bool mask_is_bool;
  int64_t mask_key;  // its stride over keys: 0, or one element
  const float* slopes;
  int64_t slope_batch;  // its stride over the batch, in elements
  const float* sinks;
  int64_t left, right;   // key j is seen where position(i) - left <= j <= position(i) + right
  float scale, softcap;  // softcap 0: none
  const int64_t* seeds;  // null: no dropout
  int64_t seed_stride;   // 0: one for all; 1: one per sequence
  uint64_t drop_below;   // words below are dropped: all of them from 2^32 on
  float keep_scale;      // 1 / (1 - dropout_p)
};

// A sequence of the batch.
struct Sequence {
  int64_t b;  // which
  int64_t q_len, k_len;
  int64_t batch, q_first, k_first;  // where its rows are in the tensors
};

static inline Sequence sequence(const Attention& a, int64_t b) {
  if (a.cu_seqlens_q) {
    const int64_t q = a.cu_seqlens_q[b], k = a.cu_seqlens_k[b];
    return {b, a.cu_seqlens_q[b + 1] - q, a.cu_seqlens_k[b + 1] - k, 0, q, k};
  }
  return {b, a.q_len, a.lengths ? a.lengths[b] : a.k_len, b, 0, 0};
}

// Where key or value j of a sequence is in a tensor of them.
static inline char* key_row(const Attention& a, const Sequence& s, const Rows& t, int64_t kv_head, int64_t j) {
  if (a.block_table) return t.at(a.block_table[s.b * a.table_row + j / a.page], kv_head, j % a.page);
  return t.at(s.batch, kv_head, s.k_first + j);
}

constexpr int64_t kBlockRows = 48;  // rows that are worked on at a time, of
constexpr int64_t kBlockKeys = 64;  // keys: a tile of the scores is 12 KiB
constexpr int64_t kThinRows = 8;    // up to here, keys and values are read where they lie
constexpr int64_t kSplitRows = 48;  // up to here, a group's keys are split into parts of
constexpr int64_t kSplitKeys = 512;

// Rows [row_begin, row_end) of a group against keys [key_begin, key_end).
struct AttentionUnit {
  int64_t b, kv_head, row_begin, row_end, key_begin, key_end;
  bool of_queries, of_keys;  // backward: which gradients it computes
  int64_t cost;
  float* partial;  // forward, of some of the keys: where the rows' parts go; to combine: all parts, of the same keys together
  int64_t parts;
};

struct AttentionForward : Attention {
  Rows out;
  Statistic lse;         // or none
  Statistic statistics;  // or none. Pairs: the maximum that a row's weights are against, and log2 of their sum, sink included
};

struct AttentionBackward : Attention {
  Rows out, grad_out, grad_query, grad_key, grad_value;
  Statistic statistics, grad_lse, delta;  // delta_i = out_i . grad_out_i - grad_lse_i
  Rows grad_mask;                         // float32, zeros at first, broadcast by strides of 0; data null: not wanted
  bool grad_mask_by_block;                // its rows are blocks of kBlockRows queries, as the mask is one for all queries
};

using AttentionForwardKernel = void(const AttentionForward&, const AttentionUnit&, char* workspace);
using AttentionBackwardKernel = void(const AttentionBackward&, const AttentionUnit&, char* workspace);
using AttentionDeltaKernel = void(const AttentionBackward&, const AttentionUnit&);
using AttentionCombineKernel = void(const AttentionForward&, const AttentionUnit&);
using AttentionPartialRow = int64_t(const Attention&);  // floats
using AttentionWorkspace = int64_t(const Attention&, int64_t rows);

// Copies `rows` new keys and values of every sequence behind those that are cached; `lengths` count them already.
void append_to_cache(const Attention&, const Rows& key, const Rows& value, int64_t rows);

void attention_forward(const AttentionForward&, int64_t threads);
void attention_backward(const AttentionBackward&, int64_t threads);

}  // namespace fastlm
