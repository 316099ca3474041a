// What a method makes of keys: `fixed` refuses every other value, else it is a default below everything that is given.
#pragma once
#include <span>

#include "engine/config/config.h"

namespace kava {

struct Rule {
  Method method;
  const char* key;
  const char* value;  // TOML
  bool fixed = true;
};

std::span<const Rule> method_rules();

}  // namespace kava
