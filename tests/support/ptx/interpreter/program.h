// A program: instructions whose names are decoded once, before they run.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "lanes.h"

namespace ptx {

class Warp;
struct Instruction;
using Handler = void (*)(Warp& warp, const Instruction& instruction, Mask lanes);

// Modifiers that change what an instruction does.
// clang-format off
enum Modifier {
  kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan,  // Comparisons; those with u hold for NaN.
  kAnd, kOr, kXor, kAdd, kMin, kMax,                                             // Combinations.
  kHi, kWide, kRelu, kPropagateNan, kFtz, kSat, kRni, kRzi, kRmi, kRpi,          // Arithmetic and rounding.
  kUp, kDown, kBfly, kIdx, kBallot, kAny, kAll,                                  // Exchanges.
  kGlobal, kShared, kParam, kTrans, kExpectTx,                                   // Memory.
};
// clang-format on

struct Instruction {
  Handler handler = nullptr;
  int line = 0;    // In the PTX text.
  int guard = -1;  // The register of the guarding predicate, or -1.
  bool guard_is_negated;
  uint64_t modifiers = 0;  // A bit for each Modifier.
  Type types[4] = {};      // In the order of the name, which is destination first.
  int num_types = 0;
  int m = 0, n = 0, k = 0;    // Shape of a matrix product.
  std::vector<int> operands;  // Registers, in the order of the text; an address is a base and an offset.

  bool has(Modifier modifier) const { return modifiers >> modifier & 1; }
  Type type() const { return types[num_types - 1]; }
  Type destination_type() const { return types[0]; }
  int num_operands() const { return int(operands.size()); }
};

struct NamedHandler {
  const char* name;  // The first words of an instruction's name.
  Handler handler;
  int most_operands = 1000;  // More, which the handler would ignore, are a Fault.
};
using Handlers = std::initializer_list<NamedHandler>;

// One list for each file of instructions.
extern const Handlers kArithmetic, kConversions, kMoves, kExchanges, kMatrices, kWarpGroups, kControl, kAsyncCopies,
    kTensorCopies, kMBarriers, kTensorMemory, kTensorCore;

// Decode a name, such as "cp.async.cg.shared.global". Throw a Fault where a word of it is unknown, or an operand too many.
Instruction decode_instruction(const std::string& name, std::vector<int> operands);

}  // namespace ptx
