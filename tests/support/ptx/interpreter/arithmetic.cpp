// Instructions that compute each lane by itself: arithmetic, logic, comparisons and selections.
#include <cmath>

#include "memory.h"
#include "warp.h"

namespace ptx {
namespace {

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// ---- operations on each element -------------------------------------------------------------------------------------------

// Of two types, as in fma.f32.bf16, the first is that of the result and of the last source.
template <class Number, class Operation>
void compute(Warp& warp, const Instruction& i, Mask lanes, Operation operation) {
  const Type type = i.destination_type();
  const int sources = i.num_operands() - 1;
  const bool flush = i.has(kFtz) && type.kind == Kind::kFloat32;
  for_lanes(lanes, [&](int lane) {
    uint64_t result = 0;
    for (int shift = 0; shift < type.bits * type.elements; shift += type.bits) {
      Number x[3] = {};
      for (int s = 0; s < sources && s < 3; ++s) {
        x[s] = decode<Number>(s + 1 < sources ? i.type() : type, warp.value(i, s + 1, lane) >> shift);
        if (flush) x[s] = Number(flushed(float(x[s])));
      }
      Number y = operation(x[0], x[1], x[2]);
      if (flush) y = Number(flushed(float(y)));
      result |= encode(type, y) << shift;
    }
    warp.value(i, 0, lane) = result;
  });
}

template <class Operation>
void compute_float(Warp& warp, const Instruction& i, Mask lanes, Operation operation) {
  if (i.type().is_integer()) throw Fault("the instruction has no integers");
  if (i.type().kind == Kind::kFloat64)
    compute<double>(warp, i, lanes, operation);
  else
    compute<float>(warp, i, lanes, operation);
}

template <class Operation>
void compute_integer(Warp& warp, const Instruction& i, Mask lanes, Operation operation) {
  if (!i.type().is_integer()) throw Fault("the instruction has no floats");
  if (i.type().kind == Kind::kSigned)
    compute<int64_t>(warp, i, lanes, operation);
  else
    compute<uint64_t>(warp, i, lanes, operation);
}

template <class Operation>
void compute_any(Warp& warp, const Instruction& i, Mask lanes, Operation operation) {
  if (i.type().is_integer())
    compute_integer(warp, i, lanes, operation);
  else
    compute_float(warp, i, lanes, operation);
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------------

void add(Warp& warp, const Instruction& i, Mask lanes) {
  compute_any(warp, i, lanes, [](auto a, auto b, auto) { return a + b; });
}

void sub(Warp& warp, const Instruction& i, Mask lanes) {
  compute_any(warp, i, lanes, [](auto a, auto b, auto) { return a - b; });
}

// The product of two integers: its low half, its high half, or all of it, plus a third operand if there is one.
void multiply_integers(Warp& warp, const Instruction& i, Mask lanes) {
  const Type type = i.type();
  const Type result = i.has(kWide) ? Type{type.kind, uint8_t(2 * type.bits), 1} : type;
  for_lanes(lanes, [&](int lane) {
    const __int128 a = type.kind == Kind::kSigned ? __int128(decode<int64_t>(type, warp.value(i, 1, lane)))
                                                  : __int128(decode<uint64_t>(type, warp.value(i, 1, lane)));
    const __int128 b = type.kind == Kind::kSigned ? __int128(decode<int64_t>(type, warp.value(i, 2, lane)))
                                                  : __int128(decode<uint64_t>(type, warp.value(i, 2, lane)));
    const uint64_t product = uint64_t(i.has(kHi) ? a * b >> type.bits : a * b);
    const uint64_t addend = i.num_operands() > 3 ? warp.value(i, 3, lane) : 0;
    warp.value(i, 0, lane) = encode(result, product + addend);
  });
}

void multiply(Warp& warp, const Instruction& i, Mask lanes) {
  if (i.type().is_integer()) return multiply_integers(warp, i, lanes);
  compute_float(warp, i, lanes, [](auto a, auto b, auto) { return a * b; });
}

void multiply_add(Warp& warp, const Instruction& i, Mask lanes) {
  if (i.type().is_integer()) return multiply_integers(warp, i, lanes);
  compute_float(warp, i, lanes, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
}

void require_divisors(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    if (!low_bits(warp.value(i, 2, lane), i.type().bits)) throw Fault("integer division by zero");
  });
}

void divide(Warp& warp, const Instruction& i, Mask lanes) {
  if (i.type().is_integer()) require_divisors(warp, i, lanes);
  compute_any(warp, i, lanes, [](auto a, auto b, auto) { return a / b; });
}

void remainder(Warp& warp, const Instruction& i, Mask lanes) {
  require_divisors(warp, i, lanes);
  compute_integer(warp, i, lanes, [](auto a, auto b, auto) { return a % b; });
}

// PTX returns the operand that is a number, unless the instruction says NaN.
template <class Number>
Number choose(Number a, Number b, bool take_a, bool propagate_nan) {
  if (a != a) return propagate_nan ? a : b;
  if (b != b) return propagate_nan ? b : a;
  return take_a ? a : b;
}

// Of two or three operands.
void minimum(Warp& warp, const Instruction& i, Mask lanes) {
  const bool relu = i.has(kRelu), nan = i.has(kPropagateNan), has_third = i.num_operands() > 3;
  compute_any(warp, i, lanes, [=](auto a, auto b, auto c) {
    auto least = choose(a, b, a < b, nan);
    if (has_third) least = choose(least, c, least < c, nan);
    return relu && least < 0 ? decltype(a)(0) : least;
  });
}

void maximum(Warp& warp, const Instruction& i, Mask lanes) {
  const bool relu = i.has(kRelu), nan = i.has(kPropagateNan), has_third = i.num_operands() > 3;
  compute_any(warp, i, lanes, [=](auto a, auto b, auto c) {
    auto largest = choose(a, b, a > b, nan);
    if (has_third) largest = choose(largest, c, largest > c, nan);
    return relu && largest < 0 ? decltype(a)(0) : largest;
  });
}

void negate(Warp& warp, const Instruction& i, Mask lanes) {
  compute_any(warp, i, lanes, [](auto a, auto, auto) { return -a; });
}

void absolute(Warp& warp, const Instruction& i, Mask lanes) {
  if (i.type().is_integer()) return compute_integer(warp, i, lanes, [](auto a, auto, auto) { return a < 0 ? -a : a; });
  compute_float(warp, i, lanes, [](auto a, auto, auto) { return std::fabs(a); });
}

// ---- elementary functions, which are more exact here than the GPU's approximations -----------------------------------------

#define PTX_FUNCTION(name, expression)                                            \
  void name(Warp& warp, const Instruction& i, Mask lanes) {                       \
    compute_float(warp, i, lanes, [](auto a, auto, auto) { return expression; }); \
  }
PTX_FUNCTION(square_root, std::sqrt(a))
PTX_FUNCTION(reciprocal_square_root, 1 / std::sqrt(a))
PTX_FUNCTION(reciprocal, 1 / a)
PTX_FUNCTION(exponential, std::exp2(a))
PTX_FUNCTION(logarithm, std::log2(a))
PTX_FUNCTION(sine, std::sin(a))
PTX_FUNCTION(cosine, std::cos(a))
PTX_FUNCTION(hyperbolic_tangent, std::tanh(a))
#undef PTX_FUNCTION

// The sign comes from the first operand.
void copy_sign(Warp& warp, const Instruction& i, Mask lanes) {
  compute_float(warp, i, lanes, [](auto a, auto b, auto) { return std::copysign(b, a); });
}

// ---- bits -----------------------------------------------------------------------------------------------------------------

void bitwise_and(Warp& warp, const Instruction& i, Mask lanes) {
  compute_integer(warp, i, lanes, [](auto a, auto b, auto) { return a & b; });
}

void bitwise_or(Warp& warp, const Instruction& i, Mask lanes) {
  compute_integer(warp, i, lanes, [](auto a, auto b, auto) { return a | b; });
}

void bitwise_xor(Warp& warp, const Instruction& i, Mask lanes) {
  compute_integer(warp, i, lanes, [](auto a, auto b, auto) { return a ^ b; });
}

void bitwise_not(Warp& warp, const Instruction& i, Mask lanes) {
  compute_integer(warp, i, lanes, [](auto a, auto, auto) { return ~a; });
}

// A bit of the result is the bit of the table whose number the three operands' bits make.
void logic_of_three(Warp& warp, const Instruction& i, Mask lanes) {
  const uint64_t table = warp.uniform(i, 4);
  compute_integer(warp, i, lanes, [=](auto a, auto b, auto c) {
    decltype(a) result = 0;
    for (int entry = 0; entry < 8; ++entry)
      if (table >> entry & 1) result |= (entry & 4 ? a : ~a) & (entry & 2 ? b : ~b) & (entry & 1 ? c : ~c);
    return result;
  });
}

// Amounts are 32 bits wide, whatever the type.
void shift_left(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    const uint32_t amount = uint32_t(warp.value(i, 2, lane));
    warp.value(i, 0, lane) = amount > 63 ? 0 : encode(i.type(), warp.value(i, 1, lane) << amount);
  });
}

void shift_right(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    const uint32_t amount = uint32_t(warp.value(i, 2, lane));
    const int64_t filled = decode<int64_t>(i.type(), warp.value(i, 1, lane)) >> (amount > 63 ? 63 : amount);
    const uint64_t plain = amount > 63 ? 0 : decode<uint64_t>(i.type(), warp.value(i, 1, lane)) >> amount;
    warp.value(i, 0, lane) = i.type().kind == Kind::kSigned ? encode(i.type(), filled) : plain;
  });
}

// A field of bits: its position and its length are bytes.
void extract_bits(Warp& warp, const Instruction& i, Mask lanes) {
  const int bits = i.type().bits;
  for_lanes(lanes, [&](int lane) {
    const int position = uint8_t(warp.value(i, 2, lane)), length = uint8_t(warp.value(i, 3, lane));
    uint64_t field = position >= bits ? 0 : low_bits(warp.value(i, 1, lane), bits) >> position;
    const int width = length < bits ? length : bits;
    field = low_bits(field, width);
    if (i.type().kind == Kind::kSigned && width) {
      const int sign = position + width - 1 < bits ? position + width - 1 : bits - 1;
      if (warp.value(i, 1, lane) >> sign & 1) field |= width == 64 ? 0 : ~uint64_t(0) << (sign - position + 1);
    }
    warp.value(i, 0, lane) = encode(i.type(), field);
  });
}

// Choose four of the eight bytes of two operands; a selector's highest bit repeats the byte's sign.
void permute_bytes(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    const uint64_t bytes = low_bits(warp.value(i, 1, lane), 32) | warp.value(i, 2, lane) << 32;
    uint64_t result = 0;
    for (int b = 0; b < 4; ++b) {
      const int selector = warp.value(i, 3, lane) >> 4 * b & 15;
      const uint8_t byte = uint8_t(bytes >> 8 * (selector & 7));
      result |= uint64_t(uint8_t(selector & 8 ? int8_t(byte) >> 7 : byte)) << 8 * b;
    }
    warp.value(i, 0, lane) = result;
  });
}

void count_ones(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    warp.value(i, 0, lane) = uint64_t(__builtin_popcountll(low_bits(warp.value(i, 1, lane), i.type().bits)));
  });
}

// ---- comparisons ----------------------------------------------------------------------------------------------------------

template <class Number>
bool holds(const Instruction& i, Number a, Number b) {
  const bool unordered = a != a || b != b;
  if (i.has(kNum)) return !unordered;
  if (i.has(kNan)) return unordered;
  if (unordered) return i.has(kEqu) || i.has(kNeu) || i.has(kLtu) || i.has(kLeu) || i.has(kGtu) || i.has(kGeu);
  if (i.has(kEq) || i.has(kEqu)) return a == b;
  if (i.has(kNe) || i.has(kNeu)) return a != b;
  if (i.has(kLt) || i.has(kLtu)) return a < b;
  if (i.has(kLe) || i.has(kLeu)) return a <= b;
  if (i.has(kGt) || i.has(kGtu) || i.has(kHi)) return a > b;
  return a >= b;
}

bool compare(const Instruction& i, uint64_t a, uint64_t b) {
  const Type type = i.type();
  if (type.kind == Kind::kUnsigned) return holds(i, decode<uint64_t>(type, a), decode<uint64_t>(type, b));
  if (type.kind == Kind::kSigned) return holds(i, decode<int64_t>(type, a), decode<int64_t>(type, b));
  return holds(i, decode<double>(type, a), decode<double>(type, b));
}

// setp.comparison[.combination] d, a, b[, c]
void set_predicate(Warp& warp, const Instruction& i, Mask lanes) {
  const bool combines = i.has(kAnd) || i.has(kOr) || i.has(kXor);
  if (i.num_operands() != 3 + combines) throw Fault("a second destination of setp is not implemented");
  for_lanes(lanes, [&](int lane) {
    bool result = compare(i, warp.value(i, 1, lane), warp.value(i, 2, lane));
    if (combines) {
      const bool other = warp.value(i, 3, lane) & 1;
      result = i.has(kAnd) ? result && other : i.has(kOr) ? result || other : result != other;
    }
    warp.value(i, 0, lane) = result;
  });
}

void select(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) { warp.value(i, 0, lane) = warp.value(i, warp.value(i, 3, lane) & 1 ? 1 : 2, lane); });
}

}  // namespace

const Handlers kArithmetic = {
    {"add", add, 3},
    {"sub", sub, 3},
    {"mul", multiply, 3},
    {"mad", multiply_add, 4},
    {"fma", multiply_add, 4},
    {"div", divide, 3},
    {"rem", remainder, 3},
    {"min", minimum, 4},
    {"max", maximum, 4},
    {"neg", negate, 2},
    {"abs", absolute, 2},
    {"sqrt", square_root, 2},
    {"rsqrt", reciprocal_square_root, 2},
    {"rcp", reciprocal, 2},
    {"ex2", exponential, 2},
    {"lg2", logarithm, 2},
    {"sin", sine, 2},
    {"cos", cosine, 2},
    {"tanh", hyperbolic_tangent, 2},
    {"copysign", copy_sign, 3},
    {"and", bitwise_and, 3},
    {"or", bitwise_or, 3},
    {"xor", bitwise_xor, 3},
    {"not", bitwise_not, 2},
    {"lop3", logic_of_three, 5},
    {"shl", shift_left, 3},
    {"shr", shift_right, 3},
    {"bfe", extract_bits, 4},
    {"prmt", permute_bytes, 4},
    {"popc", count_ones, 2},
    {"setp", set_predicate, 4},
    {"selp", select, 4},
};

}  // namespace ptx
