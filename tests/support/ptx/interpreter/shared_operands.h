// Operands of matrix products in shared memory, which a descriptor of 64 bits tells of.
#pragma once

#include <cstdint>

#include "memory.h"

namespace ptx {

// Return where copies by descriptor put, and products find, the byte of an address: 16-byte chunks change places within 128, 64
// or 32 bytes, by the number of their row.
inline uint64_t swizzled(uint64_t address, int bytes) { return address ^ ((address >> 7 & (bytes / 16 - 1)) << 4); }

// An operand's tile consists of cores of 8 rows, each as wide as the swizzle repeats.
struct SharedOperand {
  uint64_t start, leading, stride;  // Bytes; from one core to the next along the row, and across the rows.
  int row_bytes;                    // Of a core: 128, 64 or 32 with swizzle, 16 without.
  bool transposed;                  // Rows of a core run along m or n, and not along k.

  SharedOperand(uint64_t descriptor, int row_bytes, bool transposed)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        row_bytes(row_bytes),
        transposed(transposed) {
    if (row_bytes == 16 && transposed) throw Fault("a transposed operand without swizzle is not implemented");
  }

  // Return the address of the half at (i, k), where i counts along m or n.
  uint64_t address(int i, int k) const {
    const int row = transposed ? k : i, column = 2 * (transposed ? i : k);  // A column in bytes.
    return swizzled(start + row / 8 * stride + row % 8 * row_bytes + column / row_bytes * leading + column % row_bytes,
                    row_bytes);
  }
};

}  // namespace ptx
