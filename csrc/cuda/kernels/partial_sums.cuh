// Partial sums of anchors in global memory: field by field, `stride` numbers from one field to the next.
#pragma once

#include "cuda/ptx/ptx.cuh"
#include "family/statistics.h"

namespace clce::cuda {

// load(field) gives the number of that field.
template <class T, class Load>
CLCE_DEVICE PartialSums<T> partial_sums_from(bool unbounded, Load load) {
  PartialSums<T> sums;
  for_each_field<T>(unbounded, [&](int field, auto member) { sums.*member = load(field); });
  return sums;
}

template <class T>
CLCE_DEVICE PartialSums<T> load_partial_sums(const T* first, int64_t stride, bool unbounded) {
  return partial_sums_from<T>(unbounded, [&](int field) { return ptx::global_load(first + field * stride); });
}

template <class T>
CLCE_DEVICE void store_partial_sums(T* first, int64_t stride, bool unbounded, const PartialSums<T>& sums) {
  for_each_field<T>(unbounded,
                    [&](int field, auto member) { ptx::global_store(first + field * stride, sums.*member); });
}

template <class T>
CLCE_DEVICE void combine(PartialSums<T>& into, const PartialSums<T>& from, bool unbounded, T beta) {
  if (unbounded) {
    merge(into, from, hardness(beta));
  } else {
    for_each_field<T>(false, [&](int, auto member) { into.*member += from.*member; });
  }
}

// Adds to the partial sums in memory, or puts them there first.
template <class T>
CLCE_DEVICE void add_partial_sums(T* to, int64_t stride, bool unbounded, bool first, T beta,
                                  PartialSums<T> value) {
  if (!first) {
    PartialSums<T> before = load_partial_sums(to, stride, unbounded);
    combine(before, value, unbounded, beta);
    value = before;
  }
  store_partial_sums(to, stride, unbounded, value);
}

}  // namespace clce::cuda
