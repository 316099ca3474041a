// Run folders as they are compared.
#pragma once
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <utility>

#include "engine/files/checkpoint.h"
#include "engine/files/files.h"
#include "engine/files/json.h"

namespace kava {

constexpr std::size_t kMostCompared = std::size_t{1} << 26;

/// A file as it is compared: without what may differ between equal runs.
inline std::string content_of(const std::filesystem::path& path) {
  std::string text = read_file(path.string(), kMostCompared);
  const std::string name = path.filename();
  if (name == "state.json" || name == "manifest.json") {
    Json json = parse_json(text, path.string());
    json.erase("seconds");
    for (Json& file : json.contains("files") ? json["files"] : json["none"])
      if (file["name"] == "state.json") file.erase("size"), file.erase("sha256");
    return json.dump();
  }
  if (name != "metrics.jsonl") return text;
  std::istringstream lines(std::exchange(text, ""));
  for (std::string line; std::getline(lines, line);) {
    Json json = parse_json(line, path.string());
    for (const char* key : {"samples_per_s", "tokens_per_s", "mfu", "seconds", "memory_bytes", "device_bytes"}) json.erase(key);
    text += json.dump() + "\n";
  }
  return text;
}

/// Everything in a run folder: names, and what they hold.
inline std::map<std::string, std::string> snapshot(const std::filesystem::path& run) {
  std::map<std::string, std::string> all;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(run)) {
    const std::string name = entry.path().lexically_relative(run);
    if (name == "progress.json" || name.starts_with("log")) continue;
    if (entry.is_symlink()) all[name] = "link to " + std::filesystem::read_symlink(entry.path()).string();
    else if (entry.is_directory()) all[name] = "folder";
    else all[name] = sha256(content_of(entry.path()));
  }
  return all;
}

/// -1 where there is none.
inline std::int64_t newest_step(const std::filesystem::path& run) {
  const auto newest = newest_valid_checkpoint(run);
  return newest ? newest->manifest.step : -1;
}

}  // namespace kava
