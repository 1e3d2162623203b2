// Kernels with a planted fault must be caught, the correct kernels next to them must pass; each under several
// schedules.
#pragma once

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/ptx.cuh"
#include "executor/executor.h"

namespace clce::executor {

struct Params {
  const float* in = nullptr;
  float* out = nullptr;
  uint32_t* counter = nullptr;
  int n = 0;
  int variant = 0;
};

CLCE_DEVICE float* shared_floats() {
  return reinterpret_cast<float*>(ptx::dynamic_shared());
}

CLCE_KERNEL inline void clear(Params p) {
  ptx::global_store(p.out + threadIdx.x, 0.0f);
}

struct ScheduleGuard {
  ~ScheduleGuard() { set_schedule(Order::kAscending); }
};

inline void under_every_schedule(const std::function<void()>& body) {
  ScheduleGuard guard;
  set_schedule(Order::kAscending);
  body();
  set_schedule(Order::kDescending);
  body();
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    set_schedule(Order::kRandom, seed);
    body();
  }
}

using Kernel = void (*)(Params);

struct Setup {
  cuda::Grid grid;
  int threads = 64;
  size_t shared_bytes = 64 * 4;
};

// Which of several faults is seen may depend on who comes first. `parts` must all be in the message, besides
// kernel, block and thread.
struct OneOf {
  std::vector<Fault> faults;
  OneOf(Fault fault) : faults{fault} {}
  OneOf(std::initializer_list<Fault> faults) : faults(faults) {}
};
inline void expect_fault(OneOf expected, Kernel kernel, Params params, std::vector<std::string> parts,
                         Setup setup = {}) {
  under_every_schedule([&] {
    std::string message;
    Fault found{};
    try {
      cuda::launch(kernel, "planted", setup.grid, setup.threads, setup.shared_bytes, nullptr, params);
    } catch (const Error& error) {
      message = error.what();
      found = error.fault;
    }
    if (message.empty()) {
      check::fail(__FILE__, __LINE__, std::string("not caught: ") + name(expected.faults.front()));
    }
    if (std::count(expected.faults.begin(), expected.faults.end(), found) == 0)
      check::fail(__FILE__, __LINE__, "caught as something else: " + message);
    ++check::num_checks();
    parts.insert(parts.end(), {"planted", "block (", "thread (", "lane "});
    for (const std::string& part : parts) {
      ++check::num_checks();
      if (message.find(part) == std::string::npos)
        check::fail(__FILE__, __LINE__, "'" + part + "' missing in: " + message);
    }
  });
}

inline void expect_pass(Kernel kernel, Params params, Setup setup = {}) {
  under_every_schedule([&] {
    cuda::launch(kernel, "correct", setup.grid, setup.threads, setup.shared_bytes, nullptr, params);
  });
}

}  // namespace clce::executor
