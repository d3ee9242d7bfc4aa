// fastlm._C: the CPU kernels for Python. It knows nothing of torch: tensors come as python_views.h says, checked by fastlm/ops,
// which also owns every output.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <string>

#include "isa.h"
#include "noise.h"
#include "parallel.h"
#include "python_views.h"
#include "reparameterize.h"
#include "sum_rows.h"

namespace py = pybind11;

namespace fastlm {

void bind_attention(py::module_&);  // bind_attention.cpp

namespace {

// View of a tensor; `skip` leading strides are not part of the shape.
View view_of(py::handle tensor, int skip = 0) {
  const TensorView t(tensor);
  View view;
  view.data = t.data;
  view.dtype = t.dtype;
  for (int d = skip; d < t.dims; ++d) view.stride[d - skip] = t.stride[d];
  return view;
}

Shape shape_of(const py::tuple& sizes) {
  if (sizes.size() > kMaxDims) throw py::value_error("too many dimensions");
  Shape shape;
  for (const py::handle size : sizes) shape.size[shape.dims++] = size.cast<int64_t>();
  return shape;
}

// Merges neighbouring dimensions that all views walk through as one, so that most loops see a single long dimension.
void coalesce(Shape& shape, std::initializer_list<View*> views) {
  int kept = 0;
  for (int d = 0; d < shape.dims; ++d) {
    if (shape.size[d] == 1) continue;
    const auto continues = [&](const View* v) { return !v->data || v->stride[kept - 1] == v->stride[d] * shape.size[d]; };
    const bool merge = kept > 0 && std::all_of(views.begin(), views.end(), continues);
    const int to = merge ? kept - 1 : kept++;
    shape.size[to] = merge ? shape.size[to] * shape.size[d] : shape.size[d];
    for (View* v : views) v->stride[to] = v->stride[d];
  }
  if (kept == 0) {
    shape.size[0] = 1;
    for (View* v : views) v->stride[0] = 1;
    kept = 1;
  }
  shape.dims = kept;
}

int64_t product(const Shape& shape, int first_dim = 0) {
  int64_t n = 1;
  for (int d = first_dim; d < shape.dims; ++d) n *= shape.size[d];
  return n;
}

using Numbers = std::tuple<double, double, double, double>;

void fill(Latent& a, const py::tuple& shape, const py::tuple& inputs, intptr_t seeds, int64_t streams, int64_t samples,
          const Numbers& numbers) {
  a.shape = shape_of(shape);
  a.elements = product(a.shape);
  a.mu = view_of(inputs[0]);
  a.logvar = view_of(inputs[1]);
  a.prior_mu = view_of(inputs[2]);
  a.prior_logvar = view_of(inputs[3]);
  a.seeds = reinterpret_cast<const int64_t*>(seeds);
  a.stream = a.elements / std::max<int64_t>(streams, 1);
  a.samples = std::max<int64_t>(samples, 1);  // 0: one, without a leading dimension
  std::tie(a.free_bits, a.low, a.high, a.temperature) = numbers;
}

void reparameterize_forward(const py::tuple& shape, const py::tuple& inputs, const py::object& z, const py::object& kl,
                            intptr_t seeds, int64_t streams, int event_dims, int64_t samples, const Numbers& numbers) {
  LatentForward a;
  fill(a, shape, inputs, seeds, streams, samples, numbers);
  a.z = TensorView(z).data;
  a.kl = TensorView(kl).data;
  a.event = a.kl ? product(a.shape, a.shape.dims - event_dims) : 1;
  coalesce(a.shape, {&a.mu, &a.logvar, &a.prior_mu, &a.prior_logvar});
  py::gil_scoped_release nogil;
  latent_forward(a);
}

void reparameterize_backward(const py::tuple& shape, const py::tuple& inputs, const py::object& grad_z,
                             const py::object& grad_kl, const py::tuple& outputs, intptr_t seeds, int64_t streams,
                             int event_dims, int64_t samples, const Numbers& numbers) {
  LatentBackward a;
  fill(a, shape, inputs, seeds, streams, samples, numbers);
  if (a.elements == 0) return;
  a.grad_z = view_of(grad_z, samples > 0 ? 1 : 0);
  a.grad_z_sample = samples > 0 && a.grad_z.data ? TensorView(grad_z).stride[0] : 0;
  a.grad_kl = TensorView(grad_kl).data;
  a.event = product(a.shape, a.shape.dims - event_dims);
  a.grad_mu = TensorView(outputs[0]).data;
  a.grad_logvar = TensorView(outputs[1]).data;
  const View grad_prior_mu = view_of(outputs[2]), grad_prior_logvar = view_of(outputs[3]);
  a.grad_prior_mu = grad_prior_mu.data;
  a.prior_mu_dtype = grad_prior_mu.dtype;
  a.grad_prior_logvar = grad_prior_logvar.data;
  a.prior_logvar_dtype = grad_prior_logvar.dtype;
  coalesce(a.shape, {&a.mu, &a.logvar, &a.prior_mu, &a.prior_logvar, &a.grad_z});
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

// From now on, tensors may come as they are; returned is whether this torch's API is one that is understood here.
bool use_exchange(const py::capsule& api) {
  const auto* offered = static_cast<const DLPackExchangeAPI*>(api.get_pointer());
  const bool understood = offered->major == 1 && offered->dltensor_from_py_object_no_sync;
  if (understood) exchange = offered;
  return understood;
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
