// The tile shapes that each engine is compiled for.
#pragma once

#include "cuda/tile/fma.cuh"
#include "cuda/tile/half.cuh"
#include "cuda/tile/tf32.cuh"

namespace clce::cuda {

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
  static constexpr bool kResident = false;
  static constexpr int kDepth = kDepth_, kStep = kStep_, kStages = kStages_, kMinBlocks = kMinBlocks_;
};

// The owner's rows stay, tiles of the other side serve both products: for rows of at most kDims elements.
template <class Logits_, class Gradients_, int kStages_, int kMinBlocks_>
struct ResidentShape {
  using Logits = Logits_;
  using Gradients = Gradients_;
  static constexpr bool kResident = true;
  static constexpr int kDepth = Gradients::kN, kStep = Logits::kN, kStages = kStages_;
  static constexpr int kMinBlocks = kMinBlocks_;
};

template <class... Items>
struct List {};

// Forward: large tiles for batches that fill the device with them. Backward: by width of the gradient; the
// widest is also what wider rows are cut into. Backward for logits that are not bounded: BackwardAny.
template <class Engine>
struct Shapes;

template <class T>
struct Shapes<HalfEngine<T>> {
  using ForwardLarge = ForwardShape<128, 2, 4, 32, 3, 2>;
  using ForwardSmall = ForwardShape<64, 2, 2, 64, 3, 2>;
  using Resident128 = ResidentShape<Fragment<64, 64, 2, 2>, Fragment<64, 128, 2, 2>, 2, 3>;
  using Resident256 = ResidentShape<Fragment<64, 32, 4, 2>, Fragment<64, 256, 2, 4>, 3, 2>;
  using Streaming512 = StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 512, 1, 8>, 64, 16, 4, 1>;
  using Streaming768 = StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 768, 2, 4>, 96, 16, 3, 1>;
  using Backward = List<Resident128, Resident256, Streaming512, Streaming768>;
  // Its coefficients leave no registers for 768 columns.
  using BackwardAny = List<Resident128, Resident256, Streaming512>;
};

template <>
struct Shapes<FmaEngine<float>> {
  using ForwardLarge = ForwardShape<128, 2, 4, 16, 3, 1>;
  using ForwardSmall = ForwardShape<64, 2, 2, 16, 3, 2>;
  using Backward = List<StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 128, 2, 4>, 16, 16, 3, 1>,
                        StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 256, 2, 4>, 16, 16, 3, 1>>;
  using BackwardAny = Backward;
};

template <>
struct Shapes<Tf32Engine> {
  using ForwardLarge = ForwardShape<128, 2, 4, 16, 3, 1>;
  using ForwardSmall = ForwardShape<64, 2, 2, 32, 3, 2>;
  using Backward = List<StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 128, 2, 4>, 32, 16, 3, 1>,
                        StreamingShape<Fragment<64, 64, 2, 4>, Fragment<64, 256, 2, 4>, 32, 16, 3, 1>>;
  using BackwardAny = Backward;
};

template <>
struct Shapes<FmaEngine<double>> {
  using ForwardLarge = ForwardShape<32, 2, 2, 8, 3, 2>;
  using ForwardSmall = ForwardLarge;
  using Backward = List<StreamingShape<Fragment<32, 32, 2, 2>, Fragment<32, 64, 2, 2>, 8, 16, 3, 2>>;
  using BackwardAny = Backward;
};

}  // namespace clce::cuda
