// Functions that Python calls by its own convention (METH_FASTCALL), because pybind11's takes as long as the arithmetic of a
// tiny call.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlm {

using FastFunction = PyObject*(PyObject* module, PyObject* const* args, Py_ssize_t count);

inline PyMethodDef fast_method(const char* name, FastFunction* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

// Adds the method, which must live as long as the module.
inline void add_method(pybind11::module_& m, PyMethodDef& method) {
  m.attr(method.ml_name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace fastlm
