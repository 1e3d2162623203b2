// The labels of a walk's tiles: which of a warp's tiles hold nothing but negatives, and the pairs of the
// others.
#pragma once

#include "cuda/kernels/labels.cuh"
#include "cuda/kernels/pairs.cuh"
#include "cuda/tile/fragment.cuh"

namespace clce::cuda {

// Labels of the tile's rows and of the walk's kColumns columns in shared memory. A lane's labels lie side by
// side: it reads them as vectors. They are lower halves: where those are equal, the upper ones, which few
// labels have, are read from global memory.
template <class F, int kColumns>
struct WalkLabels {
  static constexpr int kGroups = (F::kM + kColumns) / 32;
  static constexpr int kBytes = 4 * (F::kM + kColumns + 2 * kGroups);
  static constexpr int kRowLines = 2 * F::kMI, kColumnLines = 2 * F::kNI;
  static_assert(F::kM % 32 == 0 && F::kN % 32 == 0, "a warp stores 32 labels at once");
  enum Flag : uint32_t { kNotAllValid = 1, kWide = 2 };

  uint32_t *rows, *cols;
  uint32_t* valid;  // per 32 rows, then per 32 columns: which are not `none`
  uint32_t* flags;

  CLCE_DEVICE explicit WalkLabels(void* memory)
      : rows(static_cast<uint32_t*>(memory)),
        cols(rows + F::kM),
        valid(cols + kColumns),
        flags(valid + kGroups) {}

  // By all lanes of a warp, for 32 rows of the tile or columns of the walk.
  CLCE_DEVICE void store_row(uint32_t row, int64_t label, int64_t none) const {
    constexpr uint32_t kWarp = 16 * F::kMI;
    const uint32_t r = row % kWarp;
    store(rows + (row - r + r % 8 * kRowLines + r / 8), row, label, none);
  }
  CLCE_DEVICE void store_col(uint32_t col, int64_t label, int64_t none) const {
    constexpr uint32_t kWarp = 8 * F::kNI;
    const uint32_t c = col % kWarp;
    store(cols + (col - c + c % 8 / 2 * kColumnLines + c / 8 * 2 + c % 2), F::kM + col, label, none);
  }

  // Of a lane's rows and columns, in the order of ByRow and ByColumn.
  CLCE_DEVICE void load_rows(const F& f, uint32_t (&labels)[kRowLines]) const {
    load(rows + f.first_row() + f.group * kRowLines, labels);
  }
  CLCE_DEVICE void load_cols(const F& f, int first, uint32_t (&labels)[kColumnLines]) const {
    load(cols + first + f.first_col() + f.pair * kColumnLines, labels);
  }

  // Flags of the warp's rows and columns together; the tile begins at column `first` of the walk.
  CLCE_DEVICE uint32_t flags_of(const F& f, int first) const {
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < groups(16 * F::kMI); ++i) all |= ptx::shared_load(flags + f.first_row() / 32 + i);
#pragma unroll
    for (int i = 0; i < groups(8 * F::kNI); ++i) {
      all |= ptx::shared_load(flags + (F::kM + first + f.first_col()) / 32 + i);
    }
    return all;
  }

  CLCE_DEVICE bool is_valid_row(int row) const { return is_valid(row); }
  CLCE_DEVICE bool is_valid_col(int col) const { return is_valid(F::kM + col); }

 private:
  static constexpr int groups(int lines) { return lines < 32 ? 1 : lines / 32; }

  CLCE_DEVICE void store(uint32_t* to, uint32_t place, int64_t label, int64_t none) const {
    ptx::shared_store(to, uint32_t(label));
    const uint32_t valid_places = ptx::ballot(label != none);
    const uint32_t wide_places = ptx::ballot(label != int32_t(label));
    if (place % 32 == 0) {
      ptx::shared_store(valid + place / 32, valid_places);
      ptx::shared_store(flags + place / 32,
                        (valid_places != ~0u ? kNotAllValid : 0u) | (wide_places != 0 ? kWide : 0u));
    }
  }

  template <int kCount>
  CLCE_DEVICE static void load(const uint32_t* from, uint32_t (&labels)[kCount]) {
    using Vector = std::conditional_t<kCount % 4 == 0, ptx::Pack<uint32_t>, ptx::Pair<uint32_t>>;
    constexpr int kSize = sizeof(Vector) / 4;
    static_assert(kCount % kSize == 0, "whole vectors");
#pragma unroll
    for (int i = 0; i < kCount; i += kSize) {
      const Vector vector = ptx::shared_load(reinterpret_cast<const Vector*>(from + i));
      if constexpr (kSize == 4) {
#pragma unroll
        for (int k = 0; k < 4; ++k) labels[i + k] = vector.values[k];
      } else {
        labels[i] = vector.low, labels[i + 1] = vector.high;
      }
    }
  }

  CLCE_DEVICE bool is_valid(int place) const {
    return ptx::shared_load(valid + place / 32) >> (place % 32) & 1;
  }
};

}  // namespace clce::cuda
