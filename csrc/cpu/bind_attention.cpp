// Attention for Python. Shapes, dtypes and devices were checked by fastlm/ops; the numbers inside index tensors are checked
// here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attention.h"
#include "../common/python_views.h"

namespace py = pybind11;

namespace fastlm {
namespace {

int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : dtype == kFloat64 ? 8 : dtype == kBool ? 1 : 2; }

// A tensor of (batch, head, row, column), or None.
Rows rows_of(const TensorView& t) {
  Rows rows;
  if (!t.data) return rows;
  rows.data = t.data;
  rows.dtype = t.dtype;
  const int64_t bytes = bytes_of(rows.dtype);
  rows.batch = t.stride[0] * bytes;
  rows.head = t.stride[1] * bytes;
  rows.row = t.stride[2] * bytes;
  return rows;
}

Rows rows_of(py::handle tensor) { return rows_of(TensorView(tensor)); }

// A tensor of (batch, head, row) with contiguous rows, or None.
Statistic statistic_of(py::handle tensor) {
  const TensorView t(tensor);
  if (!t.data) return {};
  return {reinterpret_cast<float*>(t.data), t.stride[0], t.stride[1]};
}

template <class T>
const T* array_of(const TensorView& t) {
  return reinterpret_cast<const T*>(t.data);
}

// Starts at 0, never falls, ends at the total.
void check_offsets(const char* name, const int32_t* offsets, int64_t sequences, int64_t total) {
  const auto fail = [&](const std::string& what) { throw py::value_error(std::string(name) + " must " + what); };
  if (offsets[0] != 0) fail("start at 0; got " + std::to_string(offsets[0]));
  for (int64_t b = 0; b < sequences; ++b) {
    if (offsets[b + 1] < offsets[b]) {
      fail("not fall; got " + std::to_string(offsets[b]) + ", then " + std::to_string(offsets[b + 1]) + " at " +
           std::to_string(b + 1));
    }
  }
  if (offsets[sequences] != total) {
    fail("end at the number of rows, " + std::to_string(total) + "; got " + std::to_string(offsets[sequences]));
  }
}

// options: left, right, scale, softcap, the word below which a key is dropped, what is kept is multiplied by.
void fill_options(Attention& a, const py::tuple& options) {
  const auto limit = [&](py::ssize_t i) { return item(options, i) == Py_None ? kUnlimited : integer(item(options, i)); };
  a.left = std::min(limit(0), kUnlimited);
  a.right = std::min(limit(1), kUnlimited);
  a.scale = float(PyFloat_AsDouble(item(options, 2)));
  a.softcap = float(PyFloat_AsDouble(item(options, 3)));
  a.drop_below = uint32_t(integer(item(options, 4)));
  a.keep_scale = float(PyFloat_AsDouble(item(options, 5)));
}

void fill_tensors(Attention& a, const TensorView& query, const TensorView& key, const TensorView& value) {
  a.batch = query.shape[0];
  a.heads = query.shape[1];
  a.kv_heads = key.shape[1];
  a.group = a.kv_heads ? a.heads / a.kv_heads : 1;
  a.q_len = query.shape[2];
  a.k_len = key.shape[2];
  a.head_dim = query.shape[3];
  a.value_dim = value.shape[3];
  a.query = rows_of(query);
  a.key = rows_of(key);
  a.value = rows_of(value);
}

// inputs: query, key, value, mask, slopes, sinks, seeds, cu_seqlens_q and cu_seqlens_k; all but the first three may be None.
void fill_inputs(Attention& a, const py::tuple& inputs) {
  const TensorView mask(inputs[3]), slopes(inputs[4]), seeds(inputs[6]), cu_seqlens_q(inputs[7]), cu_seqlens_k(inputs[8]);
  fill_tensors(a, TensorView(inputs[0]), TensorView(inputs[1]), TensorView(inputs[2]));
  if (cu_seqlens_q.dims) a.batch = cu_seqlens_q.shape[0] - 1;
  a.mask = rows_of(mask);
  a.mask_is_bool = mask.data && mask.dtype == kBool;
  a.mask_key = mask.data ? mask.stride[3] : 0;
  a.slopes = array_of<float>(slopes);
  a.slope_batch = slopes.dims == 2 ? a.heads : 0;
  a.sinks = array_of<float>(TensorView(inputs[5]));
  a.seeds = array_of<int64_t>(seeds);
  a.seed_stride = seeds.dims;
  a.cu_seqlens_q = array_of<int32_t>(cu_seqlens_q);
  a.cu_seqlens_k = array_of<int32_t>(cu_seqlens_k);
  if (a.cu_seqlens_q) {
    check_offsets("cu_seqlens_q", a.cu_seqlens_q, a.batch, a.q_len);
    check_offsets("cu_seqlens_k", a.cu_seqlens_k, a.batch, a.k_len);
  }
}

void forward(const py::tuple& inputs, const py::tuple& options, const py::handle& out, const py::handle& lse, int64_t threads) {
  AttentionForward a{};
  fill_inputs(a, inputs);
  fill_options(a, options);
  a.out = rows_of(out);
  a.lse = statistic_of(lse);
  py::gil_scoped_release nogil;
  attention_forward(a, threads);
}

bool has_contiguous_rows(const TensorView& t) { return t.stride[3] == 1 || t.shape[3] == 1; }

// query, key and value as the kernels take them; what is wrong with others is for Python to say.
bool fit_together(const TensorView& query, const TensorView& key, const TensorView& value) {
  for (const TensorView* t : {&query, &key, &value}) {
    const bool known = t->dtype == kFloat32 || t->dtype == kBFloat16 || t->dtype == kFloat16;
    if (!known || t->dtype != query.dtype || t->device != kCPU || t->dims != 4) return false;
    if (t->shape[0] != query.shape[0] || t->shape[3] == 0 || !has_contiguous_rows(*t)) return false;
  }
  return query.shape[3] == key.shape[3] && key.shape[1] == value.shape[1] && key.shape[2] == value.shape[2] && key.shape[1] &&
         query.shape[1] % key.shape[1] == 0;
}

// For calls that are small and have no options, in a few microseconds: false, and nothing done, where this one is not such.
bool plain_forward(const py::handle& query, const py::handle& key, const py::handle& value, const py::handle& out, double scale,
                   bool causal, bool top_left, bool grouped, int64_t threads) {
  if (!exchange || !std::isfinite(scale)) return false;
  AttentionForward a{};
  try {
    const TensorView q(query), k(key), v(value), o(out);
    if (!fit_together(q, k, v) || !o.data || v.shape[3] != q.shape[3]) return false;
    if (o.stride[1] != o.shape[2] * o.shape[3] || o.stride[2] != o.shape[3] || o.stride[3] != 1) return false;
    fill_tensors(a, q, k, v);
    a.out = rows_of(o);
  } catch (const py::error_already_set&) {  // a tensor that DLPack cannot describe
    return false;
  }
  if (!grouped && a.group != 1) return false;
  a.left = kUnlimited;
  a.right = !causal ? kUnlimited : top_left ? a.q_len - a.k_len : 0;
  a.scale = float(scale);
  py::gil_scoped_release nogil;
  attention_forward(a, threads);
  return true;
}

// Every sequence's length before appending, checked; and the pages that its keys will be in.
void check_cache(const int32_t* lengths, int64_t batch, int64_t appended, int64_t capacity, const int32_t* table,
                 int64_t table_row, int64_t page, int64_t pages) {
  for (int64_t b = 0; b < batch; ++b) {
    const auto fail = [&](const std::string& what) { throw py::value_error(what + " (sequence " + std::to_string(b) + ")"); };
    if (lengths[b] < 0 || lengths[b] + appended > capacity) {
      fail("cache_seqlens must lie between 0 and the cache's " + std::to_string(capacity) + " rows less the " +
           std::to_string(appended) + " appended; got " + std::to_string(lengths[b]));
    }
    for (int64_t i = 0; table && i * page < lengths[b] + appended; ++i) {
      const int32_t entry = table[b * table_row + i];
      if (entry < 0 || entry >= pages) {
        fail("block_table must hold pages from 0 to " + std::to_string(pages - 1) + "; got " + std::to_string(entry));
      }
    }
  }
}

// inputs: the caches as key and value, (pages, head, row, column) with a block_table; appended: key and value, or None twice.
void cached_forward(const py::tuple& inputs, const py::tuple& options, const py::handle& cache_seqlens,
                    const py::handle& block_table, const py::tuple& appended, const py::handle& out, const py::handle& lse,
                    int64_t threads) {
  AttentionForward a{};
  fill_inputs(a, inputs);
  fill_options(a, options);
  a.out = rows_of(out);
  a.lse = statistic_of(lse);
  const TensorView cached(cache_seqlens), table(block_table), caches(inputs[1]), key(appended[0]), value(appended[1]);
  a.block_table = array_of<int32_t>(table);
  a.table_row = table.dims ? table.shape[1] : 1;
  a.page = caches.shape[2];
  const int64_t rows = key.dims ? key.shape[2] : 0;
  const int32_t* before = array_of<int32_t>(cached);
  check_cache(before, a.batch, rows, a.table_row * a.page, a.block_table, a.table_row, a.page, caches.shape[0]);
  std::vector<int64_t> lengths(size_t(a.batch));
  for (int64_t b = 0; b < a.batch; ++b) lengths[size_t(b)] = before[b] + rows;
  a.lengths = lengths.data();
  const Rows new_key = rows_of(key), new_value = rows_of(value);
  py::gil_scoped_release nogil;
  if (new_key.data) append_to_cache(a, new_key, new_value, rows);
  attention_forward(a, threads);
}

// saved: out, grad_out, lse, grad_lse or None, and delta; outputs: grad_query, grad_key, grad_value, and grad_mask or None.
void backward(const py::tuple& inputs, const py::tuple& options, const py::tuple& saved, const py::tuple& outputs,
              bool grad_mask_by_block, int64_t threads) {
  AttentionBackward a{};
  fill_inputs(a, inputs);
  fill_options(a, options);
  a.out = rows_of(saved[0]);
  a.grad_out = rows_of(saved[1]);
  a.lse = statistic_of(saved[2]);
  a.grad_lse = statistic_of(saved[3]);
  a.delta = statistic_of(saved[4]);
  a.grad_query = rows_of(outputs[0]);
  a.grad_key = rows_of(outputs[1]);
  a.grad_value = rows_of(outputs[2]);
  a.grad_mask = rows_of(outputs[3]);
  a.grad_mask_by_block = grad_mask_by_block;
  py::gil_scoped_release nogil;
  attention_backward(a, threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.attr("attention_block_rows") = kBlockRows;
  m.def("attention_forward", &forward);
  m.def("attention_plain", &plain_forward);
  m.def("attention_backward", &backward);
  m.def("cached_attention_forward", &cached_forward);
}

}  // namespace fastlm
