#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace ptx {
namespace {

constexpr int kNobody = -1;

[[noreturn]] void fail(const char* what, Space space, uint64_t address, uint64_t bytes) {
  const char* const names[] = {"global", "shared", "parameter"};
  char text[120];
  std::snprintf(text, sizeof text, "%s access of %d bytes to %s memory at %#llx", what, int(bytes), names[int(space)],
                (unsigned long long)address);
  throw Fault(text);
}

// An offset below 0 is a large one.
bool is_inside(uint64_t offset, uint64_t bytes, uint64_t size) { return offset <= size && bytes <= size - offset; }

}  // namespace

Memory::Memory(size_t shared_bytes, const char* params, size_t param_bytes)
    : shared_(shared_bytes), params_(params), param_bytes_(param_bytes) {
  add_tensor(uint64_t(params), param_bytes);  // Descriptors are read by their addresses.
}

void Memory::add_tensor(uint64_t begin, uint64_t bytes) { tensors_.push_back({begin, std::vector<int>(bytes, kNobody)}); }

void Memory::start_block(int block) {
  std::memset(shared_.data(), 0xff, shared_.size());
  block_ = block;
}

int* Memory::owners_of(uint64_t address, uint64_t bytes) {
  for (Tensor& tensor : tensors_)
    if (is_inside(address - tensor.begin, bytes, tensor.owners.size())) return &tensor.owners[address - tensor.begin];
  return nullptr;
}

void Memory::own(uint64_t address, uint64_t bytes) { std::fill_n(owners_of(address, bytes), bytes, block_); }

char* Memory::at(Space space, uint64_t address, uint64_t bytes, uint64_t alignment) {
  if (address % alignment) fail("misaligned", space, address, bytes);
  if (space == Space::kGlobal) {
    const int* owners = owners_of(address, bytes);
    if (!owners) fail("out of bounds:", space, address, bytes);
    for (uint64_t byte = 0; byte < bytes; ++byte)
      if (owners[byte] != kNobody && owners[byte] != block_) fail("race with another block's store:", space, address, bytes);
    return reinterpret_cast<char*>(address);
  }
  if (!is_inside(address, bytes, space == Space::kShared ? shared_.size() : param_bytes_))
    fail("out of bounds:", space, address, bytes);
  return space == Space::kShared ? &shared_[address] : const_cast<char*>(params_) + address;
}

}  // namespace ptx
