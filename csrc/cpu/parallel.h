// Loops on torch's own threads, through the C functions of libtorch_cpu that Python hands over (fastlm/native.py).
#pragma once

#include <cstdint>

namespace fastlm {

using LoopBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, LoopBody body, void* context);

inline ParallelFor torch_parallel_for = nullptr;

// body(begin, end) over parts of [0, count); it must not throw. One unit runs here and now.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  if (count <= 1 || torch_parallel_for == nullptr) {
    body(int64_t(0), count);
    return;
  }
  const LoopBody call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  torch_parallel_for(0, count, 1, call, const_cast<Body*>(&body));
}

}  // namespace fastlm
