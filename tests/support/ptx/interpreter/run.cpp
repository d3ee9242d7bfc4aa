// The interpreter's entry: run the blocks of a grid.
#include <cstdio>
#include <cstring>

#include "block.h"

namespace ptx {

// A launch, in the form of interpreter.py.
struct Launch {
  const char* names;  // Of the instructions, each with a zero behind it.
  const int* lines;
  const int* guards;  // Twice a register, plus 1 where it is negated; -1 without a guard.
  const int* operands;
  const int* first_operands;  // Instruction i has the operands from first_operands[i] to first_operands[i + 1].
  int num_instructions;
  const Register* registers;  // As every warp has them at first.
  int num_registers;
  int num_blocks, num_warps, registers_per_thread;
  uint64_t shared_bytes;
  const char* parameters;
  uint64_t parameter_bytes;
  const uint64_t* addresses;  // Of the tensors.
  const uint64_t* bytes;
  int num_tensors;
  int late;
  unsigned seed;
};

namespace {

std::vector<Instruction> decode_program(const Launch& launch) {
  std::vector<Instruction> program;
  const char* name = launch.names;
  for (int i = 0; i < launch.num_instructions; ++i, name += std::strlen(name) + 1) {
    const int *first = launch.operands + launch.first_operands[i], *last = launch.operands + launch.first_operands[i + 1];
    Instruction& one = program.emplace_back(decode_instruction(name, {first, last}));
    one.line = launch.lines[i];
    one.guard = launch.guards[i] >> 1;  // -1 stays -1.
    one.guard_is_negated = launch.guards[i] & 1;
  }
  return program;
}

void run_block(const Launch& launch, const std::vector<Instruction>& program, Memory& memory, int index) {
  memory.start_block(index);
  std::vector<Register> registers(launch.registers, launch.registers + launch.num_registers);
  for (uint64_t& lane : registers[kCtaid].lane) lane = index;
  Block block(program, memory, launch.num_warps, launch.registers_per_thread, registers,
              launch.late ? Landing::kLate : Landing::kEarly, launch.seed + index);
  try {
    block.run();
  } catch (const Fault& fault) {
    throw Fault("block " + std::to_string(index) + ", line " + std::to_string(block.line()) + ": " + fault.what());
  }
}

}  // namespace
}  // namespace ptx

// Return 0, or 1 and a text if there was a fault.
extern "C" int ptx_run(const ptx::Launch* launch, char* text, int text_bytes) {
  using namespace ptx;
  try {
    const std::vector<Instruction> program = decode_program(*launch);
    Memory memory(launch->shared_bytes, launch->parameters, launch->parameter_bytes);
    for (int t = 0; t < launch->num_tensors; ++t) memory.add_tensor(launch->addresses[t], launch->bytes[t]);
    for (int block = 0; block < launch->num_blocks; ++block) run_block(*launch, program, memory, block);
    return 0;
  } catch (const std::exception& fault) {
    std::snprintf(text, text_bytes, "%s", fault.what());
    return 1;
  }
}
