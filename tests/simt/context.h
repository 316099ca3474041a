// Execution contexts for fibers: x86-64 by hand (a switch costs a few nanoseconds), other machines by ucontext. AddressSanitizer is told.
#pragma once
#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Context {
 public:
  /// Makes this the context of entry() on a stack of its own. entry never returns and calls arrived() first.
  void prepare(unsigned char* stack, std::size_t bytes, void (*entry)());
  static void arrived();
  /// Leaves `from`, which is running, and goes on in `to`. for_good: nobody comes back to `from`.
  static void jump(Context& from, Context& to, bool for_good = false);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t ucontext_;
#endif
  const void* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
};

}  // namespace simt
