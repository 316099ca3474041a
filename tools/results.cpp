#include "tools/results.h"

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/parts.h"
#include "engine/files/unreadable.h"
#include "engine/text/unicode.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kLargestResult = std::size_t{1} << 34;

// Without times, at any depth.
void drop_times(Json& json) {
  if (json.is_object()) {
    json.erase("seconds");
    for (auto i = json.begin(); i != json.end();) i = i.key().starts_with("ms_") ? json.erase(i) : std::next(i);
  }
  if (json.is_structured())
    for (Json& inner : json) drop_times(inner);
}

// Without what differs between equal evaluations.
Json compared(Json document) {
  if (!document.is_object()) return document;
  for (const char* key : {"model", "weights"}) document.erase(key);
  if (document.contains("options") && document["options"].is_object())
    for (const char* key : {"base", "batch", "format"})
      document["options"].erase(key);  // the form by which a file was read is in its result
  if (document.contains("results") && document["results"].is_array())
    for (Json& result : document["results"])
      if (result.is_object()) result.erase("data");
  drop_times(document);
  return document;
}

[[noreturn]] void refuse(const fs::path& path, const std::string& what) {
  throw Error(Exit::usage, shown_path(path), what, "add --force to replace it");
}

// The result that is there; null where nothing is, or `force` replaces it.
Json present(const fs::path& path, bool force) {
  if (std::error_code failed; fs::is_directory(path, failed))
    throw Error(Exit::usage, shown_path(path), "is a folder in the place of a result", "remove it");
  if (force || !is_there(path)) return nullptr;
  Json json;
  try {
    json = read_json(path.string(), kLargestResult);
  } catch (const Unreadable&) {
    throw;
  } catch (const Error&) {  // no JSON
  }
  if (!json.is_object() || !json.contains("results")) refuse(path, "is no result of kava_eval");
  return json;
}

}  // namespace

fs::path result_path(const OpenedModel& opened, const RowFile& file, const EvalOptions& options, const std::string& kind) {
  constexpr std::size_t kMostOfStem = 160;  // a name has at most 255 bytes, and other parts follow
  std::string name = beginning(fs::path(file.path).stem().string(), kMostOfStem) + "-" + file.sha256.substr(0, 8);
  name += opened.step ? fmt::format(".step_{}", *opened.step) : std::string(".adapter");
  if (options.method && *options.method != opened.config.method) name += "." + name_of(*options.method);
  if (options.stage) name += fmt::format(".stage{}", *options.stage);
  if (options.limit > 0) name += fmt::format(".limit{}", options.limit);
  if (opened.text.chat.family != ChatFamily::none) name += ".chat" + name_of(opened.text.chat.family);
  const Sampling& s = options.sampling;
  if (s.samples > 1 || !s.greedy()) name += fmt::format(".s{}-t{}", s.samples, s.temperature);
  if (!kind.empty()) name += "." + kind;
  return opened.run_dir / "eval" / (name + ".json");
}

void require_same_options(const fs::path& path, const Json& document, bool force) {
  Json there = present(path, force);
  if (there.is_null()) return;
  there.erase("results");
  Json asked = document;
  asked.erase("results");
  const Json before = compared(there), now = compared(asked);
  if (before == now) return;
  std::string others;
  if (before.contains("options") && before["options"].is_object() && now["options"].is_object())
    for (const auto& [key, value] : now["options"].items())
      if (const auto at = before["options"].find(key); at == before["options"].end() || *at != value)
        others += (others.empty() ? " (" : ", ") + key;
  refuse(path, "holds a result with other options" + (others.empty() ? "" : others + ")"));
}

void require_same_result(const fs::path& path, const Json& document, bool force) {
  if (const Json there = present(path, force); !there.is_null() && compared(there) != compared(document))
    refuse(path, "holds another result");
}

void write_result(const fs::path& path, const Json& document) {
  const MadeFolder folder(path.parent_path());
  write_file(path.string(), document.dump(1) + "\n");
}

}  // namespace kava
