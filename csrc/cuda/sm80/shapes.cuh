// The tile shapes that this engine is compiled for.
#pragma once

#include "cuda/plan/engine.h"
#include "cuda/tile/fma.cuh"
#include "cuda/tile/half.cuh"
#include "cuda/tile/tf32.cuh"

namespace clce::cuda::sm80 {

// A block may have 99 KiB of shared memory on sm_86 and sm_89, the least of all devices since sm_80; the most
// that blocks together may have is 228 KiB, of which each takes 1 KiB for itself (CUDA programming guide,
// technical specifications per compute capability).
constexpr bool shared_fits(int bytes, int blocks) {
  return bytes <= 99 * 1024 && blocks * (bytes + 1024) <= 228 * 1024;
}

// kDepth: columns of embeddings per step. kStages: steps on their way at once. kMinBlocks: blocks that
// shall fit on a multiprocessor together, which bounds the registers.
template <int kM, int kWarpsM, int kWarpsN, int kDepth_, int kStages_, int kMinBlocks_>
struct ForwardShape {
  using Logits = Fragment<kM, kM, kWarpsM, kWarpsN>;
  static constexpr int kDepth = kDepth_, kStages = kStages_, kMinBlocks = kMinBlocks_;
};

// Both sides stream: kStep is the number of rows of the other side per step of the second product, which
// fills kDims columns of gradient. The two products may lay their tiles over the warps differently.
template <class Logits_, class Gradients_, int kDepth_, int kStep_, int kStages_, int kMinBlocks_>
struct StreamingShape {
  using Logits = Logits_;
  using Gradients = Gradients_;
  static constexpr bool kResident = false, kUnbounded = true;
  static constexpr int kDepth = kDepth_, kStep = kStep_, kStages = kStages_, kMinBlocks = kMinBlocks_;
};

// The owner's rows stay, tiles of the other side serve both products: for rows of at most kDims elements.
template <class Logits_, class Gradients_, int kStages_, int kMinBlocks_>
struct ResidentShape {
  using Logits = Logits_;
  using Gradients = Gradients_;
  static constexpr bool kResident = true, kUnbounded = true;
  static constexpr int kDepth = Gradients::kN, kStep = Logits::kN, kStages = kStages_;
  static constexpr int kMinBlocks = kMinBlocks_;
};

// Compiled for bounded logits only.
template <class Shape>
struct BoundedOnly : Shape {
  static constexpr bool kUnbounded = false;
};

template <class... Items>
struct List {};

// Calls use(Item) with the item at that place of the list.
template <class Use, class... Items>
void with_item(List<Items...>, int place, Use use) {
  int i = 0;
  ((i++ == place ? use(Items{}) : void()), ...);
}

// Forward: the large and the small tile. Backward: by width of the gradient; the widest is also what wider
// rows are cut into.
template <Format format>
struct Shapes;

template <class Product_>
struct HalfShapes {
  using Product = Product_;
  using Forward = List<ForwardShape<128, 2, 4, 32, 3, 2>, ForwardShape<64, 2, 2, 64, 3, 2>>;
  using Resident128 = ResidentShape<Fragment<64, 64, 2, 2>, Fragment<64, 128, 2, 2>, 2, 3>;
  using Resident256 = ResidentShape<Fragment<64, 32, 4, 2>, Fragment<64, 256, 2, 4>, 3, 2>;
  using Streaming512 = StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 512, 1, 8>, 64, 16, 4, 1>;
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
  using Forward = List<ForwardShape<128, 2, 4, 16, 3, 1>, ForwardShape<64, 2, 2, 16, 3, 2>>;
  using Backward = List<StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 128, 2, 4>, 16, 16, 3, 1>,
                        StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 256, 2, 4>, 16, 16, 3, 1>>;
};

template <>
struct Shapes<Format::kTf32> {
  using Product = Tf32Product;
  using Forward = List<ForwardShape<128, 2, 4, 16, 3, 1>, ForwardShape<64, 2, 2, 32, 3, 2>>;
  using Backward = List<StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 128, 2, 4>, 32, 16, 3, 1>,
                        StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 256, 2, 4>, 32, 16, 3, 1>>;
};

template <>
struct Shapes<Format::kFloat64> {
  using Product = FmaProduct<double>;
  using Only = ForwardShape<32, 2, 2, 8, 3, 2>;
  using Forward = List<Only, Only>;
  using Backward = List<StreamingShape<Fragment<32, 32, 2, 2>, Fragment<32, 64, 2, 2>, 8, 16, 3, 2>>;
};

}  // namespace clce::cuda::sm80
