// A block's shared memory, and for every byte of it who wrote and who read it last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "executor/access.h"
#include "executor/clocks.h"

namespace clce::executor {

constexpr size_t kMaxShared = 227 << 10;  // the largest of any GPU so far (sm_90, sm_100)

// Who accessed a byte of shared memory. Clocks begin at 1: all zeros is nobody.
struct SharedStamp {
  uint32_t clock : kClockBits;
  uint32_t thread : kThreadBits;
  uint32_t pending : 1;  // written by an asynchronous copy that is under way

  bool is_nobody() const { return clock == 0; }
  friend bool operator==(const SharedStamp& a, const SharedStamp& b) {
    return std::memcmp(&a, &b, sizeof a) == 0;
  }
};
static_assert(kClockBits + kThreadBits + 1 == 32 && sizeof(SharedStamp) == 4, "== compares every bit");

class SharedMemory {
 public:
  void* base() const { return reinterpret_cast<void*>(addresses_.base()); }
  bool contains(uintptr_t address) const { return addresses_.contains(address); }

  // Fresh memory.
  void start_block(size_t bytes);

  void read(Thread& t, const Access& access, void* value);
  void write(Thread& t, const Access& access, const void* value);

  // An asynchronous copy: between start_copy, which returns their offset, and put the bytes must not be
  // touched.
  size_t start_copy(Thread& t, const Access& access);
  void put(Thread& t, size_t offset, size_t bytes, const void* value);

 private:
  static constexpr int kReaderSlots = 4;  // last readers are kept per warp modulo this

  // Returns the access's offset.
  size_t find(Thread& t, const Access& access) const;
  void check_writer(Thread& t, const Access& access, size_t skipped, SharedStamp writer) const;
  void check_writable(Thread& t, const Access& access, size_t offset) const;
  // What is accessed, without the first `skipped` bytes, for messages.
  std::string text(Access access, size_t skipped) const;

  AddressRange addresses_{AddressRange::kAlignment};
  size_t bytes_ = 0;
  std::vector<unsigned char> values_;
  std::vector<SharedStamp> writers_;
  std::vector<SharedStamp> readers_[kReaderSlots];
};

}  // namespace clce::executor
