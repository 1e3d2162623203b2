// Memory of a call.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace clce::cpu {

// Uninitialised memory that begins with a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kLine))) {}
  T* get() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kLine); }
  };
  std::unique_ptr<T, Free> memory_;
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
