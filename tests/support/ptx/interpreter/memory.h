// The memory that a thread block sees: the tensors of a launch, its shared memory and its parameters, all with bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace ptx {

// What a GPU would trap at, or silently do wrong.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Space { kGlobal, kShared, kParam };

class Memory {
 public:
  Memory(size_t shared_bytes, const char* params, size_t param_bytes);

  // Let kernels read and write the bytes from `begin` on.
  void add_tensor(uint64_t begin, uint64_t bytes);

  // Let a block begin: its shared memory is full of NaN, and what it stores in tensors becomes its own.
  void start_block(int block);

  // Return where an access lies. An access that is misaligned, out of bounds or to another block's own is a Fault.
  char* at(Space space, uint64_t address, uint64_t bytes, uint64_t alignment);
  char* at(Space space, uint64_t address, uint64_t bytes) { return at(space, address, bytes, bytes); }

  // Take notice of a store in a tensor.
  void own(uint64_t address, uint64_t bytes);

  size_t shared_bytes() const { return shared_.size(); }
  uint64_t param_address() const { return uint64_t(params_); }

 private:
  struct Tensor {
    uint64_t begin;
    std::vector<int> owners;  // The block that stored each byte; kNobody if none did.
  };
  // Return the owners of the first byte on, or null where no tensor has all bytes.
  int* owners_of(uint64_t address, uint64_t bytes);

  std::vector<Tensor> tensors_;
  int block_ = 0;
  std::vector<char> shared_;
  const char* params_;
  size_t param_bytes_;
};

}  // namespace ptx
