// Instructions in which the lanes of a warp see each other's values.
#include <algorithm>
#include <cmath>

#include "memory.h"
#include "warp.h"

namespace ptx {
namespace {

// Every lane that the mask names has to be there, and so is not waited for.
void require_present(const Warp& warp, uint64_t mask) {
  if (uint32_t(mask) != ~Mask(0) || warp.lanes() != ~Mask(0)) throw Fault("an exchange between some lanes of a warp");
}

// shfl.sync.mode.b32 d[|p], a, b, c, mask. c holds the last lane of a segment, and which bits of a lane name the segment.
void shuffle(Warp& warp, const Instruction& i, Mask lanes) {
  const bool has_predicate = i.num_operands() == 6;
  const int a = has_predicate ? 2 : 1;
  require_present(warp, warp.uniform(i, a + 3));
  const Register values = warp[i.operands[a]], amounts = warp[i.operands[a + 1]], clamps = warp[i.operands[a + 2]];
  for_lanes(lanes, [&](int lane) {
    const int amount = amounts.lane[lane] & 31, clamp = clamps.lane[lane] & 31, segment = clamps.lane[lane] >> 8 & 31;
    const int first = lane & segment, last = first | (clamp & ~segment);
    const int from = i.has(kUp)     ? lane - amount
                     : i.has(kDown) ? lane + amount
                     : i.has(kBfly) ? lane ^ amount
                                    : first | (amount & ~segment);
    const bool is_inside = i.has(kUp) ? from >= last : from <= last;
    warp.value(i, 0, lane) = low_bits(values.lane[is_inside ? from : lane], 32);
    if (has_predicate) warp.value(i, 1, lane) = is_inside;
  });
}

int64_t combine(const Instruction& i, int64_t a, int64_t b) {
  return i.has(kAdd)   ? a + b
         : i.has(kMin) ? std::min(a, b)
         : i.has(kMax) ? std::max(a, b)
         : i.has(kAnd) ? a & b
         : i.has(kOr)  ? a | b
                       : a ^ b;
}

// A number goes before NaN.
float combine(const Instruction& i, float a, float b) { return i.has(kMin) ? std::fmin(a, b) : std::fmax(a, b); }

template <class Number>
void reduce_as(Warp& warp, const Instruction& i, Mask lanes) {
  Number result = decode<Number>(i.type(), warp.value(i, 1, 0));
  for (int lane = 1; lane < kLanes; ++lane) result = combine(i, result, decode<Number>(i.type(), warp.value(i, 1, lane)));
  for_lanes(lanes, [&](int lane) { warp.value(i, 0, lane) = encode(i.type(), result); });
}

// redux.sync.operation.type d, a, mask
void reduce(Warp& warp, const Instruction& i, Mask lanes) {
  require_present(warp, warp.uniform(i, 2));
  if (i.type().is_integer()) return reduce_as<int64_t>(warp, i, lanes);
  if (!(i.has(kMin) || i.has(kMax)) || i.has(kPropagateNan)) throw Fault("a reduction of floats that is not implemented");
  reduce_as<float>(warp, i, lanes);
}

// elect.sync d|p, mask: one lane is the leader.
void elect(Warp& warp, const Instruction& i, Mask lanes) {
  require_present(warp, warp.uniform(i, 2));
  for_lanes(lanes, [&](int lane) {
    warp.value(i, 0, lane) = 0;
    warp.value(i, 1, lane) = lane == 0;
  });
}

// vote.sync.mode d, p, mask
void vote(Warp& warp, const Instruction& i, Mask lanes) {
  require_present(warp, warp.uniform(i, 2));
  Mask ballot = 0;
  for_lanes(lanes, [&](int lane) { ballot |= Mask(warp.value(i, 1, lane) & 1) << lane; });
  const uint64_t result = i.has(kBallot) ? ballot : i.has(kAny) ? ballot != 0 : ballot == ~Mask(0);
  for_lanes(lanes, [&](int lane) { warp.value(i, 0, lane) = result; });
}

}  // namespace

const Handlers kExchanges = {{"shfl", shuffle, 6}, {"redux", reduce, 3}, {"elect", elect, 3}, {"vote", vote, 3}};

}  // namespace ptx
