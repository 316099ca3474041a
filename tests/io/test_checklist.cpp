// docs/checklist.md: what it names exists, and its cells of Table 6 are what the configurations hold.
#include <catch2/catch_test_macros.hpp>
#include <map>
#include <regex>
#include <sstream>
#include <vector>

#include "engine/config/config.h"
#include "engine/files/files.h"
#include "tests/folders.h"

using namespace kava;

namespace {

constexpr std::size_t kMost = std::size_t{1} << 22;

std::string source(const std::string& name) { return read_file(source_dir() + "/" + name, kMost); }

/// The cells of every row of the document's tables, but of headers.
std::vector<std::vector<std::string>> rows_of(const std::string& text) {
  std::vector<std::vector<std::string>> rows;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("|---")) {
      rows.pop_back();
      continue;
    }
    if (!line.starts_with("| ")) continue;
    std::vector<std::string> cells;
    for (std::size_t begin = 2, end; (end = line.find(" |", begin)) != std::string::npos; begin = end + 3)
      cells.push_back(line.substr(begin, end - begin));
    rows.push_back(cells);
  }
  return rows;
}

// "`FILE: NAME`" in its parts.
std::pair<std::string, std::string> parts_of(const std::string& cell) {
  const auto colon = cell.find(": ");
  REQUIRE((cell.starts_with('`') && cell.ends_with('`') && colon != std::string::npos));
  return {cell.substr(1, colon - 1), cell.substr(colon + 2, cell.size() - colon - 3)};
}

// "section.key" -> value, strings without quotes.
std::map<std::string, std::string> values_of(const RunConfig& config) {
  std::map<std::string, std::string> values;
  std::istringstream lines(to_toml(config));
  std::string section;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with('[')) section = line.substr(1, line.size() - 2) + ".";
    const auto equals = line.find(" = ");
    if (equals == std::string::npos) continue;
    std::string value = line.substr(equals + 3);
    if (value.starts_with('"')) value = value.substr(1, value.size() - 2);
    values[section + line.substr(0, equals)] = value;
  }
  return values;
}

}  // namespace

TEST_CASE("every file, function and test of the checklist exists") {
  const auto rows = rows_of(source("docs/checklist.md"));
  REQUIRE(rows.size() > 70);
  for (const auto& cells : rows) {
    const auto [file, function] = parts_of(cells.at(cells.size() - 2));
    const auto [test_file, test] = parts_of(cells.back());
    INFO(file << ": " << function << "; " << test_file << ": " << test);
    // Defined there: the name, its arguments, and no semicolon before the body.
    CHECK(std::regex_search(source(file), std::regex("\\b" + function + "\\([^;{]*\\{")));
    const std::string text = source(test_file), named = "TEST_CASE(\"" + test + '"';
    CHECK((text.find(named + ")") != text.npos || text.find(named + ", \"[") != text.npos));
  }
}

TEST_CASE("every cell of Table 6 in the checklist is what the configuration of its column holds") {
  std::string text = source("docs/checklist.md");
  text = text.substr(text.find("## Table 6"));
  std::vector<std::string> columns;
  std::istringstream header(text.substr(text.find("| key |") + 7));
  for (std::string word; header >> word && word != "function";)
    if (word != "|") columns.push_back(word);
  REQUIRE(columns.size() == 6);
  const auto rows = rows_of(text);
  REQUIRE(rows.size() >= 10);
  for (std::size_t c = 0; c < columns.size(); ++c) {
    const auto values = values_of(load_config(source_dir() + "/configs/table1/kava_" + columns[c] + ".toml"));
    for (const auto& cells : rows) {
      INFO(columns[c] << " " << cells.at(0));
      REQUIRE(values.contains(cells[0]));
      CHECK(values.at(cells[0]) == cells.at(c + 1));
    }
  }
}
