// How a thread reads and writes a group of N neighbouring elements of a tensor, counted in row-major order: in 16 bytes at a
// time where the tensor is packed, which the launcher finds out, else one by one, of any dtype and strides.
#pragma once

#include "../common/view.h"
#include "scalar.cuh"

#define FASTLM_DEVICE static __device__ __forceinline__
#define FASTLM_DEVICE_MEMBER __device__ __forceinline__

namespace fastlm {

constexpr int kThreads = 128;  // of a block

// Elements of a thread: 16 bytes, but whole blocks of the noise, which are four normals.
template <class T>
constexpr int kGroup = sizeof(T) == 2 ? 8 : 4;

template <class T>
constexpr int kDtype = kFloat32;
template <>
constexpr int kDtype<double> = kFloat64;
template <>
constexpr int kDtype<__half> = kFloat16;
template <>
constexpr int kDtype<__nv_bfloat16> = kBFloat16;

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

// Elements first + low .. first + high - 1 are the thread's own; those beside them are another block's, or past the end.
struct Group {
  int64_t first;
  int low, high;
  bool exists;  // whether all N elements do

  FASTLM_MEMBER bool has(int i) const { return low <= i && i < high; }
};

// The part of the group at `first` that lies in [begin, end), in a tensor of so many elements.
template <int N>
FASTLM_DEVICE Group group_at(int64_t first, int64_t begin, int64_t end, int64_t elements) {
  return {first, first < begin ? int(begin - first) : 0, first + N > end ? int(end - first) : N, first + N <= elements};
}

// n / d for n >= 0, d > 0. The compiler's own 64-bit division is a call that takes a hundred instructions and makes registers
// spill; here, numbers from 2^32 up, which are rare, are divided bit by bit.
FASTLM_HD int64_t quotient(int64_t n, int64_t d) {
  if (n < d) return 0;
  if (((n | d) >> 32) == 0) return int64_t(uint32_t(n) / uint32_t(d));
  int64_t q = 0;
  FASTLM_ROLLED
  for (int bit = 62; bit >= 0; --bit) {
    if ((n >> bit) < d) continue;
    n -= d << bit;
    q += int64_t(1) << bit;
  }
  return q;
}

// Where an element lies in several views of one shape, and its index along the last dimension.
template <int kViews>
struct Place {
  int64_t offset[kViews];
  int64_t inner;
};

template <int kViews>
FASTLM_DEVICE Place<kViews> locate(const Shape& shape, const View* const (&views)[kViews], int64_t element) {
  Place<kViews> place = {};
  for (int d = shape.dims - 1; d >= 0; --d) {
    const int64_t rest = d > 0 ? quotient(element, shape.size[d]) : 0, index = element - rest * shape.size[d];
    if (d == shape.dims - 1) place.inner = index;
    FASTLM_UNROLL(8)
    for (int v = 0; v < kViews; ++v) place.offset[v] += index * views[v]->stride[d];
    element = rest;
  }
  return place;
}

template <class C>
FASTLM_DEVICE C read(const char* data, int dtype, int64_t offset) {
  switch (dtype) {
    case kFloat32: return widened<C>(reinterpret_cast<const float*>(data)[offset]);
    case kFloat64: return widened<C>(reinterpret_cast<const double*>(data)[offset]);
    case kBFloat16: return widened<C>(reinterpret_cast<const __nv_bfloat16*>(data)[offset]);
    default: return widened<C>(reinterpret_cast<const __half*>(data)[offset]);
  }
}

// values[i] = x, where i is not known to the compiler: the values stay in registers.
template <class C, int N>
FASTLM_DEVICE void put(C (&values)[N], int i, C x) {
  FASTLM_UNROLL(8)
  for (int j = 0; j < N; ++j) values[j] = i == j ? x : values[j];
}

// The thread's elements of the view, the first of the group at `offset` of `data`; 0 for those that are not the thread's.
// A packed view holds T, and no group of it crosses a row's end.
template <class T, class C, int N>
FASTLM_DEVICE void load(const Shape& shape, const View& view, const char* data, bool packed, const Group& group, int64_t offset,
                        int64_t inner, C (&values)[N]) {
  if (packed && group.exists) {
    const auto pack = *reinterpret_cast<const Pack<T, N>*>(reinterpret_cast<const T*>(data) + offset);
    FASTLM_UNROLL(8)
    for (int i = 0; i < N; ++i) values[i] = widened<C>(pack.v[i]);
    return;
  }
  FASTLM_UNROLL(8)
  for (int i = 0; i < N; ++i) values[i] = C(0);
  const int last = shape.dims - 1;
  FASTLM_ROLLED
  for (int i = 0; i < group.high; ++i, ++inner, offset += view.stride[last]) {
    if (inner == shape.size[last]) {
      offset = locate<1>(shape, {&view}, group.first + i).offset[0];
      inner = 0;
    }
    if (i >= group.low) put(values, i, read<C>(data, view.dtype, offset));
  }
}

template <class T, class C, int N>
FASTLM_DEVICE void store(T* out, bool packed, const Group& group, const C (&values)[N]) {
  if (packed && group.low == 0 && group.high == N) {
    Pack<T, N> pack;
    FASTLM_UNROLL(8)
    for (int i = 0; i < N; ++i) narrow(&pack.v[i], values[i]);
    *reinterpret_cast<Pack<T, N>*>(out + group.first) = pack;
    return;
  }
  FASTLM_UNROLL(8)
  for (int i = 0; i < N; ++i) {
    if (group.has(i)) narrow(out + group.first + i, values[i]);
  }
}

// To a contiguous tensor of any dtype.
template <class C, int N>
FASTLM_DEVICE void store_as(int dtype, void* out, bool packed, const Group& group, const C (&values)[N]) {
  switch (dtype) {
    case kFloat32: return store(static_cast<float*>(out), packed, group, values);
    case kFloat64: return store(static_cast<double*>(out), packed, group, values);
    case kBFloat16: return store(static_cast<__nv_bfloat16*>(out), packed, group, values);
    default: return store(static_cast<__half*>(out), packed, group, values);
  }
}

}  // namespace fastlm
