#include "tensor_core.h"

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

// Return the number of the cell of A at (row, k), which holds two halves, or of D at (row, column).
uint64_t cell_of(const TensorMemory& memory, const TensorProduct& product, uint32_t address, int row, int column) {
  return memory.number(address + (lane_of(product.shape.m, row) << 16) + uint32_t(column));
}

// Call do_half(address in shared memory, i, k) for each half of an operand (size, kK).
template <class Do>
void for_halves(const SharedOperand& operand, int size, Do do_half) {
  for (int i = 0; i < size; ++i)
    for (int k = 0; k < kK; ++k) do_half(operand.address(i, k), i, k);
}

// ---- what a product reads and writes ----------------------------------------------------------------------------------------

// Take notice that the tensor core reads A and B, and writes D, until it knows the product to be complete. Products follow each
// other, but A has to be known to be there: only products with the same D are sure to be in order.
void take_notice(Warp& warp, const TensorProduct& product) {
  Block& block = warp.block;
  Races& races = block.tensor_memory.races;
  Clock clock = warp.clock;
  clock[block.tensor_core()] = product.number;
  const auto read_shared = [&](uint64_t address, int, int) {
    block.memory.at(Space::kShared, address, 2);
    block.races.read(clock, block.tensor_core(), address, 2, Proxy::kAsync);
  };
  if (product.has_a_in_tensor_memory) {
    for (int row = 0; row < product.shape.m; ++row)
      for (int column = 0; column < kK / 2; ++column) {
        const uint64_t cell = cell_of(block.tensor_memory, product, uint32_t(product.a), row, column);
        races.read(warp.clock, warp.index, cell, 1);
        races.read(clock, block.tensor_core(), cell, 1);
      }
  } else {
    for_halves(shared_operand(product.a, product.shape.transpose_a), product.shape.m, read_shared);
  }
  for_halves(shared_operand(product.b, product.shape.transpose_b), product.shape.n, read_shared);
  for (int row = 0; row < product.shape.m; ++row)
    for (int column = 0; column < product.shape.n; ++column)
      races.write(clock, block.tensor_core(), cell_of(block.tensor_memory, product, product.d, row, column), 1);
}

// ---- products -------------------------------------------------------------------------------------------------------------

// Read A (m, kK).
std::vector<float> read_a(Block& block, const TensorProduct& product) {
  const ProductShape& shape = product.shape;
  std::vector<float> a(shape.m * kK);
  if (product.has_a_in_tensor_memory) {
    for (int row = 0; row < shape.m; ++row)
      for (int k = 0; k < kK; ++k) {
        const uint32_t halves = block.tensor_memory[cell_of(block.tensor_memory, product, uint32_t(product.a), row, k / 2)];
        a[row * kK + k] = decode<float>(shape.a_type, halves >> 16 * (k % 2));
      }
  } else {
    for_halves(shared_operand(product.a, shape.transpose_a), shape.m, [&](uint64_t address, int row, int k) {
      a[row * kK + k] = decode<float>(shape.a_type, *reinterpret_cast<uint16_t*>(block.memory.at(Space::kShared, address, 2)));
    });
  }
  return a;
}

// Read B (kK, n).
std::vector<float> read_b(Block& block, const TensorProduct& product) {
  const ProductShape& shape = product.shape;
  std::vector<float> b(kK * shape.n);
  for_halves(shared_operand(product.b, shape.transpose_b), shape.n, [&](uint64_t address, int column, int k) {
    b[k * shape.n + column] =
        decode<float>(shape.b_type, *reinterpret_cast<uint16_t*>(block.memory.at(Space::kShared, address, 2)));
  });
  return b;
}

void multiply(Block& block, const TensorProduct& product) {
  const ProductShape& shape = product.shape;
  TensorMemory& memory = block.tensor_memory;
  std::vector<float> a = read_a(block, product), sums(shape.m * shape.n);
  const std::vector<float> b = read_b(block, product);
  const auto d = [&](int e) -> uint32_t& { return memory[cell_of(memory, product, product.d, e / shape.n, e % shape.n)]; };
  if (shape.negate)
    for (float& value : a) value = -value;
  if (product.accumulate)
    for (int e = 0; e < shape.m * shape.n; ++e) sums[e] = fastlm::float_of(d(e));
  multiply_add(a.data(), b.data(), shape.m, shape.n, kK, sums.data());
  for (int e = 0; e < shape.m * shape.n; ++e) d(e) = fastlm::bits_of(sums[e]);
}

void require_lanes(const TensorProduct& product) {
  const uint32_t d_lane = product.d >> 16, a_lane = uint32_t(product.a) >> 16;
  if (d_lane && (product.shape.m != 64 || d_lane != 16)) throw Fault("a product with lanes of D that the tensor core has not");
  if (product.has_a_in_tensor_memory && a_lane != d_lane) throw Fault("a product whose A has other lanes than D");
}

// tcgen05.mma [d + offset], A, b-descriptor, shape, accumulate. A is a descriptor or [a + offset]. One thread starts it.
void start(Warp& warp, const Instruction& i, Mask lanes) {
  if (lanes & (lanes - 1)) throw Fault("a product of more than one thread");
  const int lane = __builtin_ctz(lanes);
  const bool in_tensor_memory = i.num_operands() == 7;
  const int b = in_tensor_memory ? 4 : 3;
  TensorProduct product{
      ++warp.block.num_tensor_products, ProductShape(uint32_t(warp.value(i, b + 1, lane))), false, false, 0, 0, 0};
  product.d = uint32_t(warp.address(i, 0, lane));
  product.has_a_in_tensor_memory = in_tensor_memory;
  product.a = in_tensor_memory ? warp.address(i, 2, lane) : warp.value(i, 2, lane);
  product.b = warp.value(i, b, lane);
  product.accumulate = warp.value(i, b + 2, lane) & 1;
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
