// The part of CUDA's runtime that csrc/cuda uses, on the host. The blocks of a kernel run one after the other. The threads of a
// block are fibers, which switch only at barriers and shuffles. If a barrier is missing between a write and a read of it by
// another thread, some order of the fibers reads too early; so comparing orders shows the missing barrier.
//
// Each launch reads two environment variables. CUDA_ON_HOST_ORDER is the order of fibers and blocks: forward, reverse, or a
// number that seeds a shuffle. CUDA_ON_HOST_SKIP is the index, from 0, of the __syncthreads of a kernel that does nothing.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int kWarp = 32, kMaxThreads = 1024;

// A stack to switch to. AddressSanitizer must be told of each switch.
struct Stack {
  ucontext_t context;
  void* bottom = nullptr;
  size_t size = 0;

  void switch_to(Stack& other) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, other.bottom, other.size);
    swapcontext(&context, &other.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swapcontext(&context, &other.context);
#endif
  }
};

enum State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber : Stack {
  static constexpr size_t kSize = 1 << 18;
  std::unique_ptr<char[]> memory{new char[kSize]};
  State state = kReady;
  int barriers = 0, shuffles = 0;
};

class Machine {
 public:
  Machine() { fibers_.reserve(kMaxThreads); }  // fibers must never move, because a context points into itself

  void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    gridDim = grid;
    blockDim = block;
    read_schedule();
    make_fibers(block.x);
    for (const unsigned index : order(grid.x)) {
      blockIdx = dim3(index, 0, 0);
      run_block();
    }
  }

  void barrier() {
    if (fiber().barriers++ != skipped_) wait(kAtBarrier);
  }

  // Returns the `value` of the lane that is `delta` higher, within `width` lanes, or its own if there is none.
  template <class T>
  T shuffle_down(unsigned mask, T value, unsigned delta, int width) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a register or two");
    if (mask != ~0u) throw std::logic_error("a shuffle of some lanes only");
    uint64_t* slots = slots_[fiber().shuffles++ % 2];  // two: a lane may be ahead of another by one shuffle
    const unsigned lane = current_ % kWarp, within = lane % unsigned(width);
    memcpy(slots + current_, &value, sizeof value);
    wait(kAtShuffle);
    if (within + delta < unsigned(width)) memcpy(&value, slots + current_ + delta, sizeof value);
    return value;
  }

 private:
  std::vector<Fiber> fibers_;
  Stack scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  uint64_t slots_[2][kMaxThreads];
  unsigned current_ = 0, threads_ = 0;
  int skipped_ = -1;
  std::string order_;
  std::mt19937 random_;

  Fiber& fiber() { return fibers_[current_]; }

  void read_schedule() {
    const char *order = getenv("CUDA_ON_HOST_ORDER"), *skip = getenv("CUDA_ON_HOST_SKIP");
    order_ = order ? order : "forward";
    skipped_ = skip ? atoi(skip) : -1;
    random_.seed(order_ == "forward" || order_ == "reverse" ? 0 : unsigned(std::stoul(order_)));
  }

  std::vector<unsigned> order(unsigned count) {
    std::vector<unsigned> indices(count);
    std::iota(indices.begin(), indices.end(), 0u);
    if (order_ == "reverse") std::reverse(indices.begin(), indices.end());
    if (order_ != "reverse" && order_ != "forward") std::shuffle(indices.begin(), indices.end(), random_);
    return indices;
  }

  static Machine& machine();

  // The function of a fiber: it runs the kernel as one thread, once for every block.
  static void live() {
    Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &m.scheduler_.size);
    m.scheduler_.bottom = const_cast<void*>(bottom);
#endif
    for (;;) {
      (*m.kernel_)();
      m.wait(kDone);
    }
  }

  void make_fibers(unsigned threads) {
    threads_ = threads;
    while (fibers_.size() < threads) {
      Fiber& f = fibers_.emplace_back();
      f.bottom = f.memory.get();
      f.size = Fiber::kSize;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.bottom;
      f.context.uc_stack.ss_size = f.size;
      makecontext(&f.context, &live, 0);
    }
  }

  void wait(State state) {
    fiber().state = state;
    fiber().switch_to(scheduler_);
  }

  void resume(unsigned index) {
    current_ = index;
    threadIdx = dim3(index, 0, 0);
    scheduler_.switch_to(fibers_[index]);
  }

  bool all(unsigned first, unsigned last, State state) const {
    return std::all_of(fibers_.begin() + first, fibers_.begin() + last, [&](const Fiber& f) { return f.state == state; });
  }

  void release(unsigned first, unsigned last) {
    for (unsigned i = first; i < last; ++i) fibers_[i].state = kReady;
  }

  void run_block() {
    release(0, threads_);
    for (unsigned i = 0; i < threads_; ++i) fibers_[i].barriers = fibers_[i].shuffles = 0;
    while (!all(0, threads_, kDone)) {
      bool ran = false;
      for (const unsigned index : order(threads_)) {
        if (fibers_[index].state != kReady) continue;
        resume(index);
        ran = true;
      }
      for (unsigned lane = 0; lane < threads_; lane += kWarp) {
        const unsigned end = std::min(lane + kWarp, threads_);
        if (!all(lane, end, kAtShuffle)) continue;
        release(lane, end);
        ran = true;
      }
      if (all(0, threads_, kAtBarrier)) {
        release(0, threads_);
        ran = true;
      }
      if (!ran) {
        fibers_.clear();
        throw std::logic_error("not every thread of a block comes to its barrier, or of a warp to its shuffle");
      }
    }
  }
};

inline Machine& the_machine() {
  static Machine machine;
  return machine;
}
inline Machine& Machine::machine() { return the_machine(); }

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::the_machine().barrier(); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = cuda_on_host::kWarp) {
  return cuda_on_host::the_machine().shuffle_down(mask, value, delta, width);
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  if (grid.x == 0 || block.x > unsigned(cuda_on_host::kMaxThreads)) return cudaErrorInvalidConfiguration;
  const Arguments& given = *static_cast<const Arguments*>(arguments[0]);
  cuda_on_host::the_machine().run(grid, block, [&] { kernel(given); });
  return cudaSuccess;
}
