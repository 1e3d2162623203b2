// Faults of a single access, barriers and warps, launches; and next to each the correct kernel.
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "planted.h"

using namespace clce;
using namespace clce::executor;

namespace {

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

// Each operation stands at two places of the source. From lane n of its warp on a thread asks at the second.
CLCE_KERNEL void two_places(Params p) {
  const int x = static_cast<int>(threadIdx.x);
  const auto* const row = reinterpret_cast<ptx::Pack<float>*>(ptx::dynamic_shared()) + x;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  uint32_t r[4];
  ptx::shared_store(const_cast<ptx::Pack<float>*>(row), ptx::Pack<float>{});
  ptx::sync_threads();
  switch (2 * p.variant + (x % 32 < p.n ? 0 : 1)) {
    case 0:
      ptx::sync_warp();
      break;
    case 1:
      ptx::sync_warp();
      break;
    case 2:
      ptx::shuffle_xor(1.0f, 1);
      break;
    case 3:
      ptx::shuffle_xor(1.0f, 1);
      break;
    case 4:
      ptx::ballot(true);
      break;
    case 5:
      ptx::ballot(true);
      break;
    case 6:
      ptx::any_sync(true);
      break;
    case 7:
      ptx::any_sync(true);
      break;
    case 8:
      ptx::ldmatrix_x4(r, row);
      break;
    case 9:
      ptx::ldmatrix_x4(r, row);
      break;
    case 10:
      ptx::ldmatrix_x4_trans(r, row);
      break;
    case 11:
      ptx::ldmatrix_x4_trans(r, row);
      break;
    case 12:
      ptx::mma_m16n8k16(d, a, b, ptx::bf16_tag{});
      break;
    case 13:
      ptx::mma_m16n8k16(d, a, b, ptx::bf16_tag{});
      break;
    case 14:
      ptx::mma_m16n8k16(d, a, b, ptx::f16_tag{});
      break;
    case 15:
      ptx::mma_m16n8k16(d, a, b, ptx::f16_tag{});
      break;
    case 16:
      ptx::mma_m16n8k8_tf32(d, a, b);
      break;
    case 17:
      ptx::mma_m16n8k8_tf32(d, a, b);
      break;
    case 18:
      ptx::sync_threads();
      break;
    case 19:
      ptx::sync_threads();
      break;
  }
}
TEST("faults/warp operation at two places of the source") {
  constexpr int kOperations = 10;
  Setup setup;
  setup.shared_bytes = 64 * 16;
  Params p;
  for (p.variant = 0; p.variant < kOperations; ++p.variant) {
    for (int lanes : {0, 32}) {
      p.n = lanes;
      expect_pass(two_places, p, setup);
    }
    const Fault fault = p.variant + 1 < kOperations ? Fault::kDivergence : Fault::kBarrier;
    for (int lanes : {1, 31}) {
      p.n = lanes;
      expect_fault(fault, two_places, p, {" is at ", " (test_faults.cpp:"}, setup);
    }
  }
}

// A barrier is one place for the whole block.
CLCE_KERNEL void barrier_by_warp(Params p) {
  if (static_cast<int>(threadIdx.x) / 32 < p.n) {
    ptx::sync_threads();
  } else {
    ptx::sync_threads();
  }
}
TEST("faults/barrier at two places of the source") {
  Params p;
  for (p.n = 0; p.n < 3; p.n += 2) expect_pass(barrier_by_warp, p);
  p.n = 1;
  expect_fault(Fault::kBarrier, barrier_by_warp, p, {"sync_threads (test_faults.cpp:"});
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
      cuda::launch(clear, "planted", c.grid, c.threads, c.shared_bytes, nullptr, p);
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
