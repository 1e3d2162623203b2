// The CUDA kernels, executed on the CPU, against float64.
//
// Each stage is given what the stage before really made, and compared with the reference on those inputs.
// What error is allowed follows from the error that a plain computation in the same precision makes (see
// Naive): twice that for values, three times for gradients, plus a rounding or two of the largest number
// involved (the floors below), because on a few numbers the plain computation may be exact by luck.
// Every case runs twice, under different schedules of threads and blocks, and must give the same bits.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "binding/gemm.h"
#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/plan/plan.h"
#include "cuda/ptx/ptx.cuh"
#include "executor/executor.h"
#include "reference.h"

using namespace clce;
using executor::GlobalArray;
using executor::Order;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// ---- formats

// unit: half the distance from 1 to the next number. E: of embeddings, A: of sums, operand: of what the
// gradient's matrix product takes.
struct Float32 {
  using E = float;
  using A = float;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr bool kTf32 = false;
  static constexpr double kUnitE = 0x1p-24, kUnitA = 0x1p-24, kUnitOperand = 0x1p-24, kFloors = 1;
  static constexpr const char* kName = "float32";
  static E narrow(double x) { return static_cast<float>(x); }
  static double widen(E x) { return x; }
  static double operand(double x) { return static_cast<float>(x); }
  static double element(double x) { return x; }
};
struct Tf32 : Float32 {
  static constexpr bool kTf32 = true;
  static constexpr double kUnitOperand = 0x1p-11;
  static constexpr const char* kName = "tf32";
  static double operand(double x) { return ptx::host::bits_float(ptx::to_tf32(static_cast<float>(x))); }
  static double element(double x) { return operand(x); }
};
struct Float64 {
  using E = double;
  using A = double;
  static constexpr DType kDType = DType::kFloat64;
  static constexpr bool kTf32 = false;
  // The reference rounds as often as the kernels do.
  static constexpr double kUnitE = 0x1p-53, kUnitA = 0x1p-53, kUnitOperand = 0x1p-53, kFloors = 16;
  static constexpr const char* kName = "float64";
  static E narrow(double x) { return x; }
  static double widen(E x) { return x; }
  static double operand(double x) { return x; }
  static double element(double x) { return x; }
};
struct BFloat16 {
  using E = ptx::bf16;
  using A = float;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr bool kTf32 = false;
  static constexpr double kUnitE = 0x1p-8, kUnitA = 0x1p-24, kUnitOperand = 0x1p-8, kFloors = 1;
  static constexpr const char* kName = "bfloat16";
  static E narrow(double x) { return ptx::to_bf16(static_cast<float>(x)); }
  static double widen(E x) { return ptx::to_float(x); }
  static double operand(double x) { return widen(narrow(x)); }
  static double element(double x) { return x; }
};
struct Float16 {
  using E = ptx::f16;
  using A = float;
  static constexpr DType kDType = DType::kFloat16;
  static constexpr bool kTf32 = false;
  static constexpr double kUnitE = 0x1p-11, kUnitA = 0x1p-24, kUnitOperand = 0x1p-11, kFloors = 1;
  static constexpr const char* kName = "float16";
  static E narrow(double x) { return ptx::to_f16(static_cast<float>(x)); }
  static double widen(E x) { return ptx::to_float(x); }
  // The precision of float16 without its narrow range: coefficients are expected to be rescaled.
  static double operand(double x) {
    int exponent;
    const double fraction = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(fraction, 11)), exponent - 11);
  }
  static double element(double x) { return x; }
};

// Adds a product to a sum, as plain loops do: rounded to nearest, or, where tensor cores truncate, toward
// zero. Truncation always errs to the same side, so the error of a sum of many alike grows with their number
// instead of its root: by up to K 2^-23 of the terms' magnitudes for K of them one by one, and by less for
// the groups of P that mma takes at once, K (1 + 3 / P) 2^-24.
template <class Format>
void add_product(typename Format::A& sum, double product) {
  if constexpr (Format::kTf32 || sizeof(typename Format::E) == 2) {
    if (executor::machine().arithmetic == executor::Arithmetic::kCoarse) {
      sum = ptx::host::truncate(sum + product);
      return;
    }
  }
  sum += static_cast<typename Format::A>(product);
}

// The same loops with sums of type A and rounded operands.
template <class Format>
struct Naive {
  using Sum = typename Format::A;
  static void add(Sum& sum, double product) { add_product<Format>(sum, product); }
  static double operand(double g) { return Format::operand(g); }
  static double element(double z) { return Format::element(z); }
};

// ---- what panels take for a library's matrix product

// Reads a matrix [rows, columns] as numbers: whole vectors where there are some, for the executor looks at
// each access.
template <class Format>
std::vector<double> read_operand(const MatrixProduct::Operand& from, int64_t rows, int64_t columns) {
  using E = typename Format::E;
  using Pack = ptx::Pack<E>;
  if (from.transposed) std::swap(rows, columns);
  std::vector<double> values(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    const E* const row = static_cast<const E*>(from.data) + r * from.stride;
    double* const to = &values[r * columns];
    int64_t c = 0;
    for (; c + Pack::kSize <= columns; c += Pack::kSize) {
      const Pack pack = ptx::global_load(reinterpret_cast<const Pack*>(row + c));
      for (int k = 0; k < Pack::kSize; ++k) to[c + k] = Format::element(Format::widen(pack.values[k]));
    }
    for (; c < columns; ++c) to[c] = Format::element(Format::widen(ptx::global_load(row + c)));
  }
  return values;
}

// Plain loops, in one thread of a kernel, which the executor checks like any other.
template <class Format>
void product_kernel(MatrixProduct p) {
  using Sum = typename Format::A;
  const std::vector<double> a = read_operand<Format>(p.a, p.rows, p.inner);
  const std::vector<double> b = read_operand<Format>(p.b, p.inner, p.columns);
  const int64_t a_row = p.a.transposed ? 1 : p.inner, a_inner = p.a.transposed ? p.rows : 1;
  const int64_t b_inner = p.b.transposed ? 1 : p.columns, b_column = p.b.transposed ? p.inner : 1;
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t j = 0; j < p.columns; ++j) {
      Sum sum = 0;
      for (int64_t k = 0; k < p.inner; ++k) {
        add_product<Format>(sum, a[i * a_row + k * a_inner] * b[k * b_inner + j * b_column]);
      }
      Sum* const c = static_cast<Sum*>(p.c) + i * p.c_stride + j;
      ptx::global_store(c, p.accumulate ? ptx::global_load(c) + sum : sum);
    }
  }
}

template <class Format>
ProductFunction plain_product() {
  return {[](void*, const MatrixProduct& product, void* stream) {
            cuda::launch(product_kernel<Format>, "product_kernel", cuda::Grid{}, 1, 0, stream, product);
          },
          nullptr};
}

// ---- cases

enum class Geometry { kSelf, kDisjoint, kOffset };
enum class Labels { kClasses, kNone, kSame, kDistinct, kIgnoreSome, kIgnoreAll };
enum class Layout { kContiguous, kRowGap, kTransposed, kExpanded, kMisaligned };
enum class Data { kNormal, kDuplicates, kZeroRows, kExtreme };

struct Case {
  Geometry geometry = Geometry::kSelf;
  int64_t m = 0, n = 0, d = 0;
  Labels labels = Labels::kClasses;
  int64_t views = 1, key_views = 1;
  double temperature = 0.5;
  bool temperature_on_device = false;
  bool unbounded = false;  // the unbounded path, though the logits are bounded
  bool normalize = true;
  Layout layout = Layout::kContiguous;
  Data data = Data::kNormal;
  LossConfig config;
  bool debias_of_anchors = false;  // each anchor has its own, up to the config's
  Reduction reduction = Reduction::kMean;
  bool with_grad = true;                      // grad_loss given
  int64_t panel_rows = 0, panel_columns = 0;  // 0: no panels but fused tiles
  int forward_tile = -1;                      // -1, and 0: as the plan says
  int64_t max_parts = 0;

  std::string name() const {
    std::ostringstream text;
    static const char* const geometries[] = {"self", "keys", "offset"};
    static const char* const label_kinds[] = {"classes",  "unlabelled",   "one class",
                                              "distinct", "some ignored", "all ignored"};
    static const char* const layouts[] = {"", ", row gap", ", transposed", ", expanded", ", misaligned"};
    static const char* const kinds[] = {"", ", duplicates", ", zero rows", ", extreme"};
    static const char* const reductions[] = {"none", "mean", "sum"};
    text << geometries[int(geometry)] << " " << m << "x" << n << "x" << d << ", " << label_kinds[int(labels)];
    if (views != 1 || key_views != 1) text << ", views " << views << "/" << key_views;
    text << ", t " << temperature << (temperature_on_device ? " on device" : "")
         << (unbounded ? ", unbounded" : "") << (normalize ? "" : ", unnormalized") << layouts[int(layout)]
         << kinds[int(data)] << ", beta " << config.beta << (config.debias > 0 ? ", debias" : "")
         << (debias_of_anchors ? " of anchors" : "") << (config.mean_inside_log ? ", in" : ", out")
         << (config.negatives_only ? ", negatives" : "") << (config.detach_weights ? ", detached" : "")
         << ", " << reductions[int(reduction)] << (with_grad ? "" : ", no grad_loss");
    if (forward_tile >= 0) text << ", tile " << forward_tile << ", parts " << max_parts;
    if (panel_rows) text << ", panels " << panel_rows << "x" << panel_columns;
    return text.str();
  }
};

void require(bool condition, const std::string& what) {
  ++check::num_checks();
  if (!condition) throw std::runtime_error(what);
}

void compare(const std::string& what, double found, double expected, double tolerance) {
  ++check::num_checks();
  if (found == expected || (std::isnan(found) && std::isnan(expected))) return;
  if (std::abs(found - expected) <= tolerance) return;
  std::ostringstream text;
  text.precision(10);
  text << what << ": " << found << ", expected " << expected << ", off by " << std::abs(found - expected)
       << " where " << tolerance << " is allowed";
  throw std::runtime_error(text.str());
}

template <class V>
double largest_difference(const V& a, const V& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) largest = std::max(largest, std::abs(double(a[i]) - double(b[i])));
  }
  return largest;
}

// One side's embeddings: x as the kernels get it, and as the numbers it holds.
template <class Format>
struct Rows {
  using E = typename Format::E;
  int64_t rows = 0, dim = 0, row_stride = 0, col_stride = 1;
  std::vector<double> values;  // [rows, dim]
  size_t offset = 0;
  std::unique_ptr<GlobalArray<E>> memory;
  const E* x = nullptr;

  Rows(int64_t rows, int64_t dim, const Case& c, std::mt19937& random)
      : rows(rows), dim(dim), values(rows * dim) {
    std::normal_distribution<double> normal(0, 1);
    for (int64_t r = 0; r < rows; ++r) {
      // Without normalisation |s| shall stay moderate.
      const double size = c.normalize ? std::exp(normal(random)) : 1 / std::sqrt(double(dim));
      for (int64_t d = 0; d < dim; ++d) values[r * dim + d] = size * normal(random);
      const bool second = r % 3 == 2 && r > 0;
      for (int64_t d = 0; d < dim; ++d) {
        double& v = values[r * dim + d];
        if (c.layout == Layout::kExpanded || (c.data == Data::kDuplicates && second))
          v = values[(r - (r > 0)) * dim + d];
        if (c.data == Data::kZeroRows && second) v = 0;
        // Cosines near 1 and near -1.
        if (c.data == Data::kExtreme)
          v = (d % 2 == 0 ? 1 : 0.5) * (r % 2 == 0 ? 1 : -1) + 0.01 * normal(random);
        v = Format::widen(Format::narrow(v));
      }
    }
    row_stride = dim;
    if (c.layout == Layout::kRowGap) row_stride = dim + 3;
    if (c.layout == Layout::kExpanded) row_stride = 0;
    if (c.layout == Layout::kMisaligned) offset = sizeof(E);
    if (c.layout == Layout::kTransposed) {
      row_stride = 1;
      col_stride = rows;
    }
    store();
  }

  void store() {
    const int64_t elements = rows == 0 || dim == 0 ? 0 : (rows - 1) * row_stride + (dim - 1) * col_stride + 1;
    std::vector<E> stored(elements, Format::narrow(NAN));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < dim; ++d) {
        stored[r * row_stride + d * col_stride] = Format::narrow(values[r * dim + d]);
      }
    }
    memory = std::make_unique<GlobalArray<E>>(stored, offset);
    x = memory->data();
  }

  void put(int64_t row, int64_t col, double value) {
    values[row * dim + col] = value;
    store();
  }
};

// What one run of all kernels leaves.
template <class Format>
struct Outputs {
  using E = typename Format::E;
  using A = typename Format::A;
  std::vector<E> z, key_z, dx, dk;
  std::vector<A> norms, key_norms, statistics, loss, num_terms, derivatives, danchors, dkeys, dots, key_dots;
  std::vector<A> dtemperature, dtemperature_of_keys;  // from the dots of either side

  // The bits of everything.
  std::vector<unsigned char> bits() const {
    std::vector<unsigned char> all;
    auto append = [&](const auto& values) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
      all.insert(all.end(), bytes, bytes + values.size() * sizeof(values[0]));
    };
    for (const auto* v : {&z, &key_z, &dx, &dk}) append(*v);
    for (const auto* v : {&norms, &key_norms, &statistics, &loss, &num_terms, &derivatives, &danchors, &dkeys,
                          &dots, &key_dots, &dtemperature, &dtemperature_of_keys}) {
      append(*v);
    }
    return all;
  }
};

template <class Format>
class Experiment {
 public:
  using E = typename Format::E;
  using A = typename Format::A;

  Experiment(const Case& c, uint64_t seed) : c_(c), random_(seed) {
    if (c.geometry == Geometry::kSelf) c_.n = c.m;
    anchors_ = std::make_unique<Rows<Format>>(c_.m, c_.d, c_, random_);
    if (!symmetric()) keys_ = std::make_unique<Rows<Format>>(c_.n, c_.d, c_, random_);
    if (c_.geometry == Geometry::kOffset) self_offset_ = (c_.n - c_.m) / 2;
    const bool labelled = c_.labels != Labels::kNone;
    if (labelled) {
      anchor_labels_ = draw_labels((c_.m + c_.views - 1) / c_.views);
      key_labels_ = draw_labels((c_.n + c_.key_views - 1) / c_.key_views);
      anchor_label_memory_ = std::make_unique<GlobalArray<int64_t>>(anchor_labels_);
      key_label_memory_ = std::make_unique<GlobalArray<int64_t>>(key_labels_);
    }
    temperature_ = c_.temperature_on_device ? double(A(c_.temperature)) : c_.temperature;
    temperature_memory_ = std::make_unique<GlobalArray<A>>(std::vector<A>{A(c_.temperature)});
    if (c_.debias_of_anchors) {
      for (int64_t i = 0; i < c_.m; ++i) debias_.push_back(A(c_.config.debias * double(i % 4) / 3));
      debias_memory_ = std::make_unique<GlobalArray<A>>(debias_);
    }
    std::normal_distribution<double> normal(0, 1);
    grad_.resize(c_.reduction == Reduction::kNone ? c_.m : 1);
    for (A& g : grad_) g = A(normal(random_));
    if (grad_.size() > 2) grad_[2] = 0;
    grad_memory_ = std::make_unique<GlobalArray<A>>(grad_);
  }

  bool symmetric() const { return c_.geometry == Geometry::kSelf; }
  int64_t stride() const { return padded_dim(c_.d); }
  bool bounded() const {
    return !c_.unbounded && logits_are_bounded(c_.normalize, temperature_, c_.config.beta);
  }

  // Instead of one element of the anchors.
  void put(int64_t row, int64_t col, double value) { anchors_->put(row, col, value); }

  // As the gradient that autograd hands in.
  void put_upstream(double value) {
    grad_.assign(grad_.size(), A(value));
    grad_memory_ = std::make_unique<GlobalArray<A>>(grad_);
  }

  // Each step by itself, or those of a pass in one call where that gives the same.
  Outputs<Format> run(bool in_one_call = false) {
    Outputs<Format> out;
    const int64_t m = c_.m, n = c_.n;
    GlobalArray<E> z(m * stride(), 16), key_z(symmetric() ? 0 : n * stride(), 16);
    GlobalArray<A> norms(m), key_norms(symmetric() ? 0 : n);
    ForwardArgs forward;
    forward.prepare_anchors = prepare_args(*anchors_, z, norms);
    if (!symmetric()) forward.prepare_keys = prepare_args(*keys_, key_z, key_norms);
    if (!in_one_call) {
      cuda::prepare(forward.prepare_anchors, nullptr);
      if (!symmetric()) cuda::prepare(forward.prepare_keys, nullptr);
      forward.prepare_anchors = forward.prepare_keys = {};
    }

    ContrastArgs& k = forward.contrast;
    k.dtype = Format::kDType;
    k.num_anchors = m;
    k.num_keys = n;
    k.dim = c_.d;
    k.stride = stride();
    k.anchors = z.data();
    k.keys = symmetric() ? z.data() : key_z.data();
    if (anchor_label_memory_) {
      k.anchor_labels = anchor_label_memory_->data();
      k.key_labels = symmetric() ? k.anchor_labels : key_label_memory_->data();
    }
    k.views = c_.views;
    k.key_views = symmetric() ? c_.views : c_.key_views;
    k.ignore_index = -100;
    k.symmetric = symmetric();
    k.has_self = c_.geometry != Geometry::kDisjoint;
    k.self_offset = self_offset_;
    k.temperature = c_.temperature_on_device ? 1e30 : temperature_;  // not to be looked at
    k.temperature_ptr = c_.temperature_on_device ? temperature_memory_->data() : nullptr;
    k.beta = c_.config.beta;
    // A temperature on the device is for the device to judge.
    k.bounded = c_.temperature_on_device ? c_.normalize && !c_.unbounded : bounded();
    k.allow_tf32 = Format::kTf32;
    k.engine = c_.panel_rows ? EngineChoice::kPanels : EngineChoice::kFused;
    k.product = plain_product<Format>();
    k.panel_rows = c_.panel_rows;
    k.panel_columns = c_.panel_columns;
    k.forward_tile = c_.forward_tile;
    k.max_parts = c_.max_parts;

    GlobalArray<A> statistics(kNumStatistics * m), derivatives(kNumDerivatives * m), num_terms(1);
    GlobalArray<A> loss(c_.reduction == Reduction::kNone ? m : 1);
    GlobalArray<unsigned char> workspace(cuda::forward_workspace_bytes(k), 16);
    forward.statistics = statistics.data();
    forward.workspace = workspace.data();
    forward.with_loss = true;
    LossArgs& l = forward.loss;
    l.dtype = Format::kDType;
    l.num_anchors = m;
    l.config = c_.config;
    if (debias_memory_) {
      l.config.debias = 0.99;  // not to be looked at
      l.debias = debias_memory_->data();
    }
    l.reduction = c_.reduction;
    l.temperature = k.temperature;
    l.temperature_ptr = k.temperature_ptr;
    l.statistics = statistics.data();
    l.loss = loss.data();
    l.num_terms = num_terms.data();
    l.derivatives = derivatives.data();
    cuda::forward(forward, nullptr);
    out.z = z.read();
    out.key_z = key_z.read();
    if (c_.normalize) {
      out.norms = norms.read();
      out.key_norms = key_norms.read();
    }
    out.statistics = statistics.read();
    out.loss = loss.read();
    out.num_terms = num_terms.read();
    out.derivatives = derivatives.read();

    // The loss by itself, of the same statistics.
    loss.poison();
    num_terms.poison();
    derivatives.poison();
    cuda::loss(l, nullptr);
    require(loss.read().size() == out.loss.size(), "loss: size");
    for (size_t i = 0; i < out.loss.size(); ++i) {
      // Another order of summation, perhaps.
      compare("loss alone", loss.read()[i], out.loss[i],
              1e3 * Format::kUnitA * (1 + std::abs(double(out.loss[i]))));
    }
    require(num_terms.read() == out.num_terms, "loss alone: num_terms differ");
    compare_bits("loss alone: derivatives", derivatives.read(), out.derivatives);

    GlobalArray<A> danchors(m * stride()), dkeys(symmetric() ? 0 : n * stride());
    BackwardArgs backward;
    backward.contrast = k;
    backward.statistics = statistics.data();
    backward.derivatives = derivatives.data();
    backward.upstream = c_.with_grad ? grad_memory_->data() : nullptr;
    backward.upstream_stride = c_.reduction == Reduction::kNone && c_.with_grad ? 1 : 0;
    backward.num_terms = c_.reduction == Reduction::kMean ? num_terms.data() : nullptr;
    backward.danchors = danchors.data();
    backward.dkeys = symmetric() ? nullptr : dkeys.data();
    GlobalArray<unsigned char> backward_workspace(cuda::backward_workspace_bytes(k), 16);
    backward.workspace = backward_workspace.data();
    cuda::backward(backward, nullptr);
    out.danchors = danchors.read();
    out.dkeys = dkeys.read();
    if (!symmetric() && c_.m % 2 == 1) {  // each by itself gives the same
      danchors.poison();
      dkeys.poison();
      backward_workspace.poison();
      BackwardArgs one = backward;
      one.dkeys = nullptr;
      cuda::backward(one, nullptr);
      compare_bits("danchors alone", danchors.read(), out.danchors);
      one.dkeys = dkeys.data();
      one.danchors = nullptr;
      cuda::backward(one, nullptr);
      compare_bits("dkeys alone", dkeys.read(), out.dkeys);
    }

    prepare_backward(z, norms, danchors, m, out.dx, out.dots);
    out.dtemperature = temperature_gradient(backward, out.dots);
    if (!symmetric()) {
      prepare_backward(key_z, key_norms, dkeys, n, out.dk, out.key_dots);
      out.dtemperature_of_keys = temperature_gradient(backward, out.key_dots);
    }
    if (in_one_call && m * n * c_.d < (1 << 20)) {
      GlobalArray<E> dx(m * c_.d), dk(symmetric() ? 0 : n * c_.d);
      GlobalArray<A> dots(m), key_dots(symmetric() ? 0 : n);
      backward.project_anchors = prepare_backward_args(z, norms, m, dx, dots);
      if (!symmetric()) backward.project_keys = prepare_backward_args(key_z, key_norms, n, dk, key_dots);
      cuda::backward(backward, nullptr);
      compare_bits("dx in one call", dx.read(), out.dx);
      compare_bits("dots in one call", dots.read(), out.dots);
      compare_bits("dk in one call", dk.read(), out.dk);
      compare_bits("key dots in one call", key_dots.read(), out.key_dots);
    }
    return out;
  }

  void verify(const Outputs<Format>& out) const {
    verify_prepare(*anchors_, out.z, out.norms, "anchors");
    if (!symmetric()) verify_prepare(*keys_, out.key_z, out.key_norms, "keys");

    reference::Problem p;
    p.num_anchors = c_.m;
    p.num_keys = c_.n;
    p.dim = c_.d;
    p.anchors = unpadded(out.z, c_.m);
    if (!symmetric()) p.keys = unpadded(out.key_z, c_.n);
    p.symmetric = symmetric();
    p.has_self = c_.geometry != Geometry::kDisjoint;
    p.self_offset = self_offset_;
    p.has_labels = c_.labels != Labels::kNone;
    p.anchor_labels = anchor_labels_;
    p.key_labels = key_labels_;
    p.views = c_.views;
    p.key_views = c_.key_views;
    p.temperature = temperature_;
    p.config = c_.config;
    p.debias.assign(debias_.begin(), debias_.end());

    // Weights of the anchors' losses.
    std::vector<double> weights(c_.m, 1.0);
    const double num_terms = p.num_terms();
    for (int64_t i = 0; i < c_.m; ++i) {
      if (c_.with_grad) weights[i] = grad_[c_.reduction == Reduction::kNone ? i : 0];
      if (c_.reduction == Reduction::kMean) weights[i] /= std::max(1.0, num_terms);
    }
    const auto exact = reference::evaluate(p, weights);
    const auto naive = reference::evaluate(p, weights, Naive<Format>{});
    verify_statistics(out, exact, naive);
    verify_loss(out, exact, naive, num_terms);
    verify_gradient("danchors", out.danchors, c_.m, exact, exact.danchors, naive.danchors,
                    exact.anchor_products);
    if (!symmetric()) {
      verify_gradient("dkeys", out.dkeys, c_.n, exact, exact.dkeys, naive.dkeys, exact.key_products);
    }
    verify_prepare_backward(*anchors_, out.z, out.norms, out.danchors, out.dx, out.dots, "dx");
    if (!symmetric())
      verify_prepare_backward(*keys_, out.key_z, out.key_norms, out.dkeys, out.dk, out.key_dots, "dk");

    // d(loss) / dt is that by 1 / t over -t^2.
    auto by_temperature = [&](double by_scale) { return -by_scale / (temperature_ * temperature_); };
    const double allowed =
        3 * std::abs(naive.d_scale - exact.d_scale) + gradient_floor(exact, exact.scale_products, 8);
    const double expected = by_temperature(exact.d_scale);
    const double tolerance = -by_temperature(allowed) + 4 * Format::kUnitA * std::abs(expected);
    compare("dtemperature", out.dtemperature[0], expected, tolerance);
    if (!symmetric()) compare("dtemperature from keys", out.dtemperature_of_keys[0], expected, tolerance);
  }

 private:
  static std::vector<A> temperature_gradient(const BackwardArgs& given, const std::vector<A>& dots) {
    const GlobalArray<A> memory(dots), gradient(1);
    TemperatureGradientArgs args;
    args.given = given;
    args.dots = memory.data();
    args.rows = int64_t(dots.size());
    args.gradient = gradient.data();
    cuda::temperature_gradient(args, nullptr);
    return gradient.read();
  }

  template <class T>
  static void compare_bits(const std::string& what, const std::vector<T>& a, const std::vector<T>& b) {
    require(a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0),
            what + ": other bits");
  }

  std::vector<int64_t> draw_labels(int64_t count) {
    std::vector<int64_t> labels(count);
    for (int64_t i = 0; i < count; ++i) {
      switch (c_.labels) {
        // Large and negative labels too; equal low halves do not make labels equal.
        case Labels::kClasses:
        case Labels::kIgnoreSome:
          labels[i] = int64_t(random_() % 5) * 4294967296 - 3;
          break;
        case Labels::kDistinct:
          labels[i] = i + (labels_drawn_ ? 1000000 : 0);
          break;
        default:
          labels[i] = 7;
          break;
      }
      if (c_.labels == Labels::kIgnoreAll || (c_.labels == Labels::kIgnoreSome && random_() % 4 == 0))
        labels[i] = -100;
    }
    labels_drawn_ = true;
    return labels;
  }

  PrepareArgs prepare_args(const Rows<Format>& rows, const GlobalArray<E>& z,
                           const GlobalArray<A>& norms) const {
    PrepareArgs args;
    args.dtype = Format::kDType;
    args.rows = rows.rows;
    args.dim = rows.dim;
    args.x = rows.x;
    args.x_row_stride = rows.row_stride;
    args.x_col_stride = rows.col_stride;
    args.z = z.data();
    args.norms = norms.data();
    args.normalize = c_.normalize;
    return args;
  }

  PrepareBackwardArgs prepare_backward_args(const GlobalArray<E>& z, const GlobalArray<A>& norms,
                                            int64_t rows, const GlobalArray<E>& dx,
                                            const GlobalArray<A>& dots) const {
    PrepareBackwardArgs args;
    args.dtype = Format::kDType;
    args.rows = rows;
    args.dim = c_.d;
    args.z = z.data();
    args.norms = norms.data();
    args.dx = dx.data();
    args.dots = dots.data();
    args.normalize = c_.normalize;
    return args;
  }

  void prepare_backward(const GlobalArray<E>& z, const GlobalArray<A>& norms, const GlobalArray<A>& dz,
                        int64_t rows, std::vector<E>& dx_out, std::vector<A>& dots_out) const {
    GlobalArray<E> dx(rows * c_.d, c_.layout == Layout::kMisaligned ? sizeof(E) : 0);
    GlobalArray<A> dots(rows);
    PrepareBackwardArgs args = prepare_backward_args(z, norms, rows, dx, dots);
    args.dz = dz.data();
    cuda::prepare_backward(args, nullptr);
    dx_out = dx.read();
    dots_out = dots.read();
    // Either output may be left out.
    PrepareBackwardArgs one = args;
    one.dx = nullptr;
    dots.poison();
    cuda::prepare_backward(one, nullptr);
    compare_bits("dots alone", dots.read(), dots_out);
    one.dx = args.dx;
    one.dots = nullptr;
    dx.poison();
    cuda::prepare_backward(one, nullptr);
    compare_bits("dx alone", dx.read(), dx_out);
  }

  std::vector<double> unpadded(const std::vector<E>& z, int64_t rows) const {
    std::vector<double> values(rows * c_.d);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < c_.d; ++d) values[r * c_.d + d] = Format::widen(z[r * stride() + d]);
    }
    return values;
  }

  void verify_prepare(const Rows<Format>& x, const std::vector<E>& z, const std::vector<A>& norms,
                      const std::string& what) const {
    for (int64_t r = 0; r < x.rows; ++r) {
      double square = 0;
      A naive_square = 0;
      for (int64_t d = 0; d < x.dim; ++d) {
        const double v = x.values[r * x.dim + d];
        square += v * v;
        naive_square += A(v) * A(v);
      }
      const double norm = std::sqrt(square);
      const A naive_norm = std::sqrt(naive_square);
      if (c_.normalize) {
        compare(what + ": norm", norms[r], norm,
                2 * std::abs(naive_norm - norm) + 4 * Format::kFloors * Format::kUnitA * norm);
      }
      double naive_error = 0, largest = 0;
      std::vector<double> expected(x.dim);
      for (int64_t d = 0; d < x.dim; ++d) {
        const double v = x.values[r * x.dim + d];
        expected[d] = c_.normalize ? v / std::max(norm, kNormEps) : v;
        const double plain =
            c_.normalize ? Format::widen(Format::narrow(A(v) / std::max(naive_norm, A(kNormEps)))) : v;
        naive_error = std::max(naive_error, std::abs(plain - expected[d]));
        largest = std::max(largest, std::abs(expected[d]));
      }
      const double allowed =
          c_.normalize ? 2 * naive_error + (Format::kUnitE + 2 * Format::kFloors * Format::kUnitA) * largest
                       : 0;
      for (int64_t d = 0; d < stride(); ++d) {
        const double found = Format::widen(z[r * stride() + d]);
        compare(what + ": z", found, d < x.dim ? expected[d] : 0, d < x.dim ? allowed : 0);
      }
    }
  }

  // Debiasing subtracts: what is left of H is as exact as H was. And a float32 logarithm of a sum of many.
  double condition(const reference::Result& r) const {
    double largest = 1;
    if (c_.config.debias > 0) {
      for (size_t i = 0; i < r.anchors.size(); ++i) {
        const auto& a = r.anchors[i];
        if (!a.is_term || a.n_neg == 0) continue;
        const double h = a.n_neg * a.wn / a.w;
        const double debias = debias_.empty() ? c_.config.debias : double(debias_[i]);
        largest = std::max(largest, h / std::abs(h - debias * a.n_neg * a.pos / a.n_pos));
      }
    }
    return largest;
  }

  double value_floor(const reference::Result& exact) const {
    return 4 * Format::kFloors * Format::kUnitA *
           (4 + (1 + c_.config.beta) * exact.max_logit + std::log(1.0 + c_.n));
  }

  void verify_statistics(const Outputs<Format>& out, const reference::Result& exact,
                         const reference::Result& naive) const {
    auto at = [&](int row, int64_t i) { return double(out.statistics[row * c_.m + i]); };
    double error[4] = {};
    auto values = [](const reference::Anchor& a) {
      return std::array<double, 4>{a.sum_pos, std::log(a.pos), std::log(a.w), std::log(a.wn)};
    };
    for (int64_t i = 0; i < c_.m; ++i) {
      const auto e = values(exact.anchors[i]), f = values(naive.anchors[i]);
      for (int k = 0; k < 4; ++k) error[k] = std::max(error[k], e[k] == f[k] ? 0 : std::abs(e[k] - f[k]));
    }
    const double floor = value_floor(exact);
    const double sum_floor = 4 * Format::kFloors * Format::kUnitA * exact.sum_pos_magnitude + floor;
    for (int64_t i = 0; i < c_.m; ++i) {
      const auto e = values(exact.anchors[i]);
      const std::string row = " of anchor " + std::to_string(i);
      compare("n_pos" + row, at(kNumPos, i), exact.anchors[i].n_pos, 0);
      compare("n_neg" + row, at(kNumNeg, i), exact.anchors[i].n_neg, 0);
      compare("sum_pos" + row, at(kSumPos, i), e[0], 2 * error[0] + sum_floor);
      compare("lse_pos" + row, at(kLsePos, i) + at(kLsePosLow, i), e[1], 2 * error[1] + floor);
      compare("lse_w" + row, at(kLseW, i) + at(kLseWLow, i), e[2], 2 * error[2] + floor);
      compare("lse_wn" + row, at(kLseWn, i) + at(kLseWnLow, i), e[3], 2 * error[3] + floor);
    }
  }

  void verify_loss(const Outputs<Format>& out, const reference::Result& exact, const reference::Result& naive,
                   double num_terms) const {
    compare("num_terms", out.num_terms[0], num_terms, 0);
    double error = 0, total = 0, naive_total = 0, magnitude = 0;
    for (int64_t i = 0; i < c_.m; ++i) {
      error = std::max(error, std::abs(exact.anchors[i].loss - naive.anchors[i].loss));
      total += exact.anchors[i].loss;
      naive_total += naive.anchors[i].loss;
      magnitude += std::abs(exact.anchors[i].loss);
    }
    const double floor = 2 * value_floor(exact) * condition(exact);
    if (c_.reduction == Reduction::kNone) {
      for (int64_t i = 0; i < c_.m; ++i) {
        compare("loss of anchor " + std::to_string(i), out.loss[i], exact.anchors[i].loss, 2 * error + floor);
      }
      return;
    }
    const double count = c_.reduction == Reduction::kMean ? std::max(1.0, num_terms) : 1;
    compare("loss", out.loss[0], total / count,
            (2 * std::abs(naive_total - total) + floor * std::max(1.0, num_terms) +
             8 * Format::kFloors * Format::kUnitA * magnitude) /
                count);
  }

  // Roundings of operands add up like a random walk, unless they are all the same one.
  double gradient_floor(const reference::Result& exact, const reference::Result::Products& products,
                        double walk = 2) const {
    const bool coherent = c_.d == 1 || c_.layout == Layout::kExpanded || c_.data != Data::kNormal;
    const double exponent = 4 + (1 + c_.config.beta) * exact.max_logit;
    return Format::kUnitOperand * (coherent ? products.sum : walk * products.rms) +
           2 * Format::kFloors * Format::kUnitA * exponent * condition(exact) * products.terms;
  }

  void verify_gradient(const std::string& what, const std::vector<A>& found, int64_t rows,
                       const reference::Result& result, const std::vector<double>& exact,
                       const std::vector<double>& naive, const reference::Result::Products& products) const {
    const double allowed = 3 * largest_difference(exact, naive) + gradient_floor(result, products);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < stride(); ++d) {
        const double expected = d < c_.d ? exact[r * c_.d + d] : 0;
        compare(what + "[" + std::to_string(r) + ", " + std::to_string(d) + "]", found[r * stride() + d],
                expected, d < c_.d ? allowed : 0);
      }
    }
  }

  void verify_prepare_backward(const Rows<Format>& x, const std::vector<E>& z, const std::vector<A>& norms,
                               const std::vector<A>& dz, const std::vector<E>& dx, const std::vector<A>& dots,
                               const std::string& what) const {
    for (int64_t r = 0; r < x.rows; ++r) {
      double dot = 0, magnitude = 0, largest = 0, largest_dz = 0;
      A naive_dot = 0;
      for (int64_t d = 0; d < x.dim; ++d) {
        const double a = Format::widen(z[r * stride() + d]), b = dz[r * stride() + d];
        dot += a * b;
        naive_dot += A(a) * A(b);
        magnitude += std::abs(a * b);
        largest = std::max(largest, std::abs(a));
        largest_dz = std::max(largest_dz, std::abs(b));
      }
      const double rounding = 4 * Format::kFloors * Format::kUnitA;
      compare("dots", dots[r], dot, 2 * std::abs(naive_dot - dot) + rounding * magnitude);
      std::vector<double> expected(x.dim);
      double naive_error = 0, largest_dx = 0;
      const double norm = c_.normalize ? std::max(double(norms[r]), kNormEps) : 1;
      const bool project = c_.normalize && norms[r] >= A(kNormEps);
      for (int64_t d = 0; d < x.dim; ++d) {
        const double a = Format::widen(z[r * stride() + d]), b = dz[r * stride() + d];
        expected[d] = (b - (project ? a * dot : 0)) / norm;
        const double plain =
            Format::widen(Format::narrow(double((A(b) - (project ? A(a) * naive_dot : A(0))) / A(norm))));
        if (std::isfinite(plain)) naive_error = std::max(naive_error, std::abs(plain - expected[d]));
        largest_dx = std::max(largest_dx, std::abs(expected[d]));
      }
      // Below the format's smallest normal number roundings no longer shrink.
      const double smallest = Format::widen(Format::narrow(Format::kDType == DType::kFloat16 ? 0x1p-24 : 0));
      const double allowed = 2 * naive_error + Format::kUnitE * largest_dx + smallest +
                             rounding * (largest_dz + (project ? largest * magnitude : 0)) / norm;
      for (int64_t d = 0; d < x.dim; ++d) {
        // Over 1e-12 and beyond float16's range: its largest number, for a zero row must not end a training.
        const double limit = Format::kDType == DType::kFloat16 ? 65504.0 : kInf;
        compare(what + " of row " + std::to_string(r), Format::widen(dx[r * x.dim + d]),
                std::clamp(expected[d], -limit, limit), allowed);
      }
    }
  }

  Case c_;
  mutable std::mt19937 random_;
  bool labels_drawn_ = false;
  int64_t self_offset_ = 0;
  double temperature_ = 1;
  std::unique_ptr<Rows<Format>> anchors_, keys_;
  std::vector<int64_t> anchor_labels_, key_labels_;
  std::unique_ptr<GlobalArray<int64_t>> anchor_label_memory_, key_label_memory_;
  std::unique_ptr<GlobalArray<A>> temperature_memory_, grad_memory_, debias_memory_;
  std::vector<A> grad_, debias_;
};

template <class Format>
void run_case(const Case& c) {
  const uint64_t seed = c.m * 7919 + c.n * 104729 + c.d * 31 + int(c.config.beta * 8);
  Experiment<Format> experiment(c, seed);
  executor::clear_launches();
  executor::set_schedule(Order::kAscending);
  const auto out = experiment.run();
  experiment.verify(out);
  executor::set_schedule(seed % 2 == 0 ? Order::kRandom : Order::kDescending, seed);
  const auto again = experiment.run(/*in_one_call=*/true);
  executor::set_schedule(Order::kAscending);
  require(out.bits() == again.bits(), "other bits under another schedule");
}

// ---- what is run

// Cycles through options at different paces, so that pairs of them meet.
Case with_options(Case c, int i) {
  c.config.beta = std::array{1.0, 0.0, 0.5, 2.0}[i % 4];
  c.temperature = std::array{0.5, 0.07, 0.01}[i % 3];
  c.config.mean_inside_log = i / 2 % 2;
  c.config.negatives_only = i % 5 == 4;
  c.config.detach_weights = i % 7 == 6;
  c.config.debias = i % 9 == 5 ? 0.1 : 0;
  c.labels = std::array{Labels::kClasses, Labels::kClasses, Labels::kIgnoreSome, Labels::kNone}[i / 3 % 4];
  c.views = c.labels == Labels::kNone ? 2 : 1 + (i % 11 == 3);
  c.key_views = c.geometry == Geometry::kSelf ? c.views : c.labels == Labels::kNone ? 2 : 1 + (i % 13 == 4);
  c.temperature_on_device = i % 6 == 1;
  c.unbounded = i % 8 == 7;
  c.normalize = i % 10 != 9;
  if (!c.normalize) c.temperature = 0.5;
  c.layout = static_cast<Layout>(i % 5);
  // One row over and over is a case of its own.
  if (c.layout == Layout::kExpanded && i % 2 == 1) c.layout = Layout::kContiguous;
  // All cosines -1 or 1: exactly on the floor, where there are two slopes.
  if (c.layout == Layout::kExpanded || c.d == 1) c.config.debias = 0;
  c.reduction = static_cast<Reduction>(i % 3);
  c.with_grad = i % 4 != 2;
  return c;
}

template <class Format>
void add_case(const std::string& group, const Case& c) {
  static std::vector<std::unique_ptr<check::Registration>> registrations;
  Case named = c;
  if (c.geometry == Geometry::kSelf) named.n = c.m;
  registrations.push_back(std::make_unique<check::Registration>(
      std::string(Format::kName) + "/" + group + "/" + named.name(), [c] { run_case<Format>(c); }));
}

// Panels that hardly any number of rows divides: narrower than a tile of a kernel, wider, and of several.
Case with_panels(Case c) {
  static int i = 0;
  constexpr int64_t kShapes[][2] = {{40, 24}, {200, 136}, {72, 264}, {264, 48}};
  const auto& shape = kShapes[i++ % 4];
  c.panel_rows = shape[0];
  c.panel_columns = shape[1];
  return c;
}

// Both engines; large sizes have cases of their own.
template <class Format>
void add(const std::string& group, const Case& c) {
  add_case<Format>(group, c);
  if (group != "large") add_case<Format>("panels/" + group, with_panels(c));
}

// Of the anchors' rows and of the keys' there are so few that several blocks share each of them, and not as
// many of both.
Case shared_on_both_sides(DType dtype) {
  Case c;
  c.geometry = Geometry::kOffset;
  c.m = dtype == DType::kFloat64 ? 129 : 257;  // of smaller tiles
  c.n = dtype == DType::kFloat64 ? 225 : 450;
  c.d = 72;
  c.labels = Labels::kIgnoreSome;
  return c;
}

template <class Format>
void add_all() {
  // Sizes that no tile divides, and those that some do.
  int i = Format::kTf32 + 2 * int(Format::kDType);
  for (int64_t m : {1, 2, 7, 64, 97, 130, 257}) {
    for (int64_t d : {1, 3, 8, 59, 111, 129, 300}) {
      if (m == 257 && d == 111) continue;
      Case c;
      c.m = m;
      c.d = d;
      add<Format>("self", with_options(c, i++));
    }
  }
  const std::pair<int64_t, int64_t> shapes[] = {{0, 0},  {0, 7},   {7, 0},    {1, 1},    {1, 257},  {7, 97},
                                                {97, 7}, {64, 64}, {97, 130}, {130, 97}, {257, 130}};
  for (auto [m, n] : shapes) {
    for (int64_t d : {1, 59, 129, 300}) {
      Case c;
      c.geometry = n >= m && i % 2 == 0 ? Geometry::kOffset : Geometry::kDisjoint;
      c.m = m;
      c.n = n;
      c.d = d;
      add<Format>("keys", with_options(c, i++));
    }
  }
  add_case<Format>("keys", shared_on_both_sides(Format::kDType));
  Case none;
  none.d = 5;
  add<Format>("self", none);

  // Every option with every other that changes the formulas.
  for (int flags = 0; flags < 128; ++flags) {
    Case c;
    c.geometry = flags & 1 ? Geometry::kOffset : Geometry::kSelf;
    c.m = 34;
    c.n = 70;
    c.d = 19;
    c.config.mean_inside_log = flags & 2;
    c.config.negatives_only = flags & 4;
    c.unbounded = flags & 8;
    c.temperature = flags & 16 ? 0.01 : 0.5;
    c.config.beta = std::array{0.0, 1.0, 0.5, 2.0}[flags / 32];
    c.config.detach_weights = (flags * 5 / 16) % 3 == 1;
    c.config.debias = (flags * 3 / 8) % 5 == 2 ? 0.1 : 0;
    c.debias_of_anchors = c.config.debias > 0 && flags % 2 == 0;
    c.reduction = static_cast<Reduction>(flags % 3);
    add<Format>("options", c);
  }

  // Edges.
  for (Geometry geometry : {Geometry::kSelf, Geometry::kDisjoint, Geometry::kOffset}) {
    for (int edge = 0; edge < 15; ++edge) {
      Case c;
      c.geometry = geometry;
      c.m = 35;
      c.n = 67;
      c.d = 20;
      c.config.mean_inside_log = edge % 2;
      switch (edge) {
        case 0:
          c.labels = Labels::kSame;
          break;
        case 1:
          c.labels = Labels::kDistinct;
          break;
        case 2:
          c.labels = Labels::kIgnoreAll;
          break;
        case 3:
          c.labels = Labels::kIgnoreSome;
          break;
        case 4:
          c.labels = Labels::kSame;
          c.config.negatives_only = true;
          break;
        case 5:
          c.data = Data::kDuplicates;
          break;
        case 6:
          c.data = Data::kZeroRows;
          break;
        case 7:
          c.data = Data::kExtreme;
          c.temperature = 0.01;
          break;
        case 8:
          c.data = Data::kExtreme;
          c.temperature = 0.05;
          c.config.beta = 0;
          break;
        case 9:
          c.labels = Labels::kNone;
          c.views = c.key_views = 5;
          break;
        case 10:
          c.views = 5;
          c.key_views = 3;
          break;
        case 11:
          c.data = Data::kDuplicates;
          c.temperature = 0.01;
          c.temperature_on_device = true;
          break;
        case 12:
          c.normalize = false;
          c.temperature = 0.05;
          c.reduction = Reduction::kNone;
          break;
        case 13:  // HCL: one positive, and debiasing down to the floor for some anchors
          c.labels = Labels::kNone;
          c.views = c.key_views = 2;
          c.config.debias = 0.6;
          c.reduction = Reduction::kSum;
          break;
        case 14:  // the same, each with its own
          c.labels = Labels::kNone;
          c.views = c.key_views = 2;
          c.config.debias = 0.8;
          c.debias_of_anchors = true;
          break;
      }
      add<Format>("edges", c);
    }
  }

  // Enough tiles for the larger tile shapes; for blocks that walk over several tiles, rectangles of them and
  // triangles; and for several blocks to share the other side.
  const int64_t tile = Format::kDType == DType::kFloat64 ? 32 : 128;
  Case large;
  large.d = 8;
  large.m = 16 * tile + 1;
  // More than one tile for a block, in the slowest engine and in the one that matters; there of two steps.
  if (Format::kDType == DType::kFloat64 || Format::kDType == DType::kBFloat16) large.m = 33 * tile + 40;
  if (Format::kDType == DType::kBFloat16) large.d = 70;
  add<Format>("large", large);
  large.d = 8;
  large.geometry = Geometry::kDisjoint;
  large.m = 6;
  large.n = 129 * tile + 5;
  large.config.beta = 0.5;
  add<Format>("large", large);
  large.geometry = Geometry::kOffset;
  large.n = 75 * tile;
  large.config.beta = 0;
  large.temperature = 0.01;
  add<Format>("large", large);
  large.m = 30;
  large.n = 17 * tile;
  large.d = 70;
  large.config.beta = 1;
  large.temperature = 0.5;
  add<Format>("large", large);

  // Few blocks that walk over many tiles: of several steps each, and so many that the pipeline's ring of
  // places comes round twice, for each shape that there is. Self-contrast: a triangle. Keys: two rectangles.
  const bool half = sizeof(typename Format::E) == 2;
  constexpr int64_t kWidths[] = {60, 100, 200, 500, 760};  // of rows, for each tile of the backward pass
  const int first = Format::kDType == DType::kFloat64 ? 0 : 1;
  const int count = Format::kDType == DType::kFloat64 ? 1 : half ? 4 : 2;
  for (int w = 0; w < count; ++w) {
    for (bool symmetric : {true, false}) {
      for (bool unbounded : {false, true}) {
        const bool resident = half && w < 2;
        Case walk;
        walk.geometry = symmetric ? Geometry::kSelf : Geometry::kOffset;
        walk.d = kWidths[first + w];
        walk.m = symmetric ? resident ? 460 : 150 : 70;
        walk.n = resident ? 910 : 300;
        walk.unbounded = unbounded;
        walk.config.beta = unbounded ? 0.5 : 1;
        walk.labels = unbounded ? Labels::kClasses : Labels::kIgnoreSome;
        walk.forward_tile = (w + symmetric) % 2;
        walk.max_parts = symmetric ? 1 : 2;
        add_case<Format>("walks", walk);
      }
    }
  }

  // Panels of many tiles.
  Case panels;
  panels.m = 9 * tile + 3;
  panels.d = 8;
  panels.panel_rows = 5 * tile;
  panels.panel_columns = 3 * tile - 8;
  add_case<Format>("panels/large", panels);
  panels.m = 3 * tile + 3;
  panels.unbounded = true;
  add_case<Format>("panels/large", panels);

  // Gradients wider than a block holds.
  std::vector<int64_t> widths{520};
  if (Format::kDType != DType::kFloat64) widths.push_back(1030);
  if (Format::kDType == DType::kBFloat16) widths.push_back(4096);
  for (int64_t d : widths) {
    Case wide;
    wide.m = Format::kDType == DType::kFloat64 ? 34 : 66;
    wide.d = d;
    wide.config.beta = d == 1030 ? 0 : 1;
    add<Format>("wide", wide);
  }
}

// ---- what a call costs, and what it does with numbers that are none

// Small batches are bound by launches.
template <class Format>
void test_launches() {
  Case c;
  c.m = 256;
  c.d = 128;
  c.n = 512;
  for (Geometry geometry : {Geometry::kSelf, Geometry::kDisjoint}) {
    c.geometry = geometry;
    executor::clear_launches();
    Experiment<Format>(c, 1).run();
    std::vector<std::string> kernels;
    for (const auto& launch : executor::launches()) kernels.push_back(launch.kernel);
    auto count = [&](const char* name) { return std::count(kernels.begin(), kernels.end(), name); };
    const int sides = geometry == Geometry::kSelf ? 1 : 2;
    CHECK_EQ(count("prepare_kernel"), sides);
    CHECK_EQ(count("forward_kernel"), 1);
    CHECK_EQ(count("merge_loss_kernel"), 1);
    CHECK_EQ(count("loss_kernel"), 1);                      // the loss by itself
    CHECK_EQ(count("backward_kernel"), 1);                  // for both sides
    CHECK_EQ(count("prepare_backward_kernel"), 3 * sides);  // once for both outputs, once for each
    CHECK_EQ(count("temperature_gradient_kernel"), sides);
    int64_t conflicts = 0, matrices = 0;
    for (const auto& launch : executor::launches()) {
      conflicts += launch.ldmatrix_conflicts;
      matrices += launch.ldmatrix;
    }
    CHECK_EQ(conflicts, 0);
    CHECK_EQ(matrices > 0, sizeof(typename Format::E) == 2);
  }
}

// Further cycles that an access of a warp to shared memory may take, on average, because of bank conflicts:
// by kernel, operation and the file where it stands. All others take none.
struct AcceptedConflicts {
  const char* place;
  double float32, tf32, float64, half;
};
constexpr AcceptedConflicts kAcceptedConflicts[] = {
    // Rows of 64 bytes, or of 192, are 16 bytes apart: two that are copied at once share four banks.
    {"forward_kernel: cp_async (shared_tile.cuh)", 4, 0.75, 4, 0},
    {"backward_kernel: cp_async (shared_tile.cuh)", 2.3, 0, 3.35, 0.65},
    // Rows are 4 banks apart where pairs of 8 bytes, or the second product's operand, are 8 banks wide.
    {"backward_kernel: shared_store (fma.cuh)", 2, 2, 4, 0},
    {"backward_kernel: shared_load (tf32.cuh)", 0, 0.3, 0, 0},
    // Lanes with a positive pair and lanes without read other coefficients: a GPU does not do that at once.
    {"backward_kernel: shared_load (backward_streaming.cuh)", 0.7, 0.7, 1.3, 0.8},
    {"backward_kernel: shared_load (backward_resident.cuh)", 0, 0, 0, 0.01},
    {"backward_kernel: shared_load (coefficients.cuh)", 0, 0, 0, 0.6},
    {"backward_kernel: shared_store (coefficients.cuh)", 0, 0, 0, 1},
    // Sums of a row or column: some lanes, once per tile and warp.
    {"forward_kernel: shared_load (walk_sums.cuh)", 0.25, 0.25, 0, 0.25},
    {"forward_kernel: shared_store (walk_sums.cuh)", 0.2, 0.2, 0, 0.2},
    {"forward_kernel: shared_store (tile_sums.cuh)", 0.15, 0.15, 0.1, 0.15},
    {"panel_sums_kernel: shared_store (tile_sums.cuh)", 0.15, 0.15, 0.1, 0.15},
    {"forward_kernel: shared_store (walk_labels.cuh)", 0.1, 0.1, 0, 0.1},
    // Six numbers an anchor, one of them at a time: every second bank.
    {"merge_loss_kernel: shared_load (merge_loss.cuh)", 0.75, 0.75, 0, 0.75},
    {"merge_loss_kernel: shared_store (merge_loss.cuh)", 1, 1, 0, 1},
    // A lane's four neighbouring columns, once per block.
    {"panel_gradients_kernel: shared_load (panel_gradients.cuh)", 1.3, 1.3, 0.55, 1.3},
};
template <class Format>
double accepted_conflicts(const std::string& place) {
  for (const AcceptedConflicts& known : kAcceptedConflicts) {
    if (place != known.place) continue;
    if (sizeof(typename Format::E) == 2) return known.half;
    return Format::kDType == DType::kFloat64 ? known.float64 : Format::kTf32 ? known.tf32 : known.float32;
  }
  return 0;
}

// In every shape of tile, and in panels.
template <class Format>
void test_bank_conflicts() {
  std::map<std::string, executor::BankTraffic> by_place;
  executor::count_bank_conflicts(true);
  const bool half = sizeof(typename Format::E) == 2;
  for (int64_t d : {60, 200, 500, 760}) {
    if (d > 200 && !half) break;
    for (int i = 0; i < 4; ++i) {
      Case c;
      c.m = 130;
      c.d = d;
      c.unbounded = i % 2;
      c.forward_tile = i / 2;
      c.max_parts = 1;
      if (d == 200 && i < 2) c.panel_rows = 200, c.panel_columns = 136;
      executor::clear_launches();
      Experiment<Format>(c, 1).run();
      for (const auto& launch : executor::launches()) {
        for (const auto& [place, traffic] : launch.banks) {
          auto& sum = by_place[launch.kernel + ": " + place.substr(0, place.rfind(':')) + ")"];
          sum.accesses += traffic.accesses;
          sum.conflicts += traffic.conflicts;
        }
      }
    }
  }
  executor::count_bank_conflicts(false);
  CHECK(by_place.size() > 20);
  std::string refused;
  for (const auto& [place, traffic] : by_place) {
    const double accepted = accepted_conflicts<Format>(place);
    const double cycles = double(traffic.conflicts) / double(traffic.accesses);
    ++check::num_checks();
    if (cycles > accepted) {
      refused += "\n       " + place + ": " + std::to_string(cycles) + " of " +
                 std::to_string(traffic.accesses) + " accesses, accepted " + std::to_string(accepted);
    }
  }
  if (!refused.empty()) throw std::runtime_error("bank conflicts" + refused);
}

// With many anchors float16's unit is found by a launch of its own, once for both gradients. Upstream
// gradients of 2^-24 leave nothing of dL/ds in float16 where it is not used.
TEST("float16/launches that find the unit") {
  Case c;
  c.geometry = Geometry::kDisjoint;
  c.m = 4200;
  c.n = 40;
  c.d = 16;
  c.reduction = Reduction::kNone;
  executor::clear_launches();
  Experiment<Float16> experiment(c, 1);
  experiment.put_upstream(0x1p-24);
  experiment.verify(experiment.run());
  int64_t found = 0, passes = 0;
  for (const auto& launch : executor::launches()) {
    found += launch.kernel == "find_unit_kernel";
    passes += launch.kernel == "backward_kernel";
  }
  CHECK(found == 1 && passes == 1);
}

// Of panels: a product and a kernel for each in the forward pass, three products and a kernel in the backward
// pass, and in self-contrast no panel below the diagonal.
template <class Format>
void test_panel_launches() {
  Case c;
  c.m = 256;
  c.n = 512;
  c.d = 16;
  c.panel_rows = 128;
  c.panel_columns = 64;
  for (Geometry geometry : {Geometry::kSelf, Geometry::kDisjoint}) {
    c.geometry = geometry;
    const int sides = geometry == Geometry::kSelf ? 1 : 2;
    // Rows 0 to 127: columns from 0, 64, 128, 192. Rows 128 to 255: from 128, 192.
    const int panels = geometry == Geometry::kSelf ? 6 : 16;
    executor::clear_launches();
    Experiment<Format>(c, 1).run();
    std::vector<std::string> kernels;
    for (const auto& launch : executor::launches()) kernels.push_back(launch.kernel);
    auto count = [&](const char* name) { return std::count(kernels.begin(), kernels.end(), name); };
    CHECK_EQ(count("prepare_kernel"), sides);
    CHECK_EQ(count("panel_sums_kernel"), panels);
    CHECK_EQ(count("panel_gradients_kernel"), panels);
    CHECK_EQ(count("product_kernel"), 4 * panels);
    CHECK_EQ(count("gradient_factors_kernel"), 1);
    CHECK_EQ(count("clear"), 1);
    CHECK_EQ(count("multiply_kernel"), Format::kDType == DType::kFloat16 ? sides : 0);
    CHECK_EQ(count("forward_kernel") + count("backward_kernel") + count("reduce_kernel"), 0);
  }
}

// A NaN or an infinity among the embeddings is in the loss, and no kernel stumbles over it. Padding is 0 even
// then.
template <class Format>
void test_not_numbers() {
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), kInf}) {
    for (int i = 0; i < 4; ++i) {
      const bool unbounded = i % 2;
      Case c;
      if (i >= 2) c = with_panels(c);
      c.m = 70;
      c.d = 21;
      c.unbounded = unbounded;
      c.config.mean_inside_log = unbounded;
      Experiment<Format> experiment(c, 1);
      experiment.put(3, 5, bad);
      const auto out = experiment.run();
      CHECK(std::isnan(double(out.loss[0])));
      bool any = false;
      for (size_t j = 0; j < out.danchors.size(); ++j) {
        any = any || std::isnan(double(out.danchors[j]));
        if (int64_t(j) % experiment.stride() >= c.d) CHECK_EQ(double(out.danchors[j]), 0.0);
      }
      CHECK(any);
    }
  }
  for (bool panels : {false, true}) {
    Case c;
    if (panels) c = with_panels(c);
    c.m = 70;
    c.d = 21;
    Experiment<Format> experiment(c, 1);
    experiment.put_upstream(std::numeric_limits<double>::quiet_NaN());
    const auto gradient = experiment.run().danchors;
    for (size_t i = 0; i < gradient.size(); ++i) {
      const bool padding = i % experiment.stride() >= 21;
      CHECK(padding ? gradient[i] == 0 : std::isnan(double(gradient[i])));
    }
  }
}

// Logits of 1e9 where beta is no float32: one rounding of beta and of 1 + beta in sums, logarithms and
// gradients, or exponents are no longer below 0. Each anchor's hardest negative leads by far more than a
// rounding, so that float32 gives the gradients of float64; 16 bits of the embeddings may choose others.
template <class Format>
void test_huge_logits() {
  for (double beta : {0.3, 0.1, 1.7}) {
    for (bool panels : {false, true}) {
      Case c;
      if (panels) c = with_panels(c);
      c.m = 40;
      c.d = 64;
      c.normalize = false;
      c.temperature = 1e-10;
      c.config.beta = beta;
      c.reduction = Reduction::kSum;
      c.with_grad = false;
      const auto found = Experiment<Format>(c, 1).run();
      const auto exact = Experiment<Float64>(c, 1).run();
      CHECK(std::isfinite(double(found.loss[0])));
      double error = 0, size = 0;
      for (int64_t i = 0; i < c.m; ++i) {
        for (int64_t d = 0; d < c.d; ++d) {
          const double ours = found.danchors[i * padded_dim(c.d) + d];
          const double truth = exact.danchors[i * padded_dim(c.d) + d];
          CHECK(std::isfinite(ours));
          error += (ours - truth) * (ours - truth);
          size += truth * truth;
        }
      }
      CHECK(size > 1e18);  // one over the temperature
      if (Format::kUnitE <= 0x1p-24 && !Format::kTf32) CHECK(std::sqrt(error / size) <= 1e-6 * (1 + beta));
    }
  }
}

// Of a pair that has nobody but each other, the gradient is 1 - e^(s - lse) with lse = s. It is 0 only if
// both passes know the same s, whatever the compiler fuses.
template <class Format>
void test_same_logits_in_both_passes() {
  for (double temperature : {0.5, 0.07, 0.03, 0.02, 0.013, 0.01}) {
    for (int i = 0; i < 4; ++i) {
      const bool unbounded = i % 2;
      for (int64_t d : {24, 200}) {
        Case c;
        if (i >= 2) c = with_panels(c);
        c.m = 2;
        c.d = d;
        c.labels = Labels::kSame;
        c.temperature = temperature;
        c.unbounded = unbounded;
        const auto out = Experiment<Format>(c, d).run();
        if (!unbounded && (1 + c.config.beta) / temperature < kBoundedLogit) continue;  // divides by a sum
        for (auto g : out.danchors) CHECK_EQ(double(g), 0.0);
      }
    }
  }
}

// ---- plans

using cuda::Architecture;
using cuda::BackwardTile;
using cuda::EngineTiles;

ContrastArgs plan_args(DType dtype, int64_t m, int64_t n, int64_t dim, bool symmetric, bool bounded = true) {
  ContrastArgs args;
  args.dtype = dtype;
  args.num_anchors = m;
  args.num_keys = n;
  args.dim = dim;
  args.stride = padded_dim(dim);
  args.symmetric = symmetric;
  args.bounded = bounded;
  return args;
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

TEST("plan/architecture") {
  for (int capability : {80, 86, 89, 90, 120}) {
    CHECK(cuda::architecture_of(capability) == Architecture::kSm80);
  }
  bool refused = false;
  try {
    cuda::architecture_of(75);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  CHECK(refused);
}

TEST("plan/engine") {
  ContrastArgs args = plan_args(DType::kFloat32, 4, 4, 8, true);
  CHECK(cuda::format_of(args) == cuda::Format::kFloat32);
  args.allow_tf32 = true;
  CHECK(cuda::format_of(args) == cuda::Format::kTf32);
  args.dtype = DType::kFloat16;
  CHECK(cuda::format_of(args) == cuda::Format::kFloat16);
  CHECK(cuda::plan_forward(args, Architecture::kSm80).engine.bounded);
  CHECK(!cuda::plan_forward(args, Architecture::kSm80).engine.temperature_decides);
  // The bound of a temperature on the device is not known on the host; rows that are not normalised have
  // none.
  const float temperature = 1;
  args.temperature_ptr = &temperature;
  for (bool normalized : {true, false}) {
    args.bounded = normalized;
    const cuda::Engine forward = cuda::plan_forward(args, Architecture::kSm80).engine;
    const cuda::Engine backward = cuda::plan_backward(args, Architecture::kSm80).engine;
    CHECK(!forward.bounded && !backward.bounded);
    CHECK_EQ(forward.temperature_decides, normalized);
    CHECK_EQ(backward.temperature_decides, normalized);
  }
}

// What runs at once on an H100, an A100 and on sm_86 or sm_89, by their shared memory; and a tile that does
// not fit is not chosen.
TEST("plan/devices") {
  const auto device = [](int kib) { return cuda::Device(Architecture::kSm80, kib * 1024); };
  for (DType dtype : kDTypes) {
    const ContrastArgs args = plan_args(dtype, 4096, 4096, 128, true),
                       few = plan_args(dtype, 500, 500, 128, true);
    const EngineTiles tiles = cuda::engine_tiles(Architecture::kSm80, cuda::format_of(args));
    const int bytes = tiles.forward_block[0].shared_kib * 1024;
    const bool half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
    if (half) CHECK_EQ(device(228).blocks_at_once(bytes), 2);
    if (half) CHECK_EQ(device(164).blocks_at_once(bytes), 1);
    for (int kib : {228, 164, 100}) {
      CHECK(device(kib).blocks_at_once(bytes) >= 1);
      CHECK_EQ(cuda::plan_forward(args, device(kib)).tile, 0);
      if (dtype != DType::kFloat64) CHECK_EQ(cuda::plan_forward(few, device(kib)).tile, 1);
    }
    if (dtype != DType::kFloat64) CHECK_EQ(cuda::plan_forward(args, device(99)).tile, 1);
    CHECK(cuda::plan_forward(args, Architecture::kSm80).tile == cuda::plan_forward(args, device(228)).tile);
  }
}

// As few chunks as possible, by the narrowest tile that makes so few, which is compiled for the logits.
TEST("plan/backward tile") {
  for (DType dtype : kDTypes) {
    for (bool bounded : {true, false}) {
      for (int64_t dim = 1; dim < 5000; dim += 7) {
        const ContrastArgs args = plan_args(dtype, 100, 100, dim, true, bounded);
        const auto plan = cuda::plan_backward(args, Architecture::kSm80);
        const EngineTiles tiles = cuda::engine_tiles(Architecture::kSm80, cuda::format_of(args));
        const auto chunks = [&](int tile) { return cuda::ceil_div(args.stride, tiles.backward[tile].width); };
        CHECK(bounded || tiles.backward[plan.tile].unbounded);
        CHECK_EQ(plan.chunks, chunks(plan.tile));
        for (int tile = 0; tile < tiles.num_backward; ++tile) {
          if (bounded || tiles.backward[tile].unbounded) CHECK(chunks(tile) >= chunks(plan.tile));
          if (tile < plan.tile) CHECK(chunks(tile) > chunks(plan.tile));
        }
      }
    }
  }
}

// Every share has something to do, and nothing in the workspace overlaps.
TEST("plan/shares and workspace") {
  const int64_t sizes[] = {0, 1, 33, 64, 129, 1000, 4096, 32768};
  for (DType dtype : kDTypes) {
    const int64_t acc = dtype == DType::kFloat64 ? 8 : 4;
    for (int64_t m : sizes) {
      for (int64_t n : sizes) {
        for (bool symmetric : {false, true}) {
          if (symmetric && m != n) continue;
          const ContrastArgs args = plan_args(dtype, m, n, 200, symmetric);
          const EngineTiles tiles = cuda::engine_tiles(Architecture::kSm80, cuda::format_of(args));
          const auto forward = cuda::plan_forward(args, Architecture::kSm80);
          const int64_t col_tiles = cuda::ceil_div(n, tiles.forward[forward.tile]);
          CHECK(forward.groups <= col_tiles && (forward.groups > 0) == (m > 0 && n > 0));
          CHECK_EQ(int64_t(forward.grid.x) * forward.grid.y == 0, forward.groups == 0);
          CHECK(forward.block_sums_at >= sizeof(uint32_t) && forward.block_sums_at % 16 == 0);
          CHECK(int64_t(forward.slots_at - forward.block_sums_at) >= 2 * acc * forward.merge_blocks);
          CHECK(int64_t(forward.workspace_bytes - forward.slots_at) >= acc * 6 * forward.groups * m);
          CHECK_EQ(forward.workspace_bytes, cuda::forward_workspace_bytes(args));
          const auto backward = cuda::plan_backward(args, Architecture::kSm80);
          for (const auto* plan : {&backward.anchors, &backward.keys}) {
            if (symmetric && plan == &backward.keys) continue;
            const bool of_keys = plan == &backward.keys;
            const int64_t rows = of_keys ? n : m, others = of_keys ? m : n;
            const BackwardTile& tile = tiles.backward[backward.tile];
            CHECK(plan->splits == 1 || plan->splits <= cuda::ceil_div(others, tile.columns));
            CHECK_EQ(plan->row_tiles, cuda::ceil_div(rows, tile.rows));
            const int64_t shares = plan->splits > 1 ? acc * plan->splits * rows * args.stride : 0;
            const size_t next = of_keys || symmetric ? backward.unit_at : backward.keys.shares_at;
            CHECK(int64_t(next - plan->shares_at) >= shares && plan->shares_at % 16 == 0);
          }
          CHECK(!backward.finds_unit || backward.unit_at + size_t(acc) <= backward.workspace_bytes);
          CHECK_EQ(backward.workspace_bytes, cuda::backward_workspace_bytes(args));
        }
      }
    }
  }
}

// A product of panels as cuBLAS is asked for it, whose matrices are stored by columns.
TEST("plan/gemm") {
  constexpr int64_t kRows = 3, kColumns = 4, kInner = 5, kStride = 7;
  std::array<float, kInner * kStride> a{}, b{};
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = float(i * i % 23);
    b[i] = float(i * i % 19);
  }
  for (bool a_transposed : {false, true}) {
    for (bool b_transposed : {false, true}) {
      MatrixProduct p;
      p.rows = kRows;
      p.columns = kColumns;
      p.inner = kInner;
      p.a = {a.data(), kStride, a_transposed};
      p.b = {b.data(), kStride, b_transposed};
      p.c_stride = kStride;
      const binding::Gemm g = binding::column_major(p);
      CHECK_EQ(g.k, kInner);
      CHECK_EQ(g.m, kColumns);
      CHECK_EQ(g.n, kRows);
      const auto stored = [](const binding::Gemm::Operand& x, int64_t row, int64_t column) {
        return static_cast<const float*>(x.data)[x.transposed ? column + row * x.ld : row + column * x.ld];
      };
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t c = 0; c < kColumns; ++c) {
          float wanted = 0, sum = 0;
          for (int64_t k = 0; k < kInner; ++k) {
            wanted += a[a_transposed ? k * kStride + r : r * kStride + k] *
                      b[b_transposed ? c * kStride + k : k * kStride + c];
            sum += stored(g.a, c, k) * stored(g.b, k, r);  // element [c, r] is at c + r * c_ld
          }
          CHECK_EQ(sum, wanted);
        }
      }
      CHECK_EQ(g.c_ld, kStride);
    }
  }
}

// Where panels are, by whom they can be asked for, and that they take a workspace of constant size.
TEST("plan/panels") {
  const auto panels = [](const ContrastArgs& args) {
    const bool forward = cuda::plan_forward(args, Architecture::kSm80).panels;
    CHECK_EQ(cuda::plan_backward(args, Architecture::kSm80).panels, forward);
    return forward;
  };
  ContrastArgs args = plan_args(DType::kBFloat16, 32768, 32768, 768, true);
  CHECK(!panels(args));  // nobody multiplies
  args.engine = EngineChoice::kPanels;
  CHECK(!panels(args));
  args.product = plain_product<BFloat16>();
  CHECK(panels(args));
  args.engine = EngineChoice::kFused;
  CHECK(!panels(args));
  args.engine = EngineChoice::kAuto;
  CHECK(panels(args));
  for (DType dtype : kDTypes) {
    args.dtype = dtype;
    const int64_t widest = dtype == DType::kFloat64 ? 64 : 256;
    for (int64_t stride : {widest, widest + 8}) {
      args.stride = args.dim = stride;
      for (int64_t rows : {4095, 4096}) {
        args.num_anchors = args.num_keys = rows;
        CHECK_EQ(panels(args), stride > widest && rows == 4096);
      }
    }
  }
  args.engine = EngineChoice::kPanels;
  args.num_anchors = args.num_keys = 3;
  CHECK(panels(args));
  args.num_keys = 0;
  CHECK(!panels(args));

  args.engine = EngineChoice::kAuto;
  for (DType dtype : kDTypes) {
    args.dtype = dtype;
    for (bool symmetric : {false, true}) {
      args.symmetric = symmetric;
      for (int64_t rows : {4096, 32768, 262144}) {
        args.num_anchors = args.num_keys = rows;
        const auto forward = cuda::plan_forward(args, Architecture::kSm80);
        const auto backward = cuda::plan_backward(args, Architecture::kSm80);
        CHECK_EQ(forward.workspace_bytes - forward.panel_at, size_t(16) << 20);
        const bool half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
        CHECK_EQ(backward.workspace_bytes - backward.panel_at, size_t(half ? 24 : 16) << 20);
        CHECK_EQ(backward.gradients_at - backward.panel_at, size_t(half ? 16 : 0) << 20);
        CHECK_EQ(forward.groups, dtype == DType::kFloat64 ? (symmetric ? 96 : 32) : (symmetric ? 72 : 8));
      }
    }
  }
}

// A backend allocates nothing: the workspace is all the scratch there is. Whichever engine, it never grows
// with the number of pairs.
TEST("plan/scratch is linear in the batch") {
  for (DType dtype : kDTypes) {
    for (EngineChoice engine : {EngineChoice::kFused, EngineChoice::kPanels}) {
      for (bool symmetric : {false, true}) {
        const auto bytes = [&](int64_t rows) {
          ContrastArgs args = plan_args(dtype, rows, rows, 768, symmetric);
          args.engine = engine;
          args.product = plain_product<BFloat16>();
          const auto forward = cuda::plan_forward(args, Architecture::kSm80);
          CHECK_EQ(forward.panels, engine == EngineChoice::kPanels);
          return forward.workspace_bytes + cuda::plan_backward(args, Architecture::kSm80).workspace_bytes;
        };
        for (int64_t rows : {1 << 14, 1 << 17, 1 << 20}) CHECK(bytes(8 * rows) <= 8 * bytes(rows));
        // Of a row less than its embedding and gradient take, and a panel or two.
        const size_t row = 768 * size_t(dtype == DType::kFloat64 ? 16 : 8);
        CHECK(bytes(1 << 20) <= (row << 20) + (size_t(64) << 20));
      }
    }
  }
}

// Sizes whose plans docs/cuda.md speaks of.
TEST("plan/a case of keys has both sides shared") {
  for (DType dtype : kDTypes) {
    const Case c = shared_on_both_sides(dtype);
    const auto plan = cuda::plan_backward(plan_args(dtype, c.m, c.n, c.d, false), Architecture::kSm80);
    CHECK(plan.anchors.splits > 1 && plan.keys.splits > 1 && plan.anchors.splits != plan.keys.splits);
  }
}

TEST("plan/known sizes") {
  const auto forward = [](const ContrastArgs& args) { return cuda::plan_forward(args, Architecture::kSm80); };
  const auto backward = [](const ContrastArgs& args) {
    return cuda::plan_backward(args, Architecture::kSm80);
  };
  const ContrastArgs batch = plan_args(DType::kBFloat16, 4096, 4096, 768, true);
  CHECK_EQ(forward(batch).tile, 0);
  CHECK_EQ(forward(batch).groups, 32);
  CHECK_EQ(forward(batch).grid.x, 32u * 33 / 2);
  CHECK_EQ(backward(batch).tile, 3);
  CHECK_EQ(backward(batch).chunks, 1);
  CHECK_EQ(backward(batch).anchors.splits, 2);
  ContrastArgs unbounded = batch;
  unbounded.bounded = false;
  CHECK_EQ(backward(unbounded).tile, 2);
  CHECK_EQ(backward(unbounded).chunks, 2);
  // A small batch: small tiles; a queue's anchors: as many splits as there may be.
  CHECK_EQ(forward(plan_args(DType::kBFloat16, 256, 256, 128, true)).tile, 1);
  const ContrastArgs queue = plan_args(DType::kFloat32, 64, 65536, 128, false);
  CHECK_EQ(forward(queue).groups, 128);
  CHECK_EQ(backward(queue).anchors.splits, 16);
}

template <class Format>
void add_others() {
  static const check::Registration logits(std::string(Format::kName) + "/same logits in both passes",
                                          test_same_logits_in_both_passes<Format>);
  static const check::Registration huge(std::string(Format::kName) + "/huge logits",
                                        test_huge_logits<Format>);
  static const check::Registration launches(std::string(Format::kName) + "/launches and ldmatrix",
                                            test_launches<Format>);
  static const check::Registration banks(std::string(Format::kName) + "/bank conflicts",
                                         test_bank_conflicts<Format>);
  static const check::Registration panels(std::string(Format::kName) + "/launches of panels",
                                          test_panel_launches<Format>);
  static const check::Registration numbers(std::string(Format::kName) + "/NaN and infinity",
                                           test_not_numbers<Format>);
}

const bool all_added = [] {
  add_all<Float32>();
  add_others<Float32>();
  add_all<Tf32>();
  add_others<Tf32>();
  add_all<Float64>();
  add_others<Float64>();
  add_all<BFloat16>();
  add_others<BFloat16>();
  add_all<Float16>();
  add_others<Float16>();
  return true;
}();

}  // namespace

TEST_MAIN
