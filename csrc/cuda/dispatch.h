// From what is known at run time to the types that kernels are compiled for.
#pragma once

#include "backend.h"
#include "cuda/ptx/types.cuh"

namespace clce::cuda {

template <class T>
struct TypeTag {
  using Type = T;
};

// Calls use(TypeTag<type of the embeddings>).
template <class Use>
void with_element(DType dtype, Use use) {
  switch (dtype) {
    case DType::kFloat32:
      return use(TypeTag<float>{});
    case DType::kFloat64:
      return use(TypeTag<double>{});
    case DType::kBFloat16:
      return use(TypeTag<ptx::bf16>{});
    case DType::kFloat16:
      return use(TypeTag<ptx::f16>{});
  }
}

// Calls use(TypeTag<accumulation type>).
template <class Use>
void with_acc(DType dtype, Use use) {
  if (dtype == DType::kFloat64) {
    use(TypeTag<double>{});
  } else {
    use(TypeTag<float>{});
  }
}

template <class... Items>
struct List {};

// Calls use(Item) with the item at that place of the list.
template <class Use, class... Items>
void with_item(List<Items...>, int place, Use use) {
  int i = 0;
  ((i++ == place ? use(Items{}) : void()), ...);
}

}  // namespace clce::cuda
