// Memory of a call: large pieces from torch's allocator, small ones as vectors.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <vector>

namespace clce::cpu {

// Uninitialised memory from torch's allocator (64-byte aligned, counted by its profiler).
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(c10::GetCPUAllocator()->allocate(static_cast<size_t>(size > 0 ? size : 1) * sizeof(T))) {}
  T* get() const { return static_cast<T*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

// A few arrays of one number per row, zero at first, in one piece of memory.
template <class T, int kArrays>
class RowArrays {
 public:
  explicit RowArrays(int64_t rows) : rows_(rows), memory_(kArrays * rows, T(0)) {}
  T* operator[](int array) { return memory_.data() + array * rows_; }

 private:
  int64_t rows_;
  std::vector<T> memory_;
};

}  // namespace clce::cpu
