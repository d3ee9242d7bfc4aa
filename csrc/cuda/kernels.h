// The launchers, as module.cpp calls them: on the current device, into a stream's handle; null, or what the runtime says of the
// failure. Nothing waits for the device, and nothing on it is read here.
#pragma once

#include "../common/latent.h"

namespace fastlm {

// What keeps the current device from running the kernels: an old driver, or a GPU that none of the machine code is for.
const char* why_not();

// out[0 .. count): elements position, position + 1, ... of the stream of the seed, which the device reads.
const char* normal(const int64_t* seed, uint64_t position, int64_t count, float* out, void* stream);

// How many pieces of rows the forward needs room for, in `pieces`.
int64_t latent_pieces(const LatentForward&);
const char* latent_forward(LatentForward, void* stream);
const char* latent_backward(const LatentBackward&, void* stream);

}  // namespace fastlm
