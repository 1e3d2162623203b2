// What kernels take, made of what the backend is given.
#pragma once

#include "backend.h"
#include "cuda/kernels/coefficients.cuh"
#include "cuda/kernels/labels.cuh"
#include "cuda/kernels/logits.cuh"
#include "cuda/plan/engine.h"
#include "cuda/tile/shared_tile.cuh"

namespace clce::cuda {

template <class Element>
Rows<Element> anchor_rows(const ContrastArgs& args) {
  return {static_cast<const Element*>(args.anchors), args.num_anchors, args.stride};
}

template <class Element>
Rows<Element> key_rows(const ContrastArgs& args) {
  return {static_cast<const Element*>(args.keys), args.num_keys, args.stride};
}

// Without labels, every image is a class and none is ignored.
inline Labels labels_of(const int64_t* labels, int64_t rows, int64_t views, int64_t ignore_index) {
  return {labels, rows, uint32_t(views), labels ? ignore_index : -1};
}

inline Labels anchor_labels(const ContrastArgs& args) {
  return labels_of(args.anchor_labels, args.num_anchors, args.views, args.ignore_index);
}

inline Labels key_labels(const ContrastArgs& args) {
  return labels_of(args.key_labels, args.num_keys, args.key_views, args.ignore_index);
}

// Args: with a temperature, on the host or on the device.
template <class T, class Args>
Scale<T> scale_of(const Args& args) {
  return {static_cast<const T*>(args.temperature_ptr), T(1 / args.temperature), false};
}

// The same for kernels of an engine that has them for both kinds of logits.
template <class T>
Scale<T> scale_of(const ContrastArgs& args, const Engine& engine) {
  Scale<T> scale = scale_of<T>(args);
  scale.decides = engine.temperature_decides;
  return scale;
}

// The sides of the backward pass. Keys have statistics in self-contrast only, where they are the anchors.
template <class Element, class T>
Side<Element, T> anchor_side(const BackwardArgs& given) {
  return {anchor_rows<Element>(given.contrast), anchor_labels(given.contrast),
          static_cast<const T*>(given.statistics), static_cast<const T*>(given.derivatives),
          given.upstream_stride != 0 ? static_cast<const T*>(given.upstream) : nullptr};
}

template <class Element, class T>
Side<Element, T> key_side(const BackwardArgs& given) {
  if (given.contrast.symmetric) return anchor_side<Element, T>(given);
  return {key_rows<Element>(given.contrast), key_labels(given.contrast), nullptr, nullptr, nullptr};
}

}  // namespace clce::cuda
