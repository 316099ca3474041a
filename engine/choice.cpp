#include "engine/choice.h"

#include <algorithm>

namespace kava {

std::vector<std::string> split_names(std::string_view commas) {
  std::vector<std::string> out;
  while (!commas.empty()) {
    const auto comma = std::min(commas.find(','), commas.size());
    std::string_view name = commas.substr(0, comma);
    while (name.starts_with(' ')) name.remove_prefix(1);
    out.emplace_back(name);
    commas.remove_prefix(std::min(comma + 1, commas.size()));
  }
  return out;
}

}  // namespace kava
