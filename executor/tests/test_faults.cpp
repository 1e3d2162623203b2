// Every fault the executor is there to catch, planted in a small kernel; and next to it the correct
// kernel, which must pass. Each under several schedules.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/ptx.cuh"
#include "executor/executor.h"

using namespace clce;
using namespace clce::executor;

namespace {

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

struct ScheduleGuard {
  ~ScheduleGuard() { set_schedule(Order::kAscending); }
};

void under_every_schedule(const std::function<void()>& body) {
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
void expect_fault(OneOf expected, Kernel kernel, Params params, std::vector<std::string> parts,
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

void expect_pass(Kernel kernel, Params params, Setup setup = {}) {
  under_every_schedule([&] {
    cuda::launch(kernel, "correct", setup.grid, setup.threads, setup.shared_bytes, nullptr, params);
  });
}

// ---- bounds and alignment

CLCE_KERNEL void shared_index(Params p) {
  float* s = shared_floats();
  ptx::shared_store(s + threadIdx.x + p.n, 1.0f);
  ptx::sync_threads();
  ptx::shared_load(s + threadIdx.x + p.n);
}
TEST("faults/shared out of bounds") {
  Params p;
  expect_pass(shared_index, p);
  p.n = 1;
  expect_fault(Fault::kSharedOutOfBounds, shared_index, p,
               {"shared offset 256, of 256", "thread (63, 0, 0)"});
  p.n = -1;
  expect_fault(Fault::kSharedOutOfBounds, shared_index, p, {"shared offset -4"});
}

CLCE_KERNEL void global_index(Params p) {
  const float x = p.variant == 0 ? ptx::global_load(p.in + threadIdx.x + p.n) : 0.0f;
  ptx::global_store(p.out + threadIdx.x + (p.variant == 1 ? p.n : 0), x);
}
TEST("faults/global out of bounds") {
  GlobalArray<float> in(std::vector<float>(64, 1.0f));
  GlobalArray<float> out(64);
  Params p;
  p.in = in.data();
  p.out = out.data();
  expect_pass(global_index, p);
  p.n = 1;
  expect_fault(Fault::kGlobalOutOfBounds, global_index, p, {"load", "offset 256 of a buffer of 256"});
  p.n = -1;
  expect_fault(Fault::kGlobalOutOfBounds, global_index, p, {"load", "thread (0, 0, 0)"});
  p.variant = 1;
  p.n = 1;
  expect_fault(Fault::kGlobalOutOfBounds, global_index, p, {"store", "offset 256 of a buffer of 256"});
  p.in = nullptr;
  p.variant = 0;
  expect_fault(Fault::kGlobalOutOfBounds, global_index, p, {"in no buffer"});
  {
    GlobalArray<float> gone(64);
    p.in = gone.data();
  }
  expect_fault(Fault::kGlobalOutOfBounds, global_index, p, {"in no buffer"});
}

CLCE_KERNEL void write_input(Params p) {
  ptx::global_store(const_cast<float*>(p.in) + threadIdx.x, 1.0f);
}
TEST("faults/write to an input") {
  GlobalArray<float> in(std::vector<float>(64, 1.0f));
  Params p;
  p.in = in.data();
  expect_fault(Fault::kGlobalReadOnly, write_input, p, {"store"});
}

CLCE_KERNEL void misaligned(Params p) {
  using Vector = ptx::Pack<float>;
  unsigned char* s = ptx::dynamic_shared();
  uint32_t r[4];
  switch (p.variant) {
    case 0:
      ptx::shared_store(reinterpret_cast<Vector*>(s + 16 * (threadIdx.x % 2) + p.n), Vector{});
      break;
    case 1:
      ptx::global_load(reinterpret_cast<const Vector*>(p.in + p.n));
      break;
    case 2:
      ptx::cp_async<16>(s + 16 * threadIdx.x, reinterpret_cast<const char*>(p.in) + p.n, true);
      break;
    case 3:
      ptx::cp_async<16>(s + 16 * threadIdx.x + p.n, p.in, true);
      break;
    case 4:
      for (int i = 0; i < 5; ++i) ptx::shared_store(shared_floats() + threadIdx.x + i * 32, 0.0f);
      ptx::sync_warp();
      ptx::ldmatrix_x4(r, s + 16 * threadIdx.x + p.n);
      break;
  }
}
TEST("faults/misaligned") {
  GlobalArray<float> in(std::vector<float>(64, 1.0f));
  GlobalArray<float> shifted(std::vector<float>(64, 1.0f), 4);
  Params p;
  Setup setup;
  setup.threads = 32;
  setup.shared_bytes = 1024;
  for (p.variant = 1; p.variant < 5; ++p.variant) {
    p.in = in.data();
    p.n = 0;
    expect_pass(misaligned, p, setup);
    p.n = p.variant == 1 ? 1 : 8;
    expect_fault(Fault::kMisaligned, misaligned, p, {"no multiple of 16"}, setup);
    if (p.variant == 1 || p.variant == 2) {
      p.n = 0;
      p.in = shifted.data();
      expect_fault(Fault::kMisaligned, misaligned, p, {"offset 0"}, setup);
    }
  }
  p.variant = 0;
  p.n = 4;
  expect_fault(Fault::kMisaligned, misaligned, p, {"no multiple of 16"}, setup);
}

// ---- memory nobody wrote

CLCE_KERNEL void partly_written(Params p) {
  float* s = shared_floats();
  if (static_cast<int>(threadIdx.x) < p.n) ptx::shared_store(s + threadIdx.x, 1.0f);
  ptx::sync_threads();
  ptx::shared_load(s + (threadIdx.x + 1) % 64);
}
TEST("faults/read of shared memory nobody wrote") {
  Params p;
  p.n = 64;
  expect_pass(partly_written, p);
  p.n = 63;
  expect_fault(Fault::kSharedUninitialized, partly_written, p, {"shared offset 252", "thread (62, 0, 0)"});
}

CLCE_KERNEL void leftover(Params p) {
  if (p.variant == 1 || blockIdx.x == 0) ptx::shared_store(shared_floats() + threadIdx.x, 1.0f);
  ptx::sync_threads();
  ptx::shared_load(shared_floats() + threadIdx.x);
}
TEST("faults/shared memory of the block before") {
  Setup setup;
  setup.grid = {2, 1, 1};
  Params p;
  p.variant = 1;
  expect_pass(leftover, p, setup);
  p.variant = 0;
  expect_fault(Fault::kSharedUninitialized, leftover, p, {"block (1, 0, 0)"}, setup);
}

CLCE_KERNEL void accumulate(Params p) {
  const float before = ptx::global_load(p.out + threadIdx.x);
  ptx::global_store(p.out + threadIdx.x, before + 1.0f);
}
CLCE_KERNEL void clear(Params p) {
  ptx::global_store(p.out + threadIdx.x, 0.0f);
}
TEST("faults/read of global memory nobody wrote") {
  GlobalArray<float> out(64);
  Params p;
  p.out = out.data();
  expect_fault(Fault::kGlobalUninitialized, accumulate, p, {"offset"});
  expect_pass(clear, p);
  expect_pass(accumulate, p);
  CHECK_EQ(out.read()[63], 7.0f);
  out.poison();
  bool caught = false;
  try {
    out.read();
  } catch (const Error& error) {
    caught = error.fault == Fault::kGlobalUninitialized;
  }
  CHECK(caught);
}

// ---- barriers and warps

CLCE_KERNEL void barrier_in_branch(Params p) {
  if (static_cast<int>(threadIdx.x) < p.n) ptx::sync_threads();
}
TEST("faults/barrier not reached by all") {
  Params p;
  p.n = 64;
  expect_pass(barrier_in_branch, p);
  p.n = 32;
  expect_fault(Fault::kBarrier, barrier_in_branch, p,
               {"threads 0 to 31 wait at sync_threads", "threads 32 to 63 ended"});
  p.n = 63;
  expect_fault(Fault::kBarrier, barrier_in_branch, p, {"thread 63 ended"});
}

CLCE_KERNEL void divergent(Params p) {
  const int x = static_cast<int>(threadIdx.x);
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  switch (p.variant) {
    case 0:
      if (x % 32 < p.n) ptx::shuffle_xor(1.0f, 1);
      break;
    case 1:
      if (x % 32 < p.n) {
        ptx::shuffle_xor(1.0f, 1);
      } else {
        ptx::ballot(true);
      }
      break;
    case 2:
      if (x % 32 < p.n) ptx::mma_m16n8k16(d, a, b, ptx::bf16_tag{});
      break;
    case 3:
      if (x % 32 < p.n) {
        ptx::sync_threads();
      } else {
        ptx::sync_warp();
      }
      break;
  }
}
TEST("faults/warp operation not reached by all lanes") {
  Params p;
  for (p.variant = 0; p.variant < 4; ++p.variant) {
    p.n = 32;
    expect_pass(divergent, p);
    p.n = 31;
    expect_fault(Fault::kDivergence, divergent, p, {});
  }
  p.variant = 0;
  p.n = 32;
  Setup half;
  half.threads = 48;
  expect_fault(Fault::kDivergence, divergent, p, {"warp 1"}, half);
}

// ---- asynchronous copies

// Copies 32 x 16 bytes in two stages and sums them up. Variants leave something out.
CLCE_KERNEL void staged(Params p) {
  float* s = shared_floats();
  const int x = static_cast<int>(threadIdx.x);
  ptx::cp_async<16>(s + 4 * x, p.in + 4 * x, true);
  if (p.variant != 3) ptx::cp_async_commit();
  ptx::cp_async<16>(s + 256 + 4 * x, p.in + 256 + 4 * x, true);
  if (p.variant != 4) ptx::cp_async_commit();
  if (p.variant == 5) ptx::shared_store(s + 256 + 4 * x, 0.0f);
  if (p.variant != 1) ptx::cp_async_wait<1>();
  if (p.variant != 2) ptx::sync_threads();
  float sum = ptx::shared_load(s + (p.variant == 6 ? 4 * x : 4 * x + 4) % 256);
  if (p.variant == 7) sum += ptx::shared_load(s + 256 + 4 * x);  // own, but not waited for
  ptx::cp_async_wait<0>();
  if (p.variant != 8) ptx::sync_threads();
  sum += ptx::shared_load(s + 256 + (4 * x + 4) % 256);
  ptx::global_store(p.out + x, sum);
}
TEST("faults/asynchronous copy not waited for") {
  std::vector<float> values(512);
  for (int i = 0; i < 512; ++i) values[i] = static_cast<float>(i);
  GlobalArray<float> in(values);
  GlobalArray<float> out(64);
  Params p;
  p.in = in.data();
  p.out = out.data();
  Setup setup;
  setup.shared_bytes = 2048;
  expect_pass(staged, p, setup);
  for (int x = 0; x < 64; ++x)
    CHECK_EQ(out.read()[x], values[(4 * x + 4) % 256] + values[256 + (4 * x + 4) % 256]);
  p.variant = 6;
  expect_pass(staged, p, setup);
  for (int variant : {1, 3, 4, 5, 7}) {
    p.variant = variant;
    expect_fault(Fault::kAsyncNotWaited, staged, p, {"shared offset", "under way"}, setup);
  }
  // Without the barrier after the wait others' bytes may not even have been asked for.
  for (int variant : {2, 8}) {
    p.variant = variant;
    expect_fault({Fault::kAsyncNotWaited, Fault::kSharedRace, Fault::kSharedUninitialized}, staged, p,
                 {"shared offset"}, setup);
  }
}

// ---- races

CLCE_KERNEL void neighbours(Params p) {
  float* s = shared_floats();
  const int x = static_cast<int>(threadIdx.x), other = x ^ p.n;
  ptx::shared_store(s + x, static_cast<float>(x));
  if (p.variant == 1) ptx::sync_warp();
  if (p.variant == 2) ptx::sync_threads();
  if (p.variant == 3) ptx::shuffle_xor(1, 1);  // moves values, orders nothing
  ptx::shared_load(s + other);
}
TEST("faults/race: write then read") {
  Setup setup;
  setup.threads = 128;
  setup.shared_bytes = 512;
  Params p;
  struct {
    int variant, distance;
    bool correct;
  } cases[] = {{1, 1, true}, {1, 32, false}, {2, 1, true}, {2, 64, true}, {3, 1, false}, {0, 0, true}};
  for (const auto& c : cases) {
    p.variant = c.variant;
    p.n = c.distance;
    if (c.correct) {
      expect_pass(neighbours, p, setup);
    } else {
      expect_fault({Fault::kSharedRace, Fault::kSharedUninitialized}, neighbours, p, {"shared offset"},
                   setup);
    }
  }
}

CLCE_KERNEL void overwrite(Params p) {
  float* s = shared_floats();
  const int x = static_cast<int>(threadIdx.x);
  ptx::shared_store(s + x, 0.0f);
  ptx::sync_threads();
  ptx::shared_load(s + (x + p.n) % 64);
  if (p.variant == 1) ptx::sync_threads();
  if (p.variant == 2) ptx::sync_warp();
  ptx::shared_store(s + x, 1.0f);
}
CLCE_KERNEL void same_place(Params p) {
  if (p.variant == 0 || threadIdx.x == 0) ptx::shared_store(shared_floats(), 1.0f);
}
CLCE_KERNEL void overwrite_by_copy(Params p) {
  float* s = shared_floats();
  ptx::shared_store(s + threadIdx.x, 0.0f);
  ptx::sync_threads();
  ptx::shared_load(s + (threadIdx.x + 33) % 64);
  if (p.variant == 1) ptx::sync_threads();
  if (threadIdx.x < 16) ptx::cp_async<16>(s + 4 * threadIdx.x, p.in, true);
}
TEST("faults/race: read then write") {
  Params p;
  expect_pass(overwrite, p);
  p.n = 1;
  expect_fault(Fault::kSharedRace, overwrite, p, {"no barrier since"});
  p.variant = 2;
  expect_fault(Fault::kSharedRace, overwrite, p, {"no barrier since"});
  p.variant = 1;
  expect_pass(overwrite, p);
  expect_pass(same_place, p);
  p.variant = 0;
  expect_fault(Fault::kSharedRace, same_place, p, {"shared offset 0", "written by"});
  GlobalArray<float> in(std::vector<float>(4, 1.0f));
  p.in = in.data();
  expect_fault({Fault::kSharedRace, Fault::kAsyncNotWaited}, overwrite_by_copy, p, {"shared offset"});
  p.variant = 1;
  expect_pass(overwrite_by_copy, p);
}

CLCE_KERNEL void global_exchange(Params p) {
  ptx::global_store(p.out + blockIdx.x * 64 + threadIdx.x, 1.0f);
  if (p.variant >= 1) ptx::sync_threads();
  if (p.variant == 3) return;
  const unsigned other = p.variant == 2 ? (blockIdx.x + 1) % 2 : blockIdx.x;
  ptx::global_load(p.out + other * 64 + (threadIdx.x + 1) % 64);
}
TEST("faults/race in global memory") {
  GlobalArray<float> out(128);
  Params p;
  p.out = out.data();
  Setup setup;
  setup.grid = {2, 1, 1};
  p.variant = 1;
  expect_pass(global_exchange, p, setup);
  p.variant = 0;
  expect_fault(Fault::kGlobalRace, global_exchange, p, {}, setup);
  p.variant = 2;
  expect_fault(Fault::kGlobalRace, global_exchange, p, {"of block"}, setup);
  expect_pass(clear, p);
}

// The last block sums up what all wrote: fence, atomic, fence.
CLCE_KERNEL void last_block_sums(Params p) {
  const int blocks = static_cast<int>(gridDim.x), x = static_cast<int>(threadIdx.x);
  ptx::global_store(p.out + blockIdx.x * 64 + x, 1.0f);
  if (p.variant != 1) ptx::sync_threads();
  uint32_t* is_last = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  if (x == 0) {
    if (p.variant != 2) ptx::fence_device();
    const uint32_t ticket = ptx::atomic_add(p.counter, 1);
    if (p.variant != 3) ptx::fence_device();
    ptx::shared_store(is_last, uint32_t(ticket == gridDim.x - 1));
  }
  ptx::sync_threads();
  if (!ptx::shared_load(is_last)) return;
  float sum = 0;
  for (int b = 0; b < blocks; ++b) sum += ptx::global_load(p.out + b * 64 + x);
  ptx::sync_threads();
  ptx::global_store(p.out + x, sum);
  if (x == 0) ptx::global_store(p.counter, 0u);
}
CLCE_KERNEL void clear_counter(Params p) {
  if (threadIdx.x == 0) ptx::global_store(p.counter, 0u);
}
TEST("faults/race between blocks") {
  GlobalArray<float> out(5 * 64);
  GlobalArray<uint32_t> counter(1);
  Params p;
  p.out = out.data();
  p.counter = counter.data();
  Setup setup;
  setup.grid = {5, 1, 1};
  expect_fault(Fault::kGlobalUninitialized, last_block_sums, p, {"atomic"}, setup);
  expect_pass(clear_counter, p);
  expect_pass(last_block_sums, p, setup);
  CHECK_EQ(out.read()[7], 5.0f);
  CHECK_EQ(counter.read()[0], 0u);
  for (p.variant = 1; p.variant < 4; ++p.variant) {
    under_every_schedule([&] {
      Params q = p;
      counter.poison();
      cuda::launch(clear_counter, "clear", {}, 64, 0, nullptr, q);
      bool caught = false;
      try {
        cuda::launch(last_block_sums, "planted", setup.grid, setup.threads, setup.shared_bytes, nullptr, q);
      } catch (const Error& error) {
        caught = error.fault == Fault::kGlobalRace;
      }
      CHECK(caught);
    });
  }
}

// ---- launches, and accesses that go around clce::ptx

TEST("faults/launch no GPU accepts") {
  Params p;
  struct {
    cuda::Grid grid;
    int threads;
    size_t shared_bytes;
  } cases[] = {
      {{1, 65536, 1}, 64, 0}, {{1, 1, 65536}, 64, 0}, {{}, 0, 0}, {{}, 1025, 0}, {{}, 64, (227 << 10) + 1}};
  for (const auto& c : cases) {
    bool caught = false;
    try {
      cuda::launch(same_place, "planted", c.grid, c.threads, c.shared_bytes, nullptr, p);
    } catch (const Error& error) {
      caught = error.fault == Fault::kLaunch;
    }
    CHECK(caught);
  }
}

CLCE_KERNEL void direct(Params p) {
  if (p.variant == 0) *const_cast<volatile float*>(p.out) = 1.0f;
  if (p.variant == 1) *const_cast<volatile float*>(shared_floats()) = 1.0f;
}
TEST("faults/access around the primitives") {
  GlobalArray<float> out(64);
  for (int variant = 0; variant < 3; ++variant) {
    int pipe_ends[2];
    CHECK(pipe(pipe_ends) == 0);
    const pid_t child = fork();
    if (child == 0) {
      dup2(pipe_ends[1], 2);
      Params p;
      p.out = out.data();
      p.variant = variant;
      if (variant == 2) *const_cast<volatile float*>(p.out) = 1.0f;
      cuda::launch(direct, "planted", {}, 64, 256, nullptr, p);
      _exit(0);
    }
    close(pipe_ends[1]);
    std::string text(4096, '\0');
    ssize_t length = 0, got;
    while ((got = read(pipe_ends[0], &text[length], text.size() - length)) > 0) length += got;
    close(pipe_ends[0]);
    text.resize(length);
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    CHECK(text.find("dereferenced directly") != std::string::npos);
    CHECK(text.find(variant == 2 ? "host code" : "planted, block (0, 0, 0), thread (0, 0, 0)") !=
          std::string::npos);
    CHECK(text.find(variant == 1 ? "the shared address" : "the global address") != std::string::npos);
  }
}

}  // namespace

TEST_MAIN
