#include "goldens.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <set>
#include <utility>

#include "executor/executor.h"
#include "tools/gpu_probe/questions.cuh"

namespace clce::executor {
namespace {

namespace fs = std::filesystem;

template <class... T>
std::string format(const char* pattern, T... values) {
  char text[256];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

// Equal numbers, or none of both.
bool same(float x, float y) {
  return x == y || (std::isnan(x) && std::isnan(y));
}

struct WithArithmetic {
  explicit WithArithmetic(Arithmetic arithmetic) { set_arithmetic(arithmetic); }
  ~WithArithmetic() { set_arithmetic(Arithmetic::kNearest); }
};

// ---- products

// One element: c and the products of a row of a with a row of b.
struct Sum {
  std::vector<double> terms;
  double exact = 0, magnitude = 0;
  bool finite = true;

  void add(double term) {
    terms.push_back(term);
    exact += term;
    magnitude += std::abs(term);
    finite = finite && std::isfinite(term);
  }

  // Every way to add the terms gives the same number: all are multiples of a unit, and all together are less
  // than 2^24 of it, so that no partial sum is rounded and no term has places to be cut off.
  bool is_exact_in_any_order() const {
    double unit = std::numeric_limits<double>::infinity();
    for (const double term : terms) {
      if (term == 0) continue;
      double lowest = std::ldexp(1.0, std::ilogb(term));
      while (std::fmod(term, lowest) != 0) lowest /= 2;
      unit = std::min(unit, lowest);
    }
    return magnitude == 0 || magnitude < 0x1p24 * unit;
  }

  // What truncation may take off, as Arithmetic::kCoarse truncates: a product of k columns is two sums of k /
  // 2 terms and what is there already, each term cut off at 2^-24 of the largest one, each sum at 2^-23 of
  // itself: 2 (k / 2 + 1 + 2) times 2^-24. An H100 adds all columns at once and keeps one bit more, which is
  // less.
  double tolerance() const { return (double(terms.size() - 1) + 6) * 0x1p-24 * magnitude; }
};

template <class Product>
Sum sum_of(const probe::Operands<typename Product::Bits>& asked, int number, int row, int col) {
  constexpr int k = Product::kColumns;
  const auto* a = &asked.a[size_t(number * probe::kRows + row) * k];
  const auto* b = &asked.b[size_t(number * probe::kCols + col) * k];
  Sum sum;
  for (int i = 0; i < k; ++i) sum.add(double(Product::widen(a[i])) * Product::widen(b[i]));
  sum.add(asked.c[size_t(number * probe::kRows + row) * probe::kCols + size_t(col)]);
  return sum;
}

template <class Product>
std::string operands_text(const probe::Operands<typename Product::Bits>& asked, int number, int row,
                          int col) {
  constexpr int k = Product::kColumns;
  const auto text = [&](const std::vector<typename Product::Bits>& from, int at) {
    std::string all;
    for (int i = 0; i < k; ++i)
      all += format(i ? ", %.9g" : "%.9g", Product::widen(from[size_t(at * k + i)]));
    return all;
  };
  return "a = [" + text(asked.a, number * probe::kRows + row) + "], b = [" +
         text(asked.b, number * probe::kCols + col) +
         format("], c = %.9g", asked.c[size_t(number * probe::kRows + row) * probe::kCols + size_t(col)]);
}

template <class Product>
void compare_products(Product product, const std::string& file, const std::vector<float>& found,
                      const probe::Operands<typename Product::Bits>& asked, Replay& replay) {
  const auto nearest = probe::multiply<GlobalArray>(product, asked.a, asked.b, asked.c);
  std::vector<float> coarse;
  {
    const WithArithmetic arithmetic(Arithmetic::kCoarse);
    coarse = probe::multiply<GlobalArray>(product, asked.a, asked.b, asked.c);
  }
  int exact = 0, as_nearest = 0, as_coarse = 0, wrong = 0;
  std::string first;
  for (size_t i = 0; i < found.size(); ++i) {
    const int number = int(i) / (probe::kRows * probe::kCols);
    const int row = int(i) / probe::kCols % probe::kRows, col = int(i) % probe::kCols;
    const Sum sum = sum_of<Product>(asked, number, row, col);
    const bool must_be_same = !sum.finite || sum.is_exact_in_any_order();
    exact += must_be_same;
    as_nearest += same(found[i], nearest[i]);
    as_coarse += same(found[i], coarse[i]);
    const bool right =
        must_be_same ? same(found[i], nearest[i]) : std::abs(found[i] - sum.exact) <= sum.tolerance();
    if (right) continue;
    if (wrong++ == 0) {
      first =
          format(": case %d (kind %d), row %d, column %d: %.9g, the executor has %.9g", number,
                 number % probe::kKinds, row, col, found[i], nearest[i]) +
          (must_be_same ? ", which has no rounding in it" : format(", %.3g is allowed", sum.tolerance())) +
          "; " + operands_text<Product>(asked, number, row, col);
    }
  }
  replay.files.push_back(file);
  replay.notes.push_back(file +
                         format(": of %d sums %d have no rounding in them; %d are as if rounded once, %d as "
                                "truncated in the executor's other arithmetic",
                                int(found.size()), exact, as_nearest, as_coarse));
  if (wrong) {
    replay.faults.push_back(file + ": " + Product::kOperation + first + format(" (%d elements)", wrong));
  }
}

// To the last bit the same whichever factor is the left one: both passes take a logit from either.
template <class Product>
void compare_swapped(const std::string& file, const std::vector<float>& d, const std::vector<float>& swapped,
                     const probe::Operands<typename Product::Bits>& asked, Replay& replay) {
  for (int number = 0; number < probe::kCases; ++number) {
    for (int row = 0; row < probe::kCols; ++row) {
      for (int col = 0; col < probe::kCols; ++col) {
        const float x = d[size_t((number * probe::kRows + row) * probe::kCols + col)];
        const float y = swapped[size_t((number * probe::kRows + col) * probe::kCols + row)];
        if (same(x, y)) continue;
        replay.faults.push_back(
            file + ": " + Product::kOperation +
            format(" is not symmetric: case %d, row %d, column %d: %.9g one way, %.9g the other; ", number,
                   row, col, x, y) +
            operands_text<Product>(asked, number, row, col));
        return;
      }
    }
  }
}

template <class Product>
void replay_product(Product product, const std::string& folder, Replay& replay) {
  const std::string name = Product::kName;
  constexpr size_t k = Product::kColumns, results = probe::kCases * probe::kRows * probe::kCols;
  probe::Operands<typename Product::Bits> asked;
  asked.a = probe::read<typename Product::Bits>(folder, name + "_a", probe::kCases * probe::kRows * k);
  asked.b = probe::read<typename Product::Bits>(folder, name + "_b", probe::kCases * probe::kCols * k);
  asked.c = probe::read<float>(folder, name + "_c", results);
  const auto d = probe::read<float>(folder, name + "_d", results);
  const auto swapped = probe::read<float>(folder, name + "_swapped", results);
  compare_products(product, name + "_d.bin", d, asked, replay);
  compare_products(product, name + "_swapped.bin", swapped, asked.swapped(Product::kColumns), replay);
  compare_swapped<Product>(name + "_swapped.bin", d, swapped, asked, replay);
  for (const char* part : {"_a.bin", "_b.bin", "_c.bin"}) replay.files.push_back(name + part);
}

// ---- ldmatrix

void replay_ldmatrix(const std::string& folder, Replay& replay) {
  const auto found = probe::read<uint32_t>(folder, probe::kLdmatrix, probe::kRegisters);
  const auto ours = probe::registers<GlobalArray>();
  const std::string file = std::string(probe::kLdmatrix) + ".bin";
  replay.files.push_back(file);
  const auto at = size_t(std::mismatch(found.begin(), found.end(), ours.begin()).first - found.begin());
  if (at == found.size()) return;
  replay.faults.push_back(
      file + format(": ldmatrix.x4%s: lane %d, register %d: 0x%08x, the executor has 0x%08x",
                    at >= 128 ? ".trans" : "", int(at / 4 % 32), int(at % 4), found[at], ours[at]));
}

// ---- functions

// Which NaN is the answer to NaN is nobody's business.
bool is_nan_of_16(uint32_t bits, uint32_t infinity) {
  return (bits & 0x7fffu) > infinity;
}
bool is_nan(uint32_t bits) {
  return (bits & 0x7fffffffu) > 0x7f800000u;
}

template <class Function>
bool agree(Function, float x, uint32_t found, uint32_t ours) {
  return std::isnan(x) ? is_nan(found) : found == ours;
}
bool agree(probe::ToBf16, float x, uint32_t found, uint32_t ours) {
  return std::isnan(x) ? is_nan_of_16(found, 0x7f80) && found <= 0xffff : found == ours;
}
bool agree(probe::ToF16, float x, uint32_t found, uint32_t ours) {
  return std::isnan(x) ? is_nan_of_16(found, 0x7c00) && found <= 0xffff : found == ours;
}
bool agree(probe::PackBf16, float x, uint32_t found, uint32_t ours) {
  return (found & 0xffff) == (ours & 0xffff) && agree(probe::ToBf16{}, x, found >> 16, ours >> 16);
}
bool agree(probe::PackF16, float x, uint32_t found, uint32_t ours) {
  return (found & 0xffff) == (ours & 0xffff) && agree(probe::ToF16{}, x, found >> 16, ours >> 16);
}

// Up to 2 ulp from the nearest number, nowhere below the normal ones, and exact where 2^x is 1, 0 or
// infinite.
bool agree(probe::Exp2, float x, uint32_t found, uint32_t ours) {
  constexpr uint32_t kSmallest = 0x00800000, kInfinity = 0x7f800000;
  if (std::isnan(x)) return is_nan(found);
  if (found == ours) return true;
  if (ours == kInfinity || found >= kInfinity || std::abs(x) < 0x1p-126f) return false;
  if (found != 0 && found < kSmallest) return false;
  // At the smallest normal number either may be 0 where the other is not.
  const auto rank = [](uint32_t bits) { return bits == 0 ? int64_t(kSmallest) - 1 : int64_t(bits); };
  if ((found == 0 || ours == 0) && !(x > -126.01f && x < -125.99f)) return false;
  return std::abs(rank(found) - rank(ours)) <= 2;
}

template <class Function>
void replay_samples(Function function, const std::string& folder, Replay& replay) {
  const auto found = probe::read<uint32_t>(folder, Function::kName, probe::kSamples);
  const auto ours = probe::samples<GlobalArray>(function);
  const std::string file = std::string(Function::kName) + ".bin";
  replay.files.push_back(file);
  int wrong = 0;
  std::string first;
  for (uint32_t i = 0; i < probe::kSamples; ++i) {
    const uint32_t input = probe::sample_of(i * probe::kSampled);
    const float x = probe::bits_float(input);
    if (agree(function, x, found[i], ours[i])) continue;
    if (wrong++ == 0) {
      first = format(" of 0x%08x (%.9g): 0x%08x, the executor has 0x%08x", input, x, found[i], ours[i]);
    }
  }
  if (wrong) {
    replay.faults.push_back(file + ": " + Function::kOperation + first + format(" (%d answers)", wrong));
  }
}

template <class Function>
void replay_sums(Function, const std::string& folder, const std::vector<int>& sums, Replay& replay) {
  const std::string name = std::string(Function::kName) + "_sums";
  const auto found = probe::read<unsigned long long>(folder, name, probe::kSums);
  if constexpr (std::is_same_v<Function, probe::Exp2>) {
    replay.notes.push_back(name + ".bin: not compared, for 2 ulp are allowed; exp2_errors.bin is");
    return;
  }
  replay.files.push_back(name + ".bin");
  for (const int sum : sums) {
    const uint32_t begin = uint32_t(sum) * probe::kUppersOfSum, end = begin + probe::kUppersOfSum;
    unsigned long long ours = 0;
    for (uint32_t upper = begin; upper < end; ++upper) ours += probe::sum_of<Function>(upper);
    if (ours == found[size_t(sum)]) continue;
    replay.faults.push_back(
        name + ".bin: " + Function::kOperation +
        format(" of some input in 0x%04x0000 ... 0x%04xffff has another answer", begin, end - 1));
    return;
  }
}

// 2 ulp from the nearest number are up to 2.5 from the exact one.
void replay_errors(const std::string& folder, Replay& replay) {
  const auto found = probe::read<double>(folder, probe::kExp2Errors, probe::kErrors);
  const std::string file = std::string(probe::kExp2Errors) + ".bin";
  replay.files.push_back(file);
  replay.notes.push_back(
      file + format(": ex2.approx is up to %.3f ulp off", *std::max_element(found.begin(), found.end())));
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i] <= 2.5) continue;
    const uint32_t begin = uint32_t(i) * probe::kUppersOfError;
    replay.faults.push_back(file +
                            format(": ex2.approx of some input in 0x%04x0000 ... 0x%04xffff is %.3f ulp off, "
                                   "2.5 are allowed",
                                   begin, begin + probe::kUppersOfError - 1, found[i]));
    return;
  }
}

std::set<std::string> answers_in(const std::string& folder) {
  std::set<std::string> names;
  if (!fs::is_directory(folder)) return names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".bin") names.insert(entry.path().stem().string());
  }
  return names;
}

}  // namespace

std::vector<std::string> golden_folders(const std::string& root) {
  std::vector<std::string> folders;
  if (!answers_in(root).empty()) folders.push_back(root);
  if (!fs::is_directory(root)) return folders;
  for (const auto& entry : fs::directory_iterator(root)) {
    if (!answers_in(entry.path().string()).empty()) folders.push_back(entry.path().string());
  }
  std::sort(folders.begin(), folders.end());
  return folders;
}

Replay replay_goldens(const std::string& folder, const std::vector<int>& sums) {
  const WithArithmetic arithmetic(Arithmetic::kNearest);
  std::set<std::string> left = answers_in(folder);
  Replay replay;
  // What belongs together is compared if any of it is there; then all of it must be.
  const auto compare = [&](const std::vector<std::string>& names, auto with_executor) {
    bool any = false;
    for (const auto& name : names) any = left.erase(name) > 0 || any;
    if (!any) return replay.missing.push_back("there is no " + names[0] + ".bin");
    try {
      with_executor();
    } catch (const std::exception& error) {
      replay.faults.push_back(error.what());
    }
  };
  probe::for_each_product([&](auto product) {
    const std::string name = product.kName;
    compare({name + "_a", name + "_b", name + "_c", name + "_d", name + "_swapped"},
            [&] { replay_product(product, folder, replay); });
  });
  compare({probe::kLdmatrix}, [&] { replay_ldmatrix(folder, replay); });
  probe::for_each_function([&](auto function) {
    const std::string name = function.kName;
    compare({name}, [&] { replay_samples(function, folder, replay); });
    compare({name + "_sums"}, [&] { replay_sums(function, folder, sums, replay); });
  });
  compare({probe::kExp2Errors}, [&] { replay_errors(folder, replay); });
  for (const auto& name : left) replay.faults.push_back(name + ".bin: nothing is known of this file");
  for (auto* lines : {&replay.notes, &replay.faults, &replay.missing}) {
    for (auto& line : *lines) line = fs::path(folder).filename().string() + ": " + line;
  }
  return replay;
}

}  // namespace clce::executor
