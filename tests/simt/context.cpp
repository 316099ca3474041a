#include "context.h"

#if defined(KAVA_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// void simt_switch(void** save, void* load): the registers that a callee keeps, and the stack pointer.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {

namespace {
thread_local Context* t_left = nullptr;
}

void Context::prepare(unsigned char* stack, std::size_t bytes, void (*entry)()) {
  stack_ = stack;
  stack_bytes_ = bytes;
#if defined(KAVA_ASAN)
  __asan_unpoison_memory_region(stack, bytes);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where entry's return address would be
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&ucontext_);
  ucontext_.uc_stack.ss_sp = stack;
  ucontext_.uc_stack.ss_size = bytes;
  ucontext_.uc_link = nullptr;
  makecontext(&ucontext_, entry, 0);
#endif
}

void Context::arrived() {
#if defined(KAVA_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &t_left->stack_, &t_left->stack_bytes_);
#endif
}

void Context::jump(Context& from, Context& to, bool for_good) {
  t_left = &from;
#if defined(KAVA_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, to.stack_, to.stack_bytes_);
#endif
#if defined(__x86_64__)
  simt_switch(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.ucontext_, &to.ucontext_);
#endif
#if defined(KAVA_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, &t_left->stack_, &t_left->stack_bytes_);
#endif
}

}  // namespace simt
