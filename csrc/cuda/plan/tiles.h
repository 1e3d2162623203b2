// The tiles that engines are compiled for, as plain numbers: what a plan must know of them. Where the kernels
// are compiled (csrc/cuda/<architecture>/), static assertions compare these with the shapes.
#pragma once

#include "cuda/plan/engine.h"

namespace clce::cuda {

// A block of the backward pass.
struct BackwardTile {
  int rows, columns;  // of its tile of logits: rows of the gradient's owner, rows of the other side
  int width;          // columns of the gradient that it keeps
  int blocks;         // that run at once on a multiprocessor
  bool unbounded;     // compiled for unbounded logits too
};

// A block of the forward pass, of bounded logits.
struct ForwardBlock {
  int warps;
  int blocks;      // that run at once on a multiprocessor, where there is room for them
  int shared_kib;  // of one of them, at most
};

struct EngineTiles {
  int forward[2];  // rows, and as many columns, of the large and of the small tile
  ForwardBlock forward_block[2];
  int num_backward;
  BackwardTile backward[4];  // by width
};

// Why these sizes and no others: csrc/cuda/sm80/shapes.cuh.
constexpr EngineTiles sm80_tiles(Format format) {
  switch (format) {
    case Format::kBFloat16:
    case Format::kFloat16:
      return {{128, 64},
              {{8, 2, 99}, {4, 2, 72}},
              4,
              {{128, 64, 128, 2, true},
               {128, 64, 256, 1, true},
               {64, 64, 512, 1, true},
               {64, 64, 768, 1, false}}};
    case Format::kFloat32:
    case Format::kTf32:
      return {{128, 64}, {{8, 1, 99}, {4, 2, 72}}, 2, {{64, 64, 128, 1, true}, {64, 64, 256, 1, true}}};
    case Format::kFloat64:
      break;
  }
  return {{32, 32}, {{4, 2, 24}, {4, 2, 24}}, 1, {{32, 32, 64, 2, true}}};
}

constexpr EngineTiles engine_tiles(Architecture architecture, Format format) {
  switch (architecture) {
    case Architecture::kSm80:
      break;
  }
  return sm80_tiles(format);
}

// Of panels of logits, and of their tiles.
struct PanelShape {
  int64_t rows, columns;
};

// What a block of the forward pass over a panel adds up.
constexpr PanelShape panel_tile(DType dtype) {
  return dtype == DType::kFloat64 ? PanelShape{32, 32} : PanelShape{64, 128};
}

}  // namespace clce::cuda
