// Functions that Python calls by its own convention (METH_FASTCALL), because pybind11's takes as long as the arithmetic of a
// tiny call.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace fastlm {

using FastFunction = PyObject*(PyObject* module, PyObject* const* args, Py_ssize_t count);

inline PyMethodDef fast_method(const char* name, FastFunction* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

// Returns the body's result, or null with the exception of Python's that stands for the one thrown.
template <class Body>
PyObject* with_python_errors(const Body& body) {
  try {
    return body();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Adds the method, which must live as long as the module.
inline void add_method(pybind11::module_& m, PyMethodDef& method) {
  m.attr(method.ml_name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace fastlm
