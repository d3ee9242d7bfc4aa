#include "block.h"

namespace ptx {

constexpr int kLongestTurn = 400;  // Instructions.
constexpr int kMostFailedTests = 100000;
constexpr int kUnits = 2;  // The accelerator and the tensor core, which are agents as warps are.

namespace {

std::string place_of(uint64_t address) { return "shared address " + std::to_string(address); }

}  // namespace

Block::Block(const std::vector<Instruction>& program, Memory& memory, int num_warps, int registers_per_thread,
             const std::vector<Register>& registers, Landing landing, unsigned seed)
    : memory(memory),
      races(num_warps + kUnits, memory.shared_bytes(), place_of),
      landing(landing),
      tensor_memory(num_warps + kUnits),
      program_(program),
      random_(seed) {
  warps_.reserve(num_warps);
  for (int w = 0; w < num_warps; ++w) {
    Warp& warp = warps_.emplace_back(*this, w, registers, num_warps + kUnits);
    warp.num_registers = registers_per_thread;
    for (int lane = 0; lane < kLanes; ++lane) {
      warp[kTid].lane[lane] = w * kLanes + lane;
      warp[kLaneid].lane[lane] = lane;
      warp[kWarpid].lane[lane] = w;
    }
  }
}

void Block::run() {
  for (;;) {
    std::vector<Warp*> ready;
    bool any_left = false;
    for (Warp& warp : warps_) {
      any_left |= !warp.is_done();
      if (!warp.is_done() && !warp.waits) ready.push_back(&warp);
    }
    if (!any_left) break;
    if (ready.empty()) throw Fault("deadlock: all warps wait at barriers");
    Warp* warp = ready[random_() % ready.size()];
    current_ = warp;
    warp->run(program_, 1 + random_() % kLongestTurn);
  }
  if (!tensor_memory.is_free()) throw Fault("a block ends with tensor memory that it has not freed");
}

void Block::synchronize(const std::vector<Warp*>& warps) {
  Clock common(warps_.front().clock.size());
  for (const Warp* warp : warps) join(&common, warp->clock);
  for (Warp* warp : warps) {
    warp->clock = common;
    ++warp->clock[warp->index];
  }
}

void Block::count_test(bool is_there, const char* what) {
  failed_tests_ = is_there ? 0 : failed_tests_ + 1;
  if (failed_tests_ > kMostFailedTests) throw Fault(std::string("deadlock: ") + what);
}

}  // namespace ptx
