#include "executor/fault.h"

#include "executor/thread.h"

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

std::string where(const Thread& t) {
  return t.block->kernel + ", block " + text(t.block->index) + ", thread " + text(t.index) + " (warp " +
         std::to_string(t.warp()) + ", lane " + std::to_string(t.lane()) + ")";
}

Error error_in(const Thread& t, Fault fault, const std::string& what) {
  return Error(fault, std::string(name(fault)) + " in " + where(t) + ": " + what);
}

void fail(const Thread& t, Fault fault, const std::string& what) {
  throw error_in(t, fault, what);
}

}  // namespace clce::executor
