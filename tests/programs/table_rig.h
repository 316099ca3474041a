// A table of replicate on a tiny random model, its program, and results of its runs without training.
#pragma once
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "tests/programs/text_run.h"
#include "tools/replicate_work.h"

namespace kava {

namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;

// A table of two rows on a tiny random model, with one column; each training takes a few steps.
struct TableRig {
  TableRig() {
    model.write("train.txt", kQuestions);
    model.write("test.txt", kQuestions);
    model.write("no_cot.toml",
                "method = \"no_cot\"\n[model]\npath = \"base\"\ninit = \"random\"\ndtype = \"f32\"\n[data]\ntrain = [\"train.txt\"]\n"
                "[train]\nmax_steps = 2\nbatch = 2\n[lora]\nrank = 2\n");
    save(kRows);
  }

  void save(const std::string& rows, const std::string& head = "seeds = [1, 2]\nreference = \"other\"\n") const {
    model.write("table.toml", head + "[[column]]\nname = \"test\"\ndata = \"test.txt\"\n" + rows);
  }

  Ended run(const std::string& options = "") const {
    return run_command("replicate table.toml --out out --device cpu " + options, model.folder.path());
  }

  ReplicaTable read() const { return read_table(model.folder / "table.toml"); }

  /// A finished evaluation of a row, without its training: what each seed got right.
  void put_result(const std::string& row, int64_t seed, const std::string& verdicts, double passes = 2) const {
    fs::create_directories(out() / "state");
    const auto works = works_of(read(), {}, out());
    for (const Work& work : works) {
      if (work.id == row + "." + std::to_string(seed) + ".train")
        write_state(out(), work, {true, 1, 0, "", 1.5, work.fingerprint, nullptr});
      if (work.id != row + "." + std::to_string(seed) + ".eval_test") continue;
      const double share = static_cast<double>(std::ranges::count(verdicts, '1')) / static_cast<double>(verdicts.size());
      const Json result = {{"data", "d"},       {"questions", verdicts.size()},      {"questions_sha256", "q"},
                           {"weights", "best"}, {"accuracy", {{"strict", share}}},   {"passes", passes},
                           {"ms", 1.25},        {"verdicts", {{"strict", verdicts}}}};
      write_state(out(), work, {true, 1, 0, "", 1.5, work.fingerprint, result});
    }
  }

  Json table() const { return read_json(out() / "table.json"); }
  std::string form(const char* name) const { return read_file(out() / name, 1 << 24); }
  fs::path out() const { return model.folder.path() / "out"; }

  static inline const std::string kRows =
      "[[row]]\nname = \"first\"\nconfig = \"no_cot.toml\"\n[[row]]\nname = \"second\"\nconfig = \"no_cot.toml\"\n"
      "set = [\"train.max_steps=3\"]\ngroups = [\"other\"]\n";
  TextRun model;
};

inline void check_refused(const Ended& run, int code, const std::string& about) {
  INFO(run.out << run.err);
  CHECK(run.code == code);
  CHECK(run.err.starts_with("error: "));
  CHECK(std::ranges::count(run.err, '\n') == 1);
  CHECK_THAT(run.err, ContainsSubstring(about));
}

inline std::string row(const std::string& name, const std::string& more = "") {
  return "[[row]]\nname = \"" + name + "\"\nconfig = \"no_cot.toml\"\n" + more;
}

}  // namespace kava
