#include "mbarriers.h"

#include "block.h"
#include "tensor_core.h"

namespace ptx {
namespace {

constexpr int kBarrierBytes = 8;

// mbarrier.init [address], count
void initialize(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    warp.claim(warp.address(i, 0, lane), kBarrierBytes);
    MBarrier& barrier = warp.block.mbarriers[warp.address(i, 0, lane)];
    barrier = MBarrier();
    barrier.count = barrier.pending = int(warp.value(i, 2, lane));
    barrier.clock = warp.clock;
  });
}

// mbarrier.inval [address]. A commit may be left whose products are known to be complete by another barrier.
void invalidate(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    const MBarrier& barrier = barrier_at(warp, i, 0, lane);
    if (!barrier.copies.empty()) throw Fault("an mbarrier ends before its copies");
    for (const Commit& commit : barrier.commits)
      if (!has_landed(commit)) throw Fault("an mbarrier ends before its products");
    warp.claim(warp.address(i, 0, lane), kBarrierBytes);
    warp.block.mbarriers.erase(warp.address(i, 0, lane));
  });
}

// mbarrier.arrive[.expect_tx] _, [address][, bytes]
void arrive(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    MBarrier& barrier = barrier_at(warp, i, 1, lane);
    if (i.has(kExpectTx)) barrier.missing_bytes += int64_t(warp.value(i, 3, lane));
    barrier.arrive(warp.clock);
  });
  ++warp.clock[warp.index];
}

// Let the oldest copy land or the oldest commit arrive. Return false if there is none.
bool land_oldest(Memory& memory, MBarrier* barrier) {
  if (!barrier->copies.empty()) {
    land(memory, barrier->copies.front(), barrier);
    barrier->copies.pop_front();
  } else if (!barrier->commits.empty()) {
    land(barrier->commits.front(), barrier);
    barrier->commits.pop_front();
  } else {
    return false;
  }
  return true;
}

// mbarrier.try_wait.parity p, [address], parity: p tells whether the phase of that parity is complete.
void test(Warp& warp, const Instruction& i, Mask lanes) {
  const int first = __builtin_ctz(lanes);
  MBarrier& barrier = barrier_at(warp, i, 1, first);
  const bool parity = warp.value(i, 3, first) & 1;
  while (barrier.phase == parity && land_oldest(warp.block.memory, &barrier)) {
  }  // What lands late lands when somebody asks for it.
  const bool is_complete = barrier.phase != parity;
  for_lanes(lanes, [&](int lane) { warp.value(i, 0, lane) = is_complete; });
  if (is_complete) join(&warp.clock, barrier.clock);
  warp.yields = !is_complete;
  warp.block.count_test(is_complete, "an mbarrier's phase is never complete");
}

}  // namespace

void MBarrier::arrive(const Clock& by) {
  if (!pending--) throw Fault("too many arrivals at an mbarrier");
  join(&clock, by);
  complete_if_due();
}

void MBarrier::land(int64_t bytes, const Clock& by) {
  missing_bytes -= bytes;
  join(&clock, by);
  complete_if_due();
}

void MBarrier::complete_if_due() {
  if (pending || missing_bytes) return;
  pending = count;
  phase = !phase;
}

MBarrier& barrier_at(Warp& warp, const Instruction& i, int operand, int lane) {
  const uint64_t address = warp.address(i, operand, lane);
  uint64_t content;
  warp.load(Space::kShared, address, &content, sizeof content);
  const auto found = warp.block.mbarriers.find(address);
  if (found == warp.block.mbarriers.end()) throw Fault("there is no mbarrier at shared address " + std::to_string(address));
  return found->second;
}

const Handlers kMBarriers = {
    {"mbarrier.init", initialize}, {"mbarrier.inval", invalidate}, {"mbarrier.arrive", arrive}, {"mbarrier.try_wait", test}};

}  // namespace ptx
