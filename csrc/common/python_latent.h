// Converts the Gaussian latent's arguments from Python, for the CPU module and the CUDA module.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "latent.h"
#include "python_views.h"

namespace fastlm {

namespace py = pybind11;

inline bool is_float(int dtype) { return dtype == kFloat32 || dtype == kFloat64 || dtype == kBFloat16 || dtype == kFloat16; }

inline int accumulation_dtype(int dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }

inline Shape shape_of(const TensorView& t) {
  Shape shape;
  shape.dims = t.dims;
  std::copy_n(t.shape, t.dims, shape.size);
  return shape;
}

// Returns a view of a tensor that has mu's shape behind `skip` leading dimensions, and any strides. None becomes an absent
// view.
inline View view_of(const char* name, const TensorView& t, const TensorView& mu, int skip = 0) {
  View view;
  if (!t.given) return view;
  const bool fits = t.device == mu.device && is_float(t.dtype) && t.dims == mu.dims + skip;
  expect(fits && std::equal(mu.shape, mu.shape + mu.dims, t.shape + skip), name, t, "mu's shape and device");
  view.data = t.data;
  view.dtype = t.dtype;
  std::copy_n(t.stride + skip, mu.dims, view.stride);
  return view;
}

// Returns the data of a contiguous tensor of `count` elements of a dtype, or null for None.
inline char* array_of(const char* name, const TensorView& t, const TensorView& mu, int dtype, int64_t count) {
  if (!t.given) return nullptr;
  const bool fits = t.device == mu.device && t.dtype == dtype && t.elements() == count && t.is_contiguous();
  expect(fits, name, t, "a contiguous tensor of its dtype on mu's device, with a number for each of its own");
  return t.data;
}

// Merges neighbouring dimensions that are contiguous to each other in all views, so that most loops see one long dimension.
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

using LatentSamples = std::tuple<int64_t, int64_t, int64_t>;       // their number, first and sample_stride
using LatentNumbers = std::tuple<double, double, double, double>;  // free_bits, low, high, temperature

// inputs: mu, logvar, prior_mu and prior_logvar; the priors are expanded to mu's shape, or None. seeds: int64, one for all or
// one for each entry of mu's leading dimensions; or None if no noise is drawn. 0 samples are one without a leading dimension; a
// sample_stride of 0 means that of a whole call.
inline void fill(Latent& a, const TensorView& mu, const py::tuple& inputs, const TensorView& seeds,
                 const LatentSamples& samples, const LatentNumbers& numbers) {
  a.shape = shape_of(mu);
  a.elements = product(a.shape);
  a.mu = view_of("mu", mu, mu);
  a.logvar = view_of("logvar", TensorView(inputs[1]), mu);
  expect(a.logvar.dtype == a.mu.dtype, "logvar", mu, "mu's dtype");
  a.prior_mu = view_of("prior_mu", TensorView(inputs[2]), mu);
  a.prior_logvar = view_of("prior_logvar", TensorView(inputs[3]), mu);
  const bool leads = seeds.dims <= mu.dims && std::equal(seeds.shape, seeds.shape + seeds.dims, mu.shape);
  expect(!seeds.given || leads, "seed", seeds, "one number, or one for each of mu's leading entries");
  const int64_t streams = seeds.given ? seeds.elements() : 1;
  a.seeds = reinterpret_cast<const int64_t*>(array_of("seed", seeds, mu, kInt64, streams));
  a.stream = a.elements / std::max<int64_t>(streams, 1);
  std::tie(a.samples, a.first, a.sample_stride) = samples;
  a.samples = std::max<int64_t>(a.samples, 1);
  if (a.sample_stride == 0) a.sample_stride = a.stream;
  std::tie(a.free_bits, a.low, a.high, a.temperature) = numbers;
}

// Returns the number of elements that one KL value sums up.
inline int64_t event_of(const TensorView& mu, int event_dims) {
  expect(0 <= event_dims && event_dims <= mu.dims, "event_dims", mu, "at most mu's dimensions");
  return product(shape_of(mu), mu.dims - event_dims);
}

// Returns the number of KL values.
inline int64_t events_of(const TensorView& mu, int event_dims) {
  int64_t n = 1;
  for (int d = 0; d < mu.dims - event_dims; ++d) n *= mu.shape[d];
  return n;
}

inline LatentForward latent_forward_of(const py::tuple& inputs, py::handle z, py::handle kl, py::handle seed, int event_dims,
                                       const LatentSamples& samples, const LatentNumbers& numbers) {
  LatentForward a;
  const TensorView mu(inputs[0]), seeds(seed);
  fill(a, mu, inputs, seeds, samples, numbers);
  a.z = array_of("z", TensorView(z), mu, mu.dtype, a.samples * a.elements);
  expect(!a.z || seeds.given, "seed", seeds, "to be given with z");
  const int64_t event = event_of(mu, event_dims);
  a.kl = array_of("kl", TensorView(kl), mu, accumulation_dtype(mu.dtype), events_of(mu, event_dims));
  a.event = a.kl ? event : 1;
  coalesce(a.shape, {&a.mu, &a.logvar, &a.prior_mu, &a.prior_logvar});
  return a;
}

inline LatentBackward latent_backward_of(const py::tuple& inputs, py::handle grad_z, py::handle grad_kl,
                                         const py::tuple& outputs, py::handle seed, int event_dims,
                                         const LatentSamples& samples, const LatentNumbers& numbers) {
  LatentBackward a;
  const TensorView mu(inputs[0]), seeds(seed), of_z(grad_z), of_kl(grad_kl);
  fill(a, mu, inputs, seeds, samples, numbers);
  const int skip = std::get<0>(samples) > 0 ? 1 : 0;
  a.grad_z = view_of("grad_z", of_z, mu, skip);
  expect(!of_z.given || (of_z.dtype == mu.dtype && seeds.given), "grad_z", of_z, "z's dtype, and a seed with it");
  expect(!of_z.given || !skip || of_z.shape[0] == a.samples, "grad_z", of_z, "as many samples as z");
  a.grad_z_sample = skip && of_z.data ? of_z.stride[0] : 0;
  a.event = event_of(mu, event_dims);
  a.grad_kl = array_of("grad_kl", of_kl, mu, accumulation_dtype(mu.dtype), events_of(mu, event_dims));
  a.grad_mu = array_of("grad_mu", TensorView(outputs[0]), mu, mu.dtype, a.elements);
  a.grad_logvar = array_of("grad_logvar", TensorView(outputs[1]), mu, mu.dtype, a.elements);
  const TensorView of_prior_mu(outputs[2]), of_prior_logvar(outputs[3]);
  expect(is_float(of_prior_mu.dtype) && is_float(of_prior_logvar.dtype), "grad_prior", mu, "gradients of a floating dtype");
  a.prior_mu_dtype = of_prior_mu.dtype;
  a.prior_logvar_dtype = of_prior_logvar.dtype;
  a.grad_prior_mu = array_of("grad_prior_mu", of_prior_mu, mu, of_prior_mu.dtype, a.elements);
  a.grad_prior_logvar = array_of("grad_prior_logvar", of_prior_logvar, mu, of_prior_logvar.dtype, a.elements);
  coalesce(a.shape, {&a.mu, &a.logvar, &a.prior_mu, &a.prior_logvar, &a.grad_z});
  return a;
}

}  // namespace fastlm
