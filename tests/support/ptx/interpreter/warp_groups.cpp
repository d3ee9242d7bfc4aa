// wgmma: products of four warps with operands in shared memory, which a warp waits for by groups.
#include "block.h"
#include "matrix_tiles.h"
#include "shared_operands.h"

namespace ptx {
namespace {

constexpr int kK = 16;  // Of halves.

// ---- operands in shared memory --------------------------------------------------------------------------------------------

SharedOperand shared_operand(uint64_t descriptor, bool transposed) {
  const int swizzle = int(descriptor >> 62);
  return SharedOperand(descriptor, swizzle ? 256 >> swizzle : 16, transposed);
}

float half_at(Warp& warp, uint64_t address, Type type) {
  uint16_t bits;
  warp.load(Space::kShared, address, &bits, 2, Proxy::kAsync);
  return decode<float>(type, bits);
}

// ---- products -------------------------------------------------------------------------------------------------------------

// wgmma.mma_async.m64nNk16.f32.type.type {d x N / 2}, A, b-descriptor, accumulate, sign of a, sign of b[, transpose a],
// transpose b. A is {a x 4} or a descriptor. A warp computes 16 of the 64 rows.
constexpr int kAfterA = 4;  // Operands that follow A whatever A is.

bool has_a_in_registers(const Instruction& i) { return i.num_operands() == i.n / 2 + 4 + kAfterA + 1; }

// Read A (16, kK), this warp's rows, and B (kK, n).
void read_operands(Warp& warp, const Product& product, std::vector<float>* a, std::vector<float>* b) {
  const Instruction& i = *product.instruction;
  if (has_a_in_registers(i)) {
    read_a(warp, &i.operands[i.n / 2], i.type(), kK, a->data());
  } else {
    const SharedOperand operand = shared_operand(product.a, product.transpose_a);
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < kK; ++k) (*a)[row * kK + k] = half_at(warp, operand.address(warp.index % 4 * 16 + row, k), i.type());
  }
  const SharedOperand operand = shared_operand(product.b, product.transpose_b);
  for (int k = 0; k < kK; ++k)
    for (int column = 0; column < i.n; ++column) (*b)[k * i.n + column] = half_at(warp, operand.address(column, k), i.type());
}

// Read the operands, as the hardware may do at any time until the wait; compute the product if it `lands`.
void multiply(Warp& warp, const Product& product, bool lands) {
  const Instruction& i = *product.instruction;
  std::vector<float> a(16 * kK), b(kK * i.n), sums(16 * i.n);
  read_operands(warp, product, &a, &b);
  if (!lands) return;
  if (product.negate)
    for (float& value : a) value = -value;
  if (product.accumulate) read_accumulator(warp, i.operands.data(), i.n, sums.data());
  multiply_add(a.data(), b.data(), 16, i.n, kK, sums.data());
  write_accumulator(warp, i.operands.data(), i.n, sums.data());
}

void start(Warp& warp, const Instruction& i, Mask lanes) {
  if (lanes != ~Mask(0)) throw Fault("a matrix instruction for some lanes of a warp");
  if (i.m != 64 || i.k != kK || i.destination_type().kind != Kind::kFloat32)
    throw Fault("a shape or type of wgmma that is not implemented");
  const bool in_registers = has_a_in_registers(i);
  const int a = i.n / 2, b = a + (in_registers ? 4 : 1);
  const bool a_is_negative = int32_t(warp.uniform(i, b + 2)) < 0, b_is_negative = int32_t(warp.uniform(i, b + 3)) < 0;
  Product product;
  product.instruction = &i;
  product.a = warp.uniform(i, a);
  product.b = warp.uniform(i, b);
  product.accumulate = warp.uniform(i, b + 1) & 1;
  product.negate = a_is_negative != b_is_negative;
  product.transpose_a = !in_registers && warp.uniform(i, b + 4);
  product.transpose_b = warp.uniform(i, i.num_operands() - 1);
  multiply(warp, product, warp.block.landing == Landing::kEarly);
  warp.products.open.push_back(product);
}

void commit(Warp& warp, const Instruction&, Mask) { warp.products.commit(); }

// wgmma.wait_group groups: so many of the newest may go on.
void wait(Warp& warp, const Instruction& i, Mask) {
  const bool late = warp.block.landing == Landing::kLate;
  warp.products.wait(warp.uniform(i, 0), [&](const Product& product) { multiply(warp, product, late); });
}

}  // namespace

const Handlers kWarpGroups = {
    {"wgmma.mma_async", start},
    {"wgmma.commit_group", commit},
    {"wgmma.wait_group", wait},
};

}  // namespace ptx
