// Faults of a command line.
#include <sys/resource.h>

#include <algorithm>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tests/programs/running.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::StartsWith;

namespace {

// What is said of a line that is refused.
std::string said_of(const char* line) {
  const Ended f = run_command(line);
  INFO(line);
  CHECK(f.code == 2);
  return f.err;
}

}  // namespace

TEST_CASE("what no option or command takes is named first") {
  const std::pair<const char*, const char*> lines[] = {
      {"kava_eval m --tasks gsm8k --num_fewshot 5", "error: kava_eval: option --tasks is unknown"},
      {"kava_eval m --datum=x", "error: kava_eval: option --datum is unknown"},
      {"kava_train --bogus", "error: kava_train: option --bogus is unknown"},
      {"kava_train c.toml --set a=1 b=2", "error: kava_train: argument b=2 is unknown"},
      {"kava_eval comparr a.json b.json", "error: kava_eval: command comparr is unknown"},
      {"kava_inspect stpe c.toml", "error: kava_inspect: command stpe is unknown"},
      {"kava_inspect step --bogus c.toml", "error: kava_inspect: option --bogus is unknown"},
      {"kava_data chekc a b", "error: kava_data: command chekc is unknown"}};
  for (const auto& [line, start] : lines) CHECK_THAT(said_of(line), StartsWith(start));
}

TEST_CASE("an unknown option leads to the option or the key that was meant") {
  const std::pair<const char*, const char*> lines[] = {{"kava_eval m --lmit 5", "the nearest option is --limit"},
                                                       {"kava_eval m --batch_size 5", "the nearest option is --batch"},
                                                       {"kava_inspect step c.toml --out x --lora_r 8", "write --set lora.rank=VALUE"},
                                                       {"kava_train c.toml --learning_rate=1", "write --set train.lr=VALUE"},
                                                       {"kava_train c.toml --report_to wandb", "leave it out: a run writes metrics.jsonl"},
                                                       {"kava_train c.toml --output_dir x", "the nearest option is --out"},
                                                       {"kava_train c.toml --set a=1 b=2", "give --set once for each value"}};
  for (const auto& [line, hint] : lines) CHECK_THAT(said_of(line), ContainsSubstring(hint));
}

namespace {

struct Helped {
  const char* program;
  std::vector<const char*> commands;
};

const std::vector<Helped> kPrograms = {{"kava_train", {}},
                                       {"kava_eval", {"compare"}},
                                       {"kava_generate", {}},
                                       {"kava_inspect", {"step", "probe", "file", "tokens", "doctor"}},
                                       {"kava_data", {"synth", "check", "stats", "convert"}},
                                       {"kava_merge", {}},
                                       {"kava_report", {}},
                                       {"kava_bench", {}},
                                       {"replicate", {}}};

// What is wrong with a --help, in a word.
std::string fault_of(const std::string& help, std::size_t columns) {
  std::vector<std::string> lines(1);
  for (const char c : help)
    if (c == '\n') lines.emplace_back();
    else lines.back() += c;
  bool examples = false, usage = false, example = false;
  for (const std::string& line : lines) {
    usage = usage || line.starts_with("Usage: ");
    examples = examples || line.starts_with("Example");
    example = example || (examples && line.starts_with("  ") && line.find(bin_dir() + "/") != line.npos);
    // Examples, usage, headings and the doctor's forms of lines stay whole.
    const bool text = !line.starts_with("Usage") && !line.ends_with("):") && !line.starts_with("Lines `") && !examples;
    if (text && line.size() > std::min<std::size_t>(columns, 110)) return "too wide: " + line;
  }
  if (lines.front().empty() || lines.front().size() > 110) return "no purpose in the first line";
  if (!usage) return "no usage";
  return example ? "" : "no example that can be copied";
}

}  // namespace

TEST_CASE("every --help says what for, how, and by an example that can be copied, at any width") {
  for (const Helped& p : kPrograms) {
    std::vector<std::string> lines = {std::string(p.program) + " --help"};
    for (const char* command : p.commands) lines.push_back(fmt::format("{} {} --help", p.program, command));
    for (const std::string& line : lines)
      for (const int columns : {40, 60, 80, 200}) {
        const Ended help = run_command(line, ".", fmt::format("COLUMNS={}", columns));
        CAPTURE(line, columns, help.out);
        CHECK(help.code == 0);
        CHECK(fault_of(help.out, static_cast<std::size_t>(columns)) == "");
      }
    const Ended version = run_command(std::string(p.program) + " --version");
    CAPTURE(version.out);
    for (const char* part : {" (commit ", "\ncompiler: ", "\nlibraries: ", "OpenSSL ", "\ndevices:\n  cpu: "})
      CHECK(version.out.find(part) != version.out.npos);
  }
}

TEST_CASE("every key is listed by --keys, and --help and --version take little time") {
  const Ended keys = run_command("kava_train --keys");
  CHECK(keys.code == 0);
  CHECK(keys.out.find("train.lr = 0.0008") != keys.out.npos);
  CHECK(keys.out.find("lora.rank = 128") != keys.out.npos);
  CHECK(run_command("kava_inspect step --keys").out == keys.out);
  constexpr int kRuns = 20;
  const auto children = [] {
    rusage used = {};
    ::getrusage(RUSAGE_CHILDREN, &used);
    return static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           1e-6 * static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
  };
  for (const char* option : {"--help", "--version"}) {
    // Of the processor alone, and the least of some: what else runs here must not count.
    double least = 1;
    for (int i = 0; i < kRuns; ++i) {
      const double before = children();
      REQUIRE(train({option}).code == 0);
      least = std::min(least, children() - before);
    }
    CAPTURE(option, least);
#if !defined(KAVA_ASAN) && !defined(KAVA_TSAN)
    CHECK(least < 0.020);
#endif
  }
}
