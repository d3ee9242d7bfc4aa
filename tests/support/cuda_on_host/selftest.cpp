// Tests what the other tests rely on. It prints a line for each failure.
#include <cstdio>

#include "../../../csrc/cuda/groups.cuh"

namespace {

void check(bool right, const char* what) {
  if (!right) std::puts(what);
}

// Tests the division for tensors of more than 2^32 elements, which no other test has.
void check_quotients() {
  std::mt19937_64 random(1);
  for (int i = 0; i < 100000; ++i) {
    const int64_t n = int64_t(random() >> (1 + random() % 63)), d = int64_t(random() >> (1 + random() % 63)) | 1;
    check(fastlm::quotient(n, d) == n / d, "quotient");
  }
  check(fastlm::quotient(INT64_MAX, 1) == INT64_MAX && fastlm::quotient(INT64_MAX, INT64_MAX) == 1, "quotient of the largest");
}

struct Numbers {
  int values[256];
};

void reversed(Numbers* numbers) {
  __shared__ int shared[256];
  shared[threadIdx.x] = numbers->values[threadIdx.x];
  __syncthreads();
  numbers->values[threadIdx.x] = shared[255 - threadIdx.x];
}

void some_stay_away(int count) {
  if (int(threadIdx.x) < count) __syncthreads();
}

void sums_of_8_lanes(Numbers* numbers) {
  int sum = numbers->values[threadIdx.x];
  for (int half = 4; half > 0; half /= 2) sum += __shfl_down_sync(~0u, sum, unsigned(half), 8);
  numbers->values[threadIdx.x] = sum;
}

template <class Argument>
cudaError_t launch(void (*kernel)(Argument), int threads, Argument argument) {
  void* arguments[] = {&argument};
  return cudaLaunchKernel(kernel, dim3(1), dim3(unsigned(threads)), arguments, 0, nullptr);
}

bool is_reversed(const Numbers& numbers) {
  for (int i = 0; i < 256; ++i) {
    if (numbers.values[i] != 255 - i) return false;
  }
  return true;
}

void check_threads() {
  Numbers numbers;
  const auto number = [&] { std::iota(numbers.values, numbers.values + 256, 0); };
  for (const char* order : {"forward", "reverse", "7"}) {
    setenv("CUDA_ON_HOST_ORDER", order, 1);
    number();
    launch(reversed, 256, &numbers);
    check(is_reversed(numbers), "a barrier");
    number();
    launch(sums_of_8_lanes, 256, &numbers);
    check(numbers.values[0] == 28 && numbers.values[248] == 2012, "a shuffle");
    setenv("CUDA_ON_HOST_SKIP", "0", 1);
    std::fill(numbers.values, numbers.values + 256, -1);
    launch(reversed, 256, &numbers);  // leaves other numbers in shared memory
    number();
    launch(reversed, 256, &numbers);
    check(!is_reversed(numbers), "a skipped barrier does not show");
    unsetenv("CUDA_ON_HOST_SKIP");
  }
  bool thrown = false;
  try {
    launch(some_stay_away, 64, 32);
  } catch (const std::logic_error&) {
    thrown = true;
  }
  check(thrown, "a barrier that some threads do not come to");
  check(launch(some_stay_away, 2048, 0) == cudaErrorInvalidConfiguration, "a block too large");
}

}  // namespace

int main() {
  check_quotients();
  check_threads();
}
