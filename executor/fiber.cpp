#include "executor/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(CLCE_EXECUTOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(CLCE_EXECUTOR_UCONTEXT)
// void clce_executor_switch(void** save_stack_pointer, void* load_stack_pointer)
extern "C" void clce_executor_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl clce_executor_switch
.type clce_executor_switch, @function
clce_executor_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size clce_executor_switch, .-clce_executor_switch
)");
constexpr int kSavedWords = 6;  // then the return address
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl clce_executor_switch
.type clce_executor_switch, %function
clce_executor_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size clce_executor_switch, .-clce_executor_switch
)");
#endif
#endif

namespace clce::executor {

Fiber::~Fiber() {
  if (stack_ != nullptr) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    munmap(static_cast<char*>(stack_) - page, kStackBytes + page);
  }
}

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    stack_ = static_cast<char*>(memory) + page;
  }
#if defined(CLCE_EXECUTOR_ASAN)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // of frames that were never unwound
  asan_bottom_ = stack_;
  asan_size_ = kStackBytes;
  fake_stack_ = nullptr;
#endif
#if defined(CLCE_EXECUTOR_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStackBytes);
#if defined(__x86_64__)
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  top -= kSavedWords;
  std::memset(top, 0, kSavedWords * sizeof(void*));
#else
  top -= 20;
  std::memset(top, 0, 20 * sizeof(void*));
  top[11] = reinterpret_cast<void*>(entry);  // x30
#endif
  stack_pointer_ = top;
#endif
}

#if defined(CLCE_EXECUTOR_ASAN)
namespace {
Fiber* came_from = nullptr;
}
void Fiber::finish_switch(Fiber& self) {
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack_, &bottom, &size);
  if (came_from->stack_ == nullptr) {  // the host's stack: its bounds are learnt here
    came_from->asan_bottom_ = bottom;
    came_from->asan_size_ = size;
  }
}
#endif

void Fiber::entered([[maybe_unused]] Fiber& self) {
#if defined(CLCE_EXECUTOR_ASAN)
  finish_switch(self);
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool from_ends) {
#if defined(CLCE_EXECUTOR_ASAN)
  came_from = &from;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack_, to.asan_bottom_, to.asan_size_);
#endif
#if defined(CLCE_EXECUTOR_UCONTEXT)
  swapcontext(&from.context_, &to.context_);
#else
  clce_executor_switch(&from.stack_pointer_, to.stack_pointer_);
#endif
#if defined(CLCE_EXECUTOR_ASAN)
  finish_switch(from);
#endif
}

}  // namespace clce::executor
