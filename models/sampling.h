// How the next token is chosen from the head's logits.
#pragma once
#include <cstdint>
#include <span>

namespace kava {

struct Sampling {
  int64_t samples = 1;     // answers to each question
  double temperature = 0;  // 0: the best token
  double top_p = 1;        // > 0: from the fewest best tokens that have this share of the probability
  uint64_t seed = 42;

  bool greedy() const { return temperature == 0; }
};

/// Which number is drawn: a question by its place in the file, one of its answers, a token of that.
struct DrawPlace {
  int64_t question = 0, sample = 0, position = 0;
};

/// 64 random bits, a function of the seed and the place alone.
uint64_t draw_number(uint64_t seed, const DrawPlace& place);

/// -log softmax(logits)[target]
double negative_log_likelihood(std::span<const double> logits, int32_t target);

}  // namespace kava
