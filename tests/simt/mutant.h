// What tools/mutants.py writes into its copy of the kernels. A place that can be broken has a number, and is broken while that is `chosen`.
#pragma once
#include <type_traits>

namespace mutant {

/// KAVA_MUTANT; 0: nothing is broken; -1: the same, and places that would have done otherwise are noted for KAVA_MUTANT_LOG. Constant to
/// who reads it, so that the emulator is not told of the access.
extern const int chosen;
void note(int number);

#define KAVA_ALWAYS_INLINE [[gnu::always_inline]] inline constexpr

template <class T>
KAVA_ALWAYS_INLINE T either(int number, T was, T becomes) {
  if (std::is_constant_evaluated()) return was;
  if (chosen < 0 && was != becomes) note(number);
  return chosen == number ? becomes : was;
}

/// Whether a barrier, a wait or a call is left out.
KAVA_ALWAYS_INLINE bool without(int number) { return either(number, false, true); }
KAVA_ALWAYS_INLINE bool always(int number, bool x) { return either(number, x, true); }
KAVA_ALWAYS_INLINE bool never(int number, bool x) { return either(number, x, false); }
/// A factor left out, and a mask of bits.
template <class T>
KAVA_ALWAYS_INLINE T one(int number, T x) {
  return either(number, x, T(1));
}
template <class T>
KAVA_ALWAYS_INLINE T ones(int number, T x) {
  return either(number, x, T(~T{}));
}
/// Comparisons whose bound is one too far.
template <class A, class B>
KAVA_ALWAYS_INLINE bool less(int number, A a, B b) {
  return either(number, a < b, a <= b);
}
template <class A, class B>
KAVA_ALWAYS_INLINE bool at_most(int number, A a, B b) {
  return either(number, a <= b, a < b);
}
template <class A, class B>
KAVA_ALWAYS_INLINE bool more(int number, A a, B b) {
  return either(number, a > b, a >= b);
}
template <class A, class B>
KAVA_ALWAYS_INLINE bool at_least(int number, A a, B b) {
  return either(number, a >= b, a > b);
}

#undef KAVA_ALWAYS_INLINE

}  // namespace mutant
