#include "benchmarks/bench_tokenizer.h"

#include <fmt/format.h>

#include <chrono>
#include <sstream>
#include <vector>

#include "engine/clock.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/text/tokenizer.h"

namespace kava {

void bench_tokenizer(std::FILE* out, const std::string& folder, const std::string& file) {
  std::vector<std::string> texts;
  std::istringstream lines(read_file(file, std::size_t{1} << 30));
  for (std::string line; std::getline(lines, line);) texts.push_back(line);
  if (texts.empty()) throw Error(Exit::data, shown_path(file), "holds no line", "name a file with text");
  auto start = std::chrono::steady_clock::now();
  const Tokenizer tokenizer = Tokenizer::load(folder);
  const double load = seconds_since(start);

  std::vector<std::vector<std::int32_t>> ids(texts.size());
  double bytes = 0, tokens = 0;
  start = std::chrono::steady_clock::now();
  do
    for (std::size_t i = 0; i < texts.size(); ++i) {
      ids[i] = tokenizer.encode(texts[i]);
      bytes += static_cast<double>(texts[i].size());
      tokens += static_cast<double>(ids[i].size());
    }
  while (seconds_since(start) < 1);
  const double encode = seconds_since(start);

  double decoded = 0;
  start = std::chrono::steady_clock::now();
  for (const auto& row : ids) decoded += static_cast<double>(tokenizer.decode(row).size());
  const double decode = seconds_since(start);
  fmt::print(out, "tokenizer {}: load {:.2f} s, encode {:.1f} MB/s, decode {:.1f} MB/s, {:.3f} tokens per byte\n", folder, load,
             bytes / encode * 1e-6, decoded / decode * 1e-6, tokens / bytes);
}

}  // namespace kava
