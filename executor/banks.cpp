#include "executor/banks.h"

#include <algorithm>
#include <tuple>

#include "executor/thread.h"

namespace clce::executor {

namespace {

constexpr int kBanks = 32, kWordBytes = 4;

// An operation's name and place in the source.
using Place = std::tuple<const char*, const char*, int>;
Place place_of(const Operation& at) {
  return {at.what, at.site.file, at.site.line};
}

// Of a warp, in one turn: 32, or as many (16, 8, ...) as ask for no more words than there are banks.
int lanes_at_once(size_t bytes) {
  int lanes = kWarpLanes;
  while (lanes > 1 && lanes * bytes > kBanks * kWordBytes) lanes /= 2;
  return lanes;
}

}  // namespace

int bank_conflicts(const uintptr_t* addresses, int count, size_t bytes) {
  uintptr_t words[kBanks][kWarpLanes];  // that each bank has to give
  int in_bank[kBanks] = {}, cycles = 1;
  for (int i = 0; i < count; ++i) {
    const uintptr_t last = (addresses[i] + bytes - 1) / kWordBytes;
    for (uintptr_t word = addresses[i] / kWordBytes; word <= last; ++word) {
      const uintptr_t bank = word % kBanks;
      uintptr_t* const end = words[bank] + in_bank[bank];
      if (std::find(words[bank], end, word) != end) continue;
      *end = word;
      cycles = std::max(cycles, ++in_bank[bank]);
    }
  }
  return cycles - 1;
}

void Banks::add(const Thread& t, const Operation& at, const void* address, size_t bytes) {
  lanes_[t.id].push_back({at, t.meetings, uint32_t(bytes), reinterpret_cast<uintptr_t>(address)});
}

void Banks::end_block(BankTraffics& traffic) const {
  // An access of a warp: what its lanes access in one turn, 32 words at most.
  struct WarpAccess {
    const Operation* at = nullptr;
    size_t bytes = 0;  // of a lane
    std::vector<std::vector<uintptr_t>> turns;
  };
  for (size_t first = 0; first < lanes_.size(); first += kWarpLanes) {
    // By meetings, place, and how often the lane has been there since.
    std::map<std::tuple<uint32_t, Place, int>, WarpAccess> of_warp;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      std::map<Place, int> before;
      uint32_t meetings = 0;
      for (const Access& access : lanes_[first + lane]) {
        if (access.meetings != meetings) before.clear();
        meetings = access.meetings;
        const Place place = place_of(access.at);
        WarpAccess& all = of_warp[{meetings, place, before[place]++}];
        const int at_once = lanes_at_once(access.bytes);
        all.at = &access.at;
        all.bytes = access.bytes;
        all.turns.resize(kWarpLanes / at_once);
        all.turns[lane / at_once].push_back(access.address);
      }
    }
    for (const auto& [key, all] : of_warp) {
      BankTraffic& sum = traffic[all.at->text()];
      ++sum.accesses;
      for (const auto& turn : all.turns) {
        sum.conflicts += bank_conflicts(turn.data(), int(turn.size()), all.bytes);
      }
    }
  }
}

}  // namespace clce::executor
