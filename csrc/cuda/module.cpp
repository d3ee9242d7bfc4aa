// fastlm._cuda: the CUDA kernels for Python. The module does not use torch: common/python_views.h reads and checks the tensors,
// and fastlm/ops allocates every output. fastlm/backend/cuda.py makes their device current, and passes torch's stream and a
// function that allocates temporary memory.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../common/python_latent.h"
#include "kernels.h"

namespace fastlm {
namespace {

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

void reparameterize_forward(const py::tuple& inputs, const py::object& z, const py::object& kl, const py::object& seed,
                            int event_dims, const LatentSamples& samples, const LatentNumbers& numbers,
                            const py::function& allocate, intptr_t stream) {
  LatentForward a = latent_forward_of(inputs, z, kl, seed, event_dims, samples, numbers);
  if (a.elements == 0) return;
  py::object room;  // must live until the launch; the allocator reuses it only for later work of this stream
  a.pieces = nullptr;
  if (const int64_t pieces = latent_pieces(a)) {
    room = allocate(pieces * int64_t(sizeof(double)));
    a.pieces = reinterpret_cast<double*>(TensorView(room).data);
  }
  py::gil_scoped_release nogil;
  check(latent_forward(a, reinterpret_cast<void*>(stream)));
}

void reparameterize_backward(const py::tuple& inputs, const py::object& grad_z, const py::object& grad_kl,
                             const py::tuple& outputs, const py::object& seed, int event_dims, const LatentSamples& samples,
                             const LatentNumbers& numbers, const py::function&, intptr_t stream) {
  const LatentBackward a = latent_backward_of(inputs, grad_z, grad_kl, outputs, seed, event_dims, samples, numbers);
  if (a.elements == 0) return;
  py::gil_scoped_release nogil;
  check(latent_backward(a, reinterpret_cast<void*>(stream)));
}

void normal_of(const py::object& seed, int64_t position, const py::object& out, const py::function&, intptr_t stream) {
  const TensorView to(out);
  const char* seeds = array_of("seed", TensorView(seed), to, kInt64, 1);
  array_of("out", to, to, kFloat32, to.elements());
  py::gil_scoped_release nogil;
  check(normal(reinterpret_cast<const int64_t*>(seeds), uint64_t(position), to.elements(), reinterpret_cast<float*>(to.data),
               reinterpret_cast<void*>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "fastlm's CUDA kernels.";
  m.def("use_exchange", &use_exchange);
  m.def("why_not", &why_not, "Return why the current device cannot run the kernels, or None.");
  m.def("normal", &normal_of);
  m.def("reparameterize_forward", &reparameterize_forward);
  m.def("reparameterize_backward", &reparameterize_backward);
  m.attr("architectures") = FASTLM_CUDA_ARCHITECTURES;
}

}  // namespace fastlm
