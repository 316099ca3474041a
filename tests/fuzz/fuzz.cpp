// fuzz [--target NAME] [--seconds S] [--seed N] [--corpus DIR]...: gives the parsers the files of the corpora (default: tests/errors,
// tests/golden and tests/fuzz/corpus), then for S seconds of CPU time, shared by the targets, what comes of them by random changes.
// fuzz --list: the targets.
//
// A parser may read its input or refuse it by Error. After any other exception the input lies in fuzz_TARGET.input; a fault that ends the
// process is made again by the same --target and --seed. The last line is "N executions of M targets, no crash"; exit 0, or 1.
#include <fmt/core.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <map>
#include <random>
#include <string>

#include "engine/error.h"
#include "engine/files/files.h"
#include "tests/folders.h"
#include "tests/fuzz/targets.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

constexpr std::size_t kLargest = 1 << 16;

/// CPU time of this process: a busy machine takes longer, not less.
double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

struct Options {
  bool list = false;
  std::string target;
  double seconds = 0;
  std::uint64_t seed = 1;
  std::vector<fs::path> corpora;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    if (name == "--list") o.list = true;
    else if (name == "--target") o.target = value;
    else if (name == "--seconds") o.seconds = std::atof(value.c_str());
    else if (name == "--seed") o.seed = std::strtoull(value.c_str(), nullptr, 10);
    else if (name == "--corpus") o.corpora.emplace_back(value);
    else throw Error(Exit::usage, name, "is unknown", "give --list, --target, --seconds, --seed or --corpus");
  }
  if (o.corpora.empty())
    for (const char* folder : {"errors", "golden", "fuzz/corpus"}) o.corpora.push_back(fs::path(source_dir()) / "tests" / folder);
  return o;
}

std::vector<std::string> corpus_of(const FuzzTarget& target, const std::vector<fs::path>& corpora) {
  std::vector<fs::path> files;
  for (const fs::path& corpus : corpora)
    for (const auto& entry : fs::recursive_directory_iterator(corpus))
      if (entry.is_regular_file() && entry.file_size() <= kLargest &&
          std::ranges::any_of(target.endings, [&](const std::string& end) { return entry.path().string().ends_with(end); }))
        files.push_back(entry.path());
  std::ranges::sort(files);
  std::vector<std::string> inputs = {""};
  for (const fs::path& file : files) inputs.push_back(read_file(file.string(), kLargest));
  return inputs;
}

using Random = std::mt19937_64;

std::size_t below(Random& random, std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>(random() % n); }

// What parsers of text and of lengths stumble over.
const std::vector<std::string>& pieces() {
  static const std::vector<std::string> all = {"\"",
                                               "{",
                                               "}",
                                               "[",
                                               "]",
                                               ",",
                                               ":",
                                               "\n",
                                               "\\",
                                               "null",
                                               "true",
                                               "-1",
                                               "0",
                                               "1e",
                                               "1e999",
                                               "NaN",
                                               "\xff",
                                               "\\ud800",
                                               "||",
                                               "####",
                                               "<<1/0=2>>",
                                               "(",
                                               "*",
                                               "+",
                                               "(?R)",
                                               "9223372036854775808",
                                               "18446744073709551615",
                                               "\xc3\xa9"};
  return all;
}

std::string changed(std::string x, const std::vector<std::string>& corpus, Random& random) {
  for (std::size_t n = 1 + below(random, 4); n > 0; --n) {
    const std::size_t at = below(random, x.size() + 1), length = below(random, std::min<std::size_t>(x.size() - at, 64) + 1);
    switch (below(random, 7)) {
      case 0:
        if (at < x.size()) x[at] = static_cast<char>(x[at] ^ (1 << below(random, 8)));
        break;
      case 1:
        if (at < x.size()) x[at] = static_cast<char>(random());
        break;
      case 2:
        x.erase(at, length);
        break;
      case 3:
        x.insert(at, x.substr(at, length));
        break;
      case 4:
        x.insert(at, pieces()[below(random, pieces().size())]);
        break;
      case 5:
        x.replace(at, length, pieces()[below(random, pieces().size())]);
        break;
      default: {
        const std::string& other = corpus[below(random, corpus.size())];
        const std::size_t from = below(random, other.size() + 1);
        x.replace(at, length, other.substr(from, 1 + below(random, 256)));
      }
    }
  }
  if (x.size() > kLargest) x.resize(kLargest);
  return x;
}

// Returns whether the target kept its promise.
bool keeps(const FuzzTarget& target, const fs::path& room, const std::string& input) {
  try {
    target.run(room, input);
    return true;
  } catch (const Error& e) {
    if (e.code() != Exit::internal && e.code() != Exit::write) return true;
    fmt::print(stderr, "{}: {}\n", target.name, e.what());
  } catch (const std::exception& e) {
    fmt::print(stderr, "{}: {}\n", target.name, e.what());
  }
  overwrite("fuzz_" + target.name + ".input", input);
  return false;
}

std::int64_t run(const FuzzTarget& target, const Options& options, double seconds) {
  const TempFolder folder;
  const std::vector<std::string> corpus = corpus_of(target, options.corpora);
  std::int64_t executions = 0;
  fs::create_directories(folder.path() / "room");
  auto give = [&](const std::string& input) {
    ++executions;
    return keeps(target, folder.path() / "room", input);
  };
  for (const std::string& input : corpus)
    if (!give(input)) return -1;
  std::seed_seq seed = {options.seed, static_cast<std::uint64_t>(std::hash<std::string>{}(target.name))};
  Random random(seed);
  const double end = cpu_seconds() + seconds;
  while (seconds > 0 && cpu_seconds() < end)
    if (!give(changed(corpus[below(random, corpus.size())], corpus, random))) return -1;
  fmt::print("{}: {} executions, {} from files\n", target.name, executions, corpus.size());
  std::fflush(stdout);
  return executions;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    std::vector<FuzzTarget> targets = fuzz_targets(fs::path(source_dir()) / "tests" / "golden" / "models");
    if (!options.target.empty()) std::erase_if(targets, [&](const FuzzTarget& t) { return t.name != options.target; });
    if (targets.empty()) throw Error(Exit::usage, "--target", options.target + " is unknown", "leave it out for all");
    if (options.list) {
      for (const FuzzTarget& target : targets) fmt::print("{}\n", target.name);
      return 0;
    }
    std::int64_t all = 0;
    for (const FuzzTarget& target : targets) {
      const std::int64_t n = run(target, options, options.seconds / static_cast<double>(targets.size()));
      if (n < 0) return 1;
      all += n;
    }
    fmt::print("{} executions of {} targets, no crash\n", all, targets.size());
    return 0;
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    return 1;
  }
}
