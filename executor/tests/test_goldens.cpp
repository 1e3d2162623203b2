// The replay of goldens, on files that the executor itself has written, right ones and wrong ones.
#include "goldens.h"

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "check.h"
#include "executor/executor.h"
#include "tools/gpu_probe/questions.cuh"

using namespace clce::executor;

namespace {

namespace fs = std::filesystem;

// Sums over the last of the positive inputs, of which nearly all are NaN; the others would take a minute.
constexpr int kSum = 7;

struct Folder {
  fs::path path;
  Folder() {
    std::string name = (fs::temp_directory_path() / "goldens.XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path = name;
  }
  ~Folder() { fs::remove_all(path); }
};

// A chip that computes as the executor does.
struct Chip : Folder {
  explicit Chip(Arithmetic arithmetic) {
    set_arithmetic(arithmetic);
    probe::ask<GlobalArray>(path.string());
    std::vector<unsigned long long> sums(probe::kSums);
    for (uint32_t i = 0; i < probe::kUppersOfSum; ++i) {
      sums[kSum] += probe::sum_of<probe::ToBf16>(kSum * probe::kUppersOfSum + i);
    }
    probe::write(path.string(), "to_bf16_sums", sums);
    std::vector<double> errors(probe::kErrors);
    for (uint32_t upper = 0; upper < probe::kUppers; ++upper) {
      double& error = errors[upper / probe::kUppersOfError];
      error = std::max(error, probe::exp2_error(probe::number_of(probe::sample_of(upper))));
    }
    probe::write(path.string(), probe::kExp2Errors, errors);
    set_arithmetic(Arithmetic::kNearest);
  }
};

const Chip& nearest() {
  static const Chip chip(Arithmetic::kNearest);
  return chip;
}

// The replay of one operation's files with some of the numbers of `name` changed.
template <class T, class Change>
Replay replay_changed(const std::string& prefix, const std::string& name, size_t count, Change change) {
  const Folder folder;
  for (const auto& entry : fs::directory_iterator(nearest().path)) {
    const std::string file = entry.path().filename().string();
    if (file.rfind(prefix, 0) == 0) fs::copy(entry.path(), folder.path / file);
  }
  auto values = probe::read<T>(folder.path.string(), name, count);
  change(values);
  probe::write(folder.path.string(), name, values);
  return replay_goldens(folder.path.string(), {kSum});
}

// So many faults, of which the first says all of these.
void check_found(const Replay& replay, const std::vector<std::string>& parts, size_t count = 1) {
  CHECK_EQ(replay.faults.size(), count);
  for (const auto& part : parts) {
    if (replay.faults[0].find(part) == std::string::npos) {
      clce::check::fail(__FILE__, __LINE__, "no \"" + part + "\" in: " + replay.faults[0]);
    }
  }
}
void check_none(const Replay& replay) {
  if (!replay.faults.empty()) clce::check::fail(__FILE__, __LINE__, replay.faults[0]);
}

constexpr size_t kResults = probe::kCases * probe::kRows * probe::kCols;

size_t place(int number, int row, int col) {
  return size_t((number * probe::kRows + row) * probe::kCols + col);
}

}  // namespace

TEST("goldens/the executor's own answers are found right") {
  const Replay replay = replay_goldens(nearest().path.string(), {kSum});
  check_none(replay);
  CHECK_EQ(replay.files.size(), 3u * 5 + 1 + 6 + 1 + 1);
  // Sums over all inputs of the five other functions take a GPU.
  CHECK_EQ(replay.missing.size(), 5u);
  const std::string folder = nearest().path.filename().string();
  CHECK_EQ(replay.missing[0], folder + ": there is no exp2_sums.bin");
}

TEST("goldens/another rounding of sums and exponentials is within what is allowed") {
  const Chip chip(Arithmetic::kCoarse);
  const Replay replay = replay_goldens(chip.path.string(), {});
  check_none(replay);
  const auto a = probe::read<float>(chip.path.string(), "mma_bf16_d", kResults);
  const auto b = probe::read<float>(nearest().path.string(), "mma_bf16_d", kResults);
  size_t others = 0;
  for (size_t i = 0; i < kResults; ++i) others += a[i] == b[i] ? 0 : 1;
  CHECK(others > kResults / 20);
}

TEST("goldens/wrong sums are found") {
  // Kind 3: one and small parts of its last place, which truncation may all lose, and no more.
  const auto one_more = [](float by) {
    return replay_changed<float>("mma_bf16", "mma_bf16_d", kResults,
                                 [=](auto& d) { d[place(35, 9, 4)] *= 1 + by; });
  };
  check_none(one_more(-0x1p-21f));
  check_found(one_more(0x1p-18f), {"mma_bf16_d.bin: mma.m16n8k16 of bfloat16",
                                   "case 35 (kind 3), row 9, column 4", "is allowed; a = [", "(1 elements)"});
  // What has no rounding in it: the left factor's last eight rows are zeros where the factors are swapped.
  for (const std::string name : {"mma_bf16", "mma_f16", "mma_tf32"}) {
    const auto replay = replay_changed<float>(name, name + "_swapped", kResults, [&](auto& d) {
      d[place(3, 12, 2)] = 0x1p-149f;
      d[place(4, 13, 2)] = 1;
    });
    check_found(replay,
                {name + "_swapped.bin", "case 3 (kind 3), row 12, column 2", "no rounding", "(2 elements)"});
  }
  // NaN where there is none, and the other way round.
  check_found(
      replay_changed<float>("mma_f16", "mma_f16_d", kResults, [](auto& d) { d[place(0, 9, 1)] = NAN; }),
      {"case 0 (kind 0), row 9, column 1: nan"});
  check_found(replay_changed<float>("mma_f16", "mma_f16_d", kResults, [](auto& d) { d[place(7, 0, 0)] = 1; }),
              {"case 7 (kind 7), row 0, column 0: 1, the executor has nan"}, 2);
}

TEST("goldens/a product that depends on which factor is the left one is found") {
  const auto replay = replay_changed<float>("mma_tf32", "mma_tf32_swapped", kResults, [](auto& d) {
    d[place(9, 2, 5)] = std::nextafter(d[place(9, 2, 5)], 100.0f);
  });
  check_found(replay, {"mma_tf32_swapped.bin: mma.m16n8k8 of TF32 is not symmetric: case 9, row 5, column 2",
                       "b = ["});
}

TEST("goldens/wrong registers are found") {
  const auto replay = replay_changed<uint32_t>("ldmatrix", "ldmatrix", probe::kRegisters, [](auto& r) {
    std::swap(r[128 + 4 * 7 + 2], r[128 + 4 * 7 + 3]);
  });
  check_found(replay, {"ldmatrix.bin: ldmatrix.x4.trans: lane 7, register 2: 0x"});
}

TEST("goldens/wrong conversions are found") {
  probe::for_each_function([](auto function) {
    const std::string name = function.kName;
    if (name == "exp2") return;
    const size_t i = 0x3f80 / probe::kSampled;  // 1 and a little
    const auto replay =
        replay_changed<uint32_t>(name, name, probe::kSamples, [&](auto& x) { x[i] ^= 0x10000; });
    check_found(replay, {name + ".bin: " + function.kOperation, "of 0x3f80", "(1 answers)"});
  });
  const size_t nan = 0x7fc0 / probe::kSampled;
  check_none(
      replay_changed<uint32_t>("to_f16", "to_f16", probe::kSamples, [&](auto& x) { x[nan] = 0x7fff; }));
  check_found(
      replay_changed<uint32_t>("to_f16", "to_f16", probe::kSamples, [&](auto& x) { x[nan] = 0x7c00; }),
      {"to_f16.bin: cvt.rn.f16 of 0x7fc0"});
  check_found(replay_changed<unsigned long long>("to_bf16", "to_bf16_sums", probe::kSums,
                                                 [](auto& sums) { ++sums[kSum]; }),
              {"to_bf16_sums.bin: cvt.rn.bf16 of some input in 0x70000000 ... 0x7fffffff"});
}

TEST("goldens/wrong exponentials are found") {
  const auto off_by = [](uint32_t upper, uint32_t ulps) {
    return replay_changed<uint32_t>("exp2.", "exp2", probe::kSamples,
                                    [=](auto& x) { x[upper / probe::kSampled] += ulps; });
  };
  check_none(off_by(0xc000, 2));
  check_none(off_by(0xc000, uint32_t(-2)));
  check_found(off_by(0xc000, 3), {"exp2.bin: ex2.approx of 0xc000", "(1 answers)"});
  check_found(off_by(0, 1), {"exp2.bin: ex2.approx of 0x0000"});       // 2^0
  check_found(off_by(0x7f00, 1), {"exp2.bin: ex2.approx of 0x7f00"});  // infinity
  check_found(off_by(0xff00, 64),
              {"exp2.bin: ex2.approx of 0xff00"});  // 0, and a number below the normal ones
  check_found(
      replay_changed<double>("exp2_errors", "exp2_errors", probe::kErrors, [](auto& x) { x[127] = 2.6; }),
      {"exp2_errors.bin: ex2.approx of some input in 0x3f800000 ... 0x3fffffff is 2.600 ulp off"});
}

TEST("goldens/files that are not as the probe writes them are found") {
  const Folder folder;
  CHECK(golden_folders(folder.path.string()).empty());
  CHECK(golden_folders((folder.path / "none").string()).empty());
  const fs::path chip = folder.path / "chip";
  fs::create_directory(chip);
  CHECK(golden_folders(folder.path.string()).empty());
  probe::write(chip.string(), "ldmatrix", std::vector<uint32_t>(255));
  CHECK_EQ(golden_folders(folder.path.string()).size(), 1u);
  check_found(replay_goldens(chip.string(), {}),
              {"chip: ", "ldmatrix.bin does not hold 256 numbers of 4 bytes"});
  probe::write(chip.string(), "ldmatrix", std::vector<uint32_t>(257));
  check_found(replay_goldens(chip.string(), {}), {"ldmatrix.bin does not hold"});
  fs::remove(chip / "ldmatrix.bin");
  fs::copy(nearest().path / "mma_f16_d.bin", chip / "mma_f16_d.bin");
  check_found(replay_goldens(chip.string(), {}), {"there is no", "mma_f16_a.bin"});
  // All but the one product: two others, ldmatrix, six functions, their sums, and errors.
  CHECK_EQ(replay_goldens(chip.string(), {}).missing.size(), 2u + 1 + 6 + 6 + 1);
  fs::rename(chip / "mma_f16_d.bin", chip / "mma_f8_d.bin");
  check_found(replay_goldens(chip.string(), {}), {"mma_f8_d.bin: nothing is known of this file"});
}

TEST_MAIN
