// The embedded task: arithmetic on a ring of ten. A question names a start and k steps, each a sum, a difference or a product taken modulo
// 10; the chain cannot be computed in parallel, so that the depth of sequential computation is what counts.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace kava {

struct RingRow {
  std::string question;
  std::vector<std::string> steps;  // "<<1-4=7>>"
  std::string answer;
  std::string trace() const;  // the steps joined by one space
};

constexpr int kRingNames = 16;

/// Row number `index` of a seed: a function of its three arguments alone. 1 <= steps < kRingNames.
RingRow ring_row(int64_t seed, int steps, int64_t index);

enum class Split { train, valid, test };

/// By a hash of the trace, the same for every seed: rows that share their arithmetic lie in one split. A sixteenth each is valid and test.
Split split_of(const RingRow& row);

struct SynthOptions {
  int64_t rows = 50'000;  // of training
  int steps = 3;
  int64_t seed = 42;
};

/// Every file of the task by its path below the output folder: train.txt, base.txt (the rows of train.txt, 40 % of them without their last
/// step), valid.txt, test.txt, and model/: a tokenizer and the configuration of a tiny LLaMA. No question occurs twice. The same bytes on
/// every run. Error(code usage) for more rows than 40 % of the different questions.
std::map<std::string, std::string> synthesize(const SynthOptions& options);

}  // namespace kava
