#include "tensor_copies.h"

#include <cstring>

#include "block.h"
#include "shared_operands.h"

namespace ptx {
namespace {

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
  block.races.write(copy.clock, block.accelerator(), copy.to, bytes_of(copy.tensor), Proxy::kAsync);
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

}  // namespace

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
  barrier->land(bytes_of(tensor), copy.clock);
}

const Handlers kTensorCopies = {{"cp.async.bulk.tensor", start}};

}  // namespace ptx
