// Tensors as Python hands them over: None, or (address, dtype code, strides in elements) (fastlm/native.py).
#pragma once

#include <pybind11/pybind11.h>

#include "view.h"

namespace fastlm {

inline PyObject* item(pybind11::handle tuple, pybind11::ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }

inline int64_t integer(PyObject* value) { return PyLong_AsLongLong(value); }

inline char* address_of(pybind11::handle tensor) {
  return tensor.is_none() ? nullptr : reinterpret_cast<char*>(integer(item(tensor, 0)));
}

inline int dtype_of(pybind11::handle tensor) { return int(integer(item(tensor, 1))); }

inline int64_t stride_of(pybind11::handle tensor, pybind11::ssize_t dim) {
  return integer(PyTuple_GET_ITEM(item(tensor, 2), dim));
}

}  // namespace fastlm
