// The backward pass by panels.
#include "cuda/arguments.cuh"
#include "cuda/panels/engine.h"
#include "cuda/panels/launches.cuh"
#include "cuda/panels/panel_gradients.cuh"

namespace clce::cuda {
namespace {

template <class Element, class T>
void launch_factors(const PanelGradientsParams<Element, T>& p, const BackwardArgs& args, T* factors,
                    void* stream) {
  GradientFactorsParams<Element, T> params{};
  params.anchors = p.anchors;
  params.keys = p.keys;
  params.scale = p.scale;
  params.beta = p.beta;
  params.upstream = args.upstream_stride == 0 ? static_cast<const T*>(args.upstream) : nullptr;
  params.num_terms = static_cast<const T*>(args.num_terms);
  params.factors = factors;
  launch(gradient_factors_kernel<Element, T>, "gradient_factors_kernel", Grid{}, kFactorThreads,
         kFactorThreads / 32 * 2 * sizeof(T), stream, params);
}

template <class T>
void launch_multiply(const ContrastArgs& args, void* gradient, int64_t rows, const T* factors, void* stream) {
  const MultiplyParams<T> params{static_cast<T*>(gradient), rows * args.stride, args.stride, args.dim,
                                 factors};
  const int64_t per_block = kMultiplyThreads * int64_t(ptx::Pack<T>::kSize);
  launch(multiply_kernel<T>, "multiply_kernel", Grid{uint32_t(ceil_div(params.count, per_block))},
         kMultiplyThreads, 0, stream, params);
}

template <class Element, bool kUnbounded>
void backward_as(const BackwardArgs& given, const BackwardPlan& plan, void* stream) {
  using Traits = PanelGradientsTraits<Element, kUnbounded>;
  using T = typename Traits::T;
  const ContrastArgs& args = given.contrast;
  unsigned char* const workspace = static_cast<unsigned char*>(given.workspace);
  T* const factors = reinterpret_cast<T*>(workspace);
  T* const dots = reinterpret_cast<T*>(workspace + plan.panel_at);
  typename Traits::Params params{};
  params.dots = dots;
  params.gradients = reinterpret_cast<Element*>(workspace + plan.gradients_at);
  params.stride = plan.shape.columns;
  params.anchors = anchor_side<Element, T>(given);
  params.keys = key_side<Element, T>(given);
  params.scale = scale_of<T>(args);
  params.beta = T(args.beta);
  params.symmetric = args.symmetric;
  params.has_self = args.has_self;
  params.self_offset = args.self_offset;
  params.factors = factors;

  struct {
    void* gradient;
    int64_t rows;
  } const wanted[] = {{given.danchors, args.num_anchors}, {given.dkeys, args.num_keys}};
  launch_factors(params, given, factors, stream);
  // The products leave padding alone; an anchor that is alone has no panel.
  if (args.dim < args.stride || args.num_anchors == 1) {
    for (const auto& side : wanted) {
      if (side.gradient) clear(side.gradient, size_t(side.rows * args.stride) * sizeof(T), stream);
    }
  }
  // In self-contrast the panel's columns are anchors too. The panels of the first rows then reach every
  // anchor as a column before they reach it as a row.
  void* const of_columns = args.symmetric ? given.danchors : given.dkeys;
  for_each_panel(args, plan.shape, [&](const Panel& panel) {
    multiply_logits(args, panel, dots, params.stride, stream);
    params.panel = panel;
    launch(panel_gradients_kernel<Traits>, "panel_gradients_kernel",
           panel_grid(panel, Traits::kRows, Traits::kColumns), Traits::kThreads, Traits::kSharedBytes, stream,
           params);
    const MatrixProduct::Operand gradients{params.gradients, params.stride, false};
    const MatrixProduct::Operand transposed{params.gradients, params.stride, true};
    multiply_gradient(args, transposed, panel.columns, rows_from(args, args.anchors, panel.row), panel.rows,
                      of_columns, panel.column, panel.row > 0, stream);
    multiply_gradient(args, gradients, panel.rows, rows_from(args, args.keys, panel.column), panel.columns,
                      given.danchors, panel.row, args.symmetric || panel.column > 0, stream);
  });
  if constexpr (kHasUnit<Element>) {
    for (const auto& side : wanted) {
      if (side.gradient) launch_multiply(args, side.gradient, side.rows, factors, stream);
    }
  }
}

}  // namespace

void backward_panels(const BackwardArgs& args, const BackwardPlan& plan, void* stream) {
  with_element_type<ptx::bf16, ptx::f16>(args.contrast.dtype, [&](auto zero) {
    using Element = decltype(zero);
    plan.engine.bounded ? backward_as<Element, false>(args, plan, stream)
                        : backward_as<Element, true>(args, plan, stream);
  });
}

}  // namespace clce::cuda
