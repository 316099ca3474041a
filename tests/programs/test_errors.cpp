#include <catch2/catch_test_macros.hpp>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "tests/folders.h"
#include "tests/programs/programs.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

// The cells of a row of a table, without the marks of code.
std::vector<std::string> cells(const std::string& row) {
  std::vector<std::string> out(1);
  for (std::size_t i = 1; i < row.size(); ++i) {
    if (row[i] == '\\' && i + 1 < row.size() && row[i + 1] == '|') out.back() += row[++i];
    else if (row[i] == '|') out.emplace_back();
    else if (row[i] != '`') out.back() += row[i];
  }
  for (std::string& cell : out) {
    cell.erase(0, cell.find_first_not_of(' '));
    cell.erase(cell.find_last_not_of(' ') + 1);
  }
  return out;
}

std::string with_folder(std::string line, const std::string& folder) {
  for (std::size_t at = 0; (at = line.find("DIR/", at)) != std::string::npos; at += folder.size()) line.replace(at, 3, folder);
  return line;
}

std::set<fs::path> files_in(const fs::path& folder) {
  std::set<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) files.insert(entry.path());
  return files;
}

}  // namespace

TEST_CASE("every row of docs/errors.md is what a program prints, and writes nothing") {
  const TempFolder folder;
  const fs::path errors = folder.path() / "errors";
  fs::copy(source_dir() + "/tests/errors", errors, fs::copy_options::recursive | fs::copy_options::copy_symlinks);
  fs::create_directory_symlink(source_dir() + "/tests/golden", folder.path() / "golden");
  std::ifstream table(source_dir() + "/docs/errors.md");
  const std::set<fs::path> files = files_in(errors);
  int rows = 0;
  for (std::string line; std::getline(table, line);) {
    if (!line.starts_with("| ") || line.starts_with("| bad input")) continue;
    const std::vector<std::string> cell = cells(line);
    INFO(line);
    REQUIRE(cell.size() >= 4);
    const Ended run = run_command(cell[1] + " </dev/null", errors);
    CHECK(std::to_string(run.code) == cell[2]);
    CHECK(run.err == with_folder(cell[3], fs::canonical(errors).string()) + "\n");
    CHECK(files_in(errors) == files);
    ++rows;
  }
  CHECK(rows >= 60);
}
