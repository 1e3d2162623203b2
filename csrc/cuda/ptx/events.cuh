// What a block does, for an executor to count: on a GPU there is nothing to run. Each is called by all
// threads of the block alike.
#pragma once

namespace clce::ptx {

// A tile, whose logits took so many steps.
CLCE_DEVICE void count_tile(int) {}

// A step, whose data lies in this place of the pipeline's ring.
CLCE_DEVICE void count_step(int) {}

// A copy into shared memory that has fewer rows, or fewer columns, than its place has.
CLCE_DEVICE void count_copy(bool, bool) {}

}  // namespace clce::ptx
