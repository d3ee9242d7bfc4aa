// Standard normals from a seed and a position. common/philox.h defines the stream of a seed.
#pragma once

#include <cstdint>

namespace fastlm {

// Fills out (count,) with elements position, position + 1, ... of the seed's stream.
using NormalKernel = void(uint64_t seed, uint64_t position, int64_t count, float* out);

void normal(uint64_t seed, uint64_t position, int64_t count, float* out);

}  // namespace fastlm
