// The part of CUDA's half precision that csrc/cuda uses.
#pragma once

#include "../../../csrc/common/half.h"

using __half = fastlm::Float16;

inline float __half2float(__half x) { return fastlm::widen(x); }
inline __half __float2half(float x) {
  __half half;
  fastlm::narrow_to(&half, x);
  return half;
}
