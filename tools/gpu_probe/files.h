// The files of answers: raw little-endian numbers, NAME.bin in one folder. questions.cuh says what lies in
// each, and so does answers.json, which run.py writes beside them.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace probe {

inline std::string path_of(const std::string& folder, const std::string& name) {
  return folder + "/" + name + ".bin";
}

template <class T>
void write(const std::string& folder, const std::string& name, const std::vector<T>& values) {
  const std::string path = path_of(folder, name);
  std::FILE* const file = std::fopen(path.c_str(), "wb");
  const bool all = file && std::fwrite(values.data(), sizeof(T), values.size(), file) == values.size();
  if (file == nullptr || std::fclose(file) != 0 || !all) throw std::runtime_error("cannot write " + path);
}

// All of the file, which must hold `count` numbers.
template <class T>
std::vector<T> read(const std::string& folder, const std::string& name, size_t count) {
  const std::string path = path_of(folder, name);
  std::FILE* const file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) throw std::runtime_error("there is no " + path);
  std::vector<T> values(count);
  const size_t found = std::fread(values.data(), sizeof(T), count, file);
  const bool ended = std::fgetc(file) == EOF;
  std::fclose(file);
  if (found != count || !ended) {
    throw std::runtime_error(path + " does not hold " + std::to_string(count) + " numbers of " +
                             std::to_string(sizeof(T)) + " bytes");
  }
  return values;
}

}  // namespace probe
