// Enumerations whose enumerators are also the words of the configuration.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kava {

/// The names of a list such as "a, b".
std::vector<std::string> split_names(std::string_view commas);

/// An enumeration whose enumerators, in order from 0, are also the words of the configuration.
#define KAVA_CHOICE(NAME, ...)                                               \
  enum class NAME : int { __VA_ARGS__ };                                     \
  inline const std::vector<std::string>& names_of(NAME) {                    \
    static const std::vector<std::string> names = split_names(#__VA_ARGS__); \
    return names;                                                            \
  }

/// Which trace tokens eviction keeps, how a group of query heads shares one importance, how a student's row is held against its target.
KAVA_CHOICE(Policy, rkv, cosine, attention, crop, random, uniform)
KAVA_CHOICE(Group, max_logits, max_prob, mean_prob)
KAVA_CHOICE(Distance, smooth_l1, mse, l1)

/// The word of an enumerator: name_of(Method::full_cot) == "full_cot".
template <class E>
const std::string& name_of(E value) {
  return names_of(value).at(static_cast<std::size_t>(value));
}

/// The enumerator of a word, or nothing: choice_of<Method>("kava").
template <class E>
std::optional<E> choice_of(std::string_view word) {
  const auto& names = names_of(E{});
  for (std::size_t i = 0; i < names.size(); ++i)
    if (names[i] == word) return static_cast<E>(i);
  return std::nullopt;
}

}  // namespace kava
