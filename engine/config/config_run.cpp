// The configuration as a run keeps it: written beside its results, read back wherever they lie, and held against the one that goes on.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "engine/config/architecture.h"
#include "engine/config/config.h"
#include "engine/config/config_schema.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/paths.h"

namespace kava {

using namespace schema;

namespace {

template <class F>
void for_each_path(const Key& key, F f) {
  if (const Text* text = std::get_if<Text>(&key.field); text && text->is_path) f(*text->value);
  if (const Files* files = std::get_if<Files>(&key.field))
    for (DataFile& file : *files->value) f(file.path);
}

}  // namespace

RunConfig load_run_config(const std::string& run_dir, const std::vector<std::string>& sets) {
  // Without links, so that a step upwards is one in the name too.
  std::error_code failed;
  std::filesystem::path folder = std::filesystem::canonical(run_dir, failed);
  if (failed) folder = run_dir;
  RunConfig config = load_config((folder / "config.toml").string(), sets);
  const std::string prefix = folder.string() + "/";
  for (const Key& key : keys_of(config))
    for_each_path(key, [&](std::string& path) {
      if (path.starts_with(prefix)) path = path_from(folder, path.substr(prefix.size()));
    });
  return config;
}

std::string to_toml(const RunConfig& config, const std::string& folder) {
  RunConfig copy = config;
  std::string out, section;
  for (const Key& key : keys_of(copy)) {
    for_each_path(key, [&](std::string& path) {
      if (!folder.empty()) path = relative_path(folder, path);
      if (!is_utf8(path)) throw Error(Exit::usage, key.name, "the path " + shown_path(path) + " is not UTF-8", "rename the folder");
    });
    if (key.section() != section) out += fmt::format("\n[{}]\n", section = key.section());
    out += fmt::format("{} = {}\n", key.leaf(), value_text(key));
  }
  return out;
}

namespace {
// The names of one architecture are none of another's with other defaults, so the list alone tells.
bool is_default_of_architecture(const std::vector<std::string>& targets) {
  return std::ranges::find(architectures(), targets, &Architecture::lora_targets) != architectures().end();
}
}  // namespace

std::string config_hash(const RunConfig& config) {
  RunConfig copy = config, defaults = method_defaults(config.method);
  const auto keys = keys_of(copy), unset = keys_of(defaults);
  std::vector<std::string> lines = {"method = " + name_of(config.method)};
  for (std::size_t i = 0; i < keys.size(); ++i)
    if (keys[i].on_resume == OnResume::fixed && value_text(keys[i]) != value_text(unset[i]) &&
        !(keys[i].name == "lora.targets" && is_default_of_architecture(config.lora.targets)))
      lines.push_back(fmt::format("{} = {}", keys[i].name, value_text(keys[i])));
  std::sort(lines.begin(), lines.end());
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return sha256(text);
}

std::vector<std::string> config_differences(const RunConfig& a, const RunConfig& b, OnResume kind) {
  RunConfig before = a, after = b;
  const auto old_keys = keys_of(before), new_keys = keys_of(after);
  std::vector<std::string> out;
  for (std::size_t i = 0; i < old_keys.size(); ++i) {
    const std::string from = value_text(old_keys[i]), to = value_text(new_keys[i]);
    if (old_keys[i].on_resume == kind && from != to) out.push_back(fmt::format("{}: {} -> {}", old_keys[i].name, from, to));
  }
  return out;
}

}  // namespace kava
