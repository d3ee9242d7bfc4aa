// Parallel loops on torch's own threads. Python passes the C function of libtorch_cpu that runs them (fastlm/backend/cpu.py).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastlm {

using LoopBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, LoopBody body, void* context);

inline ParallelFor torch_parallel_for = nullptr;

// Calls body(begin, end) for parts of [0, count); body must not throw. The calling thread runs a loop of one turn by itself.
// Throws if torch could not run the loop, because then outputs are unwritten.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  if (count <= 1 || torch_parallel_for == nullptr) {
    body(int64_t(0), count);
    return;
  }
  const LoopBody call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  const int error = torch_parallel_for(0, count, 1, call, const_cast<Body*>(&body));
  if (error) throw std::runtime_error("torch_parallel_for failed with code " + std::to_string(error));
}

}  // namespace fastlm
