// Which pairs of row blocks are worked on at the same time. In each round every block is touched by one
// task at most, so tasks add to their blocks' rows without locks, and the order of the additions depends
// on the sizes alone: the same bits at every run and for every number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace clce::cpu {

struct Blocks {
  int64_t rows, size;
  int64_t count() const { return (rows + size - 1) / size; }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, rows - block * size); }
};

template <class Task>
void in_parallel(int64_t tasks, const Task& task) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// task(i, j) for all i <= j: the diagonal, then a round-robin tournament.
template <class Task>
void for_symmetric_pairs(int64_t blocks, const Task& task) {
  in_parallel(blocks, [&](int64_t i) { task(i, i); });
  const int64_t players = blocks + blocks % 2;  // an odd one out sits a round out
  for (int64_t round = 0; round + 1 < players; ++round) {
    in_parallel(players / 2, [&](int64_t k) {
      const int64_t circle = players - 1;
      int64_t a = (round + k) % circle;
      int64_t b = k == 0 ? players - 1 : (round - k + circle) % circle;
      if (a > b) std::swap(a, b);
      if (b < blocks) task(a, b);
    });
  }
}

// task(i, j) for all pairs of the two sides, no i and no j twice in a round.
template <class Task>
void for_disjoint_pairs(int64_t rows, int64_t cols, const Task& task) {
  const int64_t rounds = std::max(rows, cols);
  for (int64_t round = 0; round < rounds; ++round) {
    in_parallel(std::min(rows, cols), [&](int64_t k) {
      const int64_t other = (k + round) % rounds;
      rows <= cols ? task(k, other) : task(other, k);
    });
  }
}

}  // namespace clce::cpu
