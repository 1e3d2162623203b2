// A test is a name and a function; a check that fails throws. Arguments of the program choose tests by
// parts of their names.
#pragma once

#include <cctype>
#include <chrono>
#include <cstdio>
#include <exception>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace clce::check {

struct Test {
  std::string name;
  std::function<void()> body;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline long long& num_checks() {
  static long long count = 0;
  return count;
}

struct Registration {
  Registration(std::string name, std::function<void()> body) {
    tests().push_back({std::move(name), std::move(body)});
  }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

inline int run(int argc, char** argv) {
  std::vector<std::string> parts;
  bool verbose = false, list = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "-v") {
      verbose = true;
    } else if (argument == "--list") {
      list = true;
    } else {
      parts.push_back(argument);
    }
  }
  const auto begin = std::chrono::steady_clock::now();
  auto seconds_since = [](std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  int ran = 0;
  std::vector<std::string> failed;
  for (const Test& test : tests()) {
    bool chosen = parts.empty();
    for (const std::string& part : parts) {
      const size_t at = test.name.find(part);  // "float16/" is not meant to find "bfloat16/"
      chosen = chosen || at == 0 || (at != std::string::npos && !std::isalnum(test.name[at - 1]));
    }
    if (!chosen) continue;
    ++ran;
    if (list) {
      std::printf("%s\n", test.name.c_str());
      continue;
    }
    const auto start = std::chrono::steady_clock::now();
    try {
      test.body();
      if (verbose) std::printf("ok     %s (%.2f s)\n", test.name.c_str(), seconds_since(start));
    } catch (const std::exception& error) {
      std::printf("FAILED %s\n       %s\n", test.name.c_str(), error.what());
      failed.push_back(test.name);
    }
    std::fflush(stdout);
  }
  if (list) return 0;
  for (const std::string& name : failed) std::printf("failed: %s\n", name.c_str());
  std::printf("%d tests, %lld checks, %zu failed, %.1f s\n", ran, num_checks(), failed.size(),
              seconds_since(begin));
  return failed.empty() && ran > 0 ? 0 : 1;
}

}  // namespace clce::check

#define CLCE_CONCAT_(a, b) a##b
#define CLCE_CONCAT(a, b) CLCE_CONCAT_(a, b)
#define TEST(title)                                                              \
  static void CLCE_CONCAT(test_, __LINE__)();                                    \
  static const ::clce::check::Registration CLCE_CONCAT(registration_, __LINE__)( \
      title, CLCE_CONCAT(test_, __LINE__));                                      \
  static void CLCE_CONCAT(test_, __LINE__)()

#define CHECK(condition)                                                   \
  do {                                                                     \
    ++::clce::check::num_checks();                                         \
    if (!(condition)) ::clce::check::fail(__FILE__, __LINE__, #condition); \
  } while (0)

#define CHECK_EQ(a, b)                                              \
  do {                                                              \
    ++::clce::check::num_checks();                                  \
    const auto clce_a = (a);                                        \
    const auto clce_b = (b);                                        \
    if (!(clce_a == clce_b)) {                                      \
      std::ostringstream clce_text;                                 \
      clce_text.precision(17);                                      \
      clce_text << #a " is " << clce_a << ", " #b " is " << clce_b; \
      ::clce::check::fail(__FILE__, __LINE__, clce_text.str());     \
    }                                                               \
  } while (0)

#define TEST_MAIN                          \
  int main(int argc, char** argv) {        \
    return ::clce::check::run(argc, argv); \
  }
