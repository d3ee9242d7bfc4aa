// Copies of the tensor memory accelerator, and the barriers in shared memory that tell when they are complete.
#pragma once

#include <cstdint>
#include <vector>

#include "races.h"

namespace ptx {

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

// A barrier in shared memory. Its phase is complete when all have arrived and all bytes that were announced are there.
struct MBarrier {
  int count = 0, pending = 0;  // Arrivals of a phase, and those still missing.
  int64_t missing_bytes = 0;
  bool phase = false;              // The parity of the phase that is not complete.
  std::vector<TensorCopy> copies;  // Those that have not landed.
  Clock clock;                     // What those know that have arrived.

  void complete_if_due() {
    if (pending || missing_bytes) return;
    pending = count;
    phase = !phase;
  }
};

// Return where the accelerator puts, and wgmma finds, the byte of an address: 16-byte chunks change places within 128, 64 or 32
// bytes, by the number of their row.
inline uint64_t swizzled(uint64_t address, int bytes) { return address ^ ((address >> 7 & (bytes / 16 - 1)) << 4); }

}  // namespace ptx
