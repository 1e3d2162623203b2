// What a block says of itself, by its first thread.
#pragma once

#include "executor/machine.h"

namespace clce::ptx {

namespace host {
template <class Add>
void add_to_walk(Add add) {
  if (executor::thread().id == 0) add(executor::machine().coverage.walk());
}
}  // namespace host

inline void count_tile(int steps) {
  host::add_to_walk([=](executor::Walk& walk) { walk.add_tile(steps); });
}
inline void count_step(int place) {
  host::add_to_walk([=](executor::Walk& walk) { walk.add_step(place); });
}
inline void count_copy(bool partial_rows, bool partial_columns) {
  host::add_to_walk([=](executor::Walk& walk) {
    walk.partial_rows |= partial_rows;
    walk.partial_columns |= partial_columns;
  });
}

}  // namespace clce::ptx
