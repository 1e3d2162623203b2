// Where in the source a kernel asks for something: threads that act together must stand at one place.
#pragma once

#include <cstring>
#include <string>

namespace clce::executor {

struct CallSite {
  const char* file = nullptr;
  int line = 0;

  // As the default of a parameter: where that function is called.
  static constexpr CallSite here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }

  friend bool operator==(const CallSite& a, const CallSite& b) {
    return a.line == b.line && (a.file == b.file || (a.file && b.file && std::strcmp(a.file, b.file) == 0));
  }
};

// What a thread asks for, and where.
struct Operation {
  const char* what = nullptr;  // "shuffle_xor" and so on, for messages; null: nothing
  CallSite site;

  friend bool operator==(const Operation& a, const Operation& b) {
    return (a.what == b.what || (a.what && b.what && std::strcmp(a.what, b.what) == 0)) && a.site == b.site;
  }
  friend bool operator!=(const Operation& a, const Operation& b) { return !(a == b); }

  // "shuffle_xor (walk_sums.cuh:182)"
  std::string text() const {
    const char* const slash = std::strrchr(site.file, '/');
    return std::string(what) + " (" + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
  }
};

}  // namespace clce::executor
