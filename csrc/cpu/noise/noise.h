// Standard normals from a seed and a position: the layout is in common/philox.h.
#pragma once

#include <cstdint>

namespace fastlm {

// out[0 .. count): elements position, position + 1, ... of the stream of the seed.
using NormalKernel = void(uint64_t seed, uint64_t position, int64_t count, float* out);

void normal(uint64_t seed, uint64_t position, int64_t count, float* out);

}  // namespace fastlm
