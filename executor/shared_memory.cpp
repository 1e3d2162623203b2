#include "executor/shared_memory.h"

#include <algorithm>

#include "executor/fault.h"
#include "executor/thread.h"

namespace clce::executor {

namespace {

SharedStamp stamp(const Thread& t, bool pending = false) {
  return {t.clock.now, static_cast<uint32_t>(t.id), pending};
}

// Calls f(i, stamps[i]) wherever a stamp differs from the one before; before the first stands `known`.
template <class Size, class F>
void for_each_change(const SharedStamp* stamps, Size bytes, SharedStamp known, F f) {
  // Nearly always one thread accessed all of the bytes.
  const bool all_equal = std::memcmp(stamps, stamps + 1, (bytes - 1) * sizeof *stamps) == 0;
  const size_t different = all_equal ? 1 : size_t(bytes);
  for (size_t i = 0; i < different; ++i) {
    if (stamps[i] == known) continue;
    known = stamps[i];
    f(i, known);
  }
}

std::string thread_of(SharedStamp stamp) {
  return "thread " + std::to_string(stamp.thread);
}

}  // namespace

void SharedMemory::start_block(size_t bytes) {
  bytes_ = bytes;
  values_.assign(bytes, kPoison);
  writers_.assign(bytes, SharedStamp{});
  for (auto& readers : readers_) readers.assign(bytes, SharedStamp{});
}

size_t SharedMemory::find(Thread& t, const Access& access) const {
  const size_t offset = access.address - addresses_.base();
  if (access.address < addresses_.base() || offset + access.bytes > bytes_) {
    const auto signed_offset = static_cast<long long>(offset);
    const auto range = static_cast<long long>(AddressRange::kAlignment);
    const bool near = signed_offset > -range && signed_offset < range;
    fail(t, Fault::kSharedOutOfBounds,
         access.text() +
             (near ? "shared offset " + std::to_string(signed_offset) : "address " + hex(access.address)) +
             ", of " + std::to_string(bytes_));
  }
  if (!access.is_aligned()) {
    fail(t, Fault::kMisaligned,
         text(access, 0) + ", which is no multiple of " + std::to_string(access.alignment));
  }
  return offset;
}

std::string SharedMemory::text(Access access, size_t skipped) const {
  access.bytes -= skipped;
  return access.text() + "shared offset " + std::to_string(access.address + skipped - addresses_.base());
}

void SharedMemory::check_writer(Thread& t, const Access& access, size_t skipped, SharedStamp writer) const {
  if (writer.pending) {
    fail(t, Fault::kAsyncNotWaited,
         text(access, skipped) + ", where a copy by " + thread_of(writer) + " is under way");
  }
  if (!t.has_seen(writer.thread, writer.clock)) {
    fail(t, Fault::kSharedRace,
         text(access, skipped) + ", written by " + thread_of(writer) + " with no barrier since");
  }
}

void SharedMemory::check_writable(Thread& t, const Access& access, size_t offset) const {
  with_size(access.bytes, [&](auto bytes) {
    for_each_change(&writers_[offset], bytes, SharedStamp{},
                    [&](size_t i, SharedStamp writer) { check_writer(t, access, i, writer); });
    for (const auto& readers : readers_) {
      for_each_change(&readers[offset], bytes, SharedStamp{}, [&](size_t i, SharedStamp reader) {
        if (t.has_seen(reader.thread, reader.clock)) return;
        fail(t, Fault::kSharedRace,
             text(access, i) + ", read by " + thread_of(reader) + " with no barrier since");
      });
    }
  });
}

void SharedMemory::read(Thread& t, const Access& access, void* value) {
  const size_t offset = find(t, access);
  const SharedStamp me = stamp(t);
  with_size(access.bytes, [&](auto bytes) {
    for_each_change(&writers_[offset], bytes, me, [&](size_t i, SharedStamp writer) {
      if (writer.is_nobody()) fail(t, Fault::kSharedUninitialized, text(access, i));
      check_writer(t, access, i, writer);
    });
    std::fill_n(&readers_[t.warp() % kReaderSlots][offset], bytes, me);
    std::memcpy(value, &values_[offset], bytes);
  });
}

void SharedMemory::write(Thread& t, const Access& access, const void* value) {
  const size_t offset = find(t, access);
  check_writable(t, access, offset);
  put(t, offset, access.bytes, value);
}

size_t SharedMemory::start_copy(Thread& t, const Access& access) {
  const size_t offset = find(t, access);
  check_writable(t, access, offset);
  std::fill_n(&writers_[offset], access.bytes, stamp(t, true));
  std::fill_n(&values_[offset], access.bytes, kPoison);
  return offset;
}

void SharedMemory::put(Thread& t, size_t offset, size_t size, const void* value) {
  const SharedStamp me = stamp(t);
  with_size(size, [&](auto bytes) {
    std::fill_n(&writers_[offset], bytes, me);
    std::memcpy(&values_[offset], value, bytes);
  });
}

}  // namespace clce::executor
