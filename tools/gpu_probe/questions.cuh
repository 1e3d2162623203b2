// What a chip is asked: mma, ldmatrix, ex2.approx and conversions, all through csrc/cuda/ptx and in kernels
// that the executor runs too. So its answers and a chip's are the same files, made by the same code:
// answers.cu asks a GPU, and executor/tests/goldens.h compares what it said with what the executor says.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx/ptx.cuh"

#include "files.h"

namespace probe {

namespace ptx = clce::ptx;

// ---- products: a [16, k], b [8, k], both by rows, and c, d [16, 8]

constexpr int kRows = 16, kCols = 8, kCases = 256;

template <class Bits>
struct MmaParams {
  const Bits* a;
  const Bits* b;
  const float* c;
  float* d;
};

// The operands of one case, that of the block, and one of them.
template <class Bits>
CLCE_DEVICE MmaParams<Bits> case_of_block(MmaParams<Bits> p, int k) {
  const int number = int(blockIdx.x);
  p.a += number * kRows * k, p.b += number * kCols * k;
  p.c += number * kRows * kCols, p.d += number * kRows * kCols;
  return p;
}
CLCE_DEVICE uint32_t two(const uint16_t* from, int row, int col) {
  const uint32_t low = ptx::global_load(from + row * 16 + col),
                 high = ptx::global_load(from + row * 16 + col + 1);
  return low | high << 16;
}

// Where element e of a lane's part of the result lies, as the PTX ISA manual has it ("Matrix fragments").
CLCE_DEVICE int place_of(int lane, int e) {
  return (lane / 4 + e / 2 * 8) * kCols + 2 * (lane % 4) + e % 2;
}

template <class Tag>
CLCE_KERNEL void mma_16(MmaParams<uint16_t> all) {
  const auto p = case_of_block(all, 16);
  const int lane = int(threadIdx.x), group = lane / 4, pair = lane % 4;
  const uint32_t x[4] = {two(p.a, group, 2 * pair), two(p.a, group + 8, 2 * pair),
                         two(p.a, group, 2 * pair + 8), two(p.a, group + 8, 2 * pair + 8)};
  const uint32_t y[2] = {two(p.b, group, 2 * pair), two(p.b, group, 2 * pair + 8)};
  float sum[4];
  for (int e = 0; e < 4; ++e) sum[e] = ptx::global_load(p.c + place_of(lane, e));
  ptx::mma_m16n8k16(sum, x, y, Tag{});
  for (int e = 0; e < 4; ++e) ptx::global_store(p.d + place_of(lane, e), sum[e]);
}

static CLCE_KERNEL void mma_8(MmaParams<uint32_t> all) {
  const auto p = case_of_block(all, 8);
  const int lane = int(threadIdx.x), group = lane / 4, pair = lane % 4;
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; ++i) x[i] = ptx::global_load(p.a + (group + i % 2 * 8) * 8 + pair + i / 2 * 4);
  for (int i = 0; i < 2; ++i) y[i] = ptx::global_load(p.b + group * 8 + pair + i * 4);
  float sum[4];
  for (int e = 0; e < 4; ++e) sum[e] = ptx::global_load(p.c + place_of(lane, e));
  ptx::mma_m16n8k8_tf32(sum, x, y);
  for (int e = 0; e < 4; ++e) ptx::global_store(p.d + place_of(lane, e), sum[e]);
}

inline uint32_t float_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float bits_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// A product's name, operands, and their numbers; narrow() takes numbers that exact() has made.
struct MmaBf16 {
  using Bits = uint16_t;
  static constexpr const char *kName = "mma_bf16", *kOperation = "mma.m16n8k16 of bfloat16";
  static constexpr int kColumns = 16;
  static constexpr auto kKernel = mma_16<ptx::bf16_tag>;
  static Bits narrow(float x) { return Bits(float_bits(x) >> 16); }
  static float widen(Bits x) { return bits_float(uint32_t(x) << 16); }
};
struct MmaF16 {
  using Bits = uint16_t;
  static constexpr const char *kName = "mma_f16", *kOperation = "mma.m16n8k16 of float16";
  static constexpr int kColumns = 16;
  static constexpr auto kKernel = mma_16<ptx::f16_tag>;
  static Bits narrow(float x) {
    const uint32_t u = float_bits(x);
    const uint32_t sign = u >> 16 & 0x8000u;
    if (std::isnan(x)) return Bits(sign | 0x7e00u);
    if (std::isinf(x) || std::fabs(x) >= 65536.0f) return Bits(sign | 0x7c00u);
    // Whole numbers of 2^-24 below the normal range; what is smaller is cut off.
    if (std::fabs(x) < std::ldexp(1.0f, -14)) return Bits(sign | uint32_t(std::fabs(x) * 16777216.0f));
    return Bits(sign | ((((u >> 23 & 0xffu) - 112u) << 10) | (u >> 13 & 0x3ffu)));
  }
  static float widen(Bits x) {
    const int exponent = x >> 10 & 31, fraction = x & 1023;
    const float sign = x & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * std::ldexp(float(exponent ? fraction + 1024 : fraction), exponent ? exponent - 25 : -24);
  }
};
struct MmaTf32 {
  using Bits = uint32_t;
  static constexpr const char *kName = "mma_tf32", *kOperation = "mma.m16n8k8 of TF32";
  static constexpr int kColumns = 8;
  static constexpr auto kKernel = mma_8;
  static Bits narrow(float x) { return float_bits(x); }
  static float widen(Bits x) { return bits_float(x & 0xffffe000u); }
};

template <class Each>
void for_each_product(Each each) {
  each(MmaBf16{});
  each(MmaF16{});
  each(MmaTf32{});
}

// Deterministic, the same everywhere.
struct Random {
  uint64_t state = 0x853c49e6748fea9bull;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(state >> 33);
  }
  float uniform() { return float(next() % 65536) / 32768.0f - 1.0f; }
  float power(int low, int high) { return std::ldexp(1.0f, low + int(next() % uint32_t(high - low + 1))); }
};

// Numbers that all formats hold exactly: seven bits, exponents from -14 to 15.
inline float exact(float x) {
  int exponent;
  const float fraction = std::frexp(x, &exponent);
  return std::ldexp(std::trunc(fraction * 128) / 128, exponent);
}

// What a product is asked: kinds of sums whose result tells order, rounding and how many bits are kept.
constexpr int kKinds = 8;

inline void operands(int number, int k, Random& random, std::vector<float>& a, std::vector<float>& b,
                     std::vector<float>& c) {
  for (auto& x : a) x = exact(random.uniform());
  for (auto& x : b) x = exact(random.uniform());
  for (auto& x : c) x = 0;
  const int at = int(random.next() % uint32_t(k));
  switch (number % kKinds) {
    case 0:  // ordinary
      break;
    case 1:  // exponents far apart
      for (auto& x : a) x *= random.power(-10, 10);
      break;
    case 2:  // a large product, its opposite, and small ones: what is lost between them tells the order
      for (int r = 0; r < kRows; ++r) {
        a[size_t(r * k + at)] = 128, a[size_t(r * k + (at + 1 + number / 8) % k)] = -128;
      }
      for (int r = 0; r < kCols; ++r) {
        b[size_t(r * k + at)] = 128, b[size_t(r * k + (at + 1 + number / 8) % k)] = 128;
      }
      break;
    case 3:  // one, and many quarters, halves or three quarters of its last place: rounded or cut off?
      for (auto& x : a) x = std::ldexp(1.0f, -12);
      for (auto& x : b) x = std::ldexp(float(1 + number / 8 % 4), -14);
      for (int r = 0; r < kRows; ++r) a[size_t(r * k + at)] = number / 64 % 2 ? -1.0f : 1.0f;
      for (int r = 0; r < kCols; ++r) b[size_t(r * k + at)] = 1;
      break;
    case 4:  // something to add to, much larger or smaller
      for (auto& x : c) x = random.uniform() * random.power(-20, 20);
      break;
    case 5:  // small ones, some of float16's below its normal range
      for (auto& x : a) x = std::ldexp(exact(random.uniform()), -14);
      for (auto& x : b) x = std::ldexp(exact(random.uniform()), -10);
      break;
    case 6:  // zeros beyond some columns, as padding makes them
      for (int r = 0; r < kRows; ++r) {
        for (int i = at; i < k; ++i) a[size_t(r * k + i)] = 0;
      }
      break;
    default:  // infinities and NaN in one row
      a[size_t(at)] = number / 8 % 2 ? INFINITY : NAN;
      c[size_t(at % kCols)] = number / 16 % 2 ? -INFINITY : 1.0f;
      break;
  }
}

// Arrays on the machine that is asked, device memory or the executor's:
//   Array<T>(values), Array<T>(count), data(), read()
template <template <class> class Array, class Product>
std::vector<float> multiply(Product, const std::vector<typename Product::Bits>& a,
                            const std::vector<typename Product::Bits>& b, const std::vector<float>& c) {
  using Bits = typename Product::Bits;
  const Array<Bits> x(a), y(b);
  const Array<float> added(c), out(c.size());
  clce::cuda::launch(+Product::kKernel, Product::kName, {uint32_t(c.size() / (kRows * kCols))}, 32, 0,
                     nullptr, MmaParams<Bits>{x.data(), y.data(), added.data(), out.data()});
  return out.read();
}

// The operands of y x^T: y, padded with zero rows, is the left one, and a half of x the right one.
template <class Bits>
struct Operands {
  std::vector<Bits> a, b;
  std::vector<float> c;

  Operands swapped(int k) const {
    Operands to;
    for (size_t number = 0; number < c.size() / (kRows * kCols); ++number) {
      const auto x = a.begin() + number * kRows * k, y = b.begin() + number * kCols * k;
      to.a.insert(to.a.end(), y, y + kCols * k);
      to.a.insert(to.a.end(), size_t((kRows - kCols) * k), Bits(0));
      to.b.insert(to.b.end(), x, x + kCols * k);
      for (int r = 0; r < kRows; ++r) {
        for (int j = 0; j < kCols; ++j) {
          to.c.push_back(r < kCols ? c[(number * kRows + size_t(j)) * kCols + size_t(r)] : 0.0f);
        }
      }
    }
    return to;
  }
};

// NAME_a, NAME_b: elements; NAME_c, NAME_d: float32; NAME_swapped: the d of the swapped product.
template <template <class> class Array, class Product>
void ask_product(const std::string& folder, Product product) {
  using Bits = typename Product::Bits;
  constexpr int k = Product::kColumns;
  Random random;
  Operands<Bits> asked;
  for (int number = 0; number < kCases; ++number) {
    std::vector<float> a(size_t(kRows * k)), b(size_t(kCols * k)), c(size_t(kRows * kCols));
    operands(number, k, random, a, b, c);
    for (const float x : a) asked.a.push_back(Product::narrow(x));
    for (const float x : b) asked.b.push_back(Product::narrow(x));
    asked.c.insert(asked.c.end(), c.begin(), c.end());
  }
  const Operands<Bits> swapped = asked.swapped(k);
  const std::string name = Product::kName;
  write(folder, name + "_a", asked.a);
  write(folder, name + "_b", asked.b);
  write(folder, name + "_c", asked.c);
  write(folder, name + "_d", multiply<Array>(product, asked.a, asked.b, asked.c));
  write(folder, name + "_swapped", multiply<Array>(product, swapped.a, swapped.b, swapped.c));
}

// ---- ldmatrix: uint32 [2][32][4], x4 and x4.trans of numbered elements, each lane's registers

constexpr int kRegisters = 2 * 32 * 4;
constexpr const char* kLdmatrix = "ldmatrix";

static CLCE_KERNEL void load_matrices(uint32_t* out) {
  using Row = ptx::Pack<uint16_t>;
  Row* const tile = reinterpret_cast<Row*>(ptx::dynamic_shared());
  const int lane = int(threadIdx.x);
  Row row;
  for (int i = 0; i < 8; ++i) row.values[i] = uint16_t(lane * 8 + i);
  ptx::shared_store(tile + lane, row);
  ptx::sync_warp();
  uint32_t four[4];
  ptx::ldmatrix_x4(four, tile + lane);
  for (int i = 0; i < 4; ++i) ptx::global_store(out + lane * 4 + i, four[i]);
  ptx::ldmatrix_x4_trans(four, tile + lane);
  for (int i = 0; i < 4; ++i) ptx::global_store(out + 128 + lane * 4 + i, four[i]);
}

template <template <class> class Array>
std::vector<uint32_t> registers() {
  const Array<uint32_t> out(kRegisters);
  clce::cuda::launch(load_matrices, kLdmatrix, {}, 32, 32 * 16, nullptr, out.data());
  return out.read();
}

// ---- functions of one float32, asked about all 2^32 of them

CLCE_DEVICE uint32_t bits_of(float x) {
  uint32_t y;
  memcpy(&y, &x, sizeof y);
  return y;
}
CLCE_DEVICE float number_of(uint32_t x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}

struct Exp2 {
  static constexpr const char *kName = "exp2", *kOperation = "ex2.approx";
  CLCE_DEVICE uint32_t operator()(float x) const { return bits_of(ptx::exp2_fast(x)); }
};
struct ToBf16 {
  static constexpr const char *kName = "to_bf16", *kOperation = "cvt.rn.bf16";
  CLCE_DEVICE uint32_t operator()(float x) const { return ptx::to_bf16(x).bits; }
};
struct ToF16 {
  static constexpr const char *kName = "to_f16", *kOperation = "cvt.rn.f16";
  CLCE_DEVICE uint32_t operator()(float x) const { return ptx::to_f16(x).bits; }
};
struct ToTf32 {
  static constexpr const char *kName = "to_tf32", *kOperation = "cvt.rna.tf32";
  CLCE_DEVICE uint32_t operator()(float x) const { return ptx::to_tf32(x); }
};
struct PackBf16 {  // the upper half; the lower is a constant
  static constexpr const char *kName = "pack_bf16x2", *kOperation = "cvt.rn.bf16x2";
  CLCE_DEVICE uint32_t operator()(float x) const { return ptx::pack_bf16x2(1.0f, x); }
};
struct PackF16 {
  static constexpr const char *kName = "pack_f16x2", *kOperation = "cvt.rn.f16x2";
  CLCE_DEVICE uint32_t operator()(float x) const { return ptx::pack_f16x2(1.0f, x); }
};

template <class Each>
void for_each_function(Each each) {
  each(Exp2{});
  each(ToBf16{});
  each(ToF16{});
  each(ToTf32{});
  each(PackBf16{});
  each(PackF16{});
}

// NAME: the answers to some inputs, one of every fourth upper half, whose lower half differs each time.
constexpr uint32_t kUppers = 65536, kSampled = 4, kSamples = kUppers / kSampled;

CLCE_DEVICE uint32_t sample_of(uint32_t upper) {
  return upper << 16 | ((upper * 40503u + 12345u) & 0xffffu);
}

template <class Function>
CLCE_KERNEL void answer_samples(uint32_t* answers) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  ptx::global_store(answers + i, Function{}(number_of(sample_of(i * kSampled))));
}

template <template <class> class Array, class Function>
std::vector<uint32_t> samples(Function) {
  const Array<uint32_t> out(kSamples);
  clce::cuda::launch(answer_samples<Function>, Function::kName, {kSamples / 256}, 256, 0, nullptr,
                     out.data());
  return out.read();
}

// NAME_sums: uint64 [16], of the answers to all inputs with an upper half in [4096 i, 4096 (i + 1)), each
// multiplied by an odd number that depends on its input: a wrong bit changes it.
constexpr uint32_t kSums = 16, kUppersOfSum = kUppers / kSums;

template <class Function>
CLCE_DEVICE unsigned long long sum_of(uint32_t upper) {
  unsigned long long sum = 0;
  for (uint32_t lower = 0; lower < 65536; ++lower) {
    const uint32_t input = upper << 16 | lower;
    const float x = number_of(input);
    // Which NaN is an answer to NaN is nobody's business.
    const uint32_t answer = x == x ? Function{}(x) : 0;
    sum += static_cast<unsigned long long>(answer) * (2ull * input + 1);
  }
  return sum;
}

// exp2_errors: float64 [512], the largest distance of ex2.approx from 2^x in units of the last place of 2^x,
// over the inputs with an upper half in [128 i, 128 (i + 1)); 0 where 2^x is no normal number.
constexpr const char* kExp2Errors = "exp2_errors";
constexpr uint32_t kErrors = 512, kUppersOfError = kUppers / kErrors;

CLCE_DEVICE double exp2_error(float x) {
  if (!(x > -126 && x < 128)) return 0;
  const double exact = exp2(double(x));
  int exponent;
  frexp(exact, &exponent);
  return fabs(double(ptx::exp2_fast(x)) - exact) / ldexp(1.0, exponent - 24);
}

// Everything but sums and errors, which take a GPU to find.
template <template <class> class Array>
void ask(const std::string& folder) {
  for_each_product([&](auto product) { ask_product<Array>(folder, product); });
  write(folder, kLdmatrix, registers<Array>());
  for_each_function([&](auto function) { write(folder, function.kName, samples<Array>(function)); });
}

}  // namespace probe
