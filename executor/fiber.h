// A thread of a thread block: a stack of its own and a switch that saves the callee-saved registers only
// (ucontext would make two system calls per switch for the signal mask).
#pragma once

#include <cstddef>

#if defined(CLCE_EXECUTOR_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__)) || !defined(__ELF__)
#undef CLCE_EXECUTOR_UCONTEXT
#define CLCE_EXECUTOR_UCONTEXT 1
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CLCE_EXECUTOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CLCE_EXECUTOR_ASAN 1
#endif
#endif

namespace clce::executor {

class Fiber {
 public:
  // The fiber that runs already: the host's.
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next switch to this fiber call entry(), which must never return. A fiber may be prepared
  // again whatever it was doing: its frames are forgotten, not unwound.
  void prepare(void (*entry)());

  // Leaves `from` (the fiber that calls this) and goes on in `to`. `from_ends`: never to be resumed.
  static void switch_to(Fiber& from, Fiber& to, bool from_ends = false);

  // First thing in an entry function: completes the switch that led to it.
  static void entered(Fiber& self);

  static constexpr size_t kStackBytes =
#if defined(CLCE_EXECUTOR_ASAN)
      512 << 10;
#else
      128 << 10;
#endif

 private:
  void* stack_ = nullptr;  // lowest address; a guard page lies below
#if defined(CLCE_EXECUTOR_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#if defined(CLCE_EXECUTOR_ASAN)
  void* fake_stack_ = nullptr;
  const void* asan_bottom_ = nullptr;
  size_t asan_size_ = 0;
  static void finish_switch(Fiber& self);
#endif
};

}  // namespace clce::executor
