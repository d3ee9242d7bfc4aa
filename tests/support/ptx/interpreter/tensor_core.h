// Products of the tensor core, with accumulators in its own memory.
#pragma once

#include <cstdint>

#include "lanes.h"
#include "mbarriers.h"

namespace ptx {

// The shape and the types of a product, as its 32 bits tell them.
struct ProductShape {
  int m, n;
  Type a_type, b_type;
  bool negate, transpose_a, transpose_b;

  explicit ProductShape(uint32_t bits);
};

// A product that has been started: d (m, n) += a (m, 16) b (16, n).
struct TensorProduct {
  uint32_t number;  // The tensor core's time when it is complete.
  ProductShape shape;
  bool accumulate, has_a_in_tensor_memory;
  uint64_t a, b;  // Descriptors; for A perhaps an address in tensor memory.
  uint32_t d;     // An address in tensor memory.
};

// Tell whether the products are complete that a commit follows.
bool has_landed(const Commit& commit);

// Complete these products, and let the commit arrive.
void land(const Commit& commit, MBarrier* barrier);

}  // namespace ptx
