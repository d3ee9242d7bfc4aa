#include "tensor_copies.h"

#include <cstring>
#include <utility>

#include "block.h"

namespace ptx {
namespace {

constexpr int kBarrierBytes = 8;

// Return the barrier at an address, whose first operand is given.
MBarrier& barrier_at(Warp& warp, const Instruction& i, int operand, int lane) {
  const uint64_t address = warp.address(i, operand, lane);
  uint64_t content;
  warp.load(Space::kShared, address, &content, sizeof content);
  const auto found = warp.block.mbarriers.find(address);
  if (found == warp.block.mbarriers.end()) throw Fault("there is no mbarrier at shared address " + std::to_string(address));
  return found->second;
}

// ---- copies ---------------------------------------------------------------------------------------------------------------

int bytes_of(const TensorDescriptor& tensor) {
  int bytes = tensor.element_bytes;
  for (int d = 0; d < tensor.rank; ++d) bytes *= tensor.box[d];
  return bytes;
}

// Call do_element(number, coordinates) for each element of a box, the fastest dimension first.
template <class Do>
void for_box(const TensorDescriptor& tensor, const std::vector<int32_t>& corner, Do do_element) {
  for (int e = 0; e < bytes_of(tensor) / tensor.element_bytes; ++e) {
    int64_t coordinates[5];
    for (int d = 0, rest = e; d < tensor.rank; rest /= tensor.box[d++]) coordinates[d] = corner[d] + rest % tensor.box[d];
    do_element(e, coordinates);
  }
}

// Copy a box to shared memory. What lies outside of the tensor is zeros.
void land(Memory& memory, const TensorCopy& copy, MBarrier* barrier) {
  const TensorDescriptor& tensor = copy.tensor;
  const int bytes = tensor.element_bytes;
  for_box(tensor, copy.corner, [&](int element, const int64_t* coordinates) {
    char* to = memory.at(Space::kShared, swizzled(copy.to + element * bytes, tensor.swizzle_bytes), bytes);
    bool is_inside = true;
    uint64_t from = tensor.base;
    for (int d = 0; d < tensor.rank; ++d) {
      is_inside &= coordinates[d] >= 0 && coordinates[d] < tensor.shape[d];
      from += coordinates[d] * tensor.strides[d];
    }
    std::memset(to, 0, bytes);
    if (is_inside) std::memcpy(to, memory.at(Space::kGlobal, from, bytes), bytes);
  });
  barrier->missing_bytes -= bytes_of(tensor);
  join(&barrier->clock, copy.clock);
  barrier->complete_if_due();
}

// Return a copy by a lane, which may write from now on.
TensorCopy make_copy(Warp& warp, const Instruction& i, int lane) {
  Block& block = warp.block;
  TensorCopy copy{{}, warp.address(i, 0, lane), {}, warp.clock};
  if (copy.to % 128) throw Fault("a tensor copy to a misaligned address");
  std::memcpy(&copy.tensor, block.memory.at(Space::kGlobal, warp.value(i, 2, lane), sizeof copy.tensor, 1), sizeof copy.tensor);
  for (int c = 3; c < i.num_operands() - 2; ++c) copy.corner.push_back(int32_t(warp.value(i, c, lane)));
  if (copy.tensor.rank != int(copy.corner.size())) throw Fault("a tensor copy with coordinates of another rank");
  copy.clock[block.accelerator()] = ++block.num_tensor_copies;
  block.memory.at(Space::kShared, copy.to, bytes_of(copy.tensor), 1);
  block.races.write(copy.clock, block.accelerator(), copy.to, bytes_of(copy.tensor));
  return copy;
}

// cp.async.bulk.tensor [to + offset], [descriptor, {coordinates}], [mbarrier + offset]
void start(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    MBarrier& barrier = barrier_at(warp, i, i.num_operands() - 2, lane);
    const TensorCopy copy = make_copy(warp, i, lane);
    if (warp.block.landing == Landing::kEarly)
      land(warp.block.memory, copy, &barrier);
    else
      barrier.copies.push_back(copy);
  });
}

// ---- barriers -------------------------------------------------------------------------------------------------------------

// mbarrier.init [address], count
void initialize(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    warp.claim(warp.address(i, 0, lane), kBarrierBytes);
    MBarrier& barrier = warp.block.mbarriers[warp.address(i, 0, lane)];
    barrier = MBarrier();
    barrier.count = barrier.pending = int(warp.value(i, 2, lane));
    barrier.clock = warp.clock;
  });
}

void invalidate(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    if (!barrier_at(warp, i, 0, lane).copies.empty()) throw Fault("an mbarrier ends before its copies");
    warp.claim(warp.address(i, 0, lane), kBarrierBytes);
    warp.block.mbarriers.erase(warp.address(i, 0, lane));
  });
}

// mbarrier.arrive[.expect_tx] _, [address][, bytes]
void arrive(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    MBarrier& barrier = barrier_at(warp, i, 1, lane);
    if (i.has(kExpectTx)) barrier.missing_bytes += int64_t(warp.value(i, 3, lane));
    if (!barrier.pending--) throw Fault("too many arrivals at an mbarrier");
    join(&barrier.clock, warp.clock);
    barrier.complete_if_due();
  });
  ++warp.clock[warp.index];
}

// mbarrier.try_wait.parity p, [address], parity: p tells whether the phase of that parity is complete.
void test(Warp& warp, const Instruction& i, Mask lanes) {
  const int first = __builtin_ctz(lanes);
  MBarrier& barrier = barrier_at(warp, i, 1, first);
  const bool parity = warp.value(i, 3, first) & 1;
  if (barrier.phase == parity) {  // Copies that land late land when somebody asks for them.
    for (const TensorCopy& copy : std::exchange(barrier.copies, {})) land(warp.block.memory, copy, &barrier);
  }
  const bool is_complete = barrier.phase != parity;
  for_lanes(lanes, [&](int lane) { warp.value(i, 0, lane) = is_complete; });
  if (is_complete) join(&warp.clock, barrier.clock);
  warp.yields = !is_complete;
  warp.block.count_test(is_complete);
}

}  // namespace

const Handlers kTensorCopies = {
    {"cp.async.bulk.tensor", start}, {"mbarrier.init", initialize}, {"mbarrier.inval", invalidate},
    {"mbarrier.arrive", arrive},     {"mbarrier.try_wait", test},
};

}  // namespace ptx
