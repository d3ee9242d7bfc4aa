// A kernel's scratch memory: one block per thread, divided into arrays.
#pragma once

#include <cstdint>

#include "../common/sizes.h"

namespace fastlm {

// If it begins at nullptr, bytes() is the size that the arrays need.
class Workspace {
 public:
  explicit Workspace(char* begin) : at_(reinterpret_cast<intptr_t>(begin)) {}

  // Returns the next array. Every array starts on a cache line.
  template <class T>
  __attribute__((always_inline)) inline T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(at_);
    at_ += round_up(count * int64_t(sizeof(T)), 64);
    return array;
  }

  __attribute__((always_inline)) inline int64_t bytes() const { return at_; }

 private:
  intptr_t at_;
};

}  // namespace fastlm
