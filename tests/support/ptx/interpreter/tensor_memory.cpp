#include "tensor_memory.h"

#include <algorithm>

#include "block.h"

namespace ptx {
namespace {

std::string place_of(uint64_t number) {
  return "column " + std::to_string(number % kTensorColumns) + " in lane " + std::to_string(number / kTensorColumns) +
         " of tensor memory";
}

void require_warp(Mask lanes) {
  if (lanes != ~Mask(0)) throw Fault("an access to tensor memory by some lanes of a warp");
}

// ---- allocation -----------------------------------------------------------------------------------------------------------

// Call do_cell(number) for each cell of so many columns.
template <class Do>
void for_columns(const TensorMemory& memory, uint32_t first, int columns, Do do_cell) {
  for (uint32_t lane = 0; lane < kTensorLanes; ++lane)
    for (int column = 0; column < columns; ++column) do_cell(memory.number((lane << 16 | first) + column));
}

// tcgen05.alloc [address + offset], columns: the address of new columns goes to shared memory. No fence is needed behind it.
void allocate(Warp& warp, const Instruction& i, Mask lanes) {
  require_warp(lanes);
  const uint32_t address = warp.block.tensor_memory.allocate(int(warp.uniform(i, 2)));
  warp.store(Space::kShared, warp.address(i, 0, 0), &address, sizeof address, Proxy::kAsync);
}

// tcgen05.dealloc address, columns. Whoever uses the columns has to be done.
void deallocate(Warp& warp, const Instruction& i, Mask lanes) {
  require_warp(lanes);
  TensorMemory& memory = warp.block.tensor_memory;
  const uint32_t address = uint32_t(warp.uniform(i, 0));
  const int columns = int(warp.uniform(i, 1));
  for_columns(memory, address, columns, [&](uint64_t cell) { memory.races.write(warp.clock, warp.index, cell, 1); });
  memory.free(address, columns);
}

void relinquish(Warp& warp, const Instruction&, Mask lanes) {
  require_warp(lanes);
  warp.block.tensor_memory.relinquish();
}

// ---- ld and st: asynchronous accesses of a warp to its quarter of the lanes
// --------------------------------------------------

// Return the address of a shape's cell for a lane and a register, less that of the instruction.
using Place = uint32_t (*)(uint32_t lane, uint32_t reg, uint32_t second);

// Lanes go with lanes, and registers with columns.
uint32_t place_in_32_lanes(uint32_t lane, uint32_t reg, uint32_t) { return lane << 16 | reg; }

// The upper 16 lanes of the warp have an address of their own, which is `second` further.
uint32_t place_in_16_lanes(uint32_t lane, uint32_t reg, uint32_t second) {
  return ((lane % 16) << 16) + reg + (lane < 16 ? 0 : second);
}

// An access: the numbers of its cells (registers, lanes).
std::vector<uint64_t> cells_of(Warp& warp, uint32_t address, int registers, Place place, uint32_t second) {
  std::vector<uint64_t> cells;
  for (int reg = 0; reg < registers; ++reg)
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t cell = address + place(lane, reg, second);
      if (int(cell >> 16) / kLanes != warp.index % 4) throw Fault("a warp has no access to lane " + std::to_string(cell >> 16));
      cells.push_back(warp.block.tensor_memory.number(cell));
    }
  return cells;
}

// Return what the warp knows, as of an access that is not finished.
Clock unfinished(const Warp& warp) {
  Clock clock = warp.clock;
  clock[warp.index] = kUnfinished;
  return clock;
}

// tcgen05.ld.shape.xN {d x N}, [address + offset][, second]. The registers are written at once: ptxas knows which instructions
// need them, and Triton's PTX has some of these before the wait. The cells are being read until the wait.
template <Place place, bool has_second>
void load(Warp& warp, const Instruction& i, Mask lanes) {
  require_warp(lanes);
  TensorMemory& memory = warp.block.tensor_memory;
  const int registers = i.num_operands() - 2 - has_second;
  const uint32_t second = has_second ? uint32_t(warp.uniform(i, registers + 2)) : 0;
  const std::vector<uint64_t> cells = cells_of(warp, uint32_t(warp.address(i, registers, 0)), registers, place, second);
  const Clock clock = unfinished(warp);
  for (size_t c = 0; c < cells.size(); ++c) {
    memory.races.read(clock, warp.index, cells[c], 1);
    warp.value(i, int(c / kLanes), int(c % kLanes)) = memory[cells[c]];
  }
  warp.tensor_loads.insert(warp.tensor_loads.end(), cells.begin(), cells.end());
}

// tcgen05.st.shape.xN [address + offset][, second], {a x N}. The cells are written at once, or when somebody waits for it.
template <Place place, bool has_second>
void store(Warp& warp, const Instruction& i, Mask lanes) {
  require_warp(lanes);
  TensorMemory& memory = warp.block.tensor_memory;
  const int first = 2 + has_second;
  const uint32_t second = has_second ? uint32_t(warp.uniform(i, 2)) : 0;
  const std::vector<uint64_t> cells = cells_of(warp, uint32_t(warp.address(i, 0, 0)), i.num_operands() - first, place, second);
  const Clock clock = unfinished(warp);
  for (size_t c = 0; c < cells.size(); ++c) {
    const uint32_t value = uint32_t(warp.value(i, first + int(c / kLanes), int(c % kLanes)));
    memory.races.write(clock, warp.index, cells[c], 1);
    if (warp.block.landing == Landing::kEarly) memory[cells[c]] = value;
    warp.tensor_stores.push_back({cells[c], value});
  }
}

// tcgen05.wait::ld: nothing is read any more.
void wait_for_loads(Warp& warp, const Instruction&, Mask lanes) {
  require_warp(lanes);
  for (const uint64_t cell : warp.tensor_loads) warp.block.tensor_memory.races.read(warp.clock, warp.index, cell, 1);
  warp.tensor_loads.clear();
}

// tcgen05.wait::st: all is written.
void wait_for_stores(Warp& warp, const Instruction&, Mask lanes) {
  require_warp(lanes);
  TensorMemory& memory = warp.block.tensor_memory;
  for (const TensorStore& one : warp.tensor_stores) {
    memory.races.write(warp.clock, warp.index, one.cell, 1);
    memory[one.cell] = one.value;
  }
  warp.tensor_stores.clear();
}

}  // namespace

TensorMemory::TensorMemory(int num_agents)
    : races(num_agents, kTensorLanes * kTensorColumns, place_of), cells_(kTensorLanes * kTensorColumns) {}

bool TensorMemory::is_allocated(int column) const {
  const auto after = allocated_.upper_bound(column);
  return after != allocated_.begin() && column < std::prev(after)->first + std::prev(after)->second;
}

uint64_t TensorMemory::number(uint32_t address) const {
  const int lane = int(address >> 16), column = int(address & 0xffff);
  if (lane >= kTensorLanes || !is_allocated(column))
    throw Fault("out of bounds: access to column " + std::to_string(column) + " in lane " + std::to_string(lane) +
                " of tensor memory");
  return lane * kTensorColumns + column;
}

// The last columns go first, so that a kernel does not find by chance what it looks for at column 0.
uint32_t TensorMemory::allocate(int columns) {
  if (is_relinquished_) throw Fault("an allocation of tensor memory after the permit is relinquished");
  if (columns < 32 || columns > kTensorColumns || columns & (columns - 1))
    throw Fault("an allocation of " + std::to_string(columns) + " columns of tensor memory");
  const int end = allocated_.empty() ? kTensorColumns : allocated_.begin()->first;
  if (end < columns) throw Fault("deadlock: there are too few columns of tensor memory");
  const int first = end - columns;
  allocated_[first] = columns;
  for (int lane = 0; lane < kTensorLanes; ++lane) std::fill_n(&cells_[lane * kTensorColumns + first], columns, UINT32_MAX);
  return uint32_t(first);
}

void TensorMemory::free(uint32_t address, int columns) {
  const auto found = allocated_.find(int(address));
  if (found == allocated_.end() || found->second != columns) throw Fault("tensor memory is freed that was not allocated so");
  allocated_.erase(found);
}

const Handlers kTensorMemory = {
    {"tcgen05.alloc", allocate, 3},
    {"tcgen05.dealloc", deallocate, 2},
    {"tcgen05.relinquish_alloc_permit", relinquish, 0},
    {"tcgen05.ld.sync.aligned.32x32b", load<place_in_32_lanes, false>},
    {"tcgen05.ld.sync.aligned.16x32bx2", load<place_in_16_lanes, true>},
    {"tcgen05.st.sync.aligned.32x32b", store<place_in_32_lanes, false>},
    {"tcgen05.st.sync.aligned.16x32bx2", store<place_in_16_lanes, true>},
    {"tcgen05.wait::ld", wait_for_loads, 0},
    {"tcgen05.wait::st", wait_for_stores, 0},
};

}  // namespace ptx
