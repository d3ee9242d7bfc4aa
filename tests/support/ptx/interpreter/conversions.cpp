// cvt: from one type to another.
#include <cmath>
#include <limits>

#include "warp.h"

namespace ptx {
namespace {

double rounded_to_integer(const Instruction& i, double x) {
  if (i.has(kRni)) return std::nearbyint(x);
  if (i.has(kRzi)) return std::trunc(x);
  if (i.has(kRmi)) return std::floor(x);
  return i.has(kRpi) ? std::ceil(x) : x;
}

// Out of range is the nearest integer of the type, and NaN is 0.
uint64_t to_integer(Type type, double x) {
  if (x != x) return 0;
  const bool is_signed = type.kind == Kind::kSigned;
  const double least = is_signed ? -std::ldexp(1.0, type.bits - 1) : 0.0;
  const double beyond = std::ldexp(1.0, is_signed ? type.bits - 1 : type.bits);
  if (x <= least) return is_signed ? ~uint64_t(0) << (type.bits - 1) : 0;
  if (x >= beyond) return ~uint64_t(0) >> (64 - type.bits + is_signed);
  return is_signed ? uint64_t(int64_t(x)) : uint64_t(x);
}

double to_double(const Instruction& i, Type type, uint64_t bits) {
  if (type.kind == Kind::kUnsigned) return double(decode<uint64_t>(type, bits));
  if (type.kind == Kind::kSigned) return double(decode<int64_t>(type, bits));
  const double x = decode<double>(type, bits);
  return i.has(kFtz) && type.kind == Kind::kFloat32 && std::fabs(x) < 0x1p-126 ? std::copysign(0.0, x) : x;
}

// Integers keep their sign above the type's bits, because the register may be wider than the type.
uint64_t converted(const Instruction& i, uint64_t bits) {
  const Type to = i.destination_type(), from = i.type();
  if (to.is_integer() && from.is_integer()) {
    const uint64_t number = from.kind == Kind::kSigned ? uint64_t(decode<int64_t>(from, bits)) : decode<uint64_t>(from, bits);
    return to.kind == Kind::kSigned ? uint64_t(decode<int64_t>(to, number)) : encode(to, number);
  }
  const double x = rounded_to_integer(i, to_double(i, from, bits));
  if (to.is_integer()) return to_integer(to, x);
  return encode(to, i.has(kSat) ? std::fmin(std::fmax(x, 0.0), 1.0) : x);
}

// cvt.f16x2.f32 d, high, low
void convert_pair(Warp& warp, const Instruction& i, Mask lanes) {
  const Type to = i.destination_type();
  for_lanes(lanes, [&](int lane) {
    const float high = decode<float>(i.type(), warp.value(i, 1, lane)), low = decode<float>(i.type(), warp.value(i, 2, lane));
    warp.value(i, 0, lane) = encode(to, high) << to.bits | encode(to, low);
  });
}

void convert(Warp& warp, const Instruction& i, Mask lanes) {
  if (i.num_operands() == 3) return convert_pair(warp, i, lanes);
  for_lanes(lanes, [&](int lane) { warp.value(i, 0, lane) = converted(i, warp.value(i, 1, lane)); });
}

}  // namespace

const Handlers kConversions = {{"cvt", convert, 3}};

}  // namespace ptx
