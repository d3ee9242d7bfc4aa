// A thread block: its warps, its memory and its barriers.
#pragma once

#include <map>
#include <random>
#include <vector>

#include "mbarriers.h"
#include "memory.h"
#include "program.h"
#include "races.h"
#include "tensor_memory.h"
#include "warp.h"

namespace ptx {

// The special registers come first, in the order of program.py.
enum { kTid, kCtaid, kLaneid, kWarpid };

// bar.sync: warps that wait for the others.
struct Barrier {
  int arrived = 0, expected = 0;  // Threads.
  std::vector<Warp*> waiting;
};

// When asynchronous copies and products happen: as soon or as late as the memory model allows.
enum class Landing { kEarly, kLate };

class Block {
 public:
  Block(const std::vector<Instruction>& program, Memory& memory, int num_warps, int registers_per_thread,
        const std::vector<Register>& registers, Landing landing, unsigned seed);

  // Let the warps take turns of random lengths until all have ended.
  void run();

  // Return the line of the instruction that runs.
  int line() const { return current_ ? current_->line() : 0; }

  // Take notice of a test of what a warp waits for. Too many in a row that failed are a deadlock.
  void count_test(bool is_there, const char* what);

  // Let the warps know what each of them knows.
  void synchronize(const std::vector<Warp*>& warps);

  int accelerator() const { return int(warps_.size()); }  // As agents.
  int tensor_core() const { return int(warps_.size()) + 1; }
  int num_threads() const { return int(warps_.size()) * kLanes; }

  Memory& memory;
  Races races;
  const Landing landing;
  TensorMemory tensor_memory;
  int free_registers = 0;  // That warps have given back, for each lane.
  uint32_t num_tensor_copies = 0, num_tensor_products = 0;
  int product_warp = 0;  // The last to start a product, and its time then.
  uint32_t product_time = 0;
  std::map<int, Barrier> barriers;         // By number.
  std::map<uint64_t, MBarrier> mbarriers;  // By address in shared memory.

 private:
  const std::vector<Instruction>& program_;
  std::vector<Warp> warps_;
  const Warp* current_ = nullptr;
  std::minstd_rand random_;
  int failed_tests_ = 0;  // In a row.
};

}  // namespace ptx
