#include "matrix_tiles.h"

namespace ptx {
namespace {

// Copy an accumulator between registers and d.
template <class Copy>
void for_accumulator(Warp& warp, const int* registers, int n, Copy copy) {
  for (int reg = 0; reg < n / 2; ++reg)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * (reg >> 1 & 1), column = reg / 4 * 8 + lane % 4 * 2 + (reg & 1);
      copy(warp[registers[reg]].lane[lane], row * n + column);
    }
}

}  // namespace

void read_a(Warp& warp, const int* registers, Type type, int k, float* a) {
  const int per = 32 / type.bits;
  for (int reg = 0; reg < k / (2 * per); ++reg)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int e = 0; e < per; ++e) {
        const int row = lane / 4 + 8 * (reg & 1), column = lane % 4 * per + e + 4 * per * (reg >> 1);
        a[row * k + column] = decode<float>(type, warp[registers[reg]].lane[lane] >> type.bits * e);
      }
}

void read_b(Warp& warp, const int* registers, Type type, int k, float* b) {
  const int per = 32 / type.bits;
  for (int reg = 0; reg < k / (4 * per); ++reg)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int e = 0; e < per; ++e) {
        const int row = lane % 4 * per + e + 4 * per * reg;
        b[row * 8 + lane / 4] = decode<float>(type, warp[registers[reg]].lane[lane] >> type.bits * e);
      }
}

void multiply_add(const float* a, const float* b, int m, int n, int k, float* d) {
  for (int row = 0; row < m; ++row)
    for (int j = 0; j < k; ++j)
      for (int column = 0; column < n; ++column) d[row * n + column] += a[row * k + j] * b[j * n + column];
}

void read_accumulator(Warp& warp, const int* registers, int n, float* d) {
  for_accumulator(warp, registers, n, [&](uint64_t& lane, int at) { d[at] = fastlm::float_of(uint32_t(lane)); });
}

void write_accumulator(Warp& warp, const int* registers, int n, const float* d) {
  for_accumulator(warp, registers, n, [&](uint64_t& lane, int at) { lane = fastlm::bits_of(d[at]); });
}

}  // namespace ptx
