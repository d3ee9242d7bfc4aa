// The Gaussian latent's arguments as Python hands them over, for the CPU's module and the GPU's alike; fastlm/ops checked them.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "latent.h"
#include "python_views.h"

namespace fastlm {

namespace py = pybind11;

// View of a tensor; `skip` leading strides are not part of the shape.
inline View view_of(py::handle tensor, int skip = 0) {
  const TensorView t(tensor);
  View view;
  view.data = t.data;
  view.dtype = t.dtype;
  for (int d = skip; d < t.dims; ++d) view.stride[d - skip] = t.stride[d];
  return view;
}

inline Shape shape_of(const py::tuple& sizes) {
  if (sizes.size() > kMaxDims) throw py::value_error("too many dimensions");
  Shape shape;
  for (const py::handle size : sizes) shape.size[shape.dims++] = size.cast<int64_t>();
  return shape;
}

// Merges neighbouring dimensions that all views walk through as one, so that most loops see a single long dimension.
inline void coalesce(Shape& shape, std::initializer_list<View*> views) {
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

inline int64_t product(const Shape& shape, int first_dim = 0) {
  int64_t n = 1;
  for (int d = first_dim; d < shape.dims; ++d) n *= shape.size[d];
  return n;
}

using LatentNumbers = std::tuple<double, double, double, double>;

inline void fill(Latent& a, const py::tuple& shape, const py::tuple& inputs, intptr_t seeds, int64_t streams, int64_t samples,
                 const LatentNumbers& numbers) {
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

inline LatentForward latent_forward_of(const py::tuple& shape, const py::tuple& inputs, const py::object& z,
                                       const py::object& kl, intptr_t seeds, int64_t streams, int event_dims, int64_t samples,
                                       const LatentNumbers& numbers) {
  LatentForward a;
  fill(a, shape, inputs, seeds, streams, samples, numbers);
  a.z = TensorView(z).data;
  a.kl = TensorView(kl).data;
  a.event = a.kl ? product(a.shape, a.shape.dims - event_dims) : 1;
  coalesce(a.shape, {&a.mu, &a.logvar, &a.prior_mu, &a.prior_logvar});
  return a;
}

inline LatentBackward latent_backward_of(const py::tuple& shape, const py::tuple& inputs, const py::object& grad_z,
                                         const py::object& grad_kl, const py::tuple& outputs, intptr_t seeds, int64_t streams,
                                         int event_dims, int64_t samples, const LatentNumbers& numbers) {
  LatentBackward a;
  fill(a, shape, inputs, seeds, streams, samples, numbers);
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
  return a;
}

}  // namespace fastlm
