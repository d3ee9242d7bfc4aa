// Binds linear to Python.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "linear.h"
#include "../fast_method.h"
#include "../../common/python_views.h"
#include "../../common/sizes.h"

namespace py = pybind11;

namespace fastlm {
namespace {

// Makes a matrix of a tensor (..., depth), whose leading dimensions become one. Returns whether its strides allow that.
bool fill_matrix(Matrix& matrix, const TensorView& t) {
  const int64_t size = bytes_of(t.dtype);
  int64_t rows = 1, row = 0;
  for (int d = t.dims - 2; d >= 0; --d) {
    if (t.shape[d] == 1) continue;
    if (rows > 1 && t.stride[d] != row * rows) return false;
    if (rows == 1) row = t.stride[d];
    rows *= t.shape[d];
  }
  const int64_t depth = t.shape[t.dims - 1] > 1 ? t.stride[t.dims - 1] : 1;
  matrix = {t.data, rows, row * size, depth * size};
  if (depth != 1 && rows == 1) matrix.row = size;  // a column of a matrix
  return depth == 1 || matrix.row == size;
}

// Computes the product. Returns false, and does nothing, if input or weight must be copied first.
// args: input (..., depth), weight (n, depth), bias (n,) or None, out (..., n), threads.
bool run(PyObject* const* args) {
  const TensorView input(args[0]), weight(args[1]), bias(args[2]), out(args[3]);
  const int dtype = input.dtype;
  expect(input.given && input.device == kCPU && is_half_or_float(dtype) && input.dims > 0, "input", input,
         "float32, bfloat16 or float16 on the CPU");
  const int64_t depth = input.shape[input.dims - 1];
  expect(weight.given && weight.device == kCPU && weight.dtype == dtype && weight.dims == 2 && weight.shape[1] == depth,
         "weight", weight, "2 dimensions, of input's dtype and depth");
  const int64_t n = weight.shape[0];
  expect(!bias.given || (bias.device == kCPU && bias.dtype == dtype && bias.has_shape({n}) && bias.is_contiguous()), "bias",
         bias, "a contiguous array of weight's rows");
  const bool shape = out.dims == input.dims && std::equal(out.shape, out.shape + out.dims - 1, input.shape);
  expect(shape && out.shape[out.dims - 1] == n && out.dtype == dtype && out.device == kCPU && out.is_contiguous(), "out", out,
         "input's leading dimensions, contiguous");
  Linear l{};
  if (!fill_matrix(l.a, input) || !fill_matrix(l.b, weight)) return false;
  l.depth = depth;
  l.dtype = dtype;
  l.bias = bias.data;
  l.out = out.data;
  const int64_t threads = integer(args[4]);
  py::gil_scoped_release nogil;
  linear(l, threads);
  return true;
}

PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return with_python_errors([&] {
    if (count != 5) throw py::type_error("linear takes input, weight, bias, out and threads");
    return PyBool_FromLong(run(args));
  });
}

PyMethodDef method = fast_method("linear", &call);

}  // namespace

void bind_linear(py::module_& m) { add_method(m, method); }

}  // namespace fastlm
