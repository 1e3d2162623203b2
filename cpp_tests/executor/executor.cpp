#include "executor/executor.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>

#include "executor/fiber.h"

namespace clce::executor {

const char* name(Fault fault) {
  switch (fault) {
    case Fault::kLaunch:
      return "launch";
    case Fault::kSharedOutOfBounds:
      return "shared memory out of bounds";
    case Fault::kSharedUninitialized:
      return "read of shared memory nobody wrote";
    case Fault::kSharedRace:
      return "race in shared memory";
    case Fault::kGlobalOutOfBounds:
      return "global memory out of bounds";
    case Fault::kGlobalUninitialized:
      return "read of global memory nobody wrote";
    case Fault::kGlobalReadOnly:
      return "write to an input";
    case Fault::kGlobalRace:
      return "race in global memory";
    case Fault::kMisaligned:
      return "misaligned access";
    case Fault::kAsyncNotWaited:
      return "asynchronous copy not waited for";
    case Fault::kBarrier:
      return "barrier not reached by all";
    case Fault::kDivergence:
      return "warp operation not reached by all lanes";
  }
  return "?";
}

namespace {

constexpr int kWarpLanes = 32;
constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxBarriers = 16;
constexpr size_t kMaxShared = 227 << 10;  // the largest of any GPU so far (sm_90, sm_100)
constexpr unsigned char kPoison = 0xff;

// Address ranges that are reserved and never accessible.
constexpr size_t kSharedRange = size_t(1) << 20;
constexpr size_t kSlotBytes = size_t(1) << 20;  // buffers start at multiples of it
constexpr size_t kSlots = size_t(1) << 15;

// Happens-before, by vector clocks. A thread's clock advances at every barrier it takes part in; `clock[t]`
// of what a thread has seen is the last interval of thread t whose accesses it may rely on. A barrier's
// participants share one snapshot.
struct Snapshot {
  int references = 0;
  uint32_t visit = 0;  // scratch of join()
  uint32_t clock[kMaxThreads];
};

// A thread's fence and then its atomic let other blocks see what the thread had seen or done before the
// fence: those that come to the same atomic later, and then to a fence of their own.
struct Release {
  uint32_t block;
  int thread;
  uint32_t clock;              // of the thread
  std::vector<uint32_t> seen;  // clocks of its block's other threads
};
using Acquired = std::map<uintptr_t, size_t>;  // by the atomic's address: how many of its releases are seen

struct AsyncCopy {
  uint32_t shared_offset;
  uint32_t bytes;
  const void* global;  // null: zeros
};

enum class State { kReady, kWaiting, kDone };

struct Thread {
  Fiber fiber;
  int id = 0;
  Dim3 index;
  State state = State::kDone;
  const char* waits_at = nullptr;
  bool waits_for_warp = false;
  uint32_t clock = 1;
  Snapshot* seen = nullptr;
  std::shared_ptr<Release> fenced;
  Acquired atomics;                          // seen by an atomic, of use after the next fence
  std::shared_ptr<const Acquired> acquired;  // null: nothing
  std::deque<std::vector<AsyncCopy>> groups;
  std::vector<AsyncCopy> uncommitted;
};

struct Warp {
  uint32_t ready = 0;  // lanes
  uint32_t arrived = 0;
  const char* collective = nullptr;
  const void* in[kWarpLanes];
  void* out[kWarpLanes];
};

struct Barrier {
  int expected = 0;
  std::vector<Thread*> arrived;
};

// Who accessed a byte of shared memory: thread and clock in 32 bits; 0: nobody.
constexpr int kThreadBits = 10;
constexpr uint32_t kMaxClock = (1u << 21) - 1;
constexpr uint32_t kPending = 1u << 31;  // writer only: an asynchronous copy is under way
constexpr int kReaderSlots = 4;          // last readers are kept per warp modulo this

// Who accessed a byte of global memory: launch 14 bits, block 22, thread 10, clock 18.
constexpr uint64_t kLaunches = 1 << 14;
constexpr uint64_t kMaxBlocks = 1 << 22;
constexpr uint32_t kMaxGlobalClock = (1u << 18) - 1;

std::string hex(uintptr_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<size_t>(value));
  return text;
}

bool all_equal(const uint32_t* values, size_t count) {
  if (count == 16) return std::memcmp(values, values + 1, 15 * sizeof(uint32_t)) == 0;
  if (count == 8) return std::memcmp(values, values + 1, 7 * sizeof(uint32_t)) == 0;
  if (count == 4) return std::memcmp(values, values + 1, 3 * sizeof(uint32_t)) == 0;
  return std::memcmp(values, values + 1, (count - 1) * sizeof(uint32_t)) == 0;
}

std::string triple(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

}  // namespace

class Machine {
 public:
  static Machine& get() {
    static Machine* machine = new Machine;  // outlives every static GlobalBuffer
    return *machine;
  }

  void run(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(void*),
           void* context);

  // Buffers.
  void add(GlobalBuffer& buffer, size_t offset);
  void remove(GlobalBuffer& buffer);

  // Called on a thread's fiber.
  Thread& thread() { return *running_; }
  Warp& warp_of(const Thread& t) { return warps_[t.id / kWarpLanes]; }
  void barrier(int id, int threads, const char* what);
  void warp_collective(const char* what, Evaluate evaluate, const void* in, void* out);
  void join(Thread* const* threads, size_t count);
  size_t check_shared(Thread& t, uintptr_t address, size_t bytes, size_t alignment, const char* what);
  void shared_read(Thread& t, const void* address, void* value, size_t bytes, size_t alignment,
                   const char* what);
  void shared_write(Thread& t, void* address, const void* value, size_t bytes, size_t alignment);
  // The thread that wrote these bytes of shared memory last must be done with them.
  void check_writer(Thread& t, uint32_t writer, size_t offset, size_t bytes, const char* what);
  void check_shared_write(Thread& t, size_t offset, size_t bytes, const char* what);
  GlobalBuffer& check_global(Thread& t, uintptr_t address, size_t bytes, size_t alignment, const char* what,
                             size_t& offset);
  void global_read(Thread& t, const void* address, void* value, size_t bytes, size_t alignment,
                   const char* what);
  void global_write(Thread& t, void* address, const void* value, size_t bytes, size_t alignment);
  uint32_t atomic_add(uint32_t* address, uint32_t value);
  void fence_device();
  void async_copy(void* shared, const void* global, size_t bytes, bool valid);
  void async_commit();
  void async_wait(int pending_groups);

  [[noreturn]] void fail(Fault fault, const Thread& t, const std::string& what);
  std::string where(const Thread& t) const;

  Dim3 block_index, block_dim, grid_dim;
  uintptr_t shared_base = 0;
  Order order = Order::kAscending;
  std::mt19937_64 random;
  uint64_t seed = 0;
  int multiprocessors = 4;
  std::vector<Launch> launches;
  std::vector<Thread> threads{kMaxThreads};
  bool running = false;

 private:
  Machine();
  static void entry();
  static void on_segv(int signal, siginfo_t* info, void* context);
  void run_block();
  void wait(Thread& t, const char* what, bool for_warp);
  void make_ready(Thread& t);
  Thread* next();
  void go_on(Thread& from, bool ends);
  void report_deadlock();
  std::string waiting_threads() const;
  Snapshot* new_snapshot();
  void release(Snapshot* snapshot);
  bool is_before(const Thread& t, int other, uint32_t clock) const {
    return other == t.id || clock <= t.seen->clock[other];
  }
  bool is_before(const Thread& t, uint32_t stamp) const {
    return is_before(t, static_cast<int>(stamp & (kMaxThreads - 1)), (stamp & ~kPending) >> kThreadBits);
  }
  uint32_t stamp(const Thread& t) const { return t.clock << kThreadBits | static_cast<uint32_t>(t.id); }
  uint64_t global_stamp(const Thread& t) const {
    return block_stamp_ | static_cast<uint64_t>(t.id) << 18 | t.clock;
  }
  bool races(const Thread& t, uint64_t stamp) const;
  std::string shared_at(size_t offset, size_t bytes) const {
    return std::to_string(bytes) + " bytes at shared offset " + std::to_string(offset);
  }
  std::string other_thread(uint32_t stamp) const {
    const unsigned id = stamp & (kMaxThreads - 1);
    return "thread " + std::to_string(id);
  }

  Fiber host_;
  Thread* running_ = nullptr;
  std::vector<Warp> warps_{kMaxThreads / kWarpLanes};
  Barrier barriers_[kMaxBarriers];
  int num_threads_ = 0;
  int current_warp_ = 0, current_lane_ = 0;
  int alive_ = 0;

  void (*body_)(void*) = nullptr;
  void* body_context_ = nullptr;
  std::unique_ptr<Error> error_;

  size_t shared_bytes_ = 0;
  std::vector<unsigned char> shared_;
  std::vector<uint32_t> shared_writer_;
  std::vector<uint32_t> shared_reader_[kReaderSlots];

  std::vector<std::unique_ptr<Snapshot>> snapshots_;
  std::vector<Snapshot*> free_snapshots_;
  uint32_t visit_ = 0;

  uintptr_t global_base_ = 0;
  std::vector<GlobalBuffer*> slots_;
  size_t next_slot_ = 0;
  uint64_t launch_ = 0;
  uint64_t block_stamp_ = 0;
  std::map<uintptr_t, std::vector<std::shared_ptr<Release>>> releases_;  // of this launch
};

namespace {
Machine& machine = Machine::get();
}

Machine::Machine() {
  auto reserve = [](size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("executor: cannot reserve addresses");
      std::abort();
    }
    return reinterpret_cast<uintptr_t>(memory);
  };
  shared_base = (reserve(2 * kSharedRange) + kSharedRange - 1) / kSharedRange * kSharedRange;
  global_base_ = (reserve((kSlots + 1) * kSlotBytes) + kSlotBytes - 1) / kSlotBytes * kSlotBytes;
  slots_.resize(kSlots);

  static unsigned char signal_stack[64 << 10];
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_segv;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND;
  sigaction(SIGSEGV, &action, nullptr);
}

// Not async-signal-safe, but the process ends here anyway.
void Machine::on_segv(int, siginfo_t* info, void*) {
  Machine& m = machine;
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  const bool shared = address >= m.shared_base && address < m.shared_base + kSharedRange;
  const bool global = address >= m.global_base_ && address < m.global_base_ + kSlots * kSlotBytes;
  if (shared || global) {
    std::fprintf(stderr,
                 "executor: %s: the %s address 0x%zx is dereferenced directly, not through clce::ptx\n",
                 m.running ? m.where(m.thread()).c_str() : "host code", shared ? "shared" : "global",
                 static_cast<size_t>(address));
    std::fflush(stderr);
    _exit(1);
  }
  // Someone else's fault: once more, with the default action.
}

// ---------------------------------------------------------------------------------------------------
// Reports

std::string Machine::where(const Thread& t) const {
  return launches.back().kernel + ", block " + triple(block_index) + ", thread " + triple(t.index) +
         " (warp " + std::to_string(t.id / kWarpLanes) + ", lane " + std::to_string(t.id % kWarpLanes) + ")";
}

void Machine::fail(Fault fault, const Thread& t, const std::string& what) {
  throw Error(fault, std::string(name(fault)) + " in " + where(t) + ": " + what);
}

// Ranges of threads by what they are waiting for.
std::string Machine::waiting_threads() const {
  std::string text;
  for (int first = 0; first < num_threads_;) {
    const Thread& t = threads[first];
    int last = first;
    while (last + 1 < num_threads_ && threads[last + 1].state == t.state &&
           threads[last + 1].waits_at == t.waits_at) {
      ++last;
    }
    if (!text.empty()) text += "; ";
    text += last > first ? "threads " + std::to_string(first) + " to " + std::to_string(last)
                         : "thread " + std::to_string(first);
    text += t.state == State::kDone ? " ended"
                                    : std::string(last > first ? " wait at " : " waits at ") + t.waits_at;
    first = last + 1;
  }
  return text;
}

void Machine::report_deadlock() {
  const Thread* waiting = nullptr;
  for (int i = 0; i < num_threads_; ++i) {
    const Thread& t = threads[i];
    if (t.state != State::kWaiting) continue;
    if (waiting == nullptr || (t.waits_for_warp && !waiting->waits_for_warp)) waiting = &t;
  }
  const Fault fault = waiting->waits_for_warp ? Fault::kDivergence : Fault::kBarrier;
  error_ = std::make_unique<Error>(fault, std::string(name(fault)) + " in " + where(*waiting) +
                                              ": no thread can go on: " + waiting_threads());
}

// ---------------------------------------------------------------------------------------------------
// Scheduling

void Machine::make_ready(Thread& t) {
  t.state = State::kReady;
  warp_of(t).ready |= 1u << (t.id % kWarpLanes);
}

// A warp runs as long as one of its lanes can, then the next one; at random, any of them.
Thread* Machine::next() {
  const int num_warps = (num_threads_ + kWarpLanes - 1) / kWarpLanes;
  int w = current_warp_;
  if (order == Order::kRandom) {
    const uint64_t draw = random();
    if (warps_[w].ready == 0 || (draw & 7) == 0) w = static_cast<int>((draw >> 8) % num_warps);
  }
  const int step = order == Order::kDescending ? num_warps - 1 : 1;
  for (int tried = 0; warps_[w].ready == 0; ++tried) {
    if (tried == num_warps) return nullptr;
    w = (w + step) % num_warps;
  }
  current_warp_ = w;
  const uint32_t ready = warps_[w].ready;
  int lane = 0;
  if (order == Order::kAscending) {
    lane = __builtin_ctz(ready);
  } else if (order == Order::kDescending) {
    lane = 31 - __builtin_clz(ready);
  } else {
    const int start = static_cast<int>(random() % kWarpLanes);
    const uint32_t turned = start == 0 ? ready : (ready >> start | ready << (kWarpLanes - start));
    lane = (__builtin_ctz(turned) + start) % kWarpLanes;
  }
  warps_[w].ready &= ~(1u << lane);
  return &threads[w * kWarpLanes + lane];
}

void Machine::go_on(Thread& from, bool ends) {
  Thread* to = error_ ? nullptr : next();
  if (to == &from) return;
  if (to == nullptr) {
    if (!error_ && alive_ > 0) report_deadlock();
    Fiber::switch_to(from.fiber, host_, ends);
  } else {
    running_ = to;
    Fiber::switch_to(from.fiber, to->fiber, ends);
  }
}

void Machine::wait(Thread& t, const char* what, bool for_warp) {
  t.state = State::kWaiting;
  t.waits_at = what;
  t.waits_for_warp = for_warp;
  go_on(t, false);
  t.waits_at = nullptr;
}

void Machine::entry() {
  Machine& m = machine;
  Thread& t = *m.running_;
  Fiber::entered(t.fiber);
  try {
    m.body_(m.body_context_);
  } catch (const Error& error) {
    m.error_ = std::make_unique<Error>(error);
  } catch (const std::exception& error) {
    m.error_ = std::make_unique<Error>(Fault::kLaunch, m.where(t) + ": " + error.what());
  }
  t.state = State::kDone;
  t.waits_at = nullptr;
  --m.alive_;
  m.go_on(t, true);
  std::abort();  // never resumed
}

void Machine::run_block() {
  std::fill_n(shared_.begin(), shared_bytes_, kPoison);
  std::fill_n(shared_writer_.begin(), shared_bytes_, 0u);
  for (auto& reader : shared_reader_) std::fill_n(reader.begin(), shared_bytes_, 0u);
  for (Barrier& barrier : barriers_) barrier.arrived.clear();
  free_snapshots_.clear();
  for (auto& snapshot : snapshots_) {
    snapshot->references = 0;
    free_snapshots_.push_back(snapshot.get());
  }
  Snapshot* nothing = new_snapshot();
  std::fill_n(nothing->clock, num_threads_, 0u);
  nothing->references = num_threads_;
  for (Warp& warp : warps_) warp = Warp{};
  for (int i = 0; i < num_threads_; ++i) {
    Thread& t = threads[i];
    t.id = i;
    t.index = Dim3(i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y);
    t.waits_at = nullptr;
    t.clock = 1;
    t.seen = nothing;
    t.fenced.reset();
    t.atomics.clear();
    t.acquired.reset();
    t.groups.clear();
    t.uncommitted.clear();
    t.fiber.prepare(entry);
    make_ready(t);
  }
  alive_ = num_threads_;
  current_warp_ = order == Order::kDescending ? (num_threads_ - 1) / kWarpLanes : 0;
  error_.reset();
  running_ = next();
  Fiber::switch_to(host_, running_->fiber);
  if (error_) throw Error(*error_);
}

void Machine::run(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(void*),
                  void* context) {
  Launch launch;
  launch.kernel = kernel;
  launch.grid = grid;
  launch.block = block;
  launch.shared_bytes = shared_bytes;
  launches.push_back(launch);
  auto refuse = [&](const std::string& what) {
    throw Error(Fault::kLaunch, "launch of " + launch.kernel + ": " + what);
  };
  if (running) refuse("from within a kernel");
  const uint64_t num_blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (num_blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse("grid " + triple(grid));
  const uint64_t num_threads = uint64_t(block.x) * block.y * block.z;
  if (num_threads == 0 || num_threads > kMaxThreads || block.z > 64) refuse("block " + triple(block));
  if (shared_bytes > kMaxShared) {
    refuse(std::to_string(shared_bytes) + " bytes of shared memory, at most " + std::to_string(kMaxShared));
  }
  if (num_blocks >= kMaxBlocks)
    refuse("the executor takes fewer than " + std::to_string(kMaxBlocks) + " blocks");

  if (++launch_ == kLaunches) {
    launch_ = 1;
    for (GlobalBuffer* buffer : slots_) {
      if (buffer == nullptr) continue;
      std::fill(buffer->writer_.begin(), buffer->writer_.end(), 0u);
      std::fill(buffer->reader_.begin(), buffer->reader_.end(), 0u);
      std::fill(buffer->reader2_.begin(), buffer->reader2_.end(), 0u);
    }
  }
  num_threads_ = static_cast<int>(num_threads);
  shared_bytes_ = shared_bytes;
  if (shared_.size() < shared_bytes) {
    shared_.resize(shared_bytes);
    shared_writer_.resize(shared_bytes);
    for (auto& reader : shared_reader_) reader.resize(shared_bytes);
  }
  grid_dim = grid;
  block_dim = block;
  body_ = body;
  body_context_ = context;
  random.seed(seed);
  releases_.clear();

  std::vector<uint32_t> blocks(num_blocks);
  for (uint32_t i = 0; i < num_blocks; ++i) blocks[i] = i;
  if (order == Order::kDescending) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random);
  running = true;
  try {
    for (uint32_t b : blocks) {
      block_index = Dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
      block_stamp_ = launch_ << 50 | uint64_t(b) << 28;
      run_block();
    }
  } catch (...) {
    running = false;
    throw;
  }
  running = false;
}

// ---------------------------------------------------------------------------------------------------
// Barriers and warp-wide operations

Snapshot* Machine::new_snapshot() {
  if (free_snapshots_.empty()) {
    snapshots_.push_back(std::make_unique<Snapshot>());
    return snapshots_.back().get();
  }
  Snapshot* snapshot = free_snapshots_.back();
  free_snapshots_.pop_back();
  return snapshot;
}

void Machine::release(Snapshot* snapshot) {
  if (--snapshot->references == 0) free_snapshots_.push_back(snapshot);
}

// Each of the threads has now seen what all of them did and had seen.
void Machine::join(Thread* const* joined, size_t count) {
  Snapshot* all = new_snapshot();
  ++visit_;
  for (size_t i = 0; i < count; ++i) {
    Snapshot* seen = joined[i]->seen;
    if (i == 0) {
      std::copy_n(seen->clock, num_threads_, all->clock);
    } else if (seen->visit != visit_) {
      for (int t = 0; t < num_threads_; ++t) all->clock[t] = std::max(all->clock[t], seen->clock[t]);
    }
    seen->visit = visit_;
  }
  std::shared_ptr<const Acquired> acquired;
  for (size_t i = 0; i < count; ++i) {
    const auto& more = joined[i]->acquired;
    if (more == acquired || more == nullptr) continue;
    if (acquired == nullptr) {
      acquired = more;
    } else {
      auto merged = std::make_shared<Acquired>(*acquired);
      for (const auto& [address, releases] : *more)
        (*merged)[address] = std::max((*merged)[address], releases);
      acquired = merged;
    }
  }
  all->references = static_cast<int>(count);
  for (size_t i = 0; i < count; ++i) {
    Thread& t = *joined[i];
    all->clock[t.id] = std::max(all->clock[t.id], t.clock);
    release(t.seen);
    t.seen = all;
    t.acquired = acquired;
    if (++t.clock >= kMaxClock) fail(Fault::kLaunch, t, "more barriers than the executor can count");
  }
}

void Machine::barrier(int id, int count, const char* what) {
  Thread& t = thread();
  if (count < 0) count = num_threads_;
  if (id < 0 || id >= kMaxBarriers || count == 0 || count > num_threads_ ||
      (count % kWarpLanes != 0 && count != num_threads_)) {
    fail(Fault::kBarrier, t,
         "barrier " + std::to_string(id) + " for " + std::to_string(count) + " of " +
             std::to_string(num_threads_) + " threads");
  }
  Barrier& barrier = barriers_[id];
  if (barrier.arrived.empty()) {
    barrier.expected = count;
  } else if (barrier.expected != count) {
    fail(Fault::kBarrier, t,
         "barrier " + std::to_string(id) + " for " + std::to_string(count) +
             " threads, while others wait at it for " + std::to_string(barrier.expected));
  }
  barrier.arrived.push_back(&t);
  if (static_cast<int>(barrier.arrived.size()) < count) {
    wait(t, what, false);
    return;
  }
  join(barrier.arrived.data(), barrier.arrived.size());
  for (Thread* other : barrier.arrived) {
    if (other != &t) make_ready(*other);
  }
  barrier.arrived.clear();
}

void Machine::warp_collective(const char* what, Evaluate evaluate, const void* in, void* out) {
  Thread& t = thread();
  Warp& warp = warp_of(t);
  if (warp.arrived == 0) {
    warp.collective = what;
  } else if (warp.collective != what && std::strcmp(warp.collective, what) != 0) {
    fail(Fault::kDivergence, t,
         std::string("this lane is at ") + what + ", others of its warp are at " + warp.collective);
  }
  const int lane = t.id % kWarpLanes;
  warp.in[lane] = in;
  warp.out[lane] = out;
  warp.arrived |= 1u << lane;
  if (warp.arrived != 0xffffffffu) {
    wait(t, what, true);
    return;
  }
  evaluate(warp.in, warp.out);
  warp.arrived = 0;
  warp.ready |= ~(1u << lane);
  Thread* lanes = &threads[t.id - lane];
  for (int i = 0; i < kWarpLanes; ++i) lanes[i].state = State::kReady;
}

// ---------------------------------------------------------------------------------------------------
// Shared memory

size_t Machine::check_shared(Thread& t, uintptr_t address, size_t bytes, size_t alignment, const char* what) {
  const size_t offset = address - shared_base;
  if (address < shared_base || offset + bytes > shared_bytes_) {
    const auto signed_offset = static_cast<long long>(address - shared_base);
    const bool near = signed_offset > -static_cast<long long>(kSharedRange) &&
                      signed_offset < static_cast<long long>(kSharedRange);
    fail(Fault::kSharedOutOfBounds, t,
         std::string(what) + " of " + std::to_string(bytes) + " bytes at " +
             (near ? "shared offset " + std::to_string(signed_offset) : "address " + hex(address)) + ", of " +
             std::to_string(shared_bytes_));
  }
  if ((offset & (alignment - 1)) != 0) {
    fail(Fault::kMisaligned, t,
         std::string(what) + " of " + shared_at(offset, bytes) + ", which is no multiple of " +
             std::to_string(alignment));
  }
  return offset;
}

void Machine::shared_read(Thread& t, const void* address, void* value, size_t bytes, size_t alignment,
                          const char* what) {
  const size_t offset = check_shared(t, reinterpret_cast<uintptr_t>(address), bytes, alignment, what);
  const uint32_t* writer = &shared_writer_[offset];
  uint32_t* reader = &shared_reader_[t.id / kWarpLanes % kReaderSlots][offset];
  const uint32_t me = stamp(t);
  const unsigned char* const source = &shared_[offset];
  // Nearly always one thread wrote all of the bytes.
  const bool uniform = all_equal(writer, bytes);
  uint32_t checked = me;
  for (size_t i = 0; i < (uniform ? 1 : bytes); ++i) {
    if (writer[i] == checked) continue;
    checked = writer[i];
    if (checked == 0) {
      fail(Fault::kSharedUninitialized, t, std::string(what) + " of " + shared_at(offset + i, bytes - i));
    }
    check_writer(t, checked, offset + i, bytes - i, what);
  }
  switch (bytes) {
    case 4:
      std::fill_n(reader, 4, me);
      std::memcpy(value, source, 4);
      break;
    case 8:
      std::fill_n(reader, 8, me);
      std::memcpy(value, source, 8);
      break;
    case 16:
      std::fill_n(reader, 16, me);
      std::memcpy(value, source, 16);
      break;
    default:
      std::fill_n(reader, bytes, me);
      std::memcpy(value, source, bytes);
  }
}

void Machine::check_writer(Thread& t, uint32_t writer, size_t offset, size_t bytes, const char* what) {
  if (writer & kPending) {
    fail(Fault::kAsyncNotWaited, t,
         std::string(what) + " of " + shared_at(offset, bytes) + ", where a copy by " + other_thread(writer) +
             " is under way");
  }
  if (!is_before(t, writer)) {
    fail(Fault::kSharedRace, t,
         std::string(what) + " of " + shared_at(offset, bytes) + ", written by " + other_thread(writer) +
             " with no barrier since");
  }
}

void Machine::check_shared_write(Thread& t, size_t offset, size_t bytes, const char* what) {
  uint32_t checked = 0;
  const uint32_t* writer = &shared_writer_[offset];
  for (size_t i = 0; i < bytes; ++i) {
    if (writer[i] == checked) continue;
    checked = writer[i];
    check_writer(t, checked, offset + i, bytes - i, what);
  }
  for (const auto& readers : shared_reader_) {
    const uint32_t* reader = &readers[offset];
    checked = 0;
    for (size_t i = 0; i < bytes; ++i) {
      if (reader[i] == checked) continue;
      checked = reader[i];
      if (!is_before(t, checked)) {
        fail(Fault::kSharedRace, t,
             std::string(what) + " of " + shared_at(offset + i, bytes - i) + ", read by " +
                 other_thread(checked) + " with no barrier since");
      }
    }
  }
}

void Machine::shared_write(Thread& t, void* address, const void* value, size_t bytes, size_t alignment) {
  const size_t offset = check_shared(t, reinterpret_cast<uintptr_t>(address), bytes, alignment, "store");
  check_shared_write(t, offset, bytes, "store");
  std::fill_n(&shared_writer_[offset], bytes, stamp(t));
  std::memcpy(&shared_[offset], value, bytes);
}

// ---------------------------------------------------------------------------------------------------
// Global memory

void Machine::add(GlobalBuffer& buffer, size_t offset) {
  const size_t slots = (offset + buffer.size()) / kSlotBytes + 1;  // at least one byte stays free behind it
  for (size_t tried = 0; tried < kSlots; ++tried) {
    if (next_slot_ + slots > kSlots) next_slot_ = 0;
    size_t free = 0;
    while (free < slots && slots_[next_slot_ + free] == nullptr) ++free;
    if (free == slots) {
      for (size_t i = 0; i < slots; ++i) slots_[next_slot_ + i] = &buffer;
      buffer.address_ = global_base_ + next_slot_ * kSlotBytes + offset;
      next_slot_ += slots;
      return;
    }
    next_slot_ += free + 1;
  }
  throw Error(Fault::kLaunch, "the executor's global memory is full");
}

void Machine::remove(GlobalBuffer& buffer) {
  const size_t first = (buffer.address_ - global_base_) / kSlotBytes;
  for (size_t i = first; i < kSlots && slots_[i] == &buffer; ++i) slots_[i] = nullptr;
}

GlobalBuffer& Machine::check_global(Thread& t, uintptr_t address, size_t bytes, size_t alignment,
                                    const char* what, size_t& offset) {
  GlobalBuffer* buffer = nullptr;
  if (address >= global_base_ && address < global_base_ + kSlots * kSlotBytes) {
    buffer = slots_[(address - global_base_) / kSlotBytes];
  }
  if (buffer == nullptr) {
    fail(Fault::kGlobalOutOfBounds, t,
         std::string(what) + " of " + std::to_string(bytes) + " bytes at address " + hex(address) +
             ", in no buffer");
  }
  offset = address - buffer->address_;
  if (address < buffer->address_ || offset + bytes > buffer->size()) {
    fail(Fault::kGlobalOutOfBounds, t,
         std::string(what) + " of " + std::to_string(bytes) + " bytes at offset " +
             std::to_string(static_cast<long long>(offset)) + " of a buffer of " +
             std::to_string(buffer->size()) + " (address " + hex(address) + ")");
  }
  if ((address & (alignment - 1)) != 0) {
    fail(Fault::kMisaligned, t,
         std::string(what) + " of " + std::to_string(bytes) + " bytes at address " + hex(address) +
             " (offset " + std::to_string(offset) + "), which is no multiple of " +
             std::to_string(alignment));
  }
  return *buffer;
}

// Whether an access by `t` and one recorded as `stamp` could happen in either order.
bool Machine::races(const Thread& t, uint64_t stamp) const {
  if (stamp >> 50 != launch_) return false;
  const int other = static_cast<int>(stamp >> 18 & (kMaxThreads - 1));
  const auto clock = static_cast<uint32_t>(stamp & kMaxGlobalClock);
  if (stamp >> 28 << 28 == block_stamp_) return !is_before(t, other, clock);
  if (t.acquired == nullptr) return true;
  const uint32_t block = stamp >> 28 & (kMaxBlocks - 1);
  for (const auto& [address, count] : *t.acquired) {
    const auto& releases = releases_.at(address);
    for (size_t i = 0; i < count; ++i) {
      const Release& release = *releases[i];
      if (release.block != block) continue;
      if (clock <= (release.thread == other ? release.clock : release.seen[other])) return false;
    }
  }
  return true;
}

void Machine::global_read(Thread& t, const void* address, void* value, size_t bytes, size_t alignment,
                          const char* what) {
  size_t offset = 0;
  GlobalBuffer& buffer =
      check_global(t, reinterpret_cast<uintptr_t>(address), bytes, alignment, what, offset);
  std::memcpy(value, &buffer.bytes_[offset], bytes);
  if (buffer.access_ == GlobalBuffer::Access::kInput) return;
  const uint64_t me = global_stamp(t);
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (!buffer.written_[i]) {
      fail(Fault::kGlobalUninitialized, t,
           std::string(what) + " at offset " + std::to_string(i) + " of a buffer of " +
               std::to_string(buffer.size()));
    }
    if (races(t, buffer.writer_[i])) {
      fail(Fault::kGlobalRace, t,
           std::string(what) + " at offset " + std::to_string(i) + " of a buffer of " +
               std::to_string(buffer.size()) + ", written by thread " +
               std::to_string(buffer.writer_[i] >> 18 & (kMaxThreads - 1)) + " of block " +
               std::to_string(buffer.writer_[i] >> 28 & (kMaxBlocks - 1)));
    }
    if (buffer.reader_[i] >> 28 != me >> 28) buffer.reader2_[i] = buffer.reader_[i];
    buffer.reader_[i] = me;
  }
}

void Machine::global_write(Thread& t, void* address, const void* value, size_t bytes, size_t alignment) {
  size_t offset = 0;
  GlobalBuffer& buffer =
      check_global(t, reinterpret_cast<uintptr_t>(address), bytes, alignment, "store", offset);
  if (buffer.access_ == GlobalBuffer::Access::kInput) {
    fail(Fault::kGlobalReadOnly, t,
         "store at offset " + std::to_string(offset) + " of a buffer of " + std::to_string(buffer.size()));
  }
  if (t.clock > kMaxGlobalClock) fail(Fault::kLaunch, t, "more barriers than the executor can count");
  const uint64_t me = global_stamp(t);
  for (size_t i = offset; i < offset + bytes; ++i) {
    for (uint64_t other : {buffer.writer_[i], buffer.reader_[i], buffer.reader2_[i]}) {
      if (!races(t, other)) continue;
      fail(Fault::kGlobalRace, t,
           "store at offset " + std::to_string(i) + " of a buffer of " + std::to_string(buffer.size()) +
               (other == buffer.writer_[i] ? ", written" : ", read") + " by thread " +
               std::to_string(other >> 18 & (kMaxThreads - 1)) + " of block " +
               std::to_string(other >> 28 & (kMaxBlocks - 1)));
    }
    buffer.writer_[i] = me;
    buffer.written_[i] = 1;
  }
  std::memcpy(&buffer.bytes_[offset], value, bytes);
}

void Machine::fence_device() {
  Thread& t = thread();
  auto release = std::make_shared<Release>();
  release->block = static_cast<uint32_t>(block_stamp_ >> 28 & (kMaxBlocks - 1));
  release->thread = t.id;
  release->clock = t.clock++;  // what comes after the fence is not released by it
  release->seen.assign(t.seen->clock, t.seen->clock + num_threads_);
  t.fenced = release;
  if (!t.atomics.empty()) {
    auto acquired = std::make_shared<Acquired>(t.atomics);
    if (t.acquired != nullptr) {
      for (const auto& [address, count] : *t.acquired)
        (*acquired)[address] = std::max((*acquired)[address], count);
    }
    t.acquired = acquired;
  }
}

uint32_t Machine::atomic_add(uint32_t* address, uint32_t value) {
  Thread& t = thread();
  const auto key = reinterpret_cast<uintptr_t>(address);
  size_t offset = 0;
  GlobalBuffer& buffer = check_global(t, key, 4, 4, "atomic", offset);
  if (buffer.access_ == GlobalBuffer::Access::kInput) {
    fail(Fault::kGlobalReadOnly, t, "atomic at offset " + std::to_string(offset));
  }
  for (size_t i = offset; i < offset + 4; ++i) {
    if (!buffer.written_[i]) fail(Fault::kGlobalUninitialized, t, "atomic at offset " + std::to_string(i));
    if ((buffer.written_[i] == 1 && races(t, buffer.writer_[i])) || races(t, buffer.reader_[i]) ||
        races(t, buffer.reader2_[i])) {
      fail(Fault::kGlobalRace, t, "atomic at offset " + std::to_string(i) + ", also accessed without one");
    }
    buffer.written_[i] = 2;
    buffer.writer_[i] = global_stamp(t);
  }
  auto& releases = releases_[key];
  if (!releases.empty()) t.atomics[key] = releases.size();
  if (t.fenced) releases.push_back(t.fenced);
  uint32_t before;
  std::memcpy(&before, &buffer.bytes_[offset], 4);
  const uint32_t after = before + value;
  std::memcpy(&buffer.bytes_[offset], &after, 4);
  return before;
}

// ---------------------------------------------------------------------------------------------------
// Asynchronous copies: the bytes change hands at the wait, and belong to nobody until then.

void Machine::async_copy(void* shared, const void* global, size_t bytes, bool valid) {
  Thread& t = thread();
  const size_t offset =
      check_shared(t, reinterpret_cast<uintptr_t>(shared), bytes, bytes, "asynchronous copy");
  check_shared_write(t, offset, bytes, "asynchronous copy");
  if (valid) {
    unsigned char ignored[16];
    global_read(t, global, ignored, bytes, bytes, "asynchronous copy");
  } else if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail(Fault::kMisaligned, t, "asynchronous copy from address " + hex(reinterpret_cast<uintptr_t>(global)));
  }
  std::fill_n(&shared_writer_[offset], bytes, stamp(t) | kPending);
  std::fill_n(&shared_[offset], bytes, kPoison);
  t.uncommitted.push_back(
      {static_cast<uint32_t>(offset), static_cast<uint32_t>(bytes), valid ? global : nullptr});
}

void Machine::async_commit() {
  Thread& t = thread();
  t.groups.push_back(std::move(t.uncommitted));
  t.uncommitted.clear();
}

void Machine::async_wait(int pending_groups) {
  Thread& t = thread();
  while (static_cast<int>(t.groups.size()) > pending_groups) {
    for (const AsyncCopy& copy : t.groups.front()) {
      unsigned char value[16] = {};
      if (copy.global != nullptr)
        global_read(t, copy.global, value, copy.bytes, copy.bytes, "asynchronous copy");
      std::memcpy(&shared_[copy.shared_offset], value, copy.bytes);
      std::fill_n(&shared_writer_[copy.shared_offset], copy.bytes, stamp(t));
    }
    t.groups.pop_front();
  }
}

// ---------------------------------------------------------------------------------------------------
// The interface

GlobalBuffer::GlobalBuffer(size_t bytes, Access access, size_t offset) : access_(access), bytes_(bytes) {
  machine.add(*this, offset);
  poison();
}

GlobalBuffer::~GlobalBuffer() {
  machine.remove(*this);
}

void GlobalBuffer::poison() {
  if (access_ == Access::kInput) return;
  std::fill(bytes_.begin(), bytes_.end(), kPoison);
  written_.assign(bytes_.size(), 0);
  writer_.assign(bytes_.size(), 0);
  reader_.assign(bytes_.size(), 0);
  reader2_.assign(bytes_.size(), 0);
}

size_t GlobalBuffer::first_unwritten() const {
  if (access_ == Access::kInput) return bytes_.size();
  return std::find(written_.begin(), written_.end(), 0) - written_.begin();
}

void set_schedule(Order order, uint64_t seed) {
  machine.order = order;
  machine.seed = seed;
}
const std::vector<Launch>& launches() {
  return machine.launches;
}
void clear_launches() {
  machine.launches.clear();
}

void run(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
  machine.run(kernel, grid, block, shared_bytes, body, context);
}

Dim3 thread_index() {
  return machine.thread().index;
}
Dim3 block_index() {
  return machine.block_index;
}
Dim3 block_dim() {
  return machine.block_dim;
}
Dim3 grid_dim() {
  return machine.grid_dim;
}
int lane() {
  return machine.thread().id % kWarpLanes;
}
unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(machine.shared_base);
}
void barrier(int id, int threads, const char* what) {
  machine.barrier(id, threads, what);
}
void shared_read(const void* address, void* value, size_t bytes, size_t alignment) {
  machine.shared_read(machine.thread(), address, value, bytes, alignment, "load");
}
void shared_write(void* address, const void* value, size_t bytes, size_t alignment) {
  machine.shared_write(machine.thread(), address, value, bytes, alignment);
}
void global_read(const void* address, void* value, size_t bytes, size_t alignment) {
  machine.global_read(machine.thread(), address, value, bytes, alignment, "load");
}
void global_write(void* address, const void* value, size_t bytes, size_t alignment) {
  machine.global_write(machine.thread(), address, value, bytes, alignment);
}
uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return machine.atomic_add(address, value);
}
void fence_device() {
  machine.fence_device();
}
void set_multiprocessors(int count) {
  machine.multiprocessors = count;
}
int multiprocessors() {
  return machine.multiprocessors;
}
void async_copy(void* shared, const void* global, size_t bytes, bool valid) {
  machine.async_copy(shared, global, bytes, valid);
}
void async_commit() {
  machine.async_commit();
}
void async_wait(int pending_groups) {
  machine.async_wait(pending_groups);
}
void warp_collective(const char* what, Evaluate evaluate, const void* in, void* out) {
  machine.warp_collective(what, evaluate, in, out);
}

void warp_joined() {
  const Thread& t = machine.thread();
  Thread* lanes[kWarpLanes];
  for (int i = 0; i < kWarpLanes; ++i) lanes[i] = &machine.threads[t.id / kWarpLanes * kWarpLanes + i];
  machine.join(lanes, kWarpLanes);
}
void read_matrix_row(int lane, const void* shared, void* row) {
  Thread& t = machine.threads[machine.thread().id / kWarpLanes * kWarpLanes + lane];
  machine.shared_read(t, shared, row, 16, 16, "ldmatrix");
}
void count_mma() {
  ++machine.launches.back().mma;
}
void count_ldmatrix(const void* const* rows) {
  Launch& launch = machine.launches.back();
  ++launch.ldmatrix;
  int in_bank[8] = {}, cycles = 0;  // 16 bytes of a row are four of the 32 banks
  for (int i = 0; i < 8; ++i) {
    bool again = false;
    for (int j = 0; j < i; ++j) again = again || rows[j] == rows[i];
    if (!again) cycles = std::max(cycles, ++in_bank[reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8]);
  }
  launch.ldmatrix_conflicts += cycles - 1;
}

}  // namespace clce::executor
