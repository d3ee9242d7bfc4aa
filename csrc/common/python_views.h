// Tensors as Python hands them over: None; torch's own, read through the C exchange API of DLPack 1.3, which torch offers and
// which costs no Python (dmlc.github.io/dlpack); or, where torch has none, what fastlm/native.py says of them in a tuple.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

#include "view.h"

namespace fastlm {

inline PyObject* item(pybind11::handle tuple, pybind11::ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }

inline int64_t integer(PyObject* value) { return PyLong_AsLongLong(value); }

// The parts of DLPack's ABI that are needed here, by its names.
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void *allocate, *from_python, *to_python;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);  // borrows: valid as long as the object
  void* current_work_stream;
};
inline const DLPackExchangeAPI* exchange = nullptr;
constexpr int kCPU = 1;

// From now on, tensors may come as they are; returned is whether this torch's API is one that is understood here.
inline bool use_exchange(const pybind11::capsule& api) {
  const auto* offered = static_cast<const DLPackExchangeAPI*>(api.get_pointer());
  const bool understood = offered->major == 1 && offered->dltensor_from_py_object_no_sync;
  if (understood) exchange = offered;
  return understood;
}

// Absent (data is null) where Python has None.
class TensorView {
 public:
  char* data = nullptr;
  int dtype = kFloat32;
  int dims = 0, device = kCPU;
  const int64_t *stride = nullptr, *shape = nullptr;

  explicit TensorView(pybind11::handle tensor) {
    if (tensor.is_none()) return;
    PyTuple_Check(tensor.ptr()) ? read_tuple(tensor) : read_tensor(tensor);
  }
  TensorView(const TensorView&) = delete;

 private:
  int64_t own_[2][kMaxDims];

  void read_tensor(pybind11::handle tensor) {
    DLTensor t;
    if (exchange->dltensor_from_py_object_no_sync(tensor.ptr(), &t)) throw pybind11::error_already_set();
    data = static_cast<char*>(t.data) + t.byte_offset;
    dtype = code_of(t.dtype);
    dims = t.ndim;
    device = t.device_type;
    stride = t.strides;
    shape = t.shape;
  }

  void read_tuple(pybind11::handle tuple) {
    data = reinterpret_cast<char*>(integer(item(tuple, 0)));
    dtype = int(integer(item(tuple, 1)));
    dims = int(PyTuple_GET_SIZE(item(tuple, 2)));
    for (int i = 0; i < 2; ++i) {
      for (int d = 0; d < std::min(dims, kMaxDims); ++d) own_[i][d] = integer(PyTuple_GET_ITEM(item(tuple, 2 + i), d));
    }
    stride = own_[0];
    shape = own_[1];
  }

  static int code_of(DLDataType type) {
    constexpr uint8_t kDLFloat = 2, kDLBfloat = 4, kDLBool = 6;
    if (type.code == kDLFloat) return type.bits == 16 ? kFloat16 : type.bits == 32 ? kFloat32 : kFloat64;
    return type.code == kDLBfloat ? kBFloat16 : type.code == kDLBool ? kBool : kOther;
  }
};

}  // namespace fastlm
