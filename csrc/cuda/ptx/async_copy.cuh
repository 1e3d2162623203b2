// Copies from global to shared memory that run beside the arithmetic (sm_80).
#pragma once

#include <cstdint>

namespace clce::ptx {

// Copies `Bytes` (16; both addresses aligned to it), or writes zeros where not valid; the source is then
// not read. Seen by the copying thread after cp_async_wait, by others after a barrier that follows it.
template <int Bytes>
CLCE_DEVICE void cp_async(void* shared_destination, const void* global_source, bool valid) {
  static_assert(Bytes == 16, "cp.async.cg copies 16 bytes");
  const uint32_t destination = static_cast<uint32_t>(__cvta_generic_to_shared(shared_destination));
  const int source_bytes = valid ? Bytes : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(global_source),
               "n"(Bytes), "r"(source_bytes)
               : "memory");
}

// Closes this thread's group of copies; an empty group counts too.
CLCE_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's groups, the latest, are on their way.
template <int N>
CLCE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace clce::ptx
