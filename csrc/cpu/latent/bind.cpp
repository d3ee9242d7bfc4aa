// The Gaussian latent for Python.
#include <pybind11/pybind11.h>

#include <limits>

#include "../../common/python_latent.h"
#include "../fast_method.h"
#include "latent.h"

namespace fastlm {
namespace {

void reparameterize_forward(const py::tuple& inputs, py::handle z, py::handle kl, py::handle seed, int event_dims,
                            const LatentSamples& samples, const LatentNumbers& numbers) {
  LatentForward a = latent_forward_of(inputs, z, kl, seed, event_dims, samples, numbers);
  if (a.elements == 0) return;
  py::gil_scoped_release nogil;
  latent_forward(a);
}

void reparameterize_backward(const py::tuple& inputs, py::handle grad_z, py::handle grad_kl, const py::tuple& outputs,
                             py::handle seed, int event_dims, const LatentSamples& samples, const LatentNumbers& numbers) {
  LatentBackward a = latent_backward_of(inputs, grad_z, grad_kl, outputs, seed, event_dims, samples, numbers);
  if (a.elements == 0) return;
  py::gil_scoped_release nogil;
  latent_backward(a);
}

// ---- calls without options, at the least cost -------------------------------------------------------------------------------

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const LatentSamples kOneSample{0, 0, 0};
const LatentNumbers kNoOptions{0, -kInfinity, kInfinity, 1};  // free_bits, low, high, temperature

// Returns a tuple of what belongs to mu, what belongs to logvar, and None for both priors.
py::tuple without_priors(py::handle of_mu, py::handle of_logvar) {
  return py::make_tuple(of_mu, of_logvar, py::none(), py::none());
}

// args: mu, logvar, seed, event_dims, z, kl.
PyObject* plain_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return with_python_errors([&] {
    if (count != 6) throw py::type_error("latent_plain_forward takes 6 arguments");
    const int event_dims = int(integer(args[3]));
    reparameterize_forward(without_priors(args[0], args[1]), args[4], args[5], args[2], event_dims, kOneSample, kNoOptions);
    return py::none().release().ptr();
  });
}

// args: mu, logvar, seed, event_dims, grad_z or None, grad_kl or None, grad_mu, grad_logvar.
PyObject* plain_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return with_python_errors([&] {
    if (count != 8) throw py::type_error("latent_plain_backward takes 8 arguments");
    const int event_dims = int(integer(args[3]));
    reparameterize_backward(without_priors(args[0], args[1]), args[4], args[5], without_priors(args[6], args[7]), args[2],
                            event_dims, kOneSample, kNoOptions);
    return py::none().release().ptr();
  });
}

PyMethodDef plain_forward_method = fast_method("latent_plain_forward", &plain_forward);
PyMethodDef plain_backward_method = fast_method("latent_plain_backward", &plain_backward);

}  // namespace

void bind_latent(py::module_& m) {
  m.def("reparameterize_forward", &reparameterize_forward);
  m.def("reparameterize_backward", &reparameterize_backward);
  add_method(m, plain_forward_method);
  add_method(m, plain_backward_method);
}

}  // namespace fastlm
