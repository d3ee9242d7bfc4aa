// Registers of 32 lanes, and the PTX types that instructions read them as.
#pragma once

#include <cstdint>

#include "half.h"

namespace ptx {

constexpr int kLanes = 32;
using Mask = uint32_t;  // A bit for each lane.

// A register of a warp. A narrower value lies in the low bits, with zeros above; only ld and cvt repeat a sign there.
struct Register {
  uint64_t lane[kLanes];
};

enum class Kind : uint8_t { kUnsigned, kSigned, kFloat16, kBFloat16, kFloat32, kFloat64 };

struct Type {
  Kind kind;
  uint8_t bits;      // Of an element; a predicate has 1.
  uint8_t elements;  // 2 in packed types, such as f16x2.

  int bytes() const { return bits * elements / 8; }
  bool is_integer() const { return kind <= Kind::kSigned; }
};

inline uint64_t low_bits(uint64_t value, int bits) { return bits == 64 ? value : value & ((uint64_t(1) << bits) - 1); }

// ---- an element's bits as a number, and back ------------------------------------------------------------------------------

template <class Number>
Number decode(Type type, uint64_t bits);

template <>
inline uint64_t decode(Type type, uint64_t bits) {
  return low_bits(bits, type.bits);
}
template <>
inline int64_t decode(Type type, uint64_t bits) {
  const int above = 64 - type.bits;
  return type.kind == Kind::kSigned ? int64_t(bits << above) >> above : int64_t(low_bits(bits, type.bits));
}
template <>
inline float decode(Type type, uint64_t bits) {
  if (type.kind == Kind::kFloat16) return fastlm::widen(fastlm::Float16{uint16_t(bits)});
  if (type.kind == Kind::kBFloat16) return fastlm::widen(fastlm::BFloat16{uint16_t(bits)});
  return fastlm::float_of(uint32_t(bits));
}
template <>
inline double decode(Type type, uint64_t bits) {
  if (type.kind != Kind::kFloat64) return decode<float>(type, bits);
  double number;
  __builtin_memcpy(&number, &bits, 8);
  return number;
}

inline uint64_t encode(Type type, uint64_t number) { return low_bits(number, type.bits); }
inline uint64_t encode(Type type, int64_t number) { return low_bits(uint64_t(number), type.bits); }
inline uint64_t encode(Type type, float number) {
  if (type.kind == Kind::kFloat16) {
    fastlm::Float16 half;
    fastlm::narrow_to(&half, number);
    return half.bits;
  }
  if (type.kind == Kind::kBFloat16) {
    fastlm::BFloat16 half;
    fastlm::narrow_to(&half, number);
    return half.bits;
  }
  return fastlm::bits_of(number);
}
inline uint64_t encode(Type type, double number) {
  if (type.kind != Kind::kFloat64) return encode(type, float(number));
  uint64_t bits;
  __builtin_memcpy(&bits, &number, 8);
  return bits;
}

template <class Do>
void for_lanes(Mask lanes, Do do_lane) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (lanes >> lane & 1) do_lane(lane);
}

}  // namespace ptx
