// Barriers, and what the lanes of a warp exchange: values only, which orders no memory accesses.
#pragma once

#include <cstdint>

#include "executor/machine.h"
#include "executor/ptx/memory.h"

namespace clce::ptx {

inline uint32_t thread_again() {
  return executor::thread().index.x;
}

inline void sync_threads(CallSite site = CallSite::here()) {
  executor::machine().scheduler.barrier(executor::thread(), {"sync_threads", site});
}

namespace host {

// The lanes of a warp meet and evaluate(in, out) is called once, with what each of them brings and receives.
inline void collective(const executor::Operation& at, executor::Evaluate evaluate, const void* in,
                       void* out) {
  executor::machine().warps.collective(executor::thread(), at, evaluate, in, out);
}

}  // namespace host

inline void sync_warp(CallSite site = CallSite::here()) {
  host::collective(
      {"sync_warp", site},
      [](const void* const*, void* const*) {
        executor::machine().clocks.join(executor::lanes(), executor::kWarpLanes);
      },
      nullptr, nullptr);
}

template <class T>
T shuffle_xor(T value, int lane_mask, CallSite site = CallSite::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  struct Lane {
    T value;
    int mask;
  };
  const Lane in{value, lane_mask};
  T out;
  host::collective(
      {"shuffle_xor", site},
      [](const void* const* in, void* const* out) {
        for (int lane = 0; lane < executor::kWarpLanes; ++lane) {
          const int source = (lane ^ static_cast<const Lane*>(in[lane])->mask) % executor::kWarpLanes;
          *static_cast<T*>(out[lane]) = static_cast<const Lane*>(in[source])->value;
        }
      },
      &in, &out);
  return out;
}

inline uint32_t kept(uint32_t x) {
  return x;
}

inline uint32_t ballot(bool predicate, CallSite site = CallSite::here()) {
  uint32_t votes;
  host::collective(
      {"ballot", site},
      [](const void* const* in, void* const* out) {
        uint32_t votes = 0;
        for (int lane = 0; lane < executor::kWarpLanes; ++lane) {
          votes |= uint32_t(*static_cast<const bool*>(in[lane])) << lane;
        }
        for (int lane = 0; lane < executor::kWarpLanes; ++lane) *static_cast<uint32_t*>(out[lane]) = votes;
      },
      &predicate, &votes);
  return votes;
}
inline bool any_sync(bool predicate, CallSite site = CallSite::here()) {
  return ballot(predicate, site) != 0;
}

}  // namespace clce::ptx
