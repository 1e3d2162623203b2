// Runs the CUDA kernels' own source on the CPU and reports what a GPU would punish.
//
// Thread blocks run one after another; the threads of a block are fibers that run until they have to wait
// for one another. Device addresses are not host addresses: global and shared memory live in reserved,
// inaccessible address ranges and are reached through clce::ptx alone (ptx_host.h), which checks every
// access. Whatever goes around it is a segmentation fault with a message, host code included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace clce::executor {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum class Fault {
  kLaunch,               // grid, block or shared memory that no GPU accepts
  kSharedOutOfBounds,    // outside the launch's dynamic shared memory
  kSharedUninitialized,  // a read of shared memory that nobody wrote
  kSharedRace,           // two threads, one of them writing, no barrier between
  kGlobalOutOfBounds,    // outside every buffer
  kGlobalUninitialized,  // a read of an output or workspace that nobody wrote
  kGlobalReadOnly,       // a write to an input
  kGlobalRace,           // as kSharedRace; between blocks of one launch: no fence - atomic - fence between
  kMisaligned,           // an address that is no multiple of the access's size
  kAsyncNotWaited,       // bytes of an asynchronous copy, before its wait
  kBarrier,              // a barrier that not all threads reach
  kDivergence,           // a warp-wide operation that not all 32 lanes reach
};
const char* name(Fault fault);

// what() names the kernel, the block, the thread and the address.
class Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& what) : std::runtime_error(what), fault(fault) {}
  const Fault fault;
};

// In which order threads that could run do run. Results must not depend on it.
enum class Order { kAscending, kDescending, kRandom };
void set_schedule(Order order, uint64_t seed = 0);

// What each launch did, in order; cleared by clear_launches().
struct Launch {
  std::string kernel;
  Dim3 grid, block;
  size_t shared_bytes = 0;
  int64_t mma = 0;                 // warp-wide matrix products
  int64_t ldmatrix = 0;            // 8x8 matrices loaded
  int64_t ldmatrix_conflicts = 0;  // further shared memory cycles they took because of bank conflicts
};
const std::vector<Launch>& launches();
void clear_launches();

// Global memory. Inputs are read-only; outputs hold poison (0xff: NaN in every dtype) and may not be read
// by a kernel before one wrote them. The address is 1 MiB aligned, plus `offset` bytes.
class GlobalBuffer {
 public:
  enum class Access { kInput, kOutput };
  GlobalBuffer(size_t bytes, Access access, size_t offset = 0);
  ~GlobalBuffer();
  GlobalBuffer(const GlobalBuffer&) = delete;
  GlobalBuffer& operator=(const GlobalBuffer&) = delete;

  void* device() const { return reinterpret_cast<void*>(address_); }
  unsigned char* host() { return bytes_.data(); }
  const unsigned char* host() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }
  size_t first_unwritten() const;  // size(): none
  void poison();                   // forget everything written

 private:
  friend class Machine;
  uintptr_t address_ = 0;
  Access access_;
  std::vector<unsigned char> bytes_;
  std::vector<unsigned char> written_;  // of each byte (outputs only): 0 never, 1 by a store, 2 by an atomic
  std::vector<uint64_t> writer_;        // who did
  std::vector<uint64_t> reader_, reader2_;  // the last readers, of two different blocks if there were two
};

template <class T>
class GlobalArray {
 public:
  // Input.
  explicit GlobalArray(const std::vector<T>& values, size_t offset = 0)
      : buffer_(values.size() * sizeof(T), GlobalBuffer::Access::kInput, offset) {
    if (!values.empty()) std::memcpy(buffer_.host(), values.data(), values.size() * sizeof(T));
  }
  // Output or workspace.
  explicit GlobalArray(size_t count, size_t offset = 0)
      : buffer_(count * sizeof(T), GlobalBuffer::Access::kOutput, offset) {}

  T* data() const { return static_cast<T*>(buffer_.device()); }
  size_t size() const { return buffer_.size() / sizeof(T); }
  void poison() { buffer_.poison(); }

  // Fails where an element was never written.
  std::vector<T> read() const {
    const size_t unwritten = buffer_.first_unwritten();
    if (unwritten != buffer_.size()) {
      throw Error(Fault::kGlobalUninitialized, "element " + std::to_string(unwritten / sizeof(T)) + " of " +
                                                   std::to_string(size()) + " was never written");
    }
    return read_unchecked();
  }
  std::vector<T> read_unchecked() const {
    std::vector<T> values(size());
    if (!values.empty()) std::memcpy(values.data(), buffer_.host(), values.size() * sizeof(T));
    return values;
  }

 private:
  GlobalBuffer buffer_;
};

// Runs body(context) once per thread; throws Error.
void run(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(void*), void* context);

// What the kernels' host code is told about the device.
void set_multiprocessors(int count);
int multiprocessors();

// What a device function may ask of the thread it runs in; see ptx_host.h.
Dim3 thread_index();
Dim3 block_index();
Dim3 block_dim();
Dim3 grid_dim();
int lane();
unsigned char* dynamic_shared();
void barrier(int id, int threads, const char* what);  // threads < 0: the whole block
void shared_read(const void* address, void* value, size_t bytes, size_t alignment);
void shared_write(void* address, const void* value, size_t bytes, size_t alignment);
void global_read(const void* address, void* value, size_t bytes, size_t alignment);
void global_write(void* address, const void* value, size_t bytes, size_t alignment);
uint32_t atomic_add(uint32_t* address, uint32_t value);
void fence_device();
void async_copy(void* shared, const void* global, size_t bytes, bool valid);
void async_commit();
void async_wait(int pending_groups);

// All 32 lanes of a warp meet here; the last one calls evaluate(in, out) with the lanes' pointers. Every
// lane must come with the same `what`.
using Evaluate = void (*)(const void* const* in, void* const* out);
void warp_collective(const char* what, Evaluate evaluate, const void* in, void* out);

// For evaluate().
void warp_joined();  // memory accesses of the 32 lanes before it are visible to all of them after it
void read_matrix_row(int lane, const void* shared, void* row);  // 16 bytes
void count_mma();
void count_ldmatrix(const void* const* rows);  // 8 addresses: one 8x8 matrix

}  // namespace clce::executor
