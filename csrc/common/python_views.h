// Tensors as Python passes them: None; a torch tensor, read through the C exchange API of DLPack 1.3 (dmlc.github.io/dlpack),
// which runs no Python; or, if torch does not offer that API, a tuple that fastlm/backend/cpu.py makes of the tensor.
//
// fastlm/ops checks what users pass, with better messages. The checks of dtypes, shapes, strides and devices here are those
// that keep a kernel inside its tensors, so that neither a bug in Python nor a direct call of torch.ops.fastlm.* can corrupt
// memory.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "view.h"

namespace fastlm {

inline PyObject* item(pybind11::handle tuple, pybind11::ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }

inline int64_t integer(PyObject* value) { return PyLong_AsLongLong(value); }

// The parts of DLPack's ABI that this file uses, with DLPack's names.
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
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);  // `out` is valid as long as the object
  void* current_work_stream;
};
inline const DLPackExchangeAPI* exchange = nullptr;
constexpr int kCPU = 1, kCUDA = 2;

// Lets tensors be passed without tuples, if this torch's API has a version that this file knows; returns whether it does.
inline bool use_exchange(const pybind11::capsule& api) {
  const auto* offered = static_cast<const DLPackExchangeAPI*>(api.get_pointer());
  const bool understood = offered->major == 1 && offered->dltensor_from_py_object_no_sync;
  if (understood) exchange = offered;
  return understood;
}

// A tensor that Python passed. given is false if that was None.
class TensorView {
 public:
  bool given = false;
  char* data = nullptr;
  int dtype = kFloat32;
  int dims = 0, device = kCPU;
  const int64_t *stride = nullptr, *shape = nullptr;

  explicit TensorView(pybind11::handle tensor) {
    if (tensor.is_none()) return;
    given = true;
    PyTuple_Check(tensor.ptr()) ? read_tuple(tensor) : read_tensor(tensor);
    if (dims > kMaxDims) throw pybind11::value_error("a tensor has too many dimensions");
    if (!data && elements())
      throw pybind11::value_error("a tensor has elements but no memory, as fake and meta tensors have none");
  }
  TensorView(const TensorView&) = delete;

  int64_t elements() const {
    int64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= shape[d];
    return n;
  }

  bool has_shape(std::initializer_list<int64_t> wanted) const {
    return dims == int(wanted.size()) && std::equal(wanted.begin(), wanted.end(), shape);
  }

  // Returns whether the dimensions from `from` on are in row-major order without gaps.
  bool is_contiguous(int from = 0) const {
    int64_t step = 1;
    for (int d = dims - 1; d >= from; --d) {
      if (shape[d] != 1 && stride[d] != step) return elements() == 0;
      step *= shape[d];
    }
    return true;
  }

  std::string describe() const {
    std::string text = "(";
    for (int d = 0; d < dims; ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
    return text + ")";
  }

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
    device = int(integer(item(tuple, 4)));
    stride = own_[0];
    shape = own_[1];
  }

  static int code_of(DLDataType type) {
    constexpr uint8_t kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6;
    if (type.lanes != 1) return kOther;
    switch (type.code) {
      case kDLInt: return type.bits == 32 ? kInt32 : type.bits == 64 ? kInt64 : kOther;
      case kDLFloat: return type.bits == 16 ? kFloat16 : type.bits == 32 ? kFloat32 : type.bits == 64 ? kFloat64 : kOther;
      case kDLBfloat: return kBFloat16;
      default: return type.code == kDLBool ? kBool : kOther;
    }
  }
};

inline bool is_half_or_float(int dtype) { return dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16; }

// Throws, and names the argument, if it does not fit.
inline void expect(bool fits, const char* name, const TensorView& tensor, const char* wanted) {
  if (fits) return;
  throw pybind11::value_error(std::string(name) + " does not fit the kernel, which needs " + wanted + "; got shape " +
                              tensor.describe());
}

}  // namespace fastlm
