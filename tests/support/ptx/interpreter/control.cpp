// Branches, ends, and the barriers of a block.
#include "block.h"

namespace ptx {
namespace {

// Fences: the lanes of a group go in step, and all accesses happen in the order in which they are interpreted.
void nothing(Warp&, const Instruction&, Mask) {}

// bra target
void branch(Warp& warp, const Instruction& i, Mask lanes) { warp.branch(lanes, int(warp.uniform(i, 0))); }

void leave(Warp& warp, const Instruction&, Mask lanes) { warp.leave(lanes); }

void trap(Warp&, const Instruction&, Mask) { throw Fault("trap"); }

// bar.sync number[, threads]
void synchronize(Warp& warp, const Instruction& i, Mask lanes) {
  if (lanes != ~Mask(0)) throw Fault("a barrier for some lanes of a warp");
  Barrier& barrier = warp.block.barriers[int(warp.uniform(i, 0))];
  const int expected = i.num_operands() > 1 ? int(warp.uniform(i, 1)) : warp.block.num_threads();
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
    {"bra", branch, 1},      {"ret", leave},        {"exit", leave},    {"trap", trap},
    {"bar", synchronize, 2}, {"bar.warp", nothing}, {"fence", nothing}, {"wgmma.fence", nothing},
};

}  // namespace ptx
