// Decoding of instructions' names: the handler, the types, the modifiers and the shape.
#include "program.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "memory.h"

namespace ptx {
namespace {

struct NamedType {
  const char* name;
  Type type;
};
const NamedType kTypes[] = {
    {"pred", {Kind::kUnsigned, 1, 1}},    {"b8", {Kind::kUnsigned, 8, 1}},    {"u8", {Kind::kUnsigned, 8, 1}},
    {"b16", {Kind::kUnsigned, 16, 1}},    {"u16", {Kind::kUnsigned, 16, 1}},  {"b32", {Kind::kUnsigned, 32, 1}},
    {"u32", {Kind::kUnsigned, 32, 1}},    {"b64", {Kind::kUnsigned, 64, 1}},  {"u64", {Kind::kUnsigned, 64, 1}},
    {"s8", {Kind::kSigned, 8, 1}},        {"s16", {Kind::kSigned, 16, 1}},    {"s32", {Kind::kSigned, 32, 1}},
    {"s64", {Kind::kSigned, 64, 1}},      {"f16", {Kind::kFloat16, 16, 1}},   {"bf16", {Kind::kBFloat16, 16, 1}},
    {"f32", {Kind::kFloat32, 32, 1}},     {"f64", {Kind::kFloat64, 64, 1}},   {"f16x2", {Kind::kFloat16, 16, 2}},
    {"bf16x2", {Kind::kBFloat16, 16, 2}}, {"f32x2", {Kind::kFloat32, 32, 2}},
};

struct NamedModifier {
  const char* name;
  Modifier modifier;
};
// clang-format off
const NamedModifier kModifiers[] = {
    {"eq", kEq}, {"ne", kNe}, {"lt", kLt}, {"le", kLe}, {"gt", kGt}, {"ge", kGe}, {"num", kNum}, {"nan", kNan},
    {"equ", kEqu}, {"neu", kNeu}, {"ltu", kLtu}, {"leu", kLeu}, {"gtu", kGtu}, {"geu", kGeu},
    {"lo", kLt}, {"ls", kLe}, {"hi", kHi}, {"hs", kGe},  // Of unsigned numbers; mul.lo and mul.hi have the same words.
    {"and", kAnd}, {"or", kOr}, {"xor", kXor}, {"add", kAdd}, {"min", kMin}, {"max", kMax},
    {"wide", kWide}, {"relu", kRelu}, {"NaN", kPropagateNan}, {"ftz", kFtz}, {"sat", kSat},
    {"rni", kRni}, {"rzi", kRzi}, {"rmi", kRmi}, {"rpi", kRpi},
    {"up", kUp}, {"down", kDown}, {"bfly", kBfly}, {"idx", kIdx}, {"ballot", kBallot}, {"any", kAny}, {"all", kAll},
    {"global", kGlobal}, {"shared", kShared}, {"shared::cta", kShared}, {"param", kParam}, {"trans", kTrans},
    {"expect_tx", kExpectTx},
};
// clang-format on

// Words that change nothing here: hints, the only rounding or order that there is, and what the operands tell, too.
const std::string kSilent =
    " sync aligned rn approx full uni to row col m8n8 x1 x2 x4 x8 x16 x32 x64 x128 v2 v4 cg ca parity proxy async cta"
    " 1d 2d 3d 4d 5d mbarrier::complete_tx::bytes mbarrier::arrive::one shared::cluster cta_group::1 kind::f16 ";

// Return the handler whose name is the longest beginning of the instruction's.
const NamedHandler* find_handler(const std::string& name) {
  const NamedHandler* found = nullptr;
  for (const Handlers* handlers : {&kArithmetic, &kConversions, &kMoves, &kExchanges, &kMatrices, &kWarpGroups, &kControl,
                                   &kAsyncCopies, &kTensorCopies, &kMBarriers, &kTensorMemory, &kTensorCore})
    for (const NamedHandler& one : *handlers) {
      const size_t length = std::strlen(one.name);
      const bool begins = !name.compare(0, length, one.name) && (name.size() == length || name[length] == '.');
      if (begins && (!found || length > std::strlen(found->name))) found = &one;
    }
  return found;
}

bool read_word(const std::string& word, Instruction* instruction) {
  for (const NamedType& one : kTypes)
    if (word == one.name && instruction->num_types < 4) {
      instruction->types[instruction->num_types++] = one.type;
      return true;
    }
  for (const NamedModifier& one : kModifiers)
    if (word == one.name) {
      instruction->modifiers |= uint64_t(1) << one.modifier;
      return true;
    }
  return std::sscanf(word.c_str(), "m%dn%dk%d", &instruction->m, &instruction->n, &instruction->k) == 3 ||
         kSilent.find(" " + word + " ") != std::string::npos;
}

}  // namespace

Instruction decode_instruction(const std::string& name, std::vector<int> operands) {
  const NamedHandler* found = find_handler(name);
  if (!found) throw Fault("unknown instruction " + name);
  if (int(operands.size()) > found->most_operands) throw Fault("too many operands of " + name);
  Instruction instruction;
  instruction.handler = found->handler;
  instruction.operands = std::move(operands);
  for (size_t begin = std::strlen(found->name) + 1; begin < name.size();) {
    const size_t end = std::min(name.find('.', begin), name.size());
    const std::string word = name.substr(begin, end - begin);
    if (!read_word(word, &instruction)) throw Fault("unknown modifier " + word + " of " + name);
    begin = end + 1;
  }
  return instruction;
}

}  // namespace ptx
