// Compares what a chip answered to tools/gpu_probe with what the executor answers. Where the executor claims
// to compute the same, bit for bit; where it says that a GPU may round in its own way, within what it says.
#pragma once

#include <string>
#include <vector>

namespace clce::executor {

struct Replay {
  std::vector<std::string> files;    // that were compared
  std::vector<std::string> notes;    // what else the answers tell
  std::vector<std::string> faults;   // file, operation, and the first operands that are answered otherwise
  std::vector<std::string> missing;  // what the probe asks and the folder has no answers to
};

// All answers in the folder. `sums`: which of the 16 sums over all inputs of a conversion are compared; each
// takes a second or more for each conversion.
Replay replay_goldens(const std::string& folder, const std::vector<int>& sums);

// `root` and the folders in it that hold answers.
std::vector<std::string> golden_folders(const std::string& root);

}  // namespace clce::executor
