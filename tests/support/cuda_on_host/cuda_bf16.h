// The part of CUDA's bfloat16 that csrc/cuda uses.
#pragma once

#include "../../../csrc/common/half.h"

using __nv_bfloat16 = fastlm::BFloat16;

inline float __bfloat162float(__nv_bfloat16 x) { return fastlm::widen(x); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  __nv_bfloat16 narrow;
  fastlm::narrow_to(&narrow, x);
  return narrow;
}
