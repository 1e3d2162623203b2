// Labels of rows: in global memory, and of a tile in shared memory.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace clce::cuda {

// Labels of one side: row r has labels[r / views], or r / views. There are less than 2^32 rows.
struct Labels {
  const int64_t* labels;
  int64_t rows;
  uint32_t views;
  // Given to rows that are neither anchor nor key: labelled so, or beyond the end.
  int64_t none;
};

CLCE_DEVICE int64_t load_label(const Labels& side, int64_t row) {
  if (row >= side.rows) return side.none;
  uint32_t image = uint32_t(row);
  if (side.views != 1) image /= side.views;
  return side.labels ? ptx::global_load(side.labels + image) : int64_t(image);
}

// The labels of a tile's rows and columns in shared memory: places 0 to kPlaces - 1, 32 to a group.
template <int kPlaces>
struct TileLabels {
  static constexpr int kGroups = kPlaces / 32;
  static constexpr int kBytes = 4 * (2 * kPlaces + 2 * kGroups);
  static_assert(kPlaces % 32 == 0, "a warp stores 32 labels at once");

  uint32_t *low, *high;  // halves of the labels: most labels differ or agree in the lower
  uint32_t* valid;       // per group, which are not `none`
  uint32_t* wide;        // per group, which have an upper half that the lower does not imply

  CLCE_DEVICE explicit TileLabels(void* memory)
      : low(static_cast<uint32_t*>(memory)),
        high(low + kPlaces),
        valid(high + kPlaces),
        wide(valid + kGroups) {}

  // By all lanes of a warp, for 32 places of one group.
  CLCE_DEVICE void store(int place, int64_t label, int64_t none) const {
    ptx::shared_store(low + place, uint32_t(label));
    ptx::shared_store(high + place, uint32_t(uint64_t(label) >> 32));
    const uint32_t valid_places = ptx::ballot(label != none);
    const uint32_t wide_places = ptx::ballot(label != int32_t(label));
    if (place % 32 == 0) {
      ptx::shared_store(valid + place / 32, valid_places);
      ptx::shared_store(wide + place / 32, wide_places);
    }
  }

  CLCE_DEVICE bool all_valid() const {
    uint32_t all = ~0u;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) all &= ptx::shared_load(valid + i);
    return all == ~0u;
  }

  CLCE_DEVICE bool any_wide() const {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) any |= ptx::shared_load(wide + i);
    return any != 0;
  }

  // Bit i: of place + i, up to the end of the group.
  CLCE_DEVICE uint32_t valid_from(int place) const {
    return ptx::shared_load(valid + place / 32) >> (place % 32);
  }
  CLCE_DEVICE bool is_valid(int place) const { return valid_from(place) & 1; }
};

}  // namespace clce::cuda
