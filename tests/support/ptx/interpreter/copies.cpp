// cp.async: copies from global to shared memory that a thread waits for by groups.
#include <cstring>

#include "block.h"

namespace ptx {
namespace {

void land(Warp& warp, const Copy& copy) {
  Memory& memory = warp.block.memory;
  char* to = memory.at(Space::kShared, copy.to, copy.bytes);
  std::memset(to, 0, copy.bytes);
  if (copy.bytes_read) std::memcpy(to, memory.at(Space::kGlobal, copy.from, copy.bytes_read, copy.bytes), copy.bytes_read);
}

// cp.async [to + offset], [from + offset], bytes[, bytes to read]. It may write from now on.
void start(Warp& warp, const Instruction& i, Mask lanes) {
  const int bytes = int(warp.uniform(i, 4));
  for_lanes(lanes, [&](int lane) {
    const int bytes_read = i.num_operands() > 5 ? int(uint32_t(warp.value(i, 5, lane))) : bytes;
    const Copy copy{warp.address(i, 0, lane), warp.address(i, 2, lane), bytes, bytes_read};
    warp.claim(copy.to, bytes);
    if (warp.block.landing == Landing::kEarly) land(warp, copy);
    warp.copies.open.push_back(copy);
  });
}

void commit(Warp& warp, const Instruction&, Mask) { warp.copies.commit(); }

// cp.async.wait_group groups: so many of the newest may go on. The others may have written until now.
void wait(Warp& warp, const Instruction& i, Mask) {
  warp.copies.wait(warp.uniform(i, 0), [&](const Copy& copy) {
    warp.claim(copy.to, copy.bytes);
    if (warp.block.landing == Landing::kLate) land(warp, copy);
  });
}

}  // namespace

const Handlers kAsyncCopies = {{"cp.async", start, 6}, {"cp.async.commit_group", commit, 0}, {"cp.async.wait_group", wait, 1}};

}  // namespace ptx
