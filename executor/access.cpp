#include "executor/access.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

namespace clce::executor {

AddressRange::AddressRange(size_t bytes) : bytes_(bytes) {
  void* memory =
      mmap(nullptr, bytes + kAlignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("executor: cannot reserve addresses");
    std::abort();
  }
  base_ = (reinterpret_cast<uintptr_t>(memory) + kAlignment - 1) / kAlignment * kAlignment;
}

std::string hex(uintptr_t address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<size_t>(address));
  return text;
}

}  // namespace clce::executor
