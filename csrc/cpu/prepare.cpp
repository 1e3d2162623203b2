// Rows before and after the tiles: normalised embeddings, and the gradient back through it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "backend.h"
#include "cpu/half.h"
#include "cpu/schedule.h"
#include "dispatch.h"

namespace clce::cpu {
namespace {

constexpr int64_t kGrain = 32;  // a thread takes so many rows at least

// The sum of body(0), ..., body(count - 1).
template <class Acc, class Body>
Acc sum_over(int64_t count, const Body& body) {
  constexpr int kLanes = 16;  // independent sums, so that the compiler can use vectors
  Acc lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += body(d + k);
  for (; d < count; ++d) lanes[d % kLanes] += body(d);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

template <class T>
void prepare_as(const PrepareArgs& args) {
  using Acc = AccumulationType<T>;
  const T* x = static_cast<const T*>(args.x);
  T* z = static_cast<T*>(args.z);
  Acc* norms = static_cast<Acc*>(args.norms);
  const int64_t stride = padded_dim(args.dim), step = args.x_col_stride;
  torch::stable::parallel_for(0, args.rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* from = x + i * args.x_row_stride;
      T* to = z + i * stride;
      if (args.normalize) {
        const Acc norm = std::sqrt(sum_over<Acc>(args.dim, [&](int64_t d) {
          const Acc value = static_cast<Acc>(from[d * step]);
          return value * value;
        }));
        const Acc divisor = norm < Acc(kNormEps) ? Acc(kNormEps) : norm;
        for (int64_t d = 0; d < args.dim; ++d)
          to[d] = static_cast<T>(static_cast<Acc>(from[d * step]) / divisor);
        norms[i] = norm;
      } else {
        for (int64_t d = 0; d < args.dim; ++d) to[d] = from[d * step];
      }
      std::fill(to + args.dim, to + stride, T(0));
    }
  });
}

template <class T>
void prepare_backward_as(const PrepareBackwardArgs& args) {
  using Acc = AccumulationType<T>;
  const T* z = static_cast<const T*>(args.z);
  const Acc* dz = static_cast<const Acc*>(args.dz);
  const Acc* norms = static_cast<const Acc*>(args.norms);
  T* dx = static_cast<T*>(args.dx);
  Acc* dots = static_cast<Acc*>(args.dots);
  const int64_t stride = padded_dim(args.dim);
  torch::stable::parallel_for(0, args.rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = z + i * stride;
      const Acc* grad = dz + i * stride;
      const Acc dot = sum_over<Acc>(args.dim, [&](int64_t d) { return static_cast<Acc>(row[d]) * grad[d]; });
      if (dots != nullptr) dots[i] = dot;
      if (dx == nullptr) continue;
      T* out = dx + i * args.dim;
      if (!args.normalize) {
        for (int64_t d = 0; d < args.dim; ++d) out[d] = static_cast<T>(grad[d]);
      } else if (norms[i] < Acc(kNormEps)) {
        // Division by so small a number may leave the type's range (float16's nearly always does). A zero
        // vector must not make the optimiser's step infinite: such a gradient is the largest number there is.
        const Acc largest = std::is_same_v<T, Float16> ? Acc(65504) : std::numeric_limits<Acc>::max();
        for (int64_t d = 0; d < args.dim; ++d) {
          const Acc value = grad[d] / Acc(kNormEps);
          out[d] = static_cast<T>(value > largest ? largest : value < -largest ? -largest : value);
        }
      } else {
        for (int64_t d = 0; d < args.dim; ++d) {
          out[d] = static_cast<T>((grad[d] - static_cast<Acc>(row[d]) * dot) / norms[i]);
        }
      }
    }
  });
}

}  // namespace

void prepare(const PrepareArgs& args, void*) {
  with_element_type<BFloat16, Float16>(args.dtype,
                                       [&](auto element) { prepare_as<decltype(element)>(args); });
}

void prepare_backward(const PrepareBackwardArgs& args, void*) {
  with_element_type<BFloat16, Float16>(args.dtype,
                                       [&](auto element) { prepare_backward_as<decltype(element)>(args); });
}

}  // namespace clce::cpu
