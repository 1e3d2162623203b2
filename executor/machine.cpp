#include "executor/machine.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "executor/fault.h"
#include "executor/thread.h"

namespace clce::executor {

namespace {

constexpr uint64_t kMaxBlocks = uint64_t(1) << kBlockBits;

// Throws if no GPU, or not the executor, accepts the launch.
void check(const Launch& launch) {
  auto refuse = [&](const std::string& what) {
    throw Error(Fault::kLaunch, "launch of " + launch.kernel + ": " + what);
  };
  const Dim3 &grid = launch.grid, &block = launch.block;
  if (machine().scheduler.is_running()) refuse("from within a kernel");
  const uint64_t num_blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (num_blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("grid " + text(grid));
  }
  const uint64_t num_threads = uint64_t(block.x) * block.y * block.z;
  if (num_threads == 0 || num_threads > kMaxThreads || block.z > 64) refuse("block " + text(block));
  if (launch.shared_bytes > kMaxShared) {
    refuse(std::to_string(launch.shared_bytes) + " bytes of shared memory, at most " +
           std::to_string(kMaxShared));
  }
  if (num_blocks >= kMaxBlocks && !machine().recording_only) {
    refuse("the executor takes fewer than " + std::to_string(kMaxBlocks) + " blocks");
  }
}

// Not async-signal-safe, but the process ends here anyway.
void on_segmentation_fault(int, siginfo_t* info, void*) {
  const Machine& m = machine();
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const bool shared = m.shared.contains(address);
  if (shared || m.global.contains(address)) {
    std::fprintf(stderr,
                 "executor: %s: the %s address 0x%zx is dereferenced directly, not through clce::ptx\n",
                 m.scheduler.is_running() ? where(thread()).c_str() : "host code",
                 shared ? "shared" : "global", static_cast<size_t>(address));
    std::fflush(stderr);
    _exit(1);
  }
  // Someone else's fault: once more, with the default action.
}

}  // namespace

Machine::Machine() {
  const char* const name = std::getenv("CLCE_EXECUTOR_ARITHMETIC");
  if (name != nullptr && std::string(name) == "coarse") arithmetic = Arithmetic::kCoarse;
  static unsigned char signal_stack[64 << 10];
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_segmentation_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND;
  sigaction(SIGSEGV, &action, nullptr);
}

void Machine::run(const Launch& launch, const void* kernel, const std::vector<Body>& phases, void* context) {
  launches.push_back(launch);
  check(launch);
  if (recording_only) return;
  Block block;
  block.kernel = launch.kernel;
  block.grid = launch.grid;
  block.dim = launch.block;
  block.num_threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  const Dim3& grid = launch.grid;
  coverage.start_launch(kernel, int64_t(grid.x) * grid.y * grid.z);
  for (const Body phase : phases) {
    block.launch = global.start_launch();
    clocks.start_launch();
    for (uint32_t number : scheduler.start_launch(grid.x * grid.y * grid.z)) {
      block.number = number;
      block.index = Dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
      shared.start_block(launch.shared_bytes);
      clocks.start_block(scheduler.threads(), block.num_threads);
      warps.start_block();
      coverage.start_block();
      banks.start_block();
      scheduler.run(block, phase, context);
      coverage.end_block();
      banks.end_block(launches.back().banks);
    }
  }
}

void set_schedule(Order order, uint64_t seed) {
  machine().scheduler.set_order(order, seed);
}
const std::vector<Launch>& launches() {
  return machine().launches;
}
void clear_launches() {
  machine().launches.clear();
}
void set_recording_only(bool value) {
  machine().recording_only = value;
}
void run(const void* kernel, const char* name, Dim3 grid, Dim3 block, size_t shared_bytes,
         const std::vector<Body>& phases, void* context) {
  Launch launch;
  launch.kernel = name;
  launch.grid = grid;
  launch.block = block;
  launch.shared_bytes = shared_bytes;
  machine().run(launch, kernel, phases, context);
}
void set_arithmetic(Arithmetic arithmetic) {
  machine().arithmetic = arithmetic;
}
void count_bank_conflicts(bool on) {
  machine().banks.set_counting(on);
}
void set_compute_capability(int value) {
  machine().compute_capability = value;
}
void set_blocks_at_once(int value) {
  machine().blocks_at_once = value;
}
int blocks_at_once() {
  return machine().blocks_at_once;
}
int compute_capability() {
  return machine().compute_capability;
}

}  // namespace clce::executor
