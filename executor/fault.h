// What a GPU would punish, often silently: the kinds of faults, and the exception that reports one.
#pragma once

#include <stdexcept>
#include <string>

namespace clce::executor {

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
  kBarrier,              // a barrier that not all threads reach, or at another place
  kDivergence,           // a warp-wide operation that not all 32 lanes reach, or at another place
};
const char* name(Fault fault);

// what() names the kernel, the block, the thread and the address.
class Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& what) : std::runtime_error(what), fault(fault) {}
  const Fault fault;
};

// A fault of a thread: names the thread's place before `what`.
struct Thread;
std::string where(const Thread& t);
Error error_in(const Thread& t, Fault fault, const std::string& what);
[[noreturn]] void fail(const Thread& t, Fault fault, const std::string& what);

}  // namespace clce::executor
