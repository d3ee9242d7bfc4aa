#include "tensor_core.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "block.h"
#include "matrix_tiles.h"
#include "shared_operands.h"

namespace ptx {
namespace {

constexpr int kK = 16;  // Of halves.

// ---- operands -------------------------------------------------------------------------------------------------------------

// Return the operand of a descriptor, whose bits for the swizzle are not those of wgmma.
SharedOperand shared_operand(uint64_t descriptor, bool transposed) {
  const int swizzle = int(descriptor >> 61), relative = int(descriptor >> 46 & 0x7f);
  if (relative != 1 || swizzle & 1) throw Fault("a descriptor of shared memory that is not implemented");
  return SharedOperand(descriptor, swizzle ? 256 >> swizzle / 2 : 16, transposed);
}

// Return the lane of a row. 64 rows take 16 lanes of each warp's 32.
uint32_t lane_of(int m, int row) { return uint32_t(m == 64 ? row / 16 * 32 + row % 16 : row); }

// Call do_cell(number, row, column) for each cell of so many columns of A, which holds two halves, or of D.
template <class Do>
void for_cells(const TensorMemory& memory, uint32_t address, int m, int columns, Do do_cell) {
  for (int row = 0; row < m; ++row)
    for (int column = 0; column < columns; ++column)
      do_cell(memory.number(address + (lane_of(m, row) << 16) + uint32_t(column)), row, column);
}

// Call do_half(address in shared memory, i, k) for each half of an operand (size, kK).
template <class Do>
void for_halves(uint64_t descriptor, bool transposed, int size, Do do_half) {
  const SharedOperand operand = shared_operand(descriptor, transposed);
  for (int i = 0; i < size; ++i)
    for (int k = 0; k < kK; ++k) do_half(operand.address(i, k), i, k);
}

float half_at(Memory& memory, uint64_t address, Type type) {
  uint16_t bits;
  std::memcpy(&bits, memory.at(Space::kShared, address, 2), 2);
  return decode<float>(type, bits);
}

// ---- what a product reads and writes ----------------------------------------------------------------------------------------

// Take notice that the tensor core reads A and B, and writes D, until somebody knows the product to be complete. The tensor
// core goes from product to product, but only those with the same D are sure to be in order: A has to be known to be there.
void take_notice(Warp& warp, const TensorProduct& product) {
  Block& block = warp.block;
  const ProductShape& shape = product.shape;
  const int tensor_core = block.tensor_core();
  Races& races = block.tensor_memory.races;
  Clock clock = warp.clock;
  clock[tensor_core] = product.number;
  const auto read_half = [&](uint64_t address, int, int) {
    block.memory.at(Space::kShared, address, 2);
    block.races.read(clock, tensor_core, address, 2, Proxy::kAsync);
  };
  const auto read_cell = [&](uint64_t cell, int, int) {
    races.read(warp.clock, warp.index, cell, 1);
    races.read(clock, tensor_core, cell, 1);
  };
  if (product.has_a_in_tensor_memory)
    for_cells(block.tensor_memory, uint32_t(product.a), shape.m, kK / 2, read_cell);
  else
    for_halves(product.a, shape.transpose_a, shape.m, read_half);
  for_halves(product.b, shape.transpose_b, shape.n, read_half);
  for_cells(block.tensor_memory, product.d, shape.m, shape.n,
            [&](uint64_t cell, int, int) { races.write(clock, tensor_core, cell, 1); });
}

// ---- products -------------------------------------------------------------------------------------------------------------

// Read A (m, kK).
std::vector<float> read_a(Block& block, const TensorProduct& product) {
  const ProductShape& shape = product.shape;
  std::vector<float> a(shape.m * kK);
  if (product.has_a_in_tensor_memory)
    for_cells(block.tensor_memory, uint32_t(product.a), shape.m, kK / 2, [&](uint64_t cell, int row, int column) {
      const uint32_t halves = block.tensor_memory[cell];
      a[row * kK + 2 * column] = decode<float>(shape.a_type, halves & 0xffff);
      a[row * kK + 2 * column + 1] = decode<float>(shape.a_type, halves >> 16);
    });
  else
    for_halves(product.a, shape.transpose_a, shape.m,
               [&](uint64_t address, int row, int k) { a[row * kK + k] = half_at(block.memory, address, shape.a_type); });
  return a;
}

// Read B (kK, n).
std::vector<float> read_b(Block& block, const TensorProduct& product) {
  const ProductShape& shape = product.shape;
  std::vector<float> b(kK * shape.n);
  for_halves(product.b, shape.transpose_b, shape.n, [&](uint64_t address, int column, int k) {
    b[k * shape.n + column] = half_at(block.memory, address, shape.b_type);
  });
  return b;
}

void multiply(Block& block, const TensorProduct& product) {
  const int m = product.shape.m, n = product.shape.n;
  TensorMemory& memory = block.tensor_memory;
  std::vector<float> a = read_a(block, product), sums(m * n);
  const std::vector<float> b = read_b(block, product);
  if (product.shape.negate)
    for (float& value : a) value = -value;
  if (product.accumulate)
    for_cells(memory, product.d, m, n,
              [&](uint64_t cell, int row, int column) { sums[row * n + column] = fastlm::float_of(memory[cell]); });
  multiply_add(a.data(), b.data(), m, n, kK, sums.data());
  for_cells(memory, product.d, m, n,
            [&](uint64_t cell, int row, int column) { memory[cell] = fastlm::bits_of(sums[row * n + column]); });
}

void require_lanes(const TensorProduct& product) {
  const uint32_t d_lane = product.d >> 16, a_lane = uint32_t(product.a) >> 16;
  if (d_lane && (product.shape.m != 64 || d_lane != 16)) throw Fault("a product with lanes of D that the tensor core has not");
  if (product.has_a_in_tensor_memory && a_lane != d_lane) throw Fault("a product whose A has other lanes than D");
}

// Take notice that the warp starts products, after those of others: their numbers would not tell otherwise what is complete.
void require_order(Warp& warp) {
  Block& block = warp.block;
  if (warp.clock[block.product_warp] < block.product_time) throw Fault("products of two warps in no order are not implemented");
  block.product_warp = warp.index;
  block.product_time = warp.clock[warp.index];
}

// tcgen05.mma [d + offset], A, b-descriptor, shape, accumulate. A is a descriptor or [a + offset]. One thread starts it.
void start(Warp& warp, const Instruction& i, Mask lanes) {
  if (lanes & (lanes - 1)) throw Fault("a product of more than one thread");
  require_order(warp);
  const int lane = __builtin_ctz(lanes);
  const bool has_a_in_tensor_memory = i.num_operands() == 7;
  const int b = has_a_in_tensor_memory ? 4 : 3;
  const TensorProduct product{++warp.block.num_tensor_products,
                              ProductShape(uint32_t(warp.value(i, b + 1, lane))),
                              bool(warp.value(i, b + 2, lane) & 1),
                              has_a_in_tensor_memory,
                              has_a_in_tensor_memory ? warp.address(i, 2, lane) : warp.value(i, 2, lane),
                              warp.value(i, b, lane),
                              uint32_t(warp.address(i, 0, lane))};
  require_lanes(product);
  take_notice(warp, product);
  warp.last_tensor_product = product.number;
  if (warp.block.landing == Landing::kEarly)
    multiply(warp.block, product);
  else
    warp.tensor_products.push_back(product);
}

// tcgen05.commit [mbarrier]: arrive when the products that the warp has started are complete.
void commit(Warp& warp, const Instruction& i, Mask lanes) {
  for_lanes(lanes, [&](int lane) {
    MBarrier& barrier = barrier_at(warp, i, 0, lane);
    Commit commit{&warp, warp.last_tensor_product, warp.clock};
    uint32_t& known = commit.clock[warp.block.tensor_core()];
    known = std::max(known, commit.last_product);
    if (warp.block.landing == Landing::kEarly)
      land(commit, &barrier);
    else
      barrier.commits.push_back(commit);
  });
  ++warp.clock[warp.index];
}

}  // namespace

ProductShape::ProductShape(uint32_t bits)
    : m(int(bits >> 24 & 31) << 4),
      n(int(bits >> 17 & 63) << 3),
      a_type{bits >> 7 & 7 ? Kind::kBFloat16 : Kind::kFloat16, 16, 1},
      b_type{bits >> 10 & 7 ? Kind::kBFloat16 : Kind::kFloat16, 16, 1},
      negate((bits >> 13 & 1) != (bits >> 14 & 1)),
      transpose_a(bits >> 15 & 1),
      transpose_b(bits >> 16 & 1) {
  constexpr uint32_t kKnown = 0x1f7fe490, kFloat32Sums = 1 << 4;  // The bits that are read here, with one for each type.
  const bool has_shape = m == 128 ? n % 16 == 0 : m == 64;
  if (bits & ~kKnown || !(bits & kFloat32Sums) || !has_shape || !n || n > 256)
    throw Fault("a shape or type of tcgen05.mma that is not implemented");
}

bool has_landed(const Commit& commit) {
  const auto& products = commit.warp->tensor_products;
  return products.empty() || products.front().number > commit.last_product;
}

void land(const Commit& commit, MBarrier* barrier) {
  auto& products = commit.warp->tensor_products;
  while (!has_landed(commit)) {
    multiply(commit.warp->block, products.front());
    products.pop_front();
  }
  barrier->arrive(commit.clock);
}

const Handlers kTensorCore = {{"tcgen05.mma", start, 7}, {"tcgen05.commit", commit, 2}};

}  // namespace ptx
