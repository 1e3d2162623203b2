// Bank conflicts in shared memory. It has 32 banks, of which each gives or takes one word of 4 bytes per
// cycle: other words of the same bank have to wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "executor/call_site.h"
#include "executor/clocks.h"

namespace clce::executor {

// How many further cycles it takes to access so many bytes at each of these addresses in one turn.
int bank_conflicts(const uintptr_t* addresses, int count, size_t bytes);

struct BankTraffic {
  int64_t accesses = 0;   // by warps
  int64_t conflicts = 0;  // further cycles that they took
};
// By place in the source, as Operation::text() says it.
using BankTraffics = std::map<std::string, BankTraffic>;

// What the lanes of a warp ask for one by one here is one access of all of them on a GPU: what they ask for
// at the same place of the source, for the n-th time since they last met at a warp-wide operation or barrier.
class Banks {
 public:
  bool is_counting() const { return counting_; }
  void set_counting(bool on) { counting_ = on; }

  void start_block() { lanes_.assign(counting_ ? kMaxThreads : 0, {}); }
  void add(const Thread& t, const Operation& at, const void* address, size_t bytes);
  void end_block(BankTraffics& traffic) const;

 private:
  struct Access {
    Operation at;
    uint32_t meetings, bytes;
    uintptr_t address;
  };
  bool counting_ = false;
  std::vector<std::vector<Access>> lanes_;  // by thread of the block, in their order
};

}  // namespace clce::executor
