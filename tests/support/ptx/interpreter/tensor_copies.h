// Copies of the tensor memory accelerator.
#pragma once

#include <cstdint>
#include <vector>

#include "races.h"

namespace ptx {

class Memory;
struct MBarrier;

// A tensor's descriptor, in the form of descriptors.py. The fastest dimension comes first.
struct TensorDescriptor {
  uint64_t base;
  int32_t rank, element_bytes, swizzle_bytes, unused;
  int64_t shape[5], strides[5];  // Strides in bytes.
  int32_t box[5];
};

struct TensorCopy {
  TensorDescriptor tensor;
  uint64_t to;                  // In shared memory.
  std::vector<int32_t> corner;  // The first coordinates of the box.
  Clock clock;                  // The accelerator's when the copy is complete.
};

// Copy a box to shared memory, and tell the barrier. What lies outside of the tensor is zeros.
void land(Memory& memory, const TensorCopy& copy, MBarrier* barrier);

}  // namespace ptx
