// The noise for Python.
#include <pybind11/pybind11.h>

#include "../../common/python_views.h"
#include "noise.h"

namespace py = pybind11;

namespace fastlm {
namespace {

void normal_of(int64_t seed, int64_t position, const py::handle& out) {
  const TensorView to(out);
  expect(to.device == kCPU && to.dtype == kFloat32 && to.is_contiguous(), "out", to, "contiguous float32 on the CPU");
  py::gil_scoped_release nogil;
  normal(uint64_t(seed), uint64_t(position), to.elements(), reinterpret_cast<float*>(to.data));
}

}  // namespace

void bind_noise(py::module_& m) { m.def("normal", &normal_of); }

}  // namespace fastlm
