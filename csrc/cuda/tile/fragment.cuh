// Which elements of a block's tile a thread holds. Every product uses the layout of mma.m16n8's
// accumulator, so whatever is done with the logits is written once.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace clce::cuda {

// A [kM, kN] tile over kWarpsM x kWarpsN warps; each holds kMI x kNI pieces of 16 x 8, and of each piece
// a lane holds four numbers: rows group and group + 8, columns 2 pair and 2 pair + 1.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_>
struct Fragment {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kMI = kM / kWarpsM / 16, kNI = kN / kWarpsN / 8;
  static_assert(kMI * 16 * kWarpsM == kM && kNI * 8 * kWarpsN == kN, "warps cover the tile evenly");

  int warp_row, warp_col;  // of the warp within the grid of warps
  int group, pair;         // of the lane

  CLCE_DEVICE explicit Fragment(uint32_t thread = threadIdx.x) {
    // Unsigned, for which a division is one shift.
    const uint32_t warp = thread / 32;
    warp_row = int(warp / kWarpsN);
    warp_col = int(warp % kWarpsN);
    group = int(thread / 4 % 8);
    pair = int(thread % 4);
  }

  // The same, of which the compiler knows nothing: it computes addresses where they are used, instead of
  // keeping them in registers throughout.
  CLCE_DEVICE static Fragment opaque() { return Fragment(ptx::opaque(threadIdx.x)); }

  // As a product's Reads: nothing is worth a register of its own.
  CLCE_DEVICE static Fragment kept() { return Fragment(); }

  CLCE_DEVICE int first_row() const { return warp_row * (kMI * 16); }
  CLCE_DEVICE int first_col() const { return warp_col * (kNI * 8); }
  // Row and column, within the tile, of element e (0 to 3) of piece (mi, ni).
  CLCE_DEVICE int row(int mi, int e) const { return first_row() + mi * 16 + group + (e / 2) * 8; }
  CLCE_DEVICE int col(int ni, int e) const { return first_col() + ni * 8 + 2 * pair + (e & 1); }
};

template <class T, int kMI, int kNI>
CLCE_DEVICE void set_zero(T (&x)[kMI][kNI][4]) {
#pragma unroll
  for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[mi][ni][e] = T(0);
    }
  }
}

}  // namespace clce::cuda
