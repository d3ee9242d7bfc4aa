// Vectors of 16 lanes on every machine: F32, F64, U32 and U64. On a machine with narrower registers a vector is several of them
// (Twice), so every sum over lanes has one order and one result everywhere.
//
// The header of an instruction set defines its registers, Float, Double, Word (32 bits) and Long (64 bits), and the operations
// on them. This code uses no templates of the standard library: the linker keeps one copy of each, which may then be of another
// instruction set.
#pragma once

#include <cstdint>

#include "../../common/half.h"
#include "../../common/macros.h"
#include "../../common/sizes.h"

#define FASTLM_SIMD FASTLM_HD              // a free function on vectors
#define FASTLM_LAMBDA FASTLM_FORCE_INLINE  // goes after a lambda's parameters

namespace fastlm {

constexpr int kLanes = 16;

// `count` rounded up to whole vectors.
FASTLM_SIMD int64_t padded(int64_t count) { return round_up(count, kLanes); }

// Prefetches a line into the cache of that level. The first-level cache can wait for few lines at a time.
template <int kCache = 2>
FASTLM_SIMD void prefetch_line(const char* at) {
  __builtin_prefetch(at, 0, kCache == 1 ? 3 : 2);
}

}  // namespace fastlm

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#include "portable.h"
#endif

namespace fastlm::FASTLM_ISA {

// Two vectors that act as one of twice the lanes.
template <class H>
struct Twice {
  using Scalar = typename H::Scalar;
  using Bits = Twice<typename H::Bits>;
  static constexpr int lanes = 2 * H::lanes;
  H low, high;

  FASTLM_MEMBER Twice() = default;
  FASTLM_MEMBER Twice(H low, H high) : low(low), high(high) {}
  FASTLM_MEMBER explicit Twice(Scalar x) : low(x), high(x) {}
  template <class T>
  static FASTLM_MEMBER Twice load(const T* p) {
    return {H::load(p), H::load(p + H::lanes)};
  }
  template <class T>
  FASTLM_MEMBER void store(T* p) const {
    low.store(p);
    high.store(p + H::lanes);
  }
};

#define FASTLM_TWICE_BINARY(name)                      \
  template <class H>                                   \
  FASTLM_SIMD Twice<H> name(Twice<H> a, Twice<H> b) {  \
    return {name(a.low, b.low), name(a.high, b.high)}; \
  }
FASTLM_TWICE_BINARY(operator+)
FASTLM_TWICE_BINARY(operator-)
FASTLM_TWICE_BINARY(operator*)
FASTLM_TWICE_BINARY(operator/)
FASTLM_TWICE_BINARY(operator^)
FASTLM_TWICE_BINARY(operator&)
FASTLM_TWICE_BINARY(min)
FASTLM_TWICE_BINARY(max)
FASTLM_TWICE_BINARY(scale2)
FASTLM_TWICE_BINARY(mul32)
#undef FASTLM_TWICE_BINARY

template <class H>
FASTLM_SIMD Twice<H> fma(Twice<H> a, Twice<H> b, Twice<H> c) {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
template <class W, class H>
FASTLM_SIMD Twice<H> mul_add(Twice<W> a, Twice<W> b, Twice<H> c) {
  return {mul_add(a.low, b.low, c.low), mul_add(a.high, b.high, c.high)};
}
template <class H>
FASTLM_SIMD float largest(Twice<H> a) {
  return largest(max(a.low, a.high));
}
template <class H>
FASTLM_SIMD bool any_less(Twice<H> a, Twice<H> b) {
  return any_less(a.low, b.low) | any_less(a.high, b.high);
}
template <class H>
FASTLM_SIMD bool any_nan(Twice<H> a) {
  return any_nan(a.low) | any_nan(a.high);
}
template <class H>
FASTLM_SIMD float sum(Twice<H> a) {
  return sum(a.low + a.high);
}
template <class H>
FASTLM_SIMD Twice<H> sqrt(Twice<H> a) {
  return {sqrt(a.low), sqrt(a.high)};
}
template <class H>
FASTLM_SIMD Twice<H> select_less(Twice<H> a, Twice<H> b, Twice<H> x, Twice<H> y) {
  return {select_less(a.low, b.low, x.low, y.low), select_less(a.high, b.high, x.high, y.high)};
}
template <class H>
FASTLM_SIMD Twice<H> select_negative(typename Twice<H>::Bits bits, Twice<H> x, Twice<H> y) {
  return {select_negative(bits.low, x.low, y.low), select_negative(bits.high, x.high, y.high)};
}
template <class H>
FASTLM_SIMD Twice<H> high32(Twice<H> a) {
  return {high32(a.low), high32(a.high)};
}
template <int N, class H>
FASTLM_SIMD Twice<H> shift_left(Twice<H> a) {
  return {shift_left<N>(a.low), shift_left<N>(a.high)};
}
template <int N, class H>
FASTLM_SIMD Twice<H> shift_right(Twice<H> a) {
  return {shift_right<N>(a.low), shift_right<N>(a.high)};
}
template <class H>
FASTLM_SIMD auto as_bits(Twice<H> a) -> Twice<decltype(as_bits(a.low))> {
  return {as_bits(a.low), as_bits(a.high)};
}
template <class H>
FASTLM_SIMD auto as_float(Twice<H> a) -> Twice<decltype(as_float(a.low))> {
  return {as_float(a.low), as_float(a.high)};
}
template <class H>
FASTLM_SIMD auto to_float(Twice<H> a) -> Twice<decltype(to_float(a.low))> {
  return {to_float(a.low), to_float(a.high)};
}
template <class H>
FASTLM_SIMD void store_interleaved(Twice<H> a, Twice<H> b, Twice<H> c, Twice<H> d, float* out) {
  store_interleaved(a.low, b.low, c.low, d.low, out);
  store_interleaved(a.high, b.high, c.high, d.high, out + 4 * H::lanes);
}

#if !defined(__AVX512BF16__)
template <class F>
FASTLM_SIMD void store_flushed(F a, BFloat16* p) {
  a.store(p);
}
#endif

// The vector of 16 lanes that is made of registers R.
template <class R, int lanes = R::lanes>
struct Widened {
  using type = Twice<typename Widened<R, 2 * lanes>::type>;
};
template <class R>
struct Widened<R, kLanes> {
  using type = R;
};

using F32 = Widened<Float>::type;
using U32 = Widened<Word>::type;
using F64 = Widened<Double>::type;
using U64 = Widened<Long>::type;

// The vector of 16 lanes of that type.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};
template <>
struct VectorOf<uint32_t> {
  using type = U32;
};
template <class T>
using Vector = typename VectorOf<T>::type;

// Returns the low words of 16 64-bit lanes in 32-bit lanes, in the order of kBlockOfLane.
FASTLM_SIMD Word narrow(Twice<Long> a) { return pack(a.low, a.high); }
template <class H>
FASTLM_SIMD Twice<decltype(narrow(H()))> narrow(Twice<H> a) {
  return {narrow(a.low), narrow(a.high)};
}

// The block, of 16, that each 64-bit lane draws. With this order, pack and store_interleaved, which shuffle only within
// registers, put every normal in its place: pack interleaves the words of two Longs into one Word, and store_interleaved
// transposes quads of lanes.
struct BlockOfLane {
  uint64_t block[kLanes];
  constexpr BlockOfLane() : block() {
    constexpr int n = Word::lanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int within = lane % n, second_long = within / (n / 2), word_lane = 2 * (within % (n / 2)) + second_long;
      block[lane] = lane / n * n + word_lane % 4 * (n / 4) + word_lane / 4;
    }
  }
};
alignas(64) constexpr BlockOfLane kBlockOfLane;

}  // namespace fastlm::FASTLM_ISA
