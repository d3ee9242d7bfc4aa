// The Gaussian latent for Python.
#include <pybind11/pybind11.h>

#include "../../common/python_latent.h"
#include "latent.h"

namespace fastlm {
namespace {

void reparameterize_forward(const py::tuple& inputs, const py::object& z, const py::object& kl, const py::object& seed,
                            int event_dims, int64_t samples, const LatentNumbers& numbers) {
  LatentForward a = latent_forward_of(inputs, z, kl, seed, event_dims, samples, numbers);
  if (a.elements == 0) return;
  py::gil_scoped_release nogil;
  latent_forward(a);
}

void reparameterize_backward(const py::tuple& inputs, const py::object& grad_z, const py::object& grad_kl,
                             const py::tuple& outputs, const py::object& seed, int event_dims, int64_t samples,
                             const LatentNumbers& numbers) {
  LatentBackward a = latent_backward_of(inputs, grad_z, grad_kl, outputs, seed, event_dims, samples, numbers);
  if (a.elements == 0) return;
  py::gil_scoped_release nogil;
  latent_backward(a);
}

}  // namespace

void bind_latent(py::module_& m) {
  m.def("reparameterize_forward", &reparameterize_forward);
  m.def("reparameterize_backward", &reparameterize_backward);
}

}  // namespace fastlm
