#include "block.h"

namespace ptx {

constexpr int kLongestTurn = 400;  // Instructions.
constexpr int kMostFailedTests = 100000;

Block::Block(const std::vector<Instruction>& program, Memory& memory, int num_warps, const std::vector<Register>& registers,
             Landing landing, unsigned seed)
    : memory(memory), races(num_warps + 1, memory.shared_bytes()), landing(landing), program_(program), random_(seed) {
  warps_.reserve(num_warps);
  for (int w = 0; w < num_warps; ++w) {
    Warp& warp = warps_.emplace_back(*this, w, registers, num_warps + 1);
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
    if (!any_left) return;
    if (ready.empty()) throw Fault("deadlock: all warps wait at barriers");
    Warp* warp = ready[random_() % ready.size()];
    current_ = warp;
    warp->run(program_, 1 + random_() % kLongestTurn);
  }
}

void Block::synchronize(const std::vector<Warp*>& warps) {
  Clock common(warps_.size() + 1);
  for (const Warp* warp : warps) join(&common, warp->clock);
  for (Warp* warp : warps) {
    warp->clock = common;
    ++warp->clock[warp->index];
  }
}

void Block::count_test(bool is_complete) {
  failed_tests_ = is_complete ? 0 : failed_tests_ + 1;
  if (failed_tests_ > kMostFailedTests) throw Fault("deadlock: an mbarrier's phase is never complete");
}

}  // namespace ptx
