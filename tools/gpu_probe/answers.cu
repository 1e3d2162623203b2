// Bits: what a chip answers to mma, ldmatrix, ex2.approx and conversions. They go through csrc/cuda/ptx, as
// the kernels' do, so that the executor can be asked the same.
//
//   answers FOLDER    writes FOLDER/*.bin
#include "cuda/ptx/ptx.cuh"

#include "probe.h"

#include <cmath>
#include <cstring>

namespace ptx = clce::ptx;

namespace {

// Operands of products: 16 x k and 8 x k numbers, both by rows, and a 16 x 8 matrix to add to.
constexpr int kRows = 16, kCols = 8, kCases = 256;

// A lane's part of the operands and of the result, as the PTX ISA manual has it ("Matrix fragments").
template <class Tag>
__global__ void mma_16(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
  const int lane = int(threadIdx.x), group = lane / 4, pair = lane % 4;
  a += blockIdx.x * kRows * 16, b += blockIdx.x * kCols * 16;
  c += blockIdx.x * kRows * kCols, d += blockIdx.x * kRows * kCols;
  const auto two = [](const uint16_t* from, int row, int col) {
    return uint32_t(from[row * 16 + col]) | uint32_t(from[row * 16 + col + 1]) << 16;
  };
  const uint32_t x[4] = {two(a, group, 2 * pair), two(a, group + 8, 2 * pair), two(a, group, 2 * pair + 8),
                         two(a, group + 8, 2 * pair + 8)};
  const uint32_t y[2] = {two(b, group, 2 * pair), two(b, group, 2 * pair + 8)};
  float sum[4];
  for (int e = 0; e < 4; ++e) sum[e] = c[(group + e / 2 * 8) * kCols + 2 * pair + e % 2];
  ptx::mma_m16n8k16(sum, x, y, Tag{});
  for (int e = 0; e < 4; ++e) d[(group + e / 2 * 8) * kCols + 2 * pair + e % 2] = sum[e];
}

__global__ void mma_tf32(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = int(threadIdx.x), group = lane / 4, pair = lane % 4;
  a += blockIdx.x * kRows * 8, b += blockIdx.x * kCols * 8;
  c += blockIdx.x * kRows * kCols, d += blockIdx.x * kRows * kCols;
  const uint32_t x[4] = {a[group * 8 + pair], a[(group + 8) * 8 + pair], a[group * 8 + pair + 4],
                         a[(group + 8) * 8 + pair + 4]};
  const uint32_t y[2] = {b[group * 8 + pair], b[group * 8 + pair + 4]};
  float sum[4];
  for (int e = 0; e < 4; ++e) sum[e] = c[(group + e / 2 * 8) * kCols + 2 * pair + e % 2];
  ptx::mma_m16n8k8_tf32(sum, x, y);
  for (int e = 0; e < 4; ++e) d[(group + e / 2 * 8) * kCols + 2 * pair + e % 2] = sum[e];
}

// Twice 32 lanes' registers: x4 and x4.trans of numbered 16-bit elements.
__global__ void ldmatrix(uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[32][8];
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 8; ++i) tile[lane][i] = uint16_t(lane * 8 + i);
  ptx::sync_warp();
  uint32_t four[4];
  ptx::ldmatrix_x4(four, tile[lane]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = four[i];
  ptx::ldmatrix_x4_trans(four, tile[lane]);
  for (int i = 0; i < 4; ++i) out[128 + lane * 4 + i] = four[i];
}

__device__ uint32_t bits(float x) {
  return __float_as_uint(x);
}

struct Exp2 {
  __device__ uint32_t operator()(float x) const { return bits(ptx::exp2_fast(x)); }
};
struct ToBf16 {
  __device__ uint32_t operator()(float x) const { return ptx::to_bf16(x).bits; }
};
struct ToF16 {
  __device__ uint32_t operator()(float x) const { return ptx::to_f16(x).bits; }
};
struct ToTf32 {
  __device__ uint32_t operator()(float x) const { return ptx::to_tf32(x); }
};
struct PackBf16 {  // the upper half; the lower is a constant
  __device__ uint32_t operator()(float x) const { return ptx::pack_bf16x2(1.0f, x); }
};
struct PackF16 {
  __device__ uint32_t operator()(float x) const { return ptx::pack_f16x2(1.0f, x); }
};

// All 2^32 inputs. Thread t has those whose upper 16 bits are t: one answer, at a lower half that differs
// from thread to thread, and per 4096 threads' inputs a sum of all answers, each multiplied by an odd number
// that depends on its input: a wrong bit changes it.
constexpr uint32_t kSums = 16, kSampled = 4;

__host__ __device__ uint32_t sample_of(uint32_t upper) {
  return upper << 16 | ((upper * 40503u + 12345u) & 0xffffu);
}

template <class Function>
__global__ void all_inputs(uint32_t* samples, unsigned long long* sums) {
  const uint32_t upper = blockIdx.x * blockDim.x + threadIdx.x;
  const Function function{};
  if (upper % kSampled == 0) samples[upper / kSampled] = function(__uint_as_float(sample_of(upper)));
  unsigned long long sum = 0;
  for (uint32_t lower = 0; lower < 65536; ++lower) {
    const uint32_t input = upper << 16 | lower;
    const float x = __uint_as_float(input);
    // Which NaN is an answer to NaN is nobody's business.
    const uint32_t answer = x == x ? function(x) : 0;
    sum += static_cast<unsigned long long>(answer) * (2ull * input + 1);
  }
  atomicAdd(sums + upper / (65536 / kSums), sum);
}

// The largest distance of ex2.approx from 2^x, in units of the last place, per exponent of x and sign.
__global__ void exp2_errors(unsigned long long* worst) {
  const uint32_t upper = blockIdx.x * blockDim.x + threadIdx.x;
  double top = 0;
  for (uint32_t lower = 0; lower < 65536; ++lower) {
    const float x = __uint_as_float(upper << 16 | lower);
    if (!(x > -126 && x < 128)) continue;
    const double exact = exp2(double(x));
    int exponent;
    frexp(exact, &exponent);
    const double error = fabs(double(ptx::exp2_fast(x)) - exact) / ldexp(1.0, exponent - 24);
    if (error > top) top = error;
  }
  // The bits of positive doubles are in their order.
  atomicMax(worst + upper / 128, static_cast<unsigned long long>(__double_as_longlong(top)));
}

template <class Function>
void probe_all(const std::string& folder, const char* name) {
  const probe::Buffer<uint32_t> samples(65536 / kSampled);
  const probe::Buffer<unsigned long long> sums(kSums);
  all_inputs<Function><<<256, 256>>>(samples.get(), sums.get());
  probe::finish(name);
  probe::write(folder, name, samples.read());
  probe::write(folder, (std::string(name) + "_sums").c_str(), sums.read());
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
float exact(float x) {
  int exponent;
  const float fraction = std::frexp(x, &exponent);
  return std::ldexp(std::trunc(fraction * 128) / 128, exponent);
}

// What a product is asked: kinds of sums whose result tells order, rounding and how many bits are kept.
void operands(int number, int k, Random& random, std::vector<float>& a, std::vector<float>& b,
              std::vector<float>& c) {
  const int kind = number % 8;
  for (auto& x : a) x = exact(random.uniform());
  for (auto& x : b) x = exact(random.uniform());
  for (auto& x : c) x = 0;
  const int at = int(random.next() % uint32_t(k));
  switch (kind) {
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

uint32_t float_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

uint16_t host_bf16(float x) {
  return uint16_t(float_bits(x) >> 16);  // exact() left no bits to round
}

uint16_t host_f16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = u >> 16 & 0x8000u;
  if (std::isnan(x)) return uint16_t(sign | 0x7e00u);
  if (std::isinf(x) || std::fabs(x) >= 65536.0f) return uint16_t(sign | 0x7c00u);
  // Whole numbers of 2^-24 below the normal range; what is smaller is cut off.
  if (std::fabs(x) < std::ldexp(1.0f, -14)) return uint16_t(sign | uint32_t(std::fabs(x) * 16777216.0f));
  return uint16_t(sign | ((((u >> 23 & 0xffu) - 112u) << 10) | (u >> 13 & 0x3ffu)));
}

// The products x y^T and y x^T of the same rows: the second has y, padded with zero rows, as its left
// operand, and a half of x as its right one.
template <class Bits, class Convert, class Launch>
void probe_mma(const std::string& folder, const std::string& name, int k, Convert convert, Launch launch) {
  Random random;
  std::vector<Bits> left, right, swapped_left, swapped_right;
  std::vector<float> added, swapped_added;
  for (int number = 0; number < kCases; ++number) {
    std::vector<float> a(size_t(kRows * k)), b(size_t(kCols * k)), c(size_t(kRows * kCols));
    operands(number, k, random, a, b, c);
    for (const float x : a) left.push_back(convert(x));
    for (const float x : b) right.push_back(convert(x));
    added.insert(added.end(), c.begin(), c.end());
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < k; ++i) {
        swapped_left.push_back(r < kCols ? convert(b[size_t(r * k + i)]) : convert(0.0f));
      }
      for (int j = 0; j < kCols; ++j) swapped_added.push_back(r < kCols ? c[size_t(j * kCols + r)] : 0.0f);
    }
    for (int i = 0; i < kCols * k; ++i) swapped_right.push_back(convert(a[size_t(i)]));
  }
  const auto run = [&](const std::vector<Bits>& x, const std::vector<Bits>& y, const std::vector<float>& z) {
    const probe::Buffer<Bits> dx(x), dy(y);
    const probe::Buffer<float> dz(z), out(z.size());
    launch(dx.get(), dy.get(), dz.get(), out.get());
    probe::finish(name.c_str());
    return out.read();
  };
  probe::write(folder, (name + "_a").c_str(), left);
  probe::write(folder, (name + "_b").c_str(), right);
  probe::write(folder, (name + "_c").c_str(), added);
  probe::write(folder, (name + "_d").c_str(), run(left, right, added));
  probe::write(folder, (name + "_swapped").c_str(), run(swapped_left, swapped_right, swapped_added));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: answers FOLDER\n");
    return 2;
  }
  const std::string folder = arguments[1];
  probe_mma<uint16_t>(folder, "mma_bf16", 16, host_bf16,
                      [](auto... pointers) { mma_16<ptx::bf16_tag><<<kCases, 32>>>(pointers...); });
  probe_mma<uint16_t>(folder, "mma_f16", 16, host_f16,
                      [](auto... pointers) { mma_16<ptx::f16_tag><<<kCases, 32>>>(pointers...); });
  probe_mma<uint32_t>(folder, "mma_tf32", 8, float_bits,
                      [](auto... pointers) { mma_tf32<<<kCases, 32>>>(pointers...); });

  const probe::Buffer<uint32_t> registers(256);
  ldmatrix<<<1, 32>>>(registers.get());
  probe::finish("ldmatrix");
  probe::write(folder, "ldmatrix", registers.read());

  probe_all<Exp2>(folder, "exp2");
  probe_all<ToBf16>(folder, "to_bf16");
  probe_all<ToF16>(folder, "to_f16");
  probe_all<ToTf32>(folder, "to_tf32");
  probe_all<PackBf16>(folder, "pack_bf16x2");
  probe_all<PackF16>(folder, "pack_f16x2");

  const probe::Buffer<unsigned long long> worst(512);
  exp2_errors<<<256, 256>>>(worst.get());
  probe::finish("exp2_errors");
  probe::write(folder, "exp2_errors", worst.read());
  return 0;
}
