// Instructions that move values between registers, and between registers and memory.
#include <cstring>

#include "block.h"

namespace ptx {
namespace {

void move(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) { warp.value(i, 0, lane) = low_bits(warp.value(i, 1, lane), i.type().bits); });
}

// mov.b64 d, {low, ..., high}
void pack(Warp& warp, const Instruction& i, Mask lanes) {
  const int parts = i.num_operands() - 1, bits = i.type().bits / parts;
  for_lanes(lanes, [&](int lane) {
    uint64_t whole = 0;
    for (int part = 0; part < parts; ++part) whole |= low_bits(warp.value(i, part + 1, lane), bits) << bits * part;
    warp.value(i, 0, lane) = whole;
  });
}

// mov.b64 {low, ..., high}, d
void unpack(Warp& warp, const Instruction& i, Mask lanes) {
  const int parts = i.num_operands() - 1, bits = i.type().bits / parts;
  for_lanes(lanes, [&](int lane) {
    const uint64_t whole = warp.value(i, parts, lane);
    for (int part = 0; part < parts; ++part) warp.value(i, part, lane) = low_bits(whole >> bits * part, bits);
  });
}

// Make an address of a space an address anywhere. Global addresses are the same in both.
void convert_address(Warp& warp, const Instruction& i, Mask lanes) {
  const uint64_t base = i.has(kParam) ? warp.block.memory.param_address() : 0;
  if (i.has(kShared)) throw Fault("shared memory has no generic addresses here");
  for_lanes(lanes, [&](int lane) { warp.value(i, 0, lane) = warp.value(i, 1, lane) + base; });
}

Space space_of(const Instruction& i) {
  return i.has(kShared) ? Space::kShared : i.has(kParam) ? Space::kParam : Space::kGlobal;
}

constexpr int kMostBytes = 32;  // Of an access.

// ld.space[.v4].type {d, ...}, [base + offset]
void load(Warp& warp, const Instruction& i, Mask lanes) {
  const int count = i.num_operands() - 2, bytes = i.type().bytes();
  const bool is_signed = i.type().kind == Kind::kSigned;
  for_lanes(lanes, [&](int lane) {
    char data[kMostBytes];
    warp.load(space_of(i), warp.address(i, count, lane), data, count * bytes);
    for (int k = 0; k < count; ++k) {
      uint64_t bits = 0;
      std::memcpy(&bits, data + k * bytes, bytes);
      warp.value(i, k, lane) = is_signed ? uint64_t(decode<int64_t>(i.type(), bits)) : bits;
    }
  });
}

// st.space[.v4].type [base + offset], {a, ...}
void store(Warp& warp, const Instruction& i, Mask lanes) {
  const int count = i.num_operands() - 2, bytes = i.type().bytes();
  for_lanes(lanes, [&](int lane) {
    char data[kMostBytes];
    for (int k = 0; k < count; ++k) std::memcpy(data + k * bytes, &warp.value(i, k + 2, lane), bytes);
    warp.store(space_of(i), warp.address(i, 0, lane), data, count * bytes);
  });
}

}  // namespace

const Handlers kMoves = {
    {"mov", move, 2}, {"pack", pack}, {"unpack", unpack}, {"cvta", convert_address, 2}, {"ld", load}, {"st", store},
};

}  // namespace ptx
