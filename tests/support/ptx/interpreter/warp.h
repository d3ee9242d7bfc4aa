// A warp: its registers, and which of its lanes stand where in the program.
#pragma once

#include <deque>
#include <map>
#include <vector>

#include "lanes.h"
#include "memory.h"
#include "program.h"
#include "races.h"
#include "tensor_core.h"

namespace ptx {

class Block;

// A copy that an instruction has started and no wait has completed.
struct Copy {
  uint64_t to, from;
  int bytes, bytes_read;  // The rest is filled with zeros.
};

// A product of a warp group that has started. Its registers and its shared memory are read, and written, when it lands.
struct Product {
  const Instruction* instruction;
  uint64_t a, b;  // Descriptors, unless A is in registers.
  bool accumulate, negate, transpose_a, transpose_b;
};

// A value on its way to a cell of tensor memory.
struct TensorStore {
  uint64_t cell;
  uint32_t value;
};

// What a warp has started, to be waited for by groups.
template <class Work>
struct Groups {
  std::vector<Work> open;
  std::vector<std::vector<Work>> committed;  // The oldest first.

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }

  // Complete what is committed, but for so many of the newest groups.
  template <class Complete>
  void wait(uint64_t newest, Complete complete) {
    while (committed.size() > newest) {
      for (const Work& work : committed.front()) complete(work);
      committed.erase(committed.begin());
    }
  }
};

// Lanes that have diverged form groups. The group with the smallest pc runs, and groups that meet become one.
class Warp {
 public:
  Warp(Block& block, int index, const std::vector<Register>& registers, int num_agents);

  Register& operator[](int reg) { return registers_[reg]; }
  uint64_t& value(const Instruction& i, int operand, int lane) { return registers_[i.operands[operand]].lane[lane]; }
  // Return an operand of which every lane has the same value, such as a constant.
  uint64_t uniform(const Instruction& i, int operand) const { return registers_[i.operands[operand]].lane[0]; }
  // Return base + offset of the address whose base is the operand.
  uint64_t address(const Instruction& i, int operand, int lane) {
    return value(i, operand, lane) + value(i, operand + 1, lane);
  }

  // Access memory. An access that is misaligned, out of bounds or a race is a Fault.
  void load(Space space, uint64_t address, void* to, int bytes, Proxy proxy = Proxy::kGeneric);
  void store(Space space, uint64_t address, const void* from, int bytes, Proxy proxy = Proxy::kGeneric);
  // Let the asynchronous proxy see what the warp knows of.
  void fence_proxies();
  // Tell that shared memory may be written from now on, or until now.
  void claim(uint64_t address, int bytes);

  // Run up to so many instructions, until the warp waits, yields or ends.
  void run(const std::vector<Instruction>& program, int most);
  void branch(Mask taken, int target);
  // Let other warps run, and then the same instruction again.
  void run_again() {
    --pc_;
    yields = true;
  }
  void leave(Mask lanes) { lanes_ &= ~lanes; }

  bool is_done() const { return !lanes_ && diverged_.empty(); }
  Mask lanes() const { return lanes_; }  // Of the group that runs.
  int line() const { return line_; }     // Of the instruction that runs.

  Block& block;
  const int index;
  Clock clock;
  bool waits = false;   // For a barrier of the block.
  bool yields = false;  // Another warp has to run first.
  int num_registers;    // Of a thread, as setmaxnreg counts them.
  Groups<Copy> copies;
  Groups<Product> products;
  std::vector<uint64_t> tensor_loads;  // Cells that are being read.
  std::vector<TensorStore> tensor_stores;
  std::deque<TensorProduct> tensor_products;  // Those that land late, the oldest first.
  uint32_t last_tensor_product = 0;           // Its number.

 private:
  Mask enabled(const Instruction& i) const;
  void regroup();

  std::vector<Register> registers_;
  Mask lanes_ = ~Mask(0);
  int pc_ = 0, line_ = 0;
  std::map<int, Mask> diverged_;  // By pc.
};

}  // namespace ptx
