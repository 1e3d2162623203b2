// What chips have answered, against the executor.
//
//   replay_goldens FOLDER [--all]    --all: every sum over all inputs of the conversions (a minute)
#include <cstdio>
#include <numeric>
#include <string>

#include "goldens.h"

int main(int count, char** arguments) {
  constexpr int kSkipped = 77;
  const bool all = count == 3 && std::string(arguments[2]) == "--all";
  if (count != 2 && !all) {
    std::fprintf(stderr, "usage: replay_goldens FOLDER [--all]\n");
    return 2;
  }
  const auto folders = clce::executor::golden_folders(arguments[1]);
  if (folders.empty()) {
    std::printf("no goldens are committed yet: no *.bin in %s or in its folders\n", arguments[1]);
    return kSkipped;
  }
  // 2^-31 to 2, and 2 to 2^33: all of float16's range and both of its ends.
  std::vector<int> sums{3, 4};
  if (all) {
    sums.resize(16);
    std::iota(sums.begin(), sums.end(), 0);
  }
  size_t files = 0, faults = 0;
  for (const auto& folder : folders) {
    const auto replay = clce::executor::replay_goldens(folder, sums);
    for (const auto& note : replay.notes) std::printf("%s\n", note.c_str());
    // A probe that has not come to its end must not pass for a chip that agrees.
    for (const auto* lines : {&replay.faults, &replay.missing}) {
      for (const auto& line : *lines) std::printf("FAILED %s\n", line.c_str());
      faults += lines->size();
    }
    files += replay.files.size();
  }
  std::printf("%zu files of %zu chips compared, %zu faults\n", files, folders.size(), faults);
  return faults ? 1 : 0;
}
