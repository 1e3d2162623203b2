// Copies from global to shared memory that arrive when they are waited for.
#pragma once

#include "executor/machine.h"
#include "executor/ptx/memory.h"

namespace clce::ptx {

template <int Bytes>
void cp_async(void* shared, const void* global, bool valid, CallSite site = CallSite::here()) {
  static_assert(Bytes == 16, "cp.async.cg copies 16 bytes");
  host::count({"cp_async", site}, static_cast<const Pack<uint32_t>*>(shared));
  executor::machine().copies.start(executor::thread(), shared, global, Bytes, valid);
}
inline void cp_async_commit() {
  executor::machine().copies.commit(executor::thread());
}
template <int Groups>
void cp_async_wait() {
  executor::machine().copies.wait(executor::thread(), Groups);
}

}  // namespace clce::ptx
