#include "executor/warp.h"

#include <algorithm>

#include "executor/fault.h"
#include "executor/thread.h"

namespace clce::executor {

void Warps::start_block() {
  for (Meeting& meeting : meetings_) meeting.arrived = 0;
}

void Warps::collective(Thread& t, const Operation& at, Evaluate evaluate, const void* in, void* out) {
  Meeting& meeting = meetings_[t.warp()];
  if (meeting.arrived == 0) {
    meeting.at = at;
  } else if (at != meeting.at) {
    fail(t, Fault::kDivergence,
         "this lane is at " + at.text() + ", others of its warp are at " + meeting.at.text());
  }
  meeting.in[t.lane()] = in;
  meeting.out[t.lane()] = out;
  meeting.arrived |= 1u << t.lane();
  if (meeting.arrived != 0xffffffffu) {
    scheduler_.wait(t, at, true);
    return;
  }
  evaluate(meeting.in, meeting.out);
  meeting.arrived = 0;
  scheduler_.release(t, scheduler_.lanes_of(t), kWarpLanes);
}

int bank_conflicts(const void* const* rows) {
  int in_bank[8] = {}, cycles = 0;  // 16 bytes of a row are four of the 32 banks
  for (int i = 0; i < 8; ++i) {
    if (std::find(rows, rows + i, rows[i]) != rows + i) continue;
    cycles = std::max(cycles, ++in_bank[reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8]);
  }
  return cycles - 1;
}

}  // namespace clce::executor
