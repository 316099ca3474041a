// Faults of a command line.
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#include "tests/programs/programs.h"

using namespace kava;

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
  for (const auto& [line, start] : lines) {
    const Ended f = run_command(line);
    CAPTURE(line, f.err);
    CHECK(f.code == 2);
    CHECK(f.err.starts_with(start));
  }
}

TEST_CASE("an unknown option leads to the option or the key that was meant") {
  const std::pair<const char*, const char*> lines[] = {{"kava_eval m --lmit 5", "the nearest option is --limit"},
                                                       {"kava_eval m --batch_size 5", "the nearest option is --batch"},
                                                       {"kava_inspect step c.toml --out x --lora_r 8", "write --set lora.rank=VALUE"},
                                                       {"kava_train c.toml --learning_rate=1", "write --set train.lr=VALUE"},
                                                       {"kava_train c.toml --report_to wandb", "leave it out: a run writes metrics.jsonl"},
                                                       {"kava_train c.toml --output_dir x", "the nearest option is --out"},
                                                       {"kava_train c.toml --set a=1 b=2", "give --set once for each value"}};
  for (const auto& [line, hint] : lines) {
    const Ended f = run_command(line);
    CAPTURE(line, f.err);
    CHECK(f.code == 2);
    CHECK(f.err.find(hint) != f.err.npos);
  }
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
    // Examples, usage and names are to be copied, and stay whole.
    const bool text = !line.starts_with("  -") && !line.starts_with("Usage") && !examples;
    if (text && line.size() > columns && line.find("  ", line.find_first_not_of(' ')) != line.npos) return "too wide: " + line;
  }
  if (lines.front().empty() || lines.front().size() > 110) return "no purpose in the first line";
  if (!usage) return "no usage";
  return example || help.find("Lines `ok|warn|missing") != help.npos ? "" : "no example that can be copied";
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
  for (const char* option : {"--help", "--version"}) {
    // Of the processor alone, and the least of some: what else runs here must not count.
    double least = 1;
    for (int i = 0; i < kRuns; ++i) {
      const pid_t child = ::fork();
      if (child == 0) {
        ::dup2(::open("/dev/null", O_WRONLY), 1);
        ::execl((bin_dir() + "/kava_train").c_str(), "kava_train", option, nullptr);
        ::_exit(127);
      }
      int status = 0;
      rusage used = {};
      ::wait4(child, &status, 0, &used);
      REQUIRE(status == 0);
      least = std::min(least, static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                                  1e-6 * static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec));
    }
    CAPTURE(option, least);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    CHECK(least < 0.020);
#endif
  }
}
