// The memory of the tensor core: 128 lanes of 512 columns, which hold 32 bits each. An address is a lane << 16 | a column.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "races.h"

namespace ptx {

constexpr int kTensorLanes = 128, kTensorColumns = 512;

class TensorMemory {
 public:
  explicit TensorMemory(int num_agents);

  // Return the number of the cell at an address. One in a column that is not allocated is a Fault.
  uint64_t number(uint32_t address) const;
  uint32_t& operator[](uint64_t number) { return cells_[number]; }

  // Return the address of so many new columns, which are full of NaN.
  uint32_t allocate(int columns);
  // Free what was allocated at an address.
  void free(uint32_t address, int columns);
  // Let nobody allocate any more.
  void relinquish() { is_relinquished_ = true; }

  bool is_free() const { return allocated_.empty(); }

  Races races;  // By numbers of cells.

 private:
  bool is_allocated(int column) const;

  std::vector<uint32_t> cells_;   // (lanes, columns)
  std::map<int, int> allocated_;  // Numbers of columns by the first of them.
  bool is_relinquished_ = false;
};

}  // namespace ptx
