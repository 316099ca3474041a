// An option whose value is one of an enumeration's words.
#pragma once
#include <fmt/ranges.h>

#include <optional>
#include <string>

#include "engine/choice.h"
#include "engine/config/config.h"
#include "engine/config/key_help.h"
#include "engine/error.h"

namespace kava {

/// The enumerator of an option's word; nothing where the option is not given. Error(code usage) for another word.
template <class E>
std::optional<E> choice_option(const char* option, const std::optional<std::string>& word) {
  if (!word) return std::nullopt;
  const std::optional<E> value = choice_of<E>(*word);
  if (!value) throw Error(Exit::usage, option, "\"" + escaped(*word) + "\" is none of its values", remedy_for_word(*word, names_of(E{})));
  return value;
}

/// The forms of data files, for --help.
inline std::string format_words() { return fmt::format("{}", fmt::join(names_of(DataFormat{}), ", ")); }

}  // namespace kava
