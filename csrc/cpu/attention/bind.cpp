// Binds attention to Python. It copies index tensors and checks the copies, because another thread may write to a tensor
// while the GIL is released.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attention.h"
#include "../fast_method.h"
#include "../../common/python_views.h"
#include "../../common/sizes.h"

namespace py = pybind11;

namespace fastlm {
namespace {

// ---- tensors for the kernels. Each is checked, so that a kernel stays inside it ---------------------------------------------

// Converts a tensor (batch, head, row, column) with contiguous columns.
Rows rows_of(const char* name, const TensorView& t, int dtype) {
  expect(t.device == kCPU && t.dtype == dtype && t.dims == 4, name, t, "4 dimensions on the CPU, in the query's dtype");
  expect(t.shape[3] <= 1 || t.stride[3] == 1 || !t.elements(), name, t, "contiguous columns");
  Rows rows;
  rows.data = t.data;
  rows.dtype = t.dtype;
  const int64_t bytes = bytes_of(t.dtype);
  rows.batch = t.stride[0] * bytes;
  rows.head = t.stride[1] * bytes;
  rows.row = t.stride[2] * bytes;
  return rows;
}

Rows rows_of(const char* name, py::handle tensor, int dtype, std::initializer_list<int64_t> shape) {
  const TensorView t(tensor);
  expect(t.has_shape(shape), name, t, "the shape of what it belongs to");
  return rows_of(name, t, dtype);
}

// Converts a tensor (batch, head, row) or (batch, head, row, 2) with contiguous rows, or None.
template <class T = float>
PerRow<T> statistic_of(const char* name, py::handle tensor, std::initializer_list<int64_t> shape, int dtype = kFloat32) {
  const TensorView t(tensor);
  if (!t.given) return {};
  const bool fits = t.device == kCPU && t.dtype == dtype && t.has_shape(shape) && t.is_contiguous(2);
  expect(fits, name, t, dtype == kFloat32 ? "a float32 statistic for each row" : "an integer for each row");
  return {reinterpret_cast<T*>(t.data), t.stride[0], t.stride[1]};
}

// Returns the data of a contiguous array of `count` numbers of the dtype; nullptr for None.
template <class T>
const T* array_of(const char* name, const TensorView& t, int dtype, int64_t count) {
  if (!t.given) return nullptr;
  expect(t.device == kCPU && t.dtype == dtype && t.elements() == count && t.is_contiguous(), name, t,
         "a contiguous array on the CPU with a number for each head or sequence");
  return reinterpret_cast<const T*>(t.data);
}

// Copies the numbers of an int32 index tensor.
std::vector<int32_t> indices_of(const char* name, const TensorView& t, int64_t count) {
  const int32_t* from = array_of<int32_t>(name, t, kInt32, count);
  return from ? std::vector<int32_t>(from, from + count) : std::vector<int32_t>();
}

// Sets the mask, which is None, or bool or floating and expanded to the scores' shape by strides of 0.
void fill_mask(Attention& a, const TensorView& mask) {
  if (!mask.given) return;
  expect(mask.device == kCPU && (mask.dtype == kBool || is_half_or_float(mask.dtype)), "mask", mask,
         "bool or a float on the CPU");
  expect(mask.has_shape({a.batch, a.heads, a.q_len, a.k_len}), "mask", mask, "the scores' shape");
  expect(a.k_len <= 1 || mask.stride[3] == 0 || mask.stride[3] == 1, "mask", mask, "contiguous or broadcast keys");
  if (!mask.data) return;  // There are no scores either.
  const int64_t bytes = bytes_of(mask.dtype);
  a.mask.data = mask.data;
  a.mask.dtype = mask.dtype;
  a.mask.batch = mask.stride[0] * bytes;
  a.mask.head = mask.stride[1] * bytes;
  a.mask.row = mask.stride[2] * bytes;
  a.mask_is_bool = mask.dtype == kBool;
  a.mask_key = a.k_len > 1 ? mask.stride[3] : 0;
}

// Checks that the offsets start at 0, never fall and end at the total.
void check_offsets(const char* name, const std::vector<int32_t>& of, int64_t total) {
  const int32_t* offsets = of.data();
  const int64_t sequences = int64_t(of.size()) - 1;
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

// Sets the options: left, right, scale, softcap, drop_below and keep_scale, as kernel_options (call.py) returns them.
void fill_options(Attention& a, const py::tuple& options) {
  const auto limit = [&](py::ssize_t i) {
    const int64_t side = item(options, i) == Py_None ? kUnlimited : integer(item(options, i));
    if (PyErr_Occurred()) throw py::error_already_set();
    return std::max(side, -kUnlimited);
  };
  a.left = std::min(limit(0), kUnlimited);
  a.right = std::min(limit(1), kUnlimited);
  a.scale = float(PyFloat_AsDouble(item(options, 2)));
  a.softcap = float(PyFloat_AsDouble(item(options, 3)));
  a.drop_below = uint64_t(integer(item(options, 4)));
  a.keep_scale = float(PyFloat_AsDouble(item(options, 5)));
}

// Sets the sizes of a call, and its query, key and value. With `paged`, key and value are pages (page, head, row, column).
void fill_tensors(Attention& a, const TensorView& query, const TensorView& key, const TensorView& value, bool paged) {
  expect(is_half_or_float(query.dtype), "query", query, "float32, bfloat16 or float16");
  a.query = rows_of("query", query, query.dtype);
  a.key = rows_of("key", key, query.dtype);
  a.value = rows_of("value", value, query.dtype);
  a.batch = query.shape[0];
  a.heads = query.shape[1];
  a.kv_heads = key.shape[1];
  a.q_len = query.shape[2];
  a.k_len = key.shape[2];
  a.head_dim = query.shape[3];
  a.value_dim = value.shape[3];
  const bool groups = a.kv_heads ? a.heads % a.kv_heads == 0 : a.heads == 0;
  expect((paged || key.shape[0] == a.batch) && groups && key.shape[3] == a.head_dim, "key", key,
         "query's batch, heads and head_dim");
  expect(std::equal(key.shape, key.shape + 3, value.shape), "value", value, "key's batch, heads and rows");
  a.group = a.kv_heads ? a.heads / a.kv_heads : 1;
}

// Copies of a call's index tensors. Kernels point into them, so they must live until the kernels have run.
struct Indices {
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k, block_table;
  std::vector<int64_t> lengths;
};

// Sets the tensors of a call. inputs: query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k and
// places, in the order of AttentionCall; all but the first three may be None.
void fill_inputs(Attention& a, Indices& own, const py::tuple& inputs, bool paged = false) {
  const TensorView slopes(inputs[5]), seeds(inputs[6]), cu_seqlens_q(inputs[7]), cu_seqlens_k(inputs[8]);
  fill_tensors(a, TensorView(inputs[0]), TensorView(inputs[1]), TensorView(inputs[2]), paged);
  if (cu_seqlens_q.given) {
    const TensorView& cu = cu_seqlens_q;
    expect(a.batch == 1 && cu.dims == 1 && cu.shape[0] > 0, "cu_seqlens_q", cu, "a batch of one");
    expect(cu_seqlens_k.given && inputs[3].is_none(), "cu_seqlens_q", cu, "cu_seqlens_k with it, and no mask");
    own.cu_seqlens_q = indices_of("cu_seqlens_q", cu_seqlens_q, cu_seqlens_q.shape[0]);
    own.cu_seqlens_k = indices_of("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0]);
    a.batch = cu_seqlens_q.shape[0] - 1;
    check_offsets("cu_seqlens_q", own.cu_seqlens_q, a.q_len);
    check_offsets("cu_seqlens_k", own.cu_seqlens_k, a.k_len);
    a.cu_seqlens_q = own.cu_seqlens_q.data();
    a.cu_seqlens_k = own.cu_seqlens_k.data();
  }
  fill_mask(a, TensorView(inputs[3]));
  a.slopes = array_of<float>("alibi_slopes", slopes, kFloat32, slopes.dims == 2 ? a.batch * a.heads : a.heads);
  a.slope_batch = slopes.dims == 2 ? a.heads : 0;
  a.sinks = array_of<float>("sinks", TensorView(inputs[4]), kFloat32, a.heads);
  a.seeds = array_of<int64_t>("seed", seeds, kInt64, seeds.dims ? a.batch : 1);
  a.seed_stride = seeds.dims;
  a.places = array_of<int64_t>("places", TensorView(inputs[9]), kInt64, a.batch * 4);
  for (int64_t b = 0; a.places && b < a.batch; ++b) {
    if (a.seeds && a.places[4 * b + 2] % 4) throw py::value_error("places must hold multiples of 4 as first_key");
  }
}

// Sets the tensors that a forward writes.
void fill_outputs(AttentionForward& a, int64_t batch, const py::handle& out, const py::handle& lse,
                  const py::handle& statistics) {
  a.out = rows_of("out", out, a.query.dtype, {batch, a.heads, a.q_len, a.value_dim});
  a.lse = statistic_of("lse", lse, {batch, a.heads, a.q_len});
  a.statistics = statistic_of("statistics", statistics, {batch, a.heads, a.q_len, 2});
}

// Returns the batch dimension of the tensors: packed sequences lie in a batch of one.
int64_t tensor_batch(const Attention& a) { return a.cu_seqlens_q ? 1 : a.batch; }

// row_stats: entropy, max_logit and max_key, or nothing.
void forward(const py::tuple& inputs, const py::tuple& options, const py::handle& out, const py::handle& lse,
             const py::handle& statistics, const py::tuple& row_stats, int64_t threads) {
  AttentionForward a{};
  Indices own;
  fill_inputs(a, own, inputs);
  fill_options(a, options);
  const int64_t batch = tensor_batch(a);
  fill_outputs(a, batch, out, lse, statistics);
  a.has_row_stats = row_stats.size() > 0;
  if (a.has_row_stats) {
    a.entropy = statistic_of("entropy", row_stats[0], {batch, a.heads, a.q_len});
    a.max_logit = statistic_of("max_logit", row_stats[1], {batch, a.heads, a.q_len});
    a.max_key = statistic_of<int32_t>("max_key", row_stats[2], {batch, a.heads, a.q_len}, kInt32);
  }
  py::gil_scoped_release nogil;
  attention_forward(a, threads);
}

// Sets the call of a pass that sums up weights.
void fill_mass(AttentionMass& a, Indices& own, const py::tuple& inputs, const py::tuple& options,
               const py::handle& statistics) {
  fill_inputs(a, own, inputs);
  fill_options(a, options);
  a.statistics = statistic_of("statistics", statistics, {tensor_batch(a), a.heads, a.q_len, 2});
}

void key_mass(const py::tuple& inputs, const py::tuple& options, const py::handle& statistics, const py::handle& mass) {
  AttentionMass a{};
  Indices own;
  fill_mass(a, own, inputs, options, statistics);
  a.key_mass = statistic_of("key_mass", mass, {tensor_batch(a), a.heads, a.k_len});
  py::gil_scoped_release nogil;
  attention_key_mass(a);
}

void mean_of_keys(const py::tuple& inputs, const py::tuple& options, const py::handle& statistics, const py::handle& of_keys,
                  const py::handle& mean, int64_t threads) {
  AttentionMass a{};
  Indices own;
  fill_mass(a, own, inputs, options, statistics);
  a.of_keys = statistic_of("of_keys", of_keys, {tensor_batch(a), a.heads, a.k_len});
  a.mean_of_keys = statistic_of("mean", mean, {tensor_batch(a), a.heads, a.q_len});
  py::gil_scoped_release nogil;
  attention_mean_of_keys(a, threads);
}

// inputs: as for fill_inputs, without a value, dropout and packed sequences.
void top_keys(const py::tuple& inputs, const py::tuple& options, const py::handle& lse, int64_t k, const py::handle& indices,
              const py::handle& weights, int64_t threads) {
  AttentionTopKeys a{};
  Indices own;
  fill_inputs(a, own, inputs);
  fill_options(a, options);
  if (a.seeds || a.cu_seqlens_q || k < 1 || k > kMostTopKeys) throw py::value_error("k must lie between 1 and 32");
  a.value = {};
  a.value_dim = 0;
  a.k = k;
  a.given_lse = statistic_of<const float>("lse", lse, {a.batch, a.heads, a.q_len});
  a.indices = statistic_of<int64_t>("indices", indices, {a.batch, a.heads, a.q_len, k}, kInt64);
  a.weights = statistic_of("weights", weights, {a.batch, a.heads, a.q_len, k});
  py::gil_scoped_release nogil;
  attention_top_keys(a, threads);
}

bool has_contiguous_rows(const TensorView& t) { return t.stride[3] == 1 || t.shape[3] == 1; }

// Tells whether the kernels can take query, key and value. Where they cannot, Python raises the error.
bool fit_together(const TensorView& query, const TensorView& key, const TensorView& value) {
  for (const TensorView* t : {&query, &key, &value}) {
    if (!t->given || !is_half_or_float(t->dtype) || t->dtype != query.dtype || t->device != kCPU || t->dims != 4) return false;
    if (t->shape[0] != query.shape[0] || t->shape[3] == 0 || !has_contiguous_rows(*t)) return false;
  }
  return query.shape[3] == key.shape[3] && key.shape[1] == value.shape[1] && key.shape[2] == value.shape[2] && key.shape[1] &&
         query.shape[1] % key.shape[1] == 0;
}

// Tells whether an output (B, H, L, D) is contiguous, or the transpose of a contiguous (B, L, H, D).
bool is_dense_output(const TensorView& t) {
  if (t.is_contiguous(1)) return true;
  return t.stride[3] == 1 && t.stride[1] == t.shape[3] && t.stride[2] == t.shape[1] * t.shape[3];
}

// Runs a small call without options, in a few microseconds. Returns false, and does nothing, for any other call.
// args: query, key, value, out, scale or None, causal, top_left, grouped, threads.
bool plain_forward(PyObject* const* args) {
  AttentionForward a{};
  if (!exchange) return false;
  const TensorView q(args[0]), k(args[1]), v(args[2]), o(args[3]);
  if (!fit_together(q, k, v) || !o.data || v.shape[3] != q.shape[3]) return false;
  if (!o.has_shape({q.shape[0], q.shape[1], q.shape[2], q.shape[3]}) || !is_dense_output(o)) return false;
  fill_tensors(a, q, k, v, false);
  a.out = rows_of("out", o, q.dtype);
  a.scale = float(args[4] == Py_None ? 1.0 / std::sqrt(double(a.head_dim)) : PyFloat_AsDouble(args[4]));
  if (!std::isfinite(a.scale)) return false;
  const bool causal = args[5] == Py_True, top_left = args[6] == Py_True, grouped = args[7] == Py_True;
  if (!grouped && a.group != 1) return false;
  a.left = kUnlimited;
  a.right = !causal ? kUnlimited : top_left ? a.q_len - a.k_len : 0;
  const int64_t threads = integer(args[8]);
  py::gil_scoped_release nogil;
  attention_forward(a, threads);
  return true;
}

PyObject* call_plain_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    if (count == 9 && plain_forward(args)) Py_RETURN_TRUE;
  } catch (const py::error_already_set&) {  // DLPack cannot describe a tensor.
  } catch (const py::builtin_exception&) {  // A tensor has no memory.
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_FALSE;
}

PyMethodDef plain_method = fast_method("attention_plain", &call_plain_forward);

// Checks the length of every sequence before appending, and the pages that will hold its keys.
void check_cache(const std::vector<int64_t>& before, int64_t appended, const std::vector<int32_t>& table, int64_t table_row,
                 int64_t page, int64_t pages) {
  const int64_t capacity = table_row * page;
  for (size_t b = 0; b < before.size(); ++b) {
    const auto fail = [&](const std::string& what) { throw py::value_error(what + " (sequence " + std::to_string(b) + ")"); };
    if (before[b] < 0 || before[b] + appended > capacity) {
      fail("cache_seqlens must lie between 0 and the cache's " + std::to_string(capacity) + " rows less the " +
           std::to_string(appended) + " appended; got " + std::to_string(before[b]));
    }
    for (int64_t i = 0; !table.empty() && i * page < before[b] + appended; ++i) {
      const int32_t entry = table[b * size_t(table_row) + size_t(i)];
      if (entry < 0 || entry >= pages) {
        fail("block_table must hold pages from 0 to " + std::to_string(pages - 1) + "; got " + std::to_string(entry));
      }
    }
  }
}

// Appends to the caches, then runs attention on them.
// inputs: as for fill_inputs, with the caches as key and value; with a block_table, these are (page, head, row, column).
// appended: key and value, or None twice.
void kvcache_forward(const py::tuple& inputs, const py::tuple& options, const py::handle& cache_seqlens,
                     const py::handle& block_table, const py::tuple& appended, const py::handle& out, const py::handle& lse,
                     int64_t threads) {
  AttentionForward a{};
  Indices own;
  const TensorView table(block_table), caches(inputs[1]), key(appended[0]), value(appended[1]);
  fill_inputs(a, own, inputs, table.given);
  fill_options(a, options);
  fill_outputs(a, a.batch, out, lse, py::none());
  Rows new_key, new_value;
  int64_t rows = 0;
  if (key.given) {
    rows = key.dims == 4 ? key.shape[2] : -1;
    expect(key.has_shape({a.batch, a.kv_heads, rows, a.head_dim}), "key", key, "the cache's heads and head_dim");
    expect(value.has_shape({a.batch, a.kv_heads, rows, a.value_dim}), "value", value,
           "as many rows as key, and the cache's heads");
    new_key = rows_of("key", key, a.query.dtype);
    new_value = rows_of("value", value, a.query.dtype);
  }
  if (table.given) {
    expect(table.dims == 2 && table.shape[0] == a.batch, "block_table", table, "a row for each sequence");
    own.block_table = indices_of("block_table", table, table.elements());
    a.block_table = own.block_table.data();
  }
  a.table_row = table.given ? table.shape[1] : 1;
  a.page = caches.shape[2];
  for (const int32_t length : indices_of("cache_seqlens", TensorView(cache_seqlens), a.batch)) own.lengths.push_back(length);
  check_cache(own.lengths, rows, own.block_table, a.table_row, a.page, caches.shape[0]);
  for (int64_t& length : own.lengths) length += rows;
  a.lengths = own.lengths.data();
  py::gil_scoped_release nogil;
  if (new_key.data && rows) append_to_cache(a, new_key, new_value, rows);
  attention_forward(a, threads);
}

// Sets the tangents of query, key, value, mask and sinks; each may be None.
void fill_tangents(Tangents& t, const Attention& a, const py::tuple& tangents) {
  const int dtype = a.query.dtype;
  const int64_t batch = tensor_batch(a);
  const auto rows = [&](int i, const char* name, std::initializer_list<int64_t> shape) {
    return tangents[i].is_none() ? Rows() : rows_of(name, tangents[i], dtype, shape);
  };
  t.query = rows(0, "query's tangent", {batch, a.heads, a.q_len, a.head_dim});
  t.key = rows(1, "key's tangent", {batch, a.kv_heads, a.k_len, a.head_dim});
  t.value = rows(2, "value's tangent", {batch, a.kv_heads, a.k_len, a.value_dim});
  const TensorView mask(tangents[3]), sinks(tangents[4]);
  if (mask.given) {
    Attention described = a;
    fill_mask(described, mask);
    expect(!described.mask_is_bool, "mask's tangent", mask, "a float");
    t.mask = described.mask;
    t.mask_key = described.mask_key;
  }
  t.sinks = array_of<float>("sinks' tangent", sinks, kFloat32, a.heads);
}

// results: out, lse, statistics, out's tangent and lse's tangent.
void jvp(const py::tuple& inputs, const py::tuple& options, const py::tuple& tangents, const py::tuple& results,
         int64_t threads) {
  AttentionJvp a{};
  Indices own;
  fill_inputs(a, own, inputs);
  fill_options(a, options);
  fill_tangents(a.tangent, a, tangents);
  const int64_t batch = tensor_batch(a);
  fill_outputs(a, batch, results[0], results[1], results[2]);
  a.out_tangent = rows_of("out's tangent", results[3], a.query.dtype, {batch, a.heads, a.q_len, a.value_dim});
  a.lse_tangent = statistic_of("lse's tangent", results[4], {batch, a.heads, a.q_len});
  py::gil_scoped_release nogil;
  attention_jvp(a, threads);
}

// Sets what the passes back read and write.
// saved: out, grad_out, statistics, grad_lse or None, and delta.
// outputs: grad_query, grad_key, grad_value, and grad_mask or None.
void fill_backward(AttentionBackward& a, const py::tuple& saved, const py::tuple& outputs, bool grad_mask_by_block) {
  const int64_t batch = tensor_batch(a);
  const int dtype = a.query.dtype;
  a.out = rows_of("out", saved[0], dtype, {batch, a.heads, a.q_len, a.value_dim});
  a.grad_out = rows_of("grad_out", saved[1], dtype, {batch, a.heads, a.q_len, a.value_dim});
  a.statistics = statistic_of("statistics", saved[2], {batch, a.heads, a.q_len, 2});
  a.grad_lse = statistic_of("grad_lse", saved[3], {batch, a.heads, a.q_len});
  a.delta = statistic_of("delta", saved[4], {batch, a.heads, a.q_len});
  a.grad_query = rows_of("grad_query", outputs[0], dtype, {batch, a.heads, a.q_len, a.head_dim});
  a.grad_key = rows_of("grad_key", outputs[1], dtype, {batch, a.kv_heads, a.k_len, a.head_dim});
  a.grad_value = rows_of("grad_value", outputs[2], dtype, {batch, a.kv_heads, a.k_len, a.value_dim});
  if (const TensorView grad_mask(outputs[3]); grad_mask.given) {
    const int64_t rows = grad_mask_by_block ? ceil_div(a.q_len, kBlockRows) : a.q_len;
    expect(a.mask.data || !grad_mask.elements(), "grad_mask", grad_mask, "a mask");
    expect(grad_mask.has_shape({a.batch, a.heads, rows, a.k_len}), "grad_mask", grad_mask, "a row for each of the mask's");
    a.grad_mask = rows_of("grad_mask", grad_mask, kFloat32);
    a.grad_mask_by_block = grad_mask_by_block;
  }
}

// of_stats: grad_entropy, grad_max_logit, grad_key_mass and max_key, each of which may be None, or nothing.
void backward(const py::tuple& inputs, const py::tuple& options, const py::tuple& saved, const py::tuple& outputs,
              bool grad_mask_by_block, const py::tuple& of_stats, int64_t threads) {
  AttentionBackward a{};
  Indices own;
  fill_inputs(a, own, inputs);
  fill_options(a, options);
  fill_backward(a, saved, outputs, grad_mask_by_block);
  if (of_stats.size()) {
    const int64_t batch = tensor_batch(a);
    a.grad_entropy = statistic_of("grad_entropy", of_stats[0], {batch, a.heads, a.q_len});
    a.grad_max_logit = statistic_of("grad_max_logit", of_stats[1], {batch, a.heads, a.q_len});
    a.grad_key_mass = statistic_of("grad_key_mass", of_stats[2], {batch, a.heads, a.k_len});
    a.max_key = statistic_of<const int32_t>("max_key", of_stats[3], {batch, a.heads, a.q_len}, kInt32);
    expect(a.max_key.data || !a.grad_max_logit.data, "max_key", TensorView(of_stats[3]), "given with grad_max_logit");
  }
  py::gil_scoped_release nogil;
  attention_backward(a, threads);
}

// of_tangents: out's tangent, lse's tangent, and the delta of out's tangent, which is written.
void jvp_backward(const py::tuple& inputs, const py::tuple& options, const py::tuple& tangents, const py::tuple& saved,
                  const py::tuple& of_tangents, const py::tuple& outputs, bool grad_mask_by_block, int64_t threads) {
  AttentionJvpBackward a{};
  Indices own;
  fill_inputs(a, own, inputs);
  fill_options(a, options);
  fill_tangents(a.tangent, a, tangents);
  fill_backward(a, saved, outputs, grad_mask_by_block);
  const int64_t batch = tensor_batch(a);
  a.out_tangent = rows_of("out's tangent", of_tangents[0], a.query.dtype, {batch, a.heads, a.q_len, a.value_dim});
  a.lse_tangent = statistic_of("lse's tangent", of_tangents[1], {batch, a.heads, a.q_len});
  a.tangent_delta = statistic_of("tangent_delta", of_tangents[2], {batch, a.heads, a.q_len});
  py::gil_scoped_release nogil;
  attention_jvp_backward(a, threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.attr("attention_block_rows") = kBlockRows;
  m.def("attention_forward", &forward);
  add_method(m, plain_method);
  m.def("attention_backward", &backward);
  m.def("attention_key_mass", &key_mass);
  m.def("attention_mean_of_keys", &mean_of_keys);
  m.def("attention_top_keys", &top_keys);
  m.def("attention_jvp", &jvp);
  m.def("attention_jvp_backward", &jvp_backward);
  m.def("kvcache_attention_forward", &kvcache_forward);
}

}  // namespace fastlm
