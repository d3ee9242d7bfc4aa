// fastlm._C: the CPU kernels for Python. It knows nothing of torch: tensors come as python_views.h says, checked by fastlm/ops,
// which also owns every output.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <string>

#include "../common/python_latent.h"
#include "isa.h"
#include "noise.h"
#include "parallel.h"
#include "reparameterize.h"
#include "sum_rows.h"

namespace py = pybind11;

namespace fastlm {

void bind_attention(py::module_&);  // bind_attention.cpp

namespace {

void reparameterize_forward(const py::tuple& shape, const py::tuple& inputs, const py::object& z, const py::object& kl,
                            intptr_t seeds, int64_t streams, int event_dims, int64_t samples, const LatentNumbers& numbers) {
  LatentForward a = latent_forward_of(shape, inputs, z, kl, seeds, streams, event_dims, samples, numbers);
  py::gil_scoped_release nogil;
  latent_forward(a);
}

void reparameterize_backward(const py::tuple& shape, const py::tuple& inputs, const py::object& grad_z,
                             const py::object& grad_kl, const py::tuple& outputs, intptr_t seeds, int64_t streams,
                             int event_dims, int64_t samples, const LatentNumbers& numbers) {
  LatentBackward a = latent_backward_of(shape, inputs, grad_z, grad_kl, outputs, seeds, streams, event_dims, samples, numbers);
  if (a.elements == 0) return;
  py::gil_scoped_release nogil;
  latent_backward(a);
}

void sum_rows_of(intptr_t matrix, int dtype, int64_t rows, int64_t columns, intptr_t total) {
  py::gil_scoped_release nogil;
  if (dtype == kFloat64) {
    sum_rows(reinterpret_cast<const double*>(matrix), rows, columns, reinterpret_cast<double*>(total));
  } else {
    sum_rows(reinterpret_cast<const float*>(matrix), rows, columns, reinterpret_cast<float*>(total));
  }
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
  m.def("normal", [](int64_t seed, int64_t position, intptr_t out, int64_t count) {
    py::gil_scoped_release nogil;
    normal(uint64_t(seed), uint64_t(position), count, reinterpret_cast<float*>(out));
  });
  m.def("reparameterize_forward", &reparameterize_forward);
  m.def("reparameterize_backward", &reparameterize_backward);
  m.def("sum_rows", &sum_rows_of);
  bind_attention(m);
}

}  // namespace fastlm
