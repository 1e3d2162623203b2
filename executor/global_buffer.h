// Global memory as hosts see it: buffers with addresses on the device and values that hosts can read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "executor/clocks.h"
#include "executor/fault.h"

namespace clce::executor {

// Who accessed a byte of global memory, in which launch. Launches begin at 1: all zeros is nobody.
constexpr int kBlockBits = 22, kLaunchBits = 64 - kClockBits - kThreadBits - kBlockBits;
struct GlobalStamp {
  uint64_t clock : kClockBits;
  uint64_t thread : kThreadBits;
  uint64_t block : kBlockBits;
  uint64_t launch : kLaunchBits;

  bool is_same_block(const GlobalStamp& other) const {
    return block == other.block && launch == other.launch;
  }
};
static_assert(sizeof(GlobalStamp) == 8);

// What is known of a byte of an output.
struct GlobalShadow {
  enum class Written : uint8_t { kNever, kByStore, kByAtomic };

  GlobalStamp writer{};
  GlobalStamp reader{}, other_reader{};  // the last ones, of two different blocks if there were two
  Written written = Written::kNever;
};

// Inputs are read-only; outputs hold poison and may not be read by a kernel before one wrote them. The
// address is 1 MiB aligned, plus `offset` bytes.
class GlobalBuffer {
 public:
  enum class Access { kInput, kOutput };
  GlobalBuffer(size_t bytes, Access access, size_t offset = 0);
  ~GlobalBuffer();
  GlobalBuffer(const GlobalBuffer&) = delete;
  GlobalBuffer& operator=(const GlobalBuffer&) = delete;

  void* device() const { return reinterpret_cast<void*>(address_); }
  unsigned char* host() { return values_.data(); }
  const unsigned char* host() const { return values_.data(); }
  size_t size() const { return values_.size(); }
  size_t first_unwritten() const;  // size(): none
  void poison();                   // forget everything written

 private:
  friend class GlobalMemory;
  bool is_input() const { return access_ == Access::kInput; }

  uintptr_t address_ = 0;
  Access access_;
  std::vector<unsigned char> values_;
  std::vector<GlobalShadow> shadow_;  // of an output
};

template <class T>
class GlobalArray {
 public:
  // Input.
  explicit GlobalArray(const std::vector<T>& values, size_t offset = 0)
      : buffer_(values.size() * sizeof(T), GlobalBuffer::Access::kInput, offset) {
    if (!values.empty()) std::memcpy(buffer_.host(), values.data(), values.size() * sizeof(T));
  }
  // Output or workspace.
  explicit GlobalArray(size_t count, size_t offset = 0)
      : buffer_(count * sizeof(T), GlobalBuffer::Access::kOutput, offset) {}

  T* data() const { return static_cast<T*>(buffer_.device()); }
  size_t size() const { return buffer_.size() / sizeof(T); }
  void poison() { buffer_.poison(); }

  // Fails where an element was never written.
  std::vector<T> read() const {
    const size_t unwritten = buffer_.first_unwritten();
    if (unwritten != buffer_.size()) {
      throw Error(Fault::kGlobalUninitialized, "element " + std::to_string(unwritten / sizeof(T)) + " of " +
                                                   std::to_string(size()) + " was never written");
    }
    return read_unchecked();
  }
  std::vector<T> read_unchecked() const {
    std::vector<T> values(size());
    if (!values.empty()) std::memcpy(values.data(), buffer_.host(), values.size() * sizeof(T));
    return values;
  }

 private:
  GlobalBuffer buffer_;
};

}  // namespace clce::executor
