// A thread reads and writes a group of N neighbouring elements of a tensor, in row-major order: 16 bytes at a time if the
// tensor is packed (the launcher decides), else one by one, with any dtype and strides.
#pragma once

#include "../common/view.h"
#include "scalar.cuh"

#define FASTLM_DEVICE static __device__ __forceinline__
#define FASTLM_DEVICE_MEMBER __device__ __forceinline__

namespace fastlm {

constexpr int kThreads = 128;  // threads per block

// Elements per thread: 16 bytes, or one block of the noise, four normals, if that is more.
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

// Elements first + low .. first + high - 1 belong to the thread. The others of the group belong to another block, or are past
// the end.
struct Group {
  int64_t first;
  int low, high;
  bool exists;  // whether the tensor has all N elements

  FASTLM_MEMBER bool has(int i) const { return low <= i && i < high; }
};

// Returns the part of the group at `first` that lies in [begin, end), in a tensor of so many elements.
template <int N>
FASTLM_DEVICE Group group_at(int64_t first, int64_t begin, int64_t end, int64_t elements) {
  return {first, first < begin ? int(begin - first) : 0, first + N > end ? int(end - first) : N, first + N <= elements};
}

// Returns n / d for n >= 0, d > 0. The compiler's own 64-bit division is a call of a hundred instructions, which makes
// registers spill. This divides numbers from 2^32 up, which are rare, bit by bit.
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

// The offset of an element in each of several views of one shape, and its index along the last dimension.
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

// Sets values[i] = x for an i that is not constant. The values stay in registers.
template <class C, int N>
FASTLM_DEVICE void put(C (&values)[N], int i, C x) {
  FASTLM_UNROLL(8)
  for (int j = 0; j < N; ++j) values[j] = i == j ? x : values[j];
}

// Loads the thread's elements of the view into values; the others become 0. The group starts at `offset` in `data`.
// A packed view holds T, and none of its groups crosses the end of a row.
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

// Stores the thread's elements in a contiguous tensor of T.
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

// Stores the thread's elements in a contiguous tensor of any dtype.
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
