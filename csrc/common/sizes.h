// Sizes: rounded up, and of dtypes. Code for every instruction set includes this.
#pragma once

#include <cstdint>

#include "macros.h"
#include "view.h"

namespace fastlm {

// Both take count >= 0.
FASTLM_HD int64_t ceil_div(int64_t count, int64_t step) { return (count + step - 1) / step; }
FASTLM_HD int64_t round_up(int64_t count, int64_t step) { return ceil_div(count, step) * step; }

// Bytes of one element of the dtype.
FASTLM_HD int64_t bytes_of(int dtype) {
  switch (dtype) {
    case kBool: return 1;
    case kBFloat16:
    case kFloat16: return 2;
    case kFloat32:
    case kInt32: return 4;
    default: return 8;
  }
}

}  // namespace fastlm
