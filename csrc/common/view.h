// A tensor as the kernels see it: an address, a dtype and strides. Code for every instruction set includes this, so it holds
// plain data only.
#pragma once

#include <cstdint>

namespace fastlm {

constexpr int kMaxDims = 64;  // torch's own limit

enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kBool, kInt32, kInt64, kOther };  // the codes of fastlm/backend/cpu.py

struct Shape {
  int dims = 0;
  int64_t size[kMaxDims] = {};
};

// Strides are in elements, one per dimension of the Shape that belongs to the view. data is null if the tensor is absent.
struct View {
  char* data = nullptr;
  int dtype = kFloat32;
  int64_t stride[kMaxDims] = {};
};

}  // namespace fastlm
