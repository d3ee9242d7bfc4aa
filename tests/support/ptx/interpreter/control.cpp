// Branches, ends, and the barriers of a block.
#include <string>

#include "block.h"

namespace ptx {
namespace {

// Fences: the lanes of a group go in step, and all accesses happen in the order in which they are interpreted.
void nothing(Warp&, const Instruction&, Mask) {}

// fence.proxy.async
void fence_proxies(Warp& warp, const Instruction&, Mask) { warp.fence_proxies(); }

// bra target
void branch(Warp& warp, const Instruction& i, Mask lanes) { warp.branch(lanes, int(warp.uniform(i, 0))); }

// brx.idx index, targets
void branch_by_index(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    const uint64_t index = warp.value(i, 0, lane);
    if (index + 1 >= uint64_t(i.num_operands())) throw Fault("a branch has no target " + std::to_string(index));
    warp.branch(Mask(1) << lane, int(warp.uniform(i, 1 + int(index))));
  });
}

void leave(Warp& warp, const Instruction&, Mask lanes) { warp.leave(lanes); }

void trap(Warp&, const Instruction&, Mask) { throw Fault("trap"); }

void require_registers(const Warp& warp, Mask lanes, bool is_sensible) {
  if (lanes != ~Mask(0)) throw Fault("a change of registers for some lanes of a warp");
  if (!warp.num_registers || !is_sensible) throw Fault("setmaxnreg from " + std::to_string(warp.num_registers) + " registers");
}

// setmaxnreg.dec registers: the block has what the warp gives back.
void give_registers(Warp& warp, const Instruction& i, Mask lanes) {
  const int asked = int(warp.uniform(i, 0));
  require_registers(warp, lanes, asked <= warp.num_registers);
  warp.block.free_registers += warp.num_registers - asked;
  warp.num_registers = asked;
}

// setmaxnreg.inc registers: the warp waits until the block has enough.
void take_registers(Warp& warp, const Instruction& i, Mask lanes) {
  const int asked = int(warp.uniform(i, 0)), missing = asked - warp.num_registers;
  require_registers(warp, lanes, missing >= 0);
  const bool are_there = missing <= warp.block.free_registers;
  warp.block.count_test(are_there, "there are never enough registers");
  if (!are_there) return warp.run_again();
  warp.block.free_registers -= missing;
  warp.num_registers = asked;
}

// bar.sync number[, threads]
void synchronize(Warp& warp, const Instruction& i, Mask lanes) {
  if (lanes != ~Mask(0)) throw Fault("a barrier for some lanes of a warp");
  Barrier& barrier = warp.block.barriers[int(warp.uniform(i, 0))];
  const int expected = i.num_operands() > 1 ? int(warp.uniform(i, 1)) : warp.block.num_threads();
  if (barrier.arrived && barrier.expected != expected)
    throw Fault("a barrier of which warps expect different numbers of threads");
  barrier.expected = expected;
  barrier.arrived += kLanes;
  barrier.waiting.push_back(&warp);
  warp.waits = true;
  if (barrier.arrived < expected) return;
  warp.block.synchronize(barrier.waiting);
  for (Warp* one : barrier.waiting) one->waits = false;
  barrier = Barrier();
}

}  // namespace

const Handlers kControl = {
    {"bra", branch, 1},
    {"brx.idx", branch_by_index},
    {"ret", leave},
    {"exit", leave},
    {"trap", trap},
    {"bar", synchronize, 2},
    {"barrier", synchronize, 2},
    {"bar.warp", nothing},
    {"fence", nothing},
    {"fence.proxy.async", fence_proxies},
    {"wgmma.fence", nothing},
    {"setmaxnreg.inc", take_registers, 1},
    {"setmaxnreg.dec", give_registers, 1},
};

}  // namespace ptx
