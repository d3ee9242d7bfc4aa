// The launchers, which module.cpp calls. They launch kernels on the current device, into the given stream, and return null, or
// the runtime's message about a failure. They never wait for the device, and read none of its memory.
#pragma once

#include "../common/latent.h"

namespace fastlm {

// Returns why the current device cannot run the kernels (an old driver, or no machine code for this GPU), or null.
const char* why_not();

// Fills out (count,) with elements position, position + 1, ... of the seed's stream. The device reads the seed.
const char* normal(const int64_t* seed, uint64_t position, int64_t count, float* out, void* stream);

// Returns the length that `pieces` needs for the forward.
int64_t latent_pieces(const LatentForward&);
const char* latent_forward(LatentForward, void* stream);
const char* latent_backward(const LatentBackward&, void* stream);

}  // namespace fastlm
