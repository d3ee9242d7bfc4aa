// Copies elements of tensors of any dtype and strides into short contiguous arrays of float or double, and results back.
#pragma once

#include "../simd/simd.h"
#include "../../common/view.h"

namespace fastlm::FASTLM_ISA {

constexpr int kTile = 256;  // Elements per tile: a dozen arrays of this length fit into the first-level cache.

// Calls f with a value of the dtype's storage type.
template <class F>
FASTLM_SIMD void with_dtype(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(float());
    case kFloat64: return f(double());
    case kBFloat16: return f(BFloat16());
    default: return f(Float16());
  }
}

template <class T, class U>
constexpr bool same = false;
template <class T>
constexpr bool same<T, T> = true;

// Loads 16 elements of type T as a vector of C.
template <class C, class T>
FASTLM_SIMD Vector<C> load(const T* p) {
  if constexpr (same<C, double> && sizeof(T) == 2) {
    float wide[kLanes];
    F32::load(p).store(wide);
    return F64::load(wide);
  } else if constexpr (same<C, float> && same<T, double>) {
    float narrow[kLanes];
    F64::load(p).store(narrow);
    return F32::load(narrow);
  } else {
    return Vector<C>::load(p);
  }
}

// Stores a vector of C as 16 elements of type T.
template <class C, class T>
FASTLM_SIMD void store(Vector<C> v, T* p) {
  if constexpr (same<C, double> && sizeof(T) == 2) {
    float narrow[kLanes];
    v.store(narrow);
    F32::load(narrow).store(p);
  } else if constexpr (same<C, float> && same<T, double>) {
    float values[kLanes];
    v.store(values);
    F64::load(values).store(p);
  } else {
    v.store(p);
  }
}

// Copies elements [first, first + count) of the view, in row-major order, to out, and pads it with zeros to whole vectors.
template <class T>
static void gather(const Shape& shape, const View& view, int64_t first, int64_t count, T* out) {
  const T* data = reinterpret_cast<const T*>(view.data);
  const int last = shape.dims - 1;
  int64_t index[kMaxDims], rest = first, offset = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = rest % shape.size[d];
    rest /= shape.size[d];
    offset += index[d] * view.stride[d];
  }
  for (int64_t done = 0; done < count;) {
    const int64_t left = shape.size[last] - index[last], run = left < count - done ? left : count - done;
    const int64_t stride = view.stride[last];
    if (stride == 1) {
      __builtin_memcpy(out + done, data + offset, run * sizeof(T));
    } else {
      for (int64_t i = 0; i < run; ++i) out[done + i] = data[offset + i * stride];
    }
    done += run;
    offset += run * stride;
    index[last] += run;
    for (int d = last; d > 0 && index[d] == shape.size[d]; --d) {  // carry
      offset += view.stride[d - 1] - shape.size[d] * view.stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
  for (int64_t i = count; i < padded(count); ++i) out[i] = T{};
}

// Memory for a tile of a tensor: its elements as they are stored, and as C.
template <class C>
struct Tile {
  alignas(64) C converted[kTile];
  alignas(64) char raw[kTile * sizeof(double)];
};

// Prefetches the cache lines of the next tile. Without this, memory would be idle during the arithmetic on the current tile.
template <bool kWrite, class T>
FASTLM_SIMD void prefetch(const T* next, int64_t count) {
  const char* line = reinterpret_cast<const char*>(next);
  for (int64_t byte = 0; byte < count * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(line + byte, kWrite ? 1 : 0);
}

// Returns elements [first, first + count) as C: where they are, if the tensor is contiguous and of type C, else in the tile.
template <class C>
static const C* read(Tile<C>& tile, const Shape& shape, const View& view, int64_t first, int64_t count) {
  const C* values;
  with_dtype(view.dtype, [&](auto type) FASTLM_LAMBDA {
    using T = decltype(type);
    const bool in_place = shape.dims == 1 && view.stride[0] == 1 && count % kLanes == 0;
    const T* source = reinterpret_cast<const T*>(view.data) + first;
    if (in_place) {
      prefetch<false>(source + count, count);
    } else {
      T* copy = reinterpret_cast<T*>(tile.raw);
      gather(shape, view, first, count, copy);
      source = copy;
    }
    if constexpr (same<C, T>) {
      values = source;
    } else {
      for (int64_t i = 0; i < count; i += kLanes) load<C>(source + i).store(tile.converted + i);
      values = tile.converted;
    }
  });
  return values;
}

// Memory for elements [first, first + count) of a contiguous output, which the caller fills with C in whole vectors: the
// tensor's own if it is of type C and count is a multiple of 16, else a tile here, which commit() converts.
template <class C>
struct Output {
  C* values;
  alignas(64) C tile[kTile];

  FASTLM_MEMBER void open(void* out, int dtype, int64_t first, int64_t count) {
    const bool in_place = dtype == (same<C, float> ? kFloat32 : kFloat64) && count % kLanes == 0;
    values = in_place ? static_cast<C*>(out) + first : tile;
    if (in_place) prefetch<true>(values + count, count);
  }
};

// Writes the output's tile to the tensor, unless the caller filled the tensor itself.
template <class C>
static void commit(const Output<C>& output, void* out, int dtype, int64_t first, int64_t count) {
  if (output.values != output.tile) return;
  with_dtype(dtype, [&](auto type) FASTLM_LAMBDA {
    using T = decltype(type);
    T* target = static_cast<T*>(out) + first;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store<C>(Vector<C>::load(output.tile + i), target + i);
    if (i < count) {
      T rest[kLanes];
      store<C>(Vector<C>::load(output.tile + i), rest);
      __builtin_memcpy(target + i, rest, (count - i) * sizeof(T));
    }
  });
}

}  // namespace fastlm::FASTLM_ISA
