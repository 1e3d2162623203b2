#include "executor/global_buffer.h"

#include <algorithm>

#include "executor/access.h"
#include "executor/machine.h"

namespace clce::executor {

GlobalBuffer::GlobalBuffer(size_t bytes, Access access, size_t offset) : access_(access), values_(bytes) {
  machine().global.add(*this, offset);
  poison();
}

GlobalBuffer::~GlobalBuffer() {
  machine().global.remove(*this);
}

void GlobalBuffer::poison() {
  if (is_input()) return;
  std::fill(values_.begin(), values_.end(), kPoison);
  shadow_.assign(size(), GlobalShadow{});
}

size_t GlobalBuffer::first_unwritten() const {
  const auto first = std::find_if(shadow_.begin(), shadow_.end(), [](const GlobalShadow& byte) {
    return byte.written == GlobalShadow::Written::kNever;
  });
  return is_input() ? size() : first - shadow_.begin();
}

}  // namespace clce::executor
