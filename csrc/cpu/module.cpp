// fastlm._C: the CPU kernels for Python. The module does not use torch: python_views.h reads and checks the tensors, and
// fastlm/ops allocates every output.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <string>

#include "../common/python_views.h"
#include "../common/sizes.h"
#include "parallel.h"
#include "simd/isa.h"
#include "sum_rows.h"

namespace py = pybind11;

namespace fastlm {

// The ops, whose bind_<op> is in <op>/bind.cpp.
#define FASTLM_FOR_EACH_OP(X) X(attention) X(latent) X(linear) X(noise)

#define FASTLM_DECLARE_BIND(op) void bind_##op(py::module_&);
FASTLM_FOR_EACH_OP(FASTLM_DECLARE_BIND)

namespace {

// matrix: (rows, columns), contiguous float32 or float64. total: (columns,), of the same dtype.
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

// Asks for huge pages under a large output before it is written: with pages of 4 KiB, the page faults would take longer than
// the kernels.
void advise_huge_pages(intptr_t data, int64_t bytes) {
#if defined(__linux__)
  constexpr intptr_t page = 1 << 21;
  const intptr_t begin = round_up(data, page), end = (data + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_HUGEPAGE);  // only advice: may fail
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fastlm's CPU kernels.";
  m.def("use_thread_pool", [](intptr_t f) { torch_parallel_for = reinterpret_cast<ParallelFor>(f); });
  m.def("use_exchange", &use_exchange);
  m.def("isas", &isas, "The instruction sets that this machine runs, slowest first.");
  m.def("fastest_isa", [] { return isa_names[fastest_isa()]; }, "The instruction set that is fastest here.");
  m.def("isa", [] { return isa_names[current_isa()]; }, "The instruction set in use.");
  m.def("set_isa", &set_isa);
  m.def("is_intel", &is_intel, "Whether the processor is Intel's, which torch's MKL is made for.");
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("sum_rows", &sum_rows_of);
#define FASTLM_CALL_BIND(op) bind_##op(m);
  FASTLM_FOR_EACH_OP(FASTLM_CALL_BIND)
}

}  // namespace fastlm
