// Global memory as kernels see it: which buffer an address is in, and whether an access to it is allowed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "executor/access.h"
#include "executor/clocks.h"
#include "executor/global_buffer.h"

namespace clce::executor {

class GlobalMemory {
 public:
  explicit GlobalMemory(Clocks& clocks) : clocks_(clocks) {}

  bool contains(uintptr_t address) const { return addresses_.contains(address); }
  void add(GlobalBuffer& buffer, size_t offset);
  void remove(GlobalBuffer& buffer);

  // Returns the launch's number, from 1.
  uint32_t start_launch();

  void read(Thread& t, const Access& access, void* value);
  void write(Thread& t, const Access& access, const void* value);
  uint32_t atomic_add(Thread& t, uint32_t* address, uint32_t value);

 private:
  static constexpr size_t kSlots = size_t(1) << 15;
  static constexpr size_t kSlotBytes = AddressRange::kAlignment;  // buffers start at multiples of it

  struct Place {
    GlobalBuffer& buffer;
    size_t offset;
  };
  Place find(Thread& t, const Access& access) const;
  bool races(const Thread& t, const GlobalStamp& other) const;

  Clocks& clocks_;
  AddressRange addresses_{kSlots * kSlotBytes};
  std::vector<GlobalBuffer*> slots_ = std::vector<GlobalBuffer*>(kSlots);  // null: free
  size_t next_slot_ = 0;
  uint32_t launch_ = 0;
};

}  // namespace clce::executor
