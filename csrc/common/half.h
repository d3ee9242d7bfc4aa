// Conversions of half precision in integer arithmetic, for machines without instructions for them.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fastlm {

// Storage types.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTLM_HD float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
FASTLM_HD uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

FASTLM_HD float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
FASTLM_HD float widen(uint8_t x) { return float(x); }
FASTLM_HD float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  const bool special = (x.bits & 0x7c00) == 0x7c00;  // infinity or NaN
  const uint32_t bits = special ? rest | 0x7f800000 : bits_of(float_of(rest) * 0x1p+112f);
  return float_of(bits | sign);
}

// Both round to nearest, ties to even.
FASTLM_HD void narrow_to(BFloat16* p, float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  p->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}
FASTLM_HD void narrow_to(Float16* p, float x) {
  const uint32_t bits = bits_of(x) & 0x7fffffff, sign = bits_of(x) >> 16 & 0x8000;
  uint32_t half;
  if (bits >= 0x47800000) {  // 65536 and up
    half = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: adding 1/2 rounds at the last bit of a half
    half = bits_of(float_of(bits) + 0.5f) - 0x3f000000;
  } else {
    half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  p->bits = uint16_t(half | sign);
}

}  // namespace fastlm
