#include "executor/global_memory.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "executor/fault.h"
#include "executor/thread.h"

namespace clce::executor {

namespace {

using Written = GlobalShadow::Written;

GlobalStamp stamp(const Thread& t) {
  return {t.clock.now, static_cast<uint32_t>(t.id), t.block->number, t.block->launch};
}

// For messages.
std::string at(const Access& access, size_t offset) {
  return std::string(access.what) + " at offset " + std::to_string(offset);
}
std::string of(const GlobalBuffer& buffer) {
  return " of a buffer of " + std::to_string(buffer.size());
}
std::string by(const GlobalStamp& stamp) {
  return " by thread " + std::to_string(stamp.thread) + " of block " + std::to_string(stamp.block);
}

}  // namespace

void GlobalMemory::add(GlobalBuffer& buffer, size_t offset) {
  const size_t slots = (offset + buffer.size()) / kSlotBytes + 1;  // at least one byte stays free behind it
  for (size_t tried = 0; tried < kSlots; ++tried) {
    if (next_slot_ + slots > kSlots) next_slot_ = 0;
    size_t free = 0;
    while (free < slots && slots_[next_slot_ + free] == nullptr) ++free;
    if (free == slots) {
      std::fill_n(&slots_[next_slot_], slots, &buffer);
      buffer.address_ = addresses_.base() + next_slot_ * kSlotBytes + offset;
      next_slot_ += slots;
      return;
    }
    next_slot_ += free + 1;
  }
  throw Error(Fault::kLaunch, "the executor's global memory is full");
}

void GlobalMemory::remove(GlobalBuffer& buffer) {
  auto slot = slots_.begin() + (buffer.address_ - addresses_.base()) / kSlotBytes;
  while (slot != slots_.end() && *slot == &buffer) *slot++ = nullptr;
}

uint32_t GlobalMemory::start_launch() {
  if (++launch_ == 1u << kLaunchBits) {  // numbers are used again: nobody may remember the old ones
    launch_ = 1;
    GlobalBuffer* last = nullptr;
    for (GlobalBuffer* buffer : slots_) {
      if (buffer == last) continue;
      last = buffer;
      if (buffer == nullptr) continue;
      for (GlobalShadow& byte : buffer->shadow_) byte = GlobalShadow{{}, {}, {}, byte.written};
    }
  }
  return launch_;
}

GlobalMemory::Place GlobalMemory::find(Thread& t, const Access& access) const {
  const uintptr_t address = access.address;
  GlobalBuffer* buffer = contains(address) ? slots_[(address - addresses_.base()) / kSlotBytes] : nullptr;
  if (buffer == nullptr) {
    fail(t, Fault::kGlobalOutOfBounds, access.text() + "address " + hex(address) + ", in no buffer");
  }
  const size_t offset = address - buffer->address_;
  if (address < buffer->address_ || offset + access.bytes > buffer->size()) {
    fail(t, Fault::kGlobalOutOfBounds,
         access.text() + "offset " + std::to_string(static_cast<long long>(offset)) + of(*buffer) +
             " (address " + hex(address) + ")");
  }
  if (!access.is_aligned()) {
    fail(t, Fault::kMisaligned,
         access.text() + "address " + hex(address) + " (offset " + std::to_string(offset) +
             "), which is no multiple of " + std::to_string(access.alignment));
  }
  return {*buffer, offset};
}

// Whether an access by `t` and this one could happen in either order.
bool GlobalMemory::races(const Thread& t, const GlobalStamp& other) const {
  if (other.launch != t.block->launch) return false;
  if (other.block == t.block->number) return !t.has_seen(other.thread, other.clock);
  return !clocks_.is_acquired(t, other.block, other.thread, other.clock);
}

void GlobalMemory::read(Thread& t, const Access& access, void* value) {
  const auto [buffer, offset] = find(t, access);
  std::memcpy(value, &buffer.values_[offset], access.bytes);
  if (buffer.is_input()) return;
  const GlobalStamp me = stamp(t);
  for (size_t i = offset; i < offset + access.bytes; ++i) {
    GlobalShadow& byte = buffer.shadow_[i];
    if (byte.written == Written::kNever) {
      fail(t, Fault::kGlobalUninitialized, at(access, i) + of(buffer));
    }
    if (races(t, byte.writer)) {
      fail(t, Fault::kGlobalRace, at(access, i) + of(buffer) + ", written" + by(byte.writer));
    }
    if (!byte.reader.is_same_block(me)) byte.other_reader = byte.reader;
    byte.reader = me;
  }
}

void GlobalMemory::write(Thread& t, const Access& access, const void* value) {
  const auto [buffer, offset] = find(t, access);
  if (buffer.is_input()) fail(t, Fault::kGlobalReadOnly, at(access, offset) + of(buffer));
  const GlobalStamp me = stamp(t);
  for (size_t i = offset; i < offset + access.bytes; ++i) {
    GlobalShadow& byte = buffer.shadow_[i];
    if (races(t, byte.writer)) {
      fail(t, Fault::kGlobalRace, at(access, i) + of(buffer) + ", written" + by(byte.writer));
    }
    for (const GlobalStamp& reader : {byte.reader, byte.other_reader}) {
      if (races(t, reader)) {
        fail(t, Fault::kGlobalRace, at(access, i) + of(buffer) + ", read" + by(reader));
      }
    }
    byte.writer = me;
    byte.written = Written::kByStore;
  }
  std::memcpy(&buffer.values_[offset], value, access.bytes);
}

uint32_t GlobalMemory::atomic_add(Thread& t, uint32_t* address, uint32_t value) {
  const Access access(address, sizeof value, sizeof value, "atomic");
  const auto [buffer, offset] = find(t, access);
  if (buffer.is_input()) fail(t, Fault::kGlobalReadOnly, at(access, offset));
  for (size_t i = offset; i < offset + sizeof value; ++i) {
    GlobalShadow& byte = buffer.shadow_[i];
    if (byte.written == Written::kNever) fail(t, Fault::kGlobalUninitialized, at(access, i));
    if ((byte.written == Written::kByStore && races(t, byte.writer)) || races(t, byte.reader) ||
        races(t, byte.other_reader)) {
      fail(t, Fault::kGlobalRace, at(access, i) + ", also accessed without one");
    }
    byte.written = Written::kByAtomic;
    byte.writer = stamp(t);
  }
  clocks_.atomic(t, access.address);
  uint32_t before;
  std::memcpy(&before, &buffer.values_[offset], sizeof before);
  const uint32_t after = before + value;
  std::memcpy(&buffer.values_[offset], &after, sizeof after);
  return before;
}

}  // namespace clce::executor
