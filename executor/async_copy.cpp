#include "executor/async_copy.h"

#include <utility>

#include "executor/access.h"
#include "executor/fault.h"
#include "executor/global_memory.h"
#include "executor/shared_memory.h"
#include "executor/thread.h"

namespace clce::executor {

namespace {
constexpr const char* kWhat = "asynchronous copy";
constexpr size_t kMaxBytes = 16;
}  // namespace

void AsyncCopies::start(Thread& t, void* shared, const void* global, size_t bytes, bool valid) {
  const size_t offset = shared_.start_copy(t, Access(shared, bytes, bytes, kWhat));
  const Access source(global, bytes, bytes, kWhat);
  if (valid) {
    unsigned char ignored[kMaxBytes];
    global_.read(t, source, ignored);
  } else if (!source.is_aligned()) {
    fail(t, Fault::kMisaligned, "asynchronous copy from address " + hex(source.address));
  }
  t.copies.uncommitted.push_back({offset, bytes, valid ? global : nullptr});
}

void AsyncCopies::commit(Thread& t) {
  t.copies.groups.push_back(std::move(t.copies.uncommitted));
  t.copies.uncommitted.clear();
}

void AsyncCopies::wait(Thread& t, int pending_groups) {
  auto& groups = t.copies.groups;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const AsyncCopy& copy : groups.front()) {
      unsigned char value[kMaxBytes] = {};
      if (copy.global != nullptr) global_.read(t, Access(copy.global, copy.bytes, copy.bytes, kWhat), value);
      shared_.put(t, copy.shared_offset, copy.bytes, value);
    }
    groups.pop_front();
  }
}

}  // namespace clce::executor
