// Each primitive of clce::ptx on the executor, against its meaning in the PTX ISA manual.
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/ptx.cuh"
#include "executor/executor.h"

using namespace clce;
using namespace clce::executor;

namespace {

template <class T>
struct Params {
  const T* in = nullptr;
  T* out = nullptr;
  int argument = 0;
};

CLCE_DEVICE int thread_x() {
  return static_cast<int>(threadIdx.x);
}

// ---- mma: operands [16, K] and [K, 8] in row-major order, fragments gathered element by element as the
// manual's formulas say; each position is tested by a one there and by random values.

struct MmaParams {
  const float* a;
  const float* b;
  const float* c;
  float* d;
};

template <class Tag>
CLCE_DEVICE uint16_t convert(float x);
template <>
uint16_t convert<ptx::bf16_tag>(float x) {
  return ptx::to_bf16(x).bits;
}
template <>
uint16_t convert<ptx::f16_tag>(float x) {
  return ptx::to_f16(x).bits;
}

CLCE_DEVICE void load_accumulator(float (&d)[4], const float* c, int group, int thread) {
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8;
    d[i] = ptx::global_load(c + row * 8 + thread * 2 + (i & 1));
  }
}
CLCE_DEVICE void store_accumulator(const float (&d)[4], float* out, int group, int thread) {
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8;
    ptx::global_store(out + row * 8 + thread * 2 + (i & 1), d[i]);
  }
}

template <class Tag>
CLCE_KERNEL void mma_16(MmaParams p) {
  const int group = thread_x() >> 2, thread = thread_x() % 4;
  uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
    const int col = thread * 2 + (i & 1) + (i < 4 ? 0 : 8);
    a[i / 2] |= uint32_t(convert<Tag>(ptx::global_load(p.a + row * 16 + col))) << 16 * (i & 1);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = thread * 2 + (i & 1) + (i < 2 ? 0 : 8);
    b[i / 2] |= uint32_t(convert<Tag>(ptx::global_load(p.b + row * 8 + group))) << 16 * (i & 1);
  }
  float d[4];
  load_accumulator(d, p.c, group, thread);
  ptx::mma_m16n8k16(d, a, b, Tag{});
  store_accumulator(d, p.d, group, thread);
}

CLCE_KERNEL void mma_tf32(MmaParams p) {
  const int group = thread_x() >> 2, thread = thread_x() % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const int row = (i == 0 || i == 2) ? group : group + 8;
    const int col = i < 2 ? thread : thread + 4;
    a[i] = ptx::to_tf32(ptx::global_load(p.a + row * 8 + col));
  }
  for (int i = 0; i < 2; ++i) b[i] = ptx::to_tf32(ptx::global_load(p.b + (thread + 4 * i) * 8 + group));
  float d[4];
  load_accumulator(d, p.c, group, thread);
  ptx::mma_m16n8k8_tf32(d, a, b);
  store_accumulator(d, p.d, group, thread);
}

std::vector<float> multiply_mma(void (*kernel)(MmaParams), const std::vector<float>& a,
                                const std::vector<float>& b, const std::vector<float>& c) {
  GlobalArray<float> da(a), db(b), dc(c), dd(16 * 8);
  cuda::launch(kernel, "mma", {}, 32, 0, nullptr, MmaParams{da.data(), db.data(), dc.data(), dd.data()});
  return dd.read();
}

void test_mma(void (*kernel)(MmaParams), int k) {
  // A one at (row, t) of a and small distinct numbers in b: row `row` of d is row t of b.
  std::vector<float> b(k * 8), zero(16 * 8);
  for (int i = 0; i < k * 8; ++i) b[i] = static_cast<float>(i + 1);
  for (int row = 0; row < 16; ++row) {
    for (int t = 0; t < k; ++t) {
      std::vector<float> a(16 * k);
      a[row * k + t] = 1;
      const auto d = multiply_mma(kernel, a, b, zero);
      for (int r = 0; r < 16; ++r) {
        for (int col = 0; col < 8; ++col) CHECK_EQ(d[r * 8 + col], r == row ? b[t * 8 + col] : 0.0f);
      }
    }
  }
  // Whole numbers: every product and sum is exact.
  std::mt19937 random(1);
  auto draw = [&](size_t n) {
    std::vector<float> values(n);
    for (float& v : values) v = static_cast<float>(static_cast<int>(random() % 255) - 127);
    return values;
  };
  const auto a = draw(16 * k), c = draw(16 * 8);
  b = draw(k * 8);
  const auto d = multiply_mma(kernel, a, b, c);
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      float sum = c[row * 8 + col];
      for (int t = 0; t < k; ++t) sum += a[row * k + t] * b[t * 8 + col];
      CHECK_EQ(d[row * 8 + col], sum);
    }
  }
}

TEST("primitives/mma bf16") {
  test_mma(mma_16<ptx::bf16_tag>, 16);
}
TEST("primitives/mma f16") {
  test_mma(mma_16<ptx::f16_tag>, 16);
}
TEST("primitives/mma tf32") {
  test_mma(mma_tf32, 8);
}

// The other arithmetic.
struct Coarse {
  Coarse() { set_arithmetic(Arithmetic::kCoarse); }
  ~Coarse() { set_arithmetic(Arithmetic::kNearest); }
};

TEST("primitives/coarse mma of whole numbers") {
  const Coarse coarse;
  test_mma(mma_16<ptx::bf16_tag>, 16);
  test_mma(mma_16<ptx::f16_tag>, 16);
  test_mma(mma_tf32, 8);
}

TEST("primitives/coarse mma truncates parts, the last one first") {
  const auto sum_of = [](float c, std::vector<float> products) {
    std::vector<float> a(16 * 16), b(16 * 8), sums(16 * 8);
    for (size_t k = 0; k < products.size(); ++k) a[k] = products[k], b[k * 8] = 1;
    sums[0] = c;
    return multiply_mma(mma_16<ptx::bf16_tag>, a, b, sums)[0];
  };
  const std::vector<float> eight(8, 0x1p-25f), minus(8, -0x1p-25f);
  CHECK_EQ(sum_of(1, eight), 1 + 0x1p-22f);
  CHECK_EQ(sum_of(1, {0x1p-23f, 0x1.8p-24f}), 1 + 0x1p-22f);
  CHECK_EQ(sum_of(1, {0x1p30f, 0, 0, 0, 0, 0, 0, 0, -0x1p30f}), 1);
  const Coarse coarse;
  CHECK_EQ(sum_of(1, eight), 1);
  CHECK_EQ(sum_of(-1, minus), -1);
  CHECK_EQ(sum_of(1, {0x1p-24f, 0x1p-24f}), 1 + 0x1p-23f);  // one bit more than the result has
  CHECK_EQ(sum_of(1, {0x1p-23f, 0x1.8p-24f}), 1 + 0x1p-23f);
  CHECK_EQ(sum_of(1, {0x1p30f, 0, 0, 0, 0, 0, 0, 0, -0x1p30f}), 0);
  const float inf = std::numeric_limits<float>::infinity();
  CHECK_EQ(sum_of(1, {inf}), inf);
  CHECK(std::isnan(sum_of(-inf, {inf})));
}

// Of k columns, taken 16 (TF32: 8) by an mma, and in an mma P at once: each time the P products and what is
// there already are cut off at 2^-24 of the largest, and the sum at 2^-23 of itself. That is at most (P + 1 +
// 2) 2^-24 of the magnitudes for each P columns, and where all terms have one sign, it is always to the same
// side: nothing evens out.
template <class Kernel>
void test_truncation(Kernel kernel, int columns, double unit) {
  constexpr int kMmas = 64;
  const int at_once = columns / 2, k = kMmas * columns;
  std::mt19937 random(1);
  std::vector<float> sums(16 * 8);
  std::vector<double> exact(16 * 8);
  for (int i = 0; i < kMmas; ++i) {
    std::vector<float> a(16 * columns), b(8 * columns);
    for (auto* x : {&a, &b}) {
      for (float& v : *x) {
        const double whole = double(1 + random() % int(1 / unit));
        v = static_cast<float>(std::ldexp(unit * whole, -int(random() % 8)));
      }
    }
    sums = multiply_mma(kernel, a, b, sums);
    for (int row = 0; row < 16; ++row) {
      for (int col = 0; col < 8; ++col) {
        for (int t = 0; t < columns; ++t)
          exact[row * 8 + col] += double(a[row * columns + t]) * b[t * 8 + col];
      }
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    const double lost = (exact[i] - sums[i]) / exact[i] * 0x1p24;
    CHECK(lost <= k * (1 + 3.0 / at_once));
    CHECK(lost > kMmas / 4);  // to nearest: a few
  }
}
TEST("primitives/coarse mma loses no more than derived, always to the same side") {
  const Coarse coarse;
  test_truncation(mma_16<ptx::bf16_tag>, 16, 0x1p-8);
  test_truncation(mma_16<ptx::f16_tag>, 16, 0x1p-11);
  test_truncation(mma_tf32, 8, 0x1p-11);
}

TEST("primitives/coarse exp2 is up to 2 ulp off") {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<int> seen(5);
  for (float x = -120; x < 100; x += 0.37f) {
    const uint32_t near = ptx::host::float_bits(ptx::exp2_fast(x));
    const Coarse coarse;
    const int ulps = static_cast<int>(ptx::host::float_bits(ptx::exp2_fast(x)) - near);
    CHECK(ulps >= -2 && ulps <= 2);
    ++seen[ulps + 2];
  }
  for (int count : seen) CHECK(count > 50);
  const Coarse coarse;
  CHECK_EQ(ptx::exp2_fast(0.0f), 1.0f);
  CHECK_EQ(ptx::exp2_fast(-inf), 0.0f);
  CHECK_EQ(ptx::exp2_fast(inf), inf);
  CHECK(std::isnan(ptx::exp2_fast(std::nanf(""))));
  for (float x = -150; x < -120; x += 0.01f) {
    CHECK(ptx::exp2_fast(x) == 0 || ptx::exp2_fast(x) >= 0x1p-126f);
    CHECK(ptx::exp2_fast(x) < 0x1.8p-120f);
  }
}

TEST("primitives/mma tf32 ignores the low 13 bits") {
  std::vector<float> a(16 * 8), b(8 * 8), c(16 * 8);
  a[0] = 1.0f + 0x1p-10f + 0x1p-11f;  // a tie: away from zero
  b[0] = 1.0f;
  CHECK_EQ(multiply_mma(mma_tf32, a, b, c)[0], 1.0f + 0x1p-9f);
}

// ---- ldmatrix

template <bool Transposed>
CLCE_KERNEL void ldmatrix(Params<uint32_t> p) {
  // Matrix m: element (r, c) is 64 m + 8 r + c; rows are 16 bytes, in an order that mixes matrices.
  const int m = thread_x() / 8, r = thread_x() % 8;
  uint16_t* row = reinterpret_cast<uint16_t*>(ptx::dynamic_shared()) + 8 * ((r * 4 + m) ^ 3);
  for (int c = 0; c < 8; ++c) ptx::shared_store(row + c, static_cast<uint16_t>(64 * m + 8 * r + c));
  ptx::sync_warp();
  uint32_t registers[4];
  Transposed ? ptx::ldmatrix_x4_trans(registers, row) : ptx::ldmatrix_x4(registers, row);
  for (int i = 0; i < 4; ++i) ptx::global_store(p.out + thread_x() * 4 + i, registers[i]);
}

template <bool Transposed>
void test_ldmatrix() {
  GlobalArray<uint32_t> out(32 * 4);
  Params<uint32_t> p;
  p.out = out.data();
  cuda::launch(ldmatrix<Transposed>, "ldmatrix", {}, 32, 128 * 4, nullptr, p);
  const auto registers = out.read();
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const uint32_t r = registers[lane * 4 + m];
      const uint32_t row = lane / 4, col = 2 * (lane % 4);
      CHECK_EQ(r & 0xffff, 64 * m + (Transposed ? 8 * col + row : 8 * row + col));
      CHECK_EQ(r >> 16, 64 * m + (Transposed ? 8 * (col + 1) + row : 8 * row + col + 1));
    }
  }
}
TEST("primitives/ldmatrix") {
  test_ldmatrix<false>();
  test_ldmatrix<true>();
}

// An 8x8 matrix with rows `argument` bytes apart.
CLCE_KERNEL void strided(Params<float> p) {
  unsigned char* s = ptx::dynamic_shared();
  for (int i = 0; i < 64; ++i) ptx::shared_store(reinterpret_cast<float*>(s) + 32 * i + thread_x(), 0.0f);
  ptx::sync_warp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, s + thread_x() * p.argument);
}
TEST("primitives/bank conflicts are counted") {
  auto conflicts = [](int stride) {
    Params<float> p;
    p.argument = stride;
    clear_launches();
    cuda::launch(strided, "strided", {}, 32, 8192, nullptr, p);
    CHECK_EQ(launches().back().ldmatrix, 4);
    return launches().back().ldmatrix_conflicts;
  };
  CHECK_EQ(conflicts(16), 0);
  CHECK_EQ(conflicts(144), 0);
  CHECK_EQ(conflicts(128), 4 * 7);
  CHECK_EQ(conflicts(64), 4 * 3);
}

// Lane l at l * argument bytes: a load of T, a store of T and an asynchronous copy, one after another.
template <class T>
CLCE_KERNEL void spread(Params<float> p) {
  unsigned char* const at = ptx::dynamic_shared() + thread_x() * p.argument;
  ptx::shared_store(reinterpret_cast<T*>(at), T{});
  ptx::sync_warp();
  ptx::shared_load(reinterpret_cast<const T*>(at));
  ptx::sync_warp();
  if (p.in != nullptr) {
    ptx::cp_async<16>(at, p.in, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
}
// The n-th of a loop is one access of all lanes that come to it; lanes that are absent take no part.
CLCE_KERNEL void strided_loop(Params<float> p) {
  float* const s = reinterpret_cast<float*>(ptx::dynamic_shared());
  for (int i = 0; i < p.argument; ++i) {
    if (thread_x() % 2 == 0) ptx::shared_store(s + thread_x() * p.argument + i, 0.0f);
  }
}
struct Three {
  float values[3];
};
struct CountedBanks {
  CountedBanks() { count_bank_conflicts(true); }
  ~CountedBanks() { count_bank_conflicts(false); }
};
TEST("primitives/bank conflicts of loads, stores and copies are counted") {
  const CountedBanks counted;
  const GlobalArray<float> in(std::vector<float>(4, 1.0f));
  // Further cycles of a store and of a load, or of a copy as well: the same for each.
  const auto conflicts = [&](void (*kernel)(Params<float>), int stride, bool copy = false) {
    Params<float> p;
    p.in = copy ? in.data() : nullptr;
    p.argument = stride;
    cuda::launch(kernel, "spread", {}, 32, 32 * 144, nullptr, p);
    const BankTraffics& banks = launches().back().banks;
    CHECK_EQ(banks.size(), copy ? 3u : 2u);
    const int64_t first = banks.begin()->second.conflicts;
    for (const auto& [place, traffic] : banks) {
      CHECK(place.find(" (test_primitives.cpp:") != std::string::npos);
      CHECK_EQ(traffic.accesses, 1);
      CHECK_EQ(traffic.conflicts, first);
    }
    return first;
  };
  using Pack = ptx::Pack<float>;
  using Pair = ptx::Pair<float>;
  CHECK_EQ(conflicts(spread<float>, 4), 0);
  CHECK_EQ(conflicts(spread<float>, 8), 1);
  CHECK_EQ(conflicts(spread<float>, 12), 0);
  CHECK_EQ(conflicts(spread<float>, 16), 3);
  CHECK_EQ(conflicts(spread<float>, 128), 31);
  CHECK_EQ(conflicts(spread<float>, 132), 0);
  CHECK_EQ(conflicts(spread<uint16_t>, 2), 0);
  CHECK_EQ(conflicts(spread<uint16_t>, 4), 0);
  CHECK_EQ(conflicts(spread<uint16_t>, 8), 1);
  CHECK_EQ(conflicts(spread<Pair>, 8), 0);         // two turns of 16 lanes
  CHECK_EQ(conflicts(spread<Pair>, 16), 2);        // two more, one for each turn
  CHECK_EQ(conflicts(spread<Pack>, 16, true), 0);  // four turns of 8 lanes
  CHECK_EQ(conflicts(spread<Pack>, 32, true), 4);
  CHECK_EQ(conflicts(spread<Pack>, 144, true), 0);

  // In pieces: three of 4 bytes, each with 16 lanes to a bank.
  Params<float> p;
  p.argument = 64;
  cuda::launch(spread<Three>, "spread", {}, 32, 32 * 144, nullptr, p);
  CHECK_EQ(launches().back().banks.begin()->second.accesses, 3);
  CHECK_EQ(launches().back().banks.begin()->second.conflicts, 3 * 15);

  for (p.argument = 1; p.argument < 9; ++p.argument) {
    cuda::launch(strided_loop, "strided_loop", {}, 32, 32 * 144, nullptr, p);
    const BankTraffics& banks = launches().back().banks;
    CHECK_EQ(banks.size(), 1u);
    CHECK_EQ(banks.begin()->second.accesses, p.argument);
    // Every second lane: as if the stride were twice as long.
    const int in_bank = std::gcd(2 * p.argument, 32) / 2;
    CHECK_EQ(banks.begin()->second.conflicts, p.argument * (in_bank - 1));
  }
}
TEST("primitives/bank conflicts are not counted unasked") {
  Params<float> p;
  p.argument = 8;
  cuda::launch(spread<float>, "spread", {}, 32, 32 * 144, nullptr, p);
  CHECK(launches().back().banks.empty());
}

// ---- shuffles and votes

template <class T>
CLCE_KERNEL void shuffles(Params<T> p) {
  const T own = static_cast<T>(thread_x() * 10);
  ptx::global_store(p.out + thread_x(), ptx::shuffle_xor(own, p.argument));
}
template <class T>
void test_shuffles() {
  for (Order order : {Order::kAscending, Order::kDescending, Order::kRandom}) {
    set_schedule(order, 3);
    for (int argument : {1, 2, 4, 8, 16, 31}) {
      GlobalArray<T> out(64);
      Params<T> p;
      p.out = out.data();
      p.argument = argument;
      cuda::launch(shuffles<T>, "shuffles", {}, 64, 0, nullptr, p);
      const auto values = out.read();
      for (int x = 0; x < 64; ++x) {
        const int lane = x % 32, warp = x - lane;
        CHECK_EQ(values[x], static_cast<T>(10 * (warp + (lane ^ argument))));
      }
    }
  }
  set_schedule(Order::kAscending);
}
TEST("primitives/shuffles") {
  test_shuffles<float>();
  test_shuffles<double>();
  test_shuffles<int>();
  test_shuffles<int64_t>();
}

CLCE_KERNEL void votes(Params<uint32_t> p) {
  ptx::global_store(p.out + 2 * thread_x(), ptx::ballot(thread_x() % 3 == 0));
  ptx::global_store(p.out + 2 * thread_x() + 1, uint32_t(ptx::any_sync(thread_x() == 37)));
}
TEST("primitives/votes") {
  GlobalArray<uint32_t> out(128);
  Params<uint32_t> p;
  p.out = out.data();
  cuda::launch(votes, "votes", {}, 64, 0, nullptr, p);
  for (int x = 0; x < 64; ++x) {
    uint32_t expected = 0;
    for (int lane = 0; lane < 32; ++lane) expected |= uint32_t((x / 32 * 32 + lane) % 3 == 0) << lane;
    CHECK_EQ(out.read()[2 * x], expected);
    CHECK_EQ(out.read()[2 * x + 1], x / 32 == 1 ? 1u : 0u);
  }
}

// ---- cp.async

CLCE_KERNEL void copies(Params<float> p) {
  float* s = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int x = thread_x();
  for (int stage = 0; stage < 3; ++stage) {
    // An invalid source is not looked at, wherever it points.
    const bool valid = (x + stage) % 4 != 0;
    const float* source = valid ? p.in + 4 * (stage * 32 + x) : p.in + 4 * 1000000;
    ptx::cp_async<16>(s + 4 * (stage * 32 + x), source, valid);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<2>();
  for (int i = 0; i < 4; ++i) ptx::global_store(p.out + 4 * x + i, ptx::shared_load(s + 4 * x + i));
  ptx::cp_async_commit();  // an empty group counts
  ptx::cp_async_wait<2>();
  for (int i = 0; i < 4; ++i)
    ptx::global_store(p.out + 128 + 4 * x + i, ptx::shared_load(s + 128 + 4 * x + i));
  ptx::cp_async_wait<0>();
  ptx::sync_warp();
  const int other = 31 - x;
  for (int i = 0; i < 4; ++i)
    ptx::global_store(p.out + 256 + 4 * x + i, ptx::shared_load(s + 256 + 4 * other + i));
}
TEST("primitives/cp.async groups and zero fill") {
  std::vector<float> values(384);
  for (int i = 0; i < 384; ++i) values[i] = static_cast<float>(i + 1);
  GlobalArray<float> in(values);
  GlobalArray<float> out(384);
  Params<float> p;
  p.in = in.data();
  p.out = out.data();
  for (uint64_t seed = 0; seed < 4; ++seed) {
    set_schedule(seed == 0 ? Order::kAscending : Order::kRandom, seed);
    cuda::launch(copies, "copies", {}, 32, 3 * 32 * 16, nullptr, p);
    const auto result = out.read();
    for (int i = 0; i < 384; ++i) {
      const int stage = i / 128, x = i % 128 / 4, source = stage == 2 ? 31 - x : x;
      CHECK_EQ(result[i], (source + stage) % 4 != 0 ? values[stage * 128 + 4 * source + i % 4] : 0.0f);
    }
  }
  set_schedule(Order::kAscending);
}

// ---- barriers: a tree reduction that is wrong without any of them

CLCE_KERNEL void reduce(Params<float> p) {
  float* s = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int x = thread_x();
  ptx::shared_store(s + x, static_cast<float>(x));
  ptx::sync_threads();
  for (int distance = 64; distance > 0; distance /= 2) {  // two halves of 128 threads
    if (x % 128 < distance)
      ptx::shared_store(s + x, ptx::shared_load(s + x) + ptx::shared_load(s + x + distance));
    distance >= 32 ? ptx::sync_threads() : ptx::sync_warp();
  }
  ptx::sync_threads();
  ptx::global_store(p.out + x, ptx::shared_load(s) + 1000000.0f * ptx::shared_load(s + 128));
}
TEST("primitives/barriers") {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    set_schedule(seed == 0 ? Order::kAscending : seed == 1 ? Order::kDescending : Order::kRandom, seed);
    GlobalArray<float> out(256);
    Params<float> p;
    p.out = out.data();
    cuda::launch(reduce, "reduce", {}, 256, 1024, nullptr, p);
    for (float value : out.read()) CHECK_EQ(value, 127 * 64 + 1000000.0f * (255 * 128 - 127 * 64));
  }
  set_schedule(Order::kAscending);
}

CLCE_KERNEL void indices(Params<uint32_t> p) {
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  ptx::global_store(p.out + block * blockDim.x + threadIdx.x, block * 1000 + threadIdx.x);
}
TEST("primitives/indices") {
  GlobalArray<uint32_t> out(2 * 3 * 4 * 64);
  Params<uint32_t> p;
  p.out = out.data();
  for (Order order : {Order::kAscending, Order::kDescending, Order::kRandom}) {
    set_schedule(order, 1);
    out.poison();
    cuda::launch(indices, "indices", {2, 3, 4}, 64, 0, nullptr, p);
    const auto values = out.read();
    for (uint32_t i = 0; i < values.size(); ++i) CHECK_EQ(values[i], i / 64 * 1000 + i % 64);
  }
  set_schedule(Order::kAscending);
}

// ---- what a block says of itself

// Block b walks over b tiles of `argument` steps each, through a ring of three places.
CLCE_KERNEL void walks(Params<float> p) {
  int place = 0;
  for (unsigned tile = 0; tile < blockIdx.x; ++tile) {
    for (int step = 0; step < p.argument; ++step) {
      ptx::count_step(place);
      place = (place + 1) % 3;
    }
    ptx::count_tile(p.argument);
    ptx::count_copy(tile == 3, p.argument == 1);
  }
}
TEST("primitives/events are counted, the most of any block") {
  const auto runs_of = [](int blocks, int steps) {
    executor::Coverage& coverage = executor::machine().coverage;
    coverage.forget();
    Params<float> p;
    p.argument = steps;
    cuda::launch(walks, "walks", {uint32_t(blocks), 1, 1}, 64, 0, nullptr, p);
    return coverage.current();
  };
  const KernelRuns far = runs_of(5, 2);
  CHECK_EQ(far.blocks, 5);
  CHECK_EQ(far.walk.tiles, 4);
  CHECK_EQ(far.walk.steps, 2);
  CHECK_EQ(far.walk.several_step_tiles, 4);
  CHECK_EQ(far.walk.wraps, 2);  // 8 steps: places 0 1 2, 0 1 2, 0 1
  CHECK(far.walk.partial_rows && !far.walk.partial_columns);
  const KernelRuns near = runs_of(4, 1);
  CHECK_EQ(near.walk.tiles, 3);
  CHECK_EQ(near.walk.several_step_tiles, 0);
  CHECK_EQ(near.walk.wraps, 0);
  CHECK(!near.walk.partial_rows && near.walk.partial_columns);
}

// ---- number formats

TEST("primitives/bf16 and f16") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  // Every value comes back, a float between two neighbours goes to the nearer, a tie to the even one.
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const ptx::bf16 b{static_cast<uint16_t>(bits)};
    const ptx::f16 h{static_cast<uint16_t>(bits)};
    if (std::isnan(ptx::to_float(b))) {
      CHECK(std::isnan(ptx::to_float(ptx::to_bf16(ptx::to_float(b)))));
    } else {
      CHECK_EQ(ptx::to_bf16(ptx::to_float(b)).bits, b.bits);
    }
    if (std::isnan(ptx::to_float(h))) {
      CHECK(std::isnan(ptx::to_float(ptx::to_f16(ptx::to_float(h)))));
    } else {
      CHECK_EQ(ptx::to_f16(ptx::to_float(h)).bits, h.bits);
    }
  }
  auto neighbours = [](auto low, auto high, auto narrow) {  // consecutive bits
    const double a = ptx::to_float(low), b = ptx::to_float(high), middle = (a + b) / 2;
    const float m = static_cast<float>(middle);
    CHECK_EQ(double(m), middle);
    CHECK_EQ(narrow(m).bits, low.bits % 2 == 0 ? low.bits : high.bits);
    CHECK_EQ(narrow(std::nextafter(m, static_cast<float>(a))).bits, low.bits);
    CHECK_EQ(narrow(std::nextafter(m, static_cast<float>(b))).bits, high.bits);
  };
  for (uint16_t bits = 0; bits < 0x7bff; ++bits) {
    neighbours(ptx::f16{bits}, ptx::f16{static_cast<uint16_t>(bits + 1)},
               [](float x) { return ptx::to_f16(x); });
  }
  for (uint16_t bits = 0x80; bits < 0x7f7f; ++bits) {
    neighbours(ptx::bf16{bits}, ptx::bf16{static_cast<uint16_t>(bits + 1)},
               [](float x) { return ptx::to_bf16(x); });
  }
  CHECK_EQ(ptx::to_float(ptx::f16{0x3c00}), 1.0f);
  CHECK_EQ(ptx::to_float(ptx::f16{0x0001}), 0x1p-24f);
  CHECK_EQ(ptx::to_float(ptx::f16{0xfbff}), -65504.0f);
  CHECK_EQ(ptx::to_float(ptx::bf16{0x3f80}), 1.0f);
  CHECK_EQ(ptx::to_f16(65519.0f).bits, 0x7bff);
  CHECK_EQ(ptx::to_f16(65520.0f).bits, 0x7c00);
  CHECK_EQ(ptx::to_f16(-inf).bits, 0xfc00);
  CHECK_EQ(ptx::to_bf16(3.4e38f).bits, 0x7f80);
  CHECK_EQ(ptx::to_bf16(-inf).bits, 0xff80);
  CHECK(std::isnan(ptx::to_float(ptx::to_f16(nan))));
  CHECK(std::isnan(ptx::to_float(ptx::to_bf16(nan))));
  CHECK_EQ(ptx::pack_bf16x2(1.0f, 2.0f), 0x40003f80u);
  CHECK_EQ(ptx::pack_f16x2(1.0f, 2.0f), 0x40003c00u);
}

TEST("primitives/tf32, exp2") {
  const float inf = std::numeric_limits<float>::infinity();
  auto tf32 = [](float x) { return ptx::host::bits_float(ptx::to_tf32(x)); };
  CHECK_EQ(tf32(1.0f + 0x1p-10f), 1.0f + 0x1p-10f);
  CHECK_EQ(tf32(1.0f + 0x1p-11f), 1.0f + 0x1p-10f);
  CHECK_EQ(tf32(-1.0f - 0x1p-11f), -1.0f - 0x1p-10f);
  CHECK_EQ(tf32(1.0f + 0x1p-12f), 1.0f);
  CHECK_EQ(tf32(inf), inf);
  CHECK(std::isnan(tf32(std::nanf(""))));
  CHECK_EQ(ptx::exp2_fast(3.0f), 8.0f);
  CHECK_EQ(ptx::exp2_fast(-inf), 0.0f);
  CHECK_EQ(ptx::exp2_fast(-126.5f), 0.0f);
  CHECK_EQ(ptx::exp2_fast(-126.0f), 0x1p-126f);
  CHECK(std::isnan(ptx::exp2_fast(std::nanf(""))));
}

}  // namespace

TEST_MAIN
