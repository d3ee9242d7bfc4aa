// Barriers in shared memory, which tell when copies and products are complete.
#pragma once

#include <cstdint>
#include <deque>

#include "races.h"
#include "tensor_copies.h"

namespace ptx {

class Warp;
struct Instruction;

// The arrival that follows a warp's products up to one of them.
struct Commit {
  Warp* warp;
  uint32_t last_product;  // Its number.
  Clock clock;            // What who waits for it knows.
};

// A phase is complete when all have arrived and all bytes that were announced are there.
struct MBarrier {
  int count = 0, pending = 0;  // Arrivals of a phase, and those still missing.
  int64_t missing_bytes = 0;
  bool phase = false;             // The parity of the phase that is not complete.
  std::deque<TensorCopy> copies;  // Those that have not landed.
  std::deque<Commit> commits;     // Those that have not arrived.
  Clock clock;                    // What those know that have arrived.

  // Take notice of an arrival, or of bytes that have landed.
  void arrive(const Clock& by);
  void land(int64_t bytes, const Clock& by);

 private:
  void complete_if_due();
};

// Return the barrier at an address, whose first operand is given.
MBarrier& barrier_at(Warp& warp, const Instruction& i, int operand, int lane);

}  // namespace ptx
