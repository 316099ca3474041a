#include "engine/config/toml_file.h"

#include <fmt/format.h>

#include <cmath>

#include "engine/config/toml_text.h"
#include "engine/error.h"

namespace kava {

namespace {

class Reader {
 public:
  explicit Reader(TomlFile& out) : out_(out), shown_(shown_path(out.path)) {}

  Json read(const toml::node& node, const std::string& key) {
    if (const toml::table* table = node.as_table()) return read_table(*table, key);
    const std::string where = at(shown_, node.source());
    if (!key.empty()) out_.places.emplace(key, where);
    if (const toml::array* array = node.as_array()) {
      Json list = Json::array();
      for (std::size_t i = 0; i < array->size(); ++i) list.push_back(read(*array->get(i), fmt::format("{}[{}]", key, i)));
      return list;
    }
    if (node.is_string()) return node.as_string()->get();
    if (node.is_boolean()) return node.as_boolean()->get();
    if (node.is_integer()) return node.as_integer()->get();
    if (node.is_floating_point() && std::isfinite(node.as_floating_point()->get())) return node.as_floating_point()->get();
    throw Error(Exit::usage, where, escaped(key) + " is a date or no finite number", "give a string, a number, true or false");
  }

 private:
  Json read_table(const toml::table& table, const std::string& key) {
    if (!key.empty()) out_.places.emplace(key, at(shown_, table.source()));
    Json object = Json::object();
    for (const auto& [name, value] : table) {
      const std::string below = (key.empty() ? "" : key + ".") + std::string(name.str());
      out_.places.emplace(below, at(shown_, name.source()));
      object[std::string(name.str())] = read(value, below);
    }
    return object;
  }

  TomlFile& out_;
  const std::string shown_;
};

}  // namespace

std::string TomlFile::where(std::string key) const {
  for (;;) {
    if (const auto place = places.find(key); place != places.end()) return place->second;
    const auto end = key.find_last_of(".[");
    if (end == std::string::npos) return shown_path(path);
    key.resize(end);
  }
}

TomlFile read_toml(const std::string& path) {
  TomlFile file;
  file.path = path;
  file.value = Reader(file).read(parse_toml_file(path), "");
  return file;
}

}  // namespace kava
