#include "engine/json.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <vector>

#include "engine/error.h"
#include "engine/files.h"

namespace kava {

namespace {

constexpr int kDeepest = 64;

// Watches the parse: a key given twice and too deep a nesting end it.
struct Guard {
  const std::string& where;
  std::vector<std::set<std::string>> keys;
  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    using Event = Json::parse_event_t;
    if (depth > kDeepest) throw Error(Exit::data, where, fmt::format("JSON nested deeper than {} levels", kDeepest), "flatten the file");
    if (event == Event::object_start) keys.emplace_back();
    else if (event == Event::object_end) keys.pop_back();
    else if (event == Event::key && !keys.back().insert(parsed.get<std::string>()).second)
      throw Error(Exit::data, where, fmt::format("key \"{}\" is given twice in one JSON object", escaped(parsed.get<std::string>())),
                  "keep one of them");
    return true;
  }
};

// What nlohmann says after its own name and number, for one line.
std::string reason(const char* what) {
  std::string_view s = what;
  if (auto i = s.find("] "); i != std::string_view::npos) s.remove_prefix(i + 2);
  return escaped(s, 160);
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) {
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  try {
    return Json::parse(text.begin(), text.end(), Guard{where, {}});
  } catch (const Json::exception& e) {
    throw Error(Exit::data, where, "not valid JSON: " + reason(e.what()), "correct the file");
  }
}

Json read_json(const std::string& path, std::size_t most_bytes) { return parse_json(read_file(path, most_bytes), path); }

}  // namespace kava
