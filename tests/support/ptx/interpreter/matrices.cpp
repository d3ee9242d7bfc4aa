// Matrix products of a warp, and the loads and stores of their 8 x 8 fragments.
#include "block.h"
#include "matrix_tiles.h"

namespace ptx {
namespace {

void require_warp(Mask lanes) {
  if (lanes != ~Mask(0)) throw Fault("a matrix instruction for some lanes of a warp");
}

// ---- ldmatrix and stmatrix: lane 8 m + r holds the address of row r of matrix m, 8 halves ---------------------------------

struct Place {
  int row, column;
};

// Return where a matrix has the first or second half of a lane's register.
Place place_of(int lane, int half, bool transposed) {
  const int row = lane / 4, column = lane % 4 * 2 + half;
  return transposed ? Place{column, row} : Place{row, column};
}

uint64_t half_address(Warp& warp, const Instruction& i, int address, int matrix, Place place) {
  return warp.address(i, address, 8 * matrix + place.row) + 2 * place.column;
}

void require_aligned_rows(Warp& warp, const Instruction& i, int address, int matrices) {
  for (int row = 0; row < 8 * matrices; ++row)
    if (warp.address(i, address, row) % 16) throw Fault("a misaligned row of a matrix");
}

// ldmatrix {d, ...}, [base + offset]
void load_matrices(Warp& warp, const Instruction& i, Mask lanes) {
  require_warp(lanes);
  const int count = i.num_operands() - 2;
  require_aligned_rows(warp, i, count, count);
  std::vector<Register> loaded(count);  // The address may be in a register that is written.
  for (int matrix = 0; matrix < count; ++matrix)
    for (int lane = 0; lane < kLanes; ++lane) {
      uint16_t halves[2];
      for (int h = 0; h < 2; ++h) {
        const uint64_t address = half_address(warp, i, count, matrix, place_of(lane, h, i.has(kTrans)));
        warp.load(Space::kShared, address, &halves[h], 2);
      }
      loaded[matrix].lane[lane] = halves[0] | uint64_t(halves[1]) << 16;
    }
  for (int matrix = 0; matrix < count; ++matrix) warp[i.operands[matrix]] = loaded[matrix];
}

// stmatrix [base + offset], {a, ...}
void store_matrices(Warp& warp, const Instruction& i, Mask lanes) {
  require_warp(lanes);
  const int count = i.num_operands() - 2;
  require_aligned_rows(warp, i, 0, count);
  for (int matrix = 0; matrix < count; ++matrix)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int h = 0; h < 2; ++h) {
        const uint16_t half = uint16_t(warp.value(i, matrix + 2, lane) >> 16 * h);
        const uint64_t address = half_address(warp, i, 0, matrix, place_of(lane, h, i.has(kTrans)));
        warp.store(Space::kShared, address, &half, 2);
      }
}

// ---- mma: D = A B + C of one warp -----------------------------------------------------------------------------------------

// mma.sync.m16n8k16.row.col.f32.type.type.f32 {d x 4}, {a, ...}, {b, ...}, {c x 4}
void multiply_in_warp(Warp& warp, const Instruction& i, Mask lanes) {
  require_warp(lanes);
  const Type type = i.types[1];
  if (i.m != 16 || i.n != 8 || i.k > 16 || i.destination_type().kind != Kind::kFloat32)
    throw Fault("a shape or type of mma that is not implemented");
  const int* d = i.operands.data();
  const int* a = d + 4;
  const int* b = a + i.k * type.bits / 64;
  const int* c = b + i.k * type.bits / 128;
  float a_tile[16 * 16], b_tile[16 * 8], sums[16 * 8];
  read_a(warp, a, type, i.k, a_tile);
  read_b(warp, b, type, i.k, b_tile);
  read_accumulator(warp, c, 8, sums);
  multiply_add(a_tile, b_tile, 16, 8, i.k, sums);
  write_accumulator(warp, d, 8, sums);
}

}  // namespace

const Handlers kMatrices = {
    {"ldmatrix", load_matrices},
    {"stmatrix", store_matrices},
    {"mma", multiply_in_warp, 14},
};

}  // namespace ptx
