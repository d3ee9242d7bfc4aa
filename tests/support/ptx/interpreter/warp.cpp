#include "warp.h"

#include <algorithm>
#include <cstring>

#include "block.h"

namespace ptx {

Warp::Warp(Block& block, int index, const std::vector<Register>& registers, int num_agents)
    : block(block), index(index), clock(2 * num_agents), registers_(registers) {
  clock[index] = 1;
}

void Warp::load(Space space, uint64_t address, void* to, int bytes, Proxy proxy) {
  std::memcpy(to, block.memory.at(space, address, bytes), bytes);
  if (space == Space::kShared) block.races.read(clock, index, address, bytes, proxy);
}

void Warp::store(Space space, uint64_t address, const void* from, int bytes, Proxy proxy) {
  char* to = block.memory.at(space, address, bytes);
  if (space == Space::kShared) block.races.write(clock, index, address, bytes, proxy, !std::memcmp(to, from, bytes));
  if (space == Space::kGlobal) block.memory.own(address, bytes);
  std::memcpy(to, from, bytes);
}

void Warp::claim(uint64_t address, int bytes) {
  block.memory.at(Space::kShared, address, bytes);
  block.races.write(clock, index, address, bytes);
}

void Warp::fence_proxies() {
  const size_t num_agents = clock.size() / 2;
  std::copy_n(clock.begin(), num_agents, clock.begin() + num_agents);
  ++clock[index];
}

Mask Warp::enabled(const Instruction& i) const {
  if (i.guard < 0) return lanes_;
  Mask holds = 0;
  for_lanes(lanes_, [&](int lane) { holds |= Mask(registers_[i.guard].lane[lane] & 1) << lane; });
  return i.guard_is_negated ? lanes_ & ~holds : holds;
}

void Warp::branch(Mask taken, int target) {
  lanes_ &= ~taken;
  diverged_[target] |= taken;
}

void Warp::regroup() {
  if (lanes_) diverged_[pc_] |= lanes_;
  if (diverged_.empty()) return;
  pc_ = diverged_.begin()->first;
  lanes_ = diverged_.begin()->second;
  diverged_.erase(diverged_.begin());
}

void Warp::run(const std::vector<Instruction>& program, int most) {
  yields = false;
  while (most-- > 0 && !waits && !yields && !is_done()) {
    if (pc_ >= int(program.size())) throw Fault("the program has no end");
    const Instruction& i = program[pc_++];
    line_ = i.line;
    if (const Mask lanes = enabled(i)) i.handler(*this, i, lanes);
    if (!lanes_ || !diverged_.empty()) regroup();
  }
}

}  // namespace ptx
