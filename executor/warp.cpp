#include "executor/warp.h"

#include "executor/fault.h"
#include "executor/thread.h"

namespace clce::executor {

void Warps::start_block() {
  for (Meeting& meeting : meetings_) meeting.arrived = 0;
}

void Warps::collective(Thread& t, const Operation& at, Evaluate evaluate, const void* in, void* out) {
  ++t.meetings;
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

}  // namespace clce::executor
