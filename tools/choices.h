// Options whose values are the words of an enumeration.
#pragma once
#include <fmt/ranges.h>

#include <optional>
#include <string>

#include "engine/choice.h"
#include "engine/error.h"

namespace kava {

/// Nothing where the option is not given. Error(code usage) naming the values.
template <class E>
std::optional<E> choice(const char* option, const std::optional<std::string>& word) {
  if (!word) return std::nullopt;
  const std::optional<E> value = choice_of<E>(*word);
  if (!value)
    throw Error(Exit::usage, option, "\"" + escaped(*word) + "\" is none of its values",
                fmt::format("give {}", fmt::join(names_of(E{}), ", ")));
  return value;
}

}  // namespace kava
