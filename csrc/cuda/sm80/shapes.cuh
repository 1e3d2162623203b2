// The tile shapes that this engine is compiled for, and why.
//
// Registers: a multiprocessor has 65536, so each of 256 threads may have 255, or 128 if two such blocks run
// at once. What the compiler takes is quoted for sm_80 / sm_90, bounded logits; tools/check_sass.py prints it
// for all. Shared memory: see shared_fits. A step loads 16 KiB unless something else is said, and has one
// barrier.
#pragma once

#include "cuda/list.h"
#include "cuda/plan/engine.h"
#include "cuda/tile/fma.cuh"
#include "cuda/tile/half.cuh"
#include "cuda/tile/tf32.cuh"

namespace clce::cuda::sm80 {

// Whether so many blocks run at once on every device: sm_86 and sm_89 have the least shared memory since
// sm_80, 100 KiB a multiprocessor, where an A100 has 164 and Hopper 228 (CUDA programming guide, technical
// specifications per compute capability).
constexpr bool shared_fits(int bytes, int blocks) {
  return blocks * (bytes + Device::kReservedShared) <= 100 * 1024;
}

// A square tile. kDepth: columns of embeddings per step. kStages: places of the pipeline. kMinBlocks: blocks
// that shall fit on a multiprocessor of Hopper together, which bounds the registers; with unbounded logits a
// block may be alone. On a device with less shared memory fewer run, of which the plan knows. kBand: columns
// of tiles that are walked together, whose sums stay in shared memory.
template <int kM, int kWarpsM, int kWarpsN, int kDepth_, int kStages_, int kMinBlocks_, int kBand_ = 4>
struct ForwardShape {
  using Logits = Fragment<kM, kM, kWarpsM, kWarpsN>;
  static constexpr int kDepth = kDepth_, kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kBand = kBand_;
};

// Both sides stream: kStep is the number of rows of the other side per step of the second product. The two
// products may lay their tiles over the warps differently.
template <class Logits_, class Gradients_, int kDepth_, int kStep_, int kStages_, int kMinBlocks_>
struct StreamingShape {
  using Logits = Logits_;
  using Gradients = Gradients_;
  static constexpr bool kUnbounded = true;
  static constexpr int kDepth = kDepth_, kStep = kStep_, kStages = kStages_, kMinBlocks = kMinBlocks_;
};

// The owner's rows stay in registers, tiles of the other side serve both products: for rows that fit into the
// gradient's width.
template <class Logits_, class Gradients_, int kStages_, int kMinBlocks_>
struct ResidentShape {
  using Logits = Logits_;
  using Gradients = Gradients_;
  static constexpr bool kUnbounded = true;
  static constexpr int kStages = kStages_, kMinBlocks = kMinBlocks_;
};

// Compiled for bounded logits only.
template <class Shape>
struct BoundedOnly : Shape {
  static constexpr bool kUnbounded = false;
};

// Forward: the large tile, for batches that fill a device with it, and the small one. Backward: by width of
// the gradient; the widest is also what wider rows are cut into. plan/tiles.h repeats what a plan needs of
// them.
template <Format format>
struct Shapes;

template <class Product_>
struct HalfShapes {
  using Product = Product_;

  // Large: 64 logits a thread, and with all that their sums need 128 / 128 registers, which lets two blocks
  // run, where there is room for 98 KiB of each: on Hopper. 72 of them are the pipeline's: two steps of 36
  // KiB have as much on its way as three of half the depth, and half as many barriers. 24 hold the sums of a
  // row of tiles and of a band of two; a third stage or a wider band would not fit. Small: 32 logits, 102 /
  // 110 registers.
  using Forward = List<ForwardShape<128, 2, 4, 64, 2, 2, 2>, ForwardShape<64, 2, 2, 64, 3, 2>>;

  // A warp has 32 rows: 128 registers hold their gradient, 64 their embeddings, 16 the logits, 8 dL/ds, 255 /
  // 255 in all, of which eight warps may have as many. Two blocks rather than one: one multiplies while the
  // other waits at its barrier. More rows would be read for as many products, but registers are full.
  using Resident128 = ResidentShape<Fragment<128, 64, 4, 1>, Fragment<128, 128, 4, 1>, 2, 2>;
  // Rows twice as wide, so 16 to a warp, in the same registers, 254 / 255 in all: each piece of the other
  // side then serves half as many products, and shared memory is what it waits for. One block, or each would
  // have to read the other side for 64 rows.
  using Resident256 = ResidentShape<Fragment<128, 64, 8, 1>, Fragment<128, 256, 8, 1>, 2, 1>;
  // 128 registers hold the gradient, 16 the logits, 202 / 200 in all: one block. kStep is what one mma sums
  // over; a fifth stage would not fit. One row of warps in the second product: a warp then reads an eighth of
  // the other side's rows, the larger operand, instead of a quarter.
  using Streaming512 = StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 512, 1, 8>, 64, 16, 4, 1>;
  // 192 registers hold the gradient, 16 the logits, 255 / 255 in all. A step loads 24 KiB, a fourth stage
  // would not fit. Two rows of warps in the second product: 8 registers hold its operand of dL/ds, where one
  // row needs 16. (That fits as well; which is faster has not been measured.) Unbounded logits need ten
  // coefficients a row instead of four; 768 columns would spill on sm_80, 348 bytes a thread.
  using Streaming768 = StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 768, 2, 4>, 96, 16, 3, 1>;
  using Backward = List<Resident128, Resident256, Streaming512, BoundedOnly<Streaming768>>;
};

template <>
struct Shapes<Format::kBFloat16> : HalfShapes<HalfProduct<ptx::bf16>> {};
template <>
struct Shapes<Format::kFloat16> : HalfShapes<HalfProduct<ptx::f16>> {};

template <>
struct Shapes<Format::kFloat32> {
  using Product = FmaProduct<float>;
  // Large: 64 logits and the operands of their outer product, 168 / 159 registers: one block, for two would
  // leave 128, and it would spill. A fourth stage would not fit. Small: 102 / 128 registers. Its step loads 8
  // KiB only: a barrier is short beside that many multiply-adds without tensor cores.
  using Forward = List<ForwardShape<128, 2, 4, 16, 3, 1>, ForwardShape<64, 2, 2, 16, 3, 2>>;
  // 32 or 64 registers hold the gradient, 118 / 118 or 148 / 148 in all: one block, for two would leave 128.
  // A step of the first product loads 8 KiB, of the second 8 or 16. No 512 columns: three stages would have
  // 97 KiB alone.
  using Backward = List<StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 128, 2, 4>, 16, 16, 3, 1>,
                        StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 256, 2, 4>, 16, 16, 3, 1>>;
};

template <>
struct Shapes<Format::kTf32> {
  using Product = Tf32Product;
  // As float32, but tensor cores are done sooner, so steps are longer where that fits. Large: 164 / 168
  // registers. Small: 103 / 108 registers.
  using Forward = List<ForwardShape<128, 2, 4, 16, 3, 1>, ForwardShape<64, 2, 2, 32, 3, 2>>;
  // 102 / 104 or 130 / 136 registers; a block has 74 KiB.
  using Backward = List<StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 128, 2, 4>, 32, 16, 3, 1>,
                        StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 256, 2, 4>, 32, 16, 3, 1>>;
};

// float64 is for checking gradients, not for speed: one tile of each kind, small and quick to compile.
// Exponentials take most of its 144 / 174 and 186 / 192 registers; two blocks of 128 threads may have 255. A
// step loads 4 KiB, or 8 in the second product. Bands of one tile, so that tests have several of them.
template <>
struct Shapes<Format::kFloat64> {
  using Product = FmaProduct<double>;
  using Only = ForwardShape<32, 2, 2, 8, 3, 2, 1>;
  using Forward = List<Only, Only>;
  using Backward = List<StreamingShape<Fragment<32, 32, 2, 2>, Fragment<32, 64, 2, 2>, 8, 16, 3, 2>>;
};

}  // namespace clce::cuda::sm80
