// From the engine that a plan names to its functions.
#pragma once

#include <type_traits>

#include "cuda/sm80/engine.h"

namespace clce::cuda {

// Calls use(std::integral_constant<Format, format>).
template <class Use>
void with_format(Format format, Use use) {
  switch (format) {
    case Format::kFloat32:
      return use(std::integral_constant<Format, Format::kFloat32>{});
    case Format::kTf32:
      return use(std::integral_constant<Format, Format::kTf32>{});
    case Format::kFloat64:
      return use(std::integral_constant<Format, Format::kFloat64>{});
    case Format::kBFloat16:
      return use(std::integral_constant<Format, Format::kBFloat16>{});
    case Format::kFloat16:
      return use(std::integral_constant<Format, Format::kFloat16>{});
  }
}

inline void forward_tiles(const ForwardArgs& args, const ForwardPlan& plan, void* stream) {
  with_format(plan.engine.format, [&](auto format) {
    switch (plan.engine.architecture) {
      case Architecture::kSm80:
        return sm80::forward_tiles<format()>(args, plan, stream);
    }
  });
}

inline bool forward_whole(const ForwardArgs& args, const ForwardPlan& plan, void* stream) {
  bool done = false;
  with_format(plan.engine.format, [&](auto format) {
    switch (plan.engine.architecture) {
      case Architecture::kSm80:
        done = sm80::forward_whole<format()>(args, plan, stream);
    }
  });
  return done;
}

inline void backward_tiles(const BackwardArgs& args, const BackwardPlan& plan, void* stream) {
  with_format(plan.engine.format, [&](auto format) {
    switch (plan.engine.architecture) {
      case Architecture::kSm80:
        return sm80::backward_tiles<format()>(args, plan, stream);
    }
  });
}

}  // namespace clce::cuda
