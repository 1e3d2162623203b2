// Asynchronous copies that nobody waited for, and races; and next to each the correct kernel.
#include <string>
#include <vector>

#include "planted.h"

using namespace clce;
using namespace clce::executor;

namespace {

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

// Blocks meet between phases: each reads then what its neighbour wrote. Without meeting that is a race.
CLCE_DEVICE void write_own(const Params& p) {
  if (threadIdx.x == 0) ptx::global_store(p.out + blockIdx.x, float(blockIdx.x));
}
CLCE_DEVICE void add_neighbour(const Params& p) {
  if (threadIdx.x != 0) return;
  const float theirs = ptx::global_load(p.out + (blockIdx.x + 1) % gridDim.x);
  ptx::global_store(p.out + gridDim.x + blockIdx.x, theirs);
}
struct Meeting {
  using Params = executor::Params;
  static constexpr int kThreads = 64, kSharedBytes = 0;
  struct Write {
    static void run(const Params& p) { write_own(p); }
  };
  struct Read {
    static void run(const Params& p) { add_neighbour(p); }
  };
  using Phases = cuda::List<Write, Read>;
};
CLCE_KERNEL void both_at_once(Params p) {
  write_own(p);
  add_neighbour(p);
}
TEST("faults/blocks that meet") {
  constexpr uint32_t kBlocks = 5;
  GlobalArray<float> out(2 * kBlocks);
  Params p;
  p.out = out.data();
  under_every_schedule([&] {
    out.poison();
    clear_launches();
    CHECK(cuda::launch_phases<Meeting>("meeting", {kBlocks}, nullptr, p));
    CHECK_EQ(launches().size(), 1u);
    const auto values = out.read();
    for (uint32_t i = 0; i < kBlocks; ++i) CHECK_EQ(values[kBlocks + i], float((i + 1) % kBlocks));
  });
  Setup setup;
  setup.grid = {kBlocks};
  out.poison();
  expect_fault({Fault::kGlobalRace, Fault::kGlobalUninitialized}, both_at_once, p, {}, setup);
  // Where not all of them have room at once, none runs.
  set_blocks_at_once(kBlocks - 1);
  clear_launches();
  CHECK(!cuda::launch_phases<Meeting>("meeting", {kBlocks}, nullptr, p));
  CHECK(launches().empty());
  set_blocks_at_once(216);
}

}  // namespace

TEST_MAIN
