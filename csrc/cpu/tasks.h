// Tasks on torch's threads, each of which has scratch memory of its own.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "../common/sizes.h"
#include "parallel.h"

namespace fastlm {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// Returns memory that starts on a cache line and has room for one more, or nullptr.
inline Memory allocate(int64_t bytes) {
  return Memory(static_cast<char*>(std::aligned_alloc(64, size_t(round_up(bytes, 64)) + 64)));
}

// Calls run(task, memory) for the tasks 0 ... count - 1 on all threads. A thread has a workspace, and takes the next task when
// it has finished one. The results must not depend on which thread runs a task.
template <class Run>
void run_tasks(int64_t count, int64_t workspace, const Run& run) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  parallel_for(count, [&](int64_t, int64_t) {
    const Memory memory = allocate(workspace);
    if (!memory) {
      failed = true;
      return;
    }
    for (int64_t i = next++; i < count; i = next++) run(i, memory.get());
  });
  if (failed && next < count) throw std::bad_alloc();
}

}  // namespace fastlm
