// A tensor as the kernels see it: an address, a dtype and strides. Included by code for every instruction set: plain data only.
#pragma once

#include <cstdint>

namespace fastlm {

constexpr int kMaxDims = 64;  // torch itself stops here

enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kBool, kInt32, kInt64, kOther };  // the codes of fastlm/backend/cpu.py

struct Shape {
  int dims = 0;
  int64_t size[kMaxDims] = {};
};

// Strides in elements, over the dimensions of a Shape that goes with it. data is null where the tensor is absent.
struct View {
  char* data = nullptr;
  int dtype = kFloat32;
  int64_t stride[kMaxDims] = {};
};

}  // namespace fastlm
