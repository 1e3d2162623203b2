// The contract between the binding and a backend (csrc/cpu, csrc/cuda): what a backend is asked to do, as
// plain argument structs and one list of functions, without torch.
//
//   prepare            embeddings x, any strides  ->  rows z [M, stride]: normalised or copied, padded
//   forward            z (and the keys' rows)     ->  statistics [9, M]; if asked, what `loss` gives,
//                                                     and from x on, as if `prepare` had been called first
//   loss               statistics                 ->  loss; its derivatives [5, M] by the statistics
//   backward           statistics, derivatives    ->  dz, dkeys (logits are computed once more); if asked, on
//                                                     to dx, as if `prepare_backward` had been called next
//   prepare_backward   dz                         ->  dx; z . dz of each row, if asked
//   temperature_gradient   these dots             ->  the gradient by the temperature
//
// "acc" in the comments is the accumulation type: double where the embeddings are double, else float.
#pragma once

#include <cstddef>
#include <cstdint>

#include "family/loss.h"

namespace clce {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

// How the passes over pairs are computed on a GPU (docs/cuda.md). kFused: one kernel makes logits and what
// becomes of them. kPanels: logits come from a library's matrix product, a panel at a time. kAuto: the plan
// chooses.
enum class EngineChoice : int { kAuto = 0, kFused = 1, kPanels = 2 };

// A matrix product that the library is asked for, everything on the device:
//
//   c = a b, or c += a b, in c's type:  c [rows, columns], a [rows, inner], b [inner, columns]
//
// Rows lie `stride` elements apart; of a transposed operand it is the transpose that lies so.
struct MatrixProduct {
  struct Operand {
    const void* data = nullptr;
    int64_t stride = 0;
    bool transposed = false;
  };
  DType dtype = DType::kFloat32;  // of a and b; c is acc
  int64_t rows = 0, columns = 0, inner = 0;
  Operand a, b;
  void* c = nullptr;
  int64_t c_stride = 0;
  bool accumulate = false;
  bool allow_tf32 = false;  // as in ContrastArgs
};

// Who computes it: torch, or what a C++ program brings. The same call gives the same bits; nothing waits for
// the host.
struct ProductFunction {
  void (*multiply)(void* context, const MatrixProduct& product, void* stream) = nullptr;
  void* context = nullptr;
};

// Rows are padded with zeros to a multiple of this many elements, so that a row of any dtype starts at a
// multiple of 16 bytes.
constexpr int64_t kRowPadding = 8;
constexpr int64_t padded_dim(int64_t dim) {
  return (dim + kRowPadding - 1) / kRowPadding * kRowPadding;
}

// Embeddings shorter than this are divided by it, as torch.nn.functional.normalize does.
constexpr double kNormEps = 1e-12;

// z = x / max(|x|, eps), or x
struct PrepareArgs {
  DType dtype = DType::kFloat32;  // of x and z
  int64_t rows = 0, dim = 0;
  const void* x = nullptr;                     // [rows, dim]
  int64_t x_row_stride = 0, x_col_stride = 1;  // in elements
  void* z = nullptr;                           // [rows, padded_dim(dim)], contiguous
  void* norms = nullptr;                       // acc [rows]: |x| (unclamped); not written unless normalize
  bool normalize = true;
};

// dx = (dz - z (z . dz)) / max(|x|, eps), without the projection where |x| < eps; or dz
struct PrepareBackwardArgs {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, dim = 0;
  const void* z = nullptr;      // [rows, padded_dim(dim)]
  const void* norms = nullptr;  // acc [rows]
  const void* dz = nullptr;     // acc [rows, padded_dim(dim)]; z and dz: 16-byte aligned
  void* dx = nullptr;           // dtype [rows, dim], contiguous; may be null
  void* dots = nullptr;         // acc [rows]: z . dz, for the temperature's gradient; may be null
  bool normalize = true;
};

// M anchors against N keys. In self-contrast the keys are the anchors: symmetric is true, self_offset 0.
struct ContrastArgs {
  DType dtype = DType::kFloat32;
  int64_t num_anchors = 0, num_keys = 0, dim = 0;
  int64_t stride = 0;             // elements from row to row of anchors and keys: padded_dim(dim)
  const void* anchors = nullptr;  // [M, stride], 16-byte aligned, columns from dim to stride are zero
  const void* keys = nullptr;     // [N, stride], likewise
  // Null: every image is a class of its own, row r has label r / views.
  const int64_t* anchor_labels = nullptr;  // [M / views]: row r has anchor_labels[r / views]
  const int64_t* key_labels = nullptr;     // [N / key_views]
  int64_t views = 1, key_views = 1;
  int64_t ignore_index = -100;  // only looked at where labels are given
  bool symmetric = false;
  bool has_self = false;  // anchor i is also key self_offset + i, and is not compared with itself
  int64_t self_offset = 0;
  double temperature = 1.0;               // used where temperature_ptr is null
  const void* temperature_ptr = nullptr;  // acc [1] on the device (no host synchronisation)
  double beta = 1.0;
  // logits_are_bounded(): plain sums of exponentials, no maxima. Where the temperature lies on another
  // device: whether z is normalised; the device finds the rest.
  bool bounded = false;
  bool allow_tf32 = false;  // float32 products may round their operands to TF32 (CUDA)
  // CUDA. Both passes must be given the same.
  EngineChoice engine = EngineChoice::kAuto;
  ProductFunction product;                    // without it there are no panels
  int64_t panel_rows = 0, panel_columns = 0;  // of a panel of logits; 0: as the plan says
  // Fused tiles, for measurements and tests. Which of the engine's forward tiles; -1: as the plan says. Into
  // how many parts a side is cut at most, so that few blocks walk far; 0: as the plan says.
  int forward_tile = -1;
  int64_t max_parts = 0;
};

struct LossArgs {
  DType dtype = DType::kFloat32;  // of the embeddings: gives acc
  int64_t num_anchors = 0;
  LossConfig config;
  const void* debias = nullptr;  // acc [M]: of each anchor; null: config.debias of all
  Reduction reduction = Reduction::kMean;
  double temperature = 1.0;
  const void* temperature_ptr = nullptr;
  const void* statistics = nullptr;  // acc [kNumStatistics, M]
  void* loss = nullptr;              // acc [M] for kNone, else acc [1]; 0 where there is no term
  void* num_terms = nullptr;         // acc [1]: anchors that have a loss term
  void* derivatives = nullptr;       // acc [kNumDerivatives, M] of each L_i, before the reduction
};

struct ForwardArgs {
  ContrastArgs contrast;
  void* statistics = nullptr;  // acc [kNumStatistics, M]
  bool with_loss = false;      // also fill `loss` (its statistics pointer is `statistics`)
  LossArgs loss;
  // Sides that are prepared first: those whose x is given. Their z is the contrast's.
  PrepareArgs prepare_anchors, prepare_keys;
  void* workspace = nullptr;  // forward_workspace_bytes(contrast) bytes, 16-byte aligned; CPU: none
};

struct BackwardArgs {
  ContrastArgs contrast;
  const void* statistics = nullptr;   // acc [kNumStatistics, M]
  const void* derivatives = nullptr;  // acc [kNumDerivatives, M]; d loss / d statistic of anchor i is
                                      // derivatives[., i] * upstream[i * upstream_stride] / num_terms
  const void* upstream = nullptr;     // acc [1] or [M], the gradient that autograd hands in; null: 1
  int64_t upstream_stride = 0;        // 0 or 1
  const void* num_terms = nullptr;    // acc [1], reduction kMean (values below 1 count as 1); null: 1
  void* danchors = nullptr;           // acc [M, stride]; may be null; symmetric: both sides' gradient
  void* dkeys = nullptr;              // acc [N, stride]; may be null; null when symmetric
  // Sides whose gradient goes on through prepare_backward: those whose dx or dots is given. Their dz is not
  // looked at: it is danchors or dkeys, which hold anything afterwards.
  PrepareBackwardArgs project_anchors, project_keys;
  void* workspace = nullptr;  // backward_workspace_bytes(contrast) bytes, 16-byte aligned
};

// d loss / d temperature (gradient_by_temperature() in family/loss.h says how)
struct TemperatureGradientArgs {
  BackwardArgs given;          // what backward was given
  const void* dots = nullptr;  // acc [rows]: z . dz of all rows of one side, from prepare_backward
  int64_t rows = 0;
  void* gradient = nullptr;  // acc [1]
};

// A backend's functions: result, name, parameters. This list is the only one: the struct of pointers, the
// declarations and each backend's table below are made of it.
//
// Every function is asynchronous on `stream` (a cudaStream_t; ignored on the CPU), allocates nothing on the
// device and gives the same bits at every call. Padding columns of danchors and dkeys are set to 0.
#define CLCE_BACKEND_FUNCTIONS(F)                                       \
  F(void, prepare, (const PrepareArgs&, void* stream))                  \
  F(void, prepare_backward, (const PrepareBackwardArgs&, void* stream)) \
  F(size_t, forward_workspace_bytes, (const ContrastArgs&))             \
  F(void, forward, (const ForwardArgs&, void* stream))                  \
  F(void, loss, (const LossArgs&, void* stream))                        \
  F(size_t, backward_workspace_bytes, (const ContrastArgs&))            \
  F(void, backward, (const BackwardArgs&, void* stream))                \
  F(void, temperature_gradient, (const TemperatureGradientArgs&, void* stream))

#define CLCE_POINTER(result, name, parameters) result(*name) parameters;
#define CLCE_DECLARATION(result, name, parameters) result name parameters;
#define CLCE_ENTRY(result, name, parameters) name,

struct Backend {
  CLCE_BACKEND_FUNCTIONS(CLCE_POINTER)
};

// Namespace clce::NAME: its functions, which that backend defines, and kBackend, the table of them.
#define CLCE_DECLARE_BACKEND(NAME)                                          \
  namespace NAME {                                                          \
  CLCE_BACKEND_FUNCTIONS(CLCE_DECLARATION)                                  \
  inline constexpr Backend kBackend = {CLCE_BACKEND_FUNCTIONS(CLCE_ENTRY)}; \
  }

CLCE_DECLARE_BACKEND(cpu)
CLCE_DECLARE_BACKEND(cuda)

#undef CLCE_DECLARE_BACKEND
#undef CLCE_ENTRY
#undef CLCE_DECLARATION
#undef CLCE_POINTER

}  // namespace clce
