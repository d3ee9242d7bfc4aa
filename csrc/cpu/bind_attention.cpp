// Attention for Python. Shapes, dtypes and devices were checked by fastlm/ops; the numbers inside index tensors are checked
// here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "attention.h"
#include "python_views.h"

namespace py = pybind11;

namespace fastlm {
namespace {

int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : dtype == kFloat64 ? 8 : dtype == kBool ? 1 : 2; }

// A view of (batch, head, row, column), or None.
Rows rows_of(py::handle tensor) {
  Rows rows;
  if (tensor.is_none()) return rows;
  rows.data = address_of(tensor);
  rows.dtype = dtype_of(tensor);
  const int64_t bytes = bytes_of(rows.dtype);
  rows.batch = stride_of(tensor, 0) * bytes;
  rows.head = stride_of(tensor, 1) * bytes;
  rows.row = stride_of(tensor, 2) * bytes;
  return rows;
}

// A view of (batch, head, row) with contiguous rows.
Statistic statistic_of(py::handle tensor) {
  if (tensor.is_none()) return {};
  return {reinterpret_cast<float*>(address_of(tensor)), stride_of(tensor, 0), stride_of(tensor, 1)};
}

template <class T>
const T* array_of(py::handle address) {
  return reinterpret_cast<const T*>(address.is_none() ? 0 : integer(address.ptr()));
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

// sizes: batch, query heads, key heads, query length, key length, head_dim, value_dim.
void fill_sizes(Attention& a, const py::tuple& sizes) {
  int64_t n[7];
  for (int i = 0; i < 7; ++i) n[i] = integer(item(sizes, i));
  a.batch = n[0];
  a.heads = n[1];
  a.kv_heads = n[2];
  a.group = n[2] ? n[1] / n[2] : 1;
  a.q_len = n[3];
  a.k_len = n[4];
  a.head_dim = n[5];
  a.value_dim = n[6];
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

// inputs: views of query, key, value and mask; addresses and batch strides of slopes; the address of sinks; the address and
// stride of seeds; the addresses of cu_seqlens_q and cu_seqlens_k.
void fill_inputs(Attention& a, const py::tuple& inputs) {
  a.query = rows_of(inputs[0]);
  a.key = rows_of(inputs[1]);
  a.value = rows_of(inputs[2]);
  a.mask = rows_of(inputs[3]);
  a.mask_is_bool = a.mask.data && a.mask.dtype == kBool;
  a.mask_key = a.mask.data ? stride_of(inputs[3], 3) : 0;
  a.slopes = array_of<float>(inputs[4]);
  a.slope_batch = integer(item(inputs, 5));
  a.sinks = array_of<float>(inputs[6]);
  a.seeds = array_of<int64_t>(inputs[7]);
  a.seed_stride = integer(item(inputs, 8));
  a.cu_seqlens_q = array_of<int32_t>(inputs[9]);
  a.cu_seqlens_k = array_of<int32_t>(inputs[10]);
  if (a.cu_seqlens_q) {
    check_offsets("cu_seqlens_q", a.cu_seqlens_q, a.batch, a.q_len);
    check_offsets("cu_seqlens_k", a.cu_seqlens_k, a.batch, a.k_len);
  }
}

void forward(const py::tuple& sizes, const py::tuple& inputs, const py::tuple& options, const py::tuple& out,
             const py::tuple& lse, int64_t threads) {
  AttentionForward a{};
  fill_sizes(a, sizes);
  fill_inputs(a, inputs);
  fill_options(a, options);
  a.out = rows_of(out);
  a.lse = statistic_of(lse);
  py::gil_scoped_release nogil;
  attention_forward(a, threads);
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

// cache: the address of cache_seqlens, of block_table or None, its entries per sequence, rows per page, pages, rows in all;
// appended: views of key and value, and their rows.
void cached_forward(const py::tuple& sizes, const py::tuple& inputs, const py::tuple& options, const py::tuple& cache,
                    const py::tuple& appended, const py::tuple& out, const py::tuple& lse, int64_t threads) {
  AttentionForward a{};
  fill_sizes(a, sizes);
  fill_inputs(a, inputs);
  fill_options(a, options);
  a.out = rows_of(out);
  a.lse = statistic_of(lse);
  const int32_t* cache_seqlens = array_of<int32_t>(cache[0]);
  a.block_table = array_of<int32_t>(cache[1]);
  a.table_row = integer(item(cache, 2));
  a.page = integer(item(cache, 3));
  const int64_t rows = integer(item(appended, 2));
  check_cache(cache_seqlens, a.batch, rows, integer(item(cache, 5)), a.block_table, a.table_row, a.page,
              integer(item(cache, 4)));
  std::vector<int64_t> lengths(size_t(a.batch));
  for (int64_t b = 0; b < a.batch; ++b) lengths[size_t(b)] = cache_seqlens[b] + rows;
  a.lengths = lengths.data();
  const Rows key = rows_of(appended[0]), value = rows_of(appended[1]);
  py::gil_scoped_release nogil;
  if (key.data && rows) append_to_cache(a, key, value, rows);
  attention_forward(a, threads);
}

// saved: views of out, grad_out, lse, grad_lse and delta; outputs: of grad_query, grad_key, grad_value and grad_mask.
void backward(const py::tuple& sizes, const py::tuple& inputs, const py::tuple& options, const py::tuple& saved,
              const py::tuple& outputs, bool grad_mask_by_block, int64_t threads) {
  AttentionBackward a{};
  fill_sizes(a, sizes);
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
  m.def("attention_backward", &backward);
  m.def("cached_attention_forward", &cached_forward);
}

}  // namespace fastlm
