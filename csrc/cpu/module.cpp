// fastlm._C: the CPU kernels for Python. It knows nothing of torch: tensors come as python_views.h says, which checks them;
// fastlm/ops owns every output.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <string>

#include "../common/python_latent.h"
#include "simd/isa.h"
#include "noise/noise.h"
#include "parallel.h"
#include "latent/latent.h"
#include "sum_rows.h"

namespace py = pybind11;

namespace fastlm {

void bind_attention(py::module_&);  // attention/bind.cpp

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

// matrix: (rows, columns) of float32 or float64, contiguous; total: (columns,) in its dtype.
void sum_rows_of(const py::handle& matrix, const py::handle& total) {
  const TensorView from(matrix), to(total);
  const bool fits = from.device == kCPU && from.dims == 2 && from.is_contiguous();
  expect(fits && (from.dtype == kFloat32 || from.dtype == kFloat64), "matrix", from, "float32 or float64 rows on the CPU");
  expect(to.dtype == from.dtype && to.has_shape({from.shape[1]}) && to.is_contiguous(), "total", to,
         "a number for each column");
  py::gil_scoped_release nogil;
  if (from.dtype == kFloat64) {
    sum_rows(reinterpret_cast<const double*>(from.data), from.shape[0], from.shape[1], reinterpret_cast<double*>(to.data));
  } else {
    sum_rows(reinterpret_cast<const float*>(from.data), from.shape[0], from.shape[1], reinterpret_cast<float*>(to.data));
  }
}

void normal_of(int64_t seed, int64_t position, const py::handle& out) {
  const TensorView to(out);
  expect(to.device == kCPU && to.dtype == kFloat32 && to.is_contiguous(), "out", to, "contiguous float32 on the CPU");
  py::gil_scoped_release nogil;
  normal(uint64_t(seed), uint64_t(position), to.elements(), reinterpret_cast<float*>(to.data));
}

py::list isas() {
  py::list names;
  for (int isa = 0; isa < isa_count; ++isa) {
    if (isa_runs_here(isa)) names.append(isa_names[isa]);
  }
  return names;
}

void set_isa(const std::string& name) {
  for (int isa = 0; isa < isa_count; ++isa) {
    if (name == isa_names[isa] && isa_runs_here(isa)) return set_current_isa(isa);
  }
  throw py::value_error("this machine runs " + py::str(isas()).cast<std::string>() + "; got '" + name + "'");
}

// Asks for huge pages under a large output before it is written: at 4 KiB a page, faults would take longer than the kernels.
void advise_huge_pages(intptr_t data, int64_t bytes) {
#if defined(__linux__)
  constexpr intptr_t page = 1 << 21;
  const intptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_HUGEPAGE);  // only advice: may fail
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fastlm's CPU kernels.";
  m.def("use_thread_pool", [](intptr_t f) { torch_parallel_for = reinterpret_cast<ParallelFor>(f); });
  m.def("use_exchange", &use_exchange);
  m.def("isas", &isas, "The instruction sets that this machine runs, slowest first.");
  m.def("isa", [] { return isa_names[current_isa()]; }, "The instruction set in use.");
  m.def("set_isa", &set_isa);
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("normal", &normal_of);
  m.def("reparameterize_forward", &reparameterize_forward);
  m.def("reparameterize_backward", &reparameterize_backward);
  m.def("sum_rows", &sum_rows_of);
  bind_attention(m);
}

}  // namespace fastlm
