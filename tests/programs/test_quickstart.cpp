// tools/quickstart.sh from data to table and next commands, on programs that are told to do little.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <regex>
#include <sstream>

#include "tests/programs/programs.h"

using namespace kava;
namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;

namespace {

void write_script(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  overwrite(path, "#!/bin/bash\n" + text + "\n");
  fs::permissions(path, fs::perms::owner_all);
}

// A project folder in which nothing is installed or built, and the programs are this build's with less to do.
fs::path project(const TempFolder& folder) {
  const fs::path root = folder.path() / "project", bin = root / "build/cpu/bin";
  write_script(root / "tools/setup.sh", "");
  write_script(root / "path/cmake", "");
  fs::copy_file(source_dir() + "/tools/quickstart.sh", root / "tools/quickstart.sh");
  fs::create_symlink(source_dir() + "/configs", root / "configs");
  const auto program = [&](const std::string& name, const std::string& more, const std::string& then = "") {
    write_script(bin / name, fmt::format("'{}'/{} \"$@\" {} || exit\n{}", bin_dir(), name, more, then));
  };
  program("kava_train", "--threads 1 --set train.max_steps=3 --set train.micro_batch=0");
  program("kava_data", "", "[ \"$1\" != synth ] || for f in \"$3\"/*.txt; do head -n 200 \"$f\" >f; mv f \"$f\"; done");
  for (const char* name : {"kava_generate", "kava_report"}) program(name, "");
  write_script(bin / "kava_eval",
               fmt::format("few=()\n[ \"$1\" = compare ] || few=(--limit 8)\n'{}'/kava_eval \"$@\" \"${{few[@]}}\"", bin_dir()));
  return root;
}

// What a line of the shell prints in a folder. Its exit status must be 0.
std::string printed(const fs::path& folder, const std::string& line) {
  const TempFolder streams;
  const int status = std::system(fmt::format("cd '{}' && {} >'{}' 2>&1", folder.string(), line, streams / "out").c_str());
  const std::string text = read_file(streams / "out", 1 << 24);
  INFO(line << "\n" << text);
  REQUIRE(status == 0);
  return text;
}

}  // namespace

TEST_CASE("the quickstart goes to any --out, and the commands that it ends with work as they are printed") {
  const TempFolder folder;
  const fs::path root = project(folder);
  const std::string out = folder / "elsewhere/my runs";
  const std::string text = printed(root, "PATH=\"$PWD/path:$PATH\" tools/quickstart.sh --out '" + out + "'");
  CAPTURE(text);
  for (const char* row : {"full chain of thought", "no chain, equal updates", "KaVa, 14 latents"})
    CHECK(std::regex_search(text, std::regex("\n" + std::string(row) + R"( +[\d.]+ % +[\d.]+ +[\d.]+ +[\d.]+\n)")));
  // But for the progress of evaluations that take long.
  CHECK(!std::regex_search(text, std::regex("\n(?!  test\\.txt: \\d).* of 8 questions")));
  CHECK_THAT(text, ContainsSubstring(" passes may cost as much as 27"));
  // Three updates teach no answer.
  CHECK(std::regex_search(text, std::regex(R"(\nanswer: .{0,20} ?\((right|wrong: it is \d)\)\n)")));
  CHECK_THAT(text, ContainsSubstring("The model knows this task alone"));
  CHECK(fs::exists(fs::path(out) / "kava/adapter"));
  std::istringstream next(text.substr(text.find("\nnext:\n") + 7));
  int commands = 0;
  for (std::string line; std::getline(next, line); ++commands) printed(root, line);
  CHECK(commands == 3);
}

TEST_CASE("the quickstart refuses what it does not know before it does anything") {
  const TempFolder folder;
  const fs::path root = project(folder);
  for (const char* options : {"--nothing", "--seed", "--out"}) {
    const std::string said = printed(root, fmt::format("! tools/quickstart.sh {}", options));
    CHECK(said.starts_with("error: "));
    CHECK(std::count(said.begin(), said.end(), '\n') == 1);
  }
  CHECK_THAT(printed(root, "tools/quickstart.sh --help"), ContainsSubstring("--out DIR"));
}
