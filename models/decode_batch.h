// Questions that are decoded together: the passes before their first tokens, then a pass for each further token. An answer is a branch on
// the rows of its question, of which there may be several; they share those rows and belong to one group of segments.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "models/decode.h"
#include "models/layout.h"
#include "models/transformer.h"

namespace kava {

/// How many of the questions, from the first on, are decoded together: at most `most`, and no more than 2 GiB hold, but one at least.
/// new_rows: that each of them gets beyond its prompt and latents.
std::size_t together(const Model& model, const Recipe& recipe, std::span<const Sample> questions, int64_t most, int64_t new_rows);

class DecodeBatch {
 public:
  /// ends: how many EOS end an answer.
  DecodeBatch(Model& model, Arena& arena, Layout layout, const DecodeOptions& options, int32_t ends);

  /// Rows beyond those of the layout and of the tokens.
  struct Extra {
    int64_t rows = 0, live_rows = 0, pass_rows = 0;
    int32_t last_position = 0;
  };
  /// For at most `answers` answers in all.
  void allocate(int64_t answers, const Extra& extra);
  /// All passes of the layout.
  void run_layout();

  /// Where an answer begins: behind the row whose live number is `live`, which attends `keys`, itself the last.
  struct Start {
    int64_t question = 0;  // by its place in the layout; answers to one question start one after the other
    std::vector<int32_t> keys;
    int32_t position = 0, live = 0;
    int64_t passes = 0, passes_merged = 0;
  };
  /// The start behind a sample's last given row of the layout.
  Start given_start(std::size_t sample) const;

  /// Decodes options.sampling.samples answers from each start, all of those together. numbers: the questions' own, for the draws.
  std::vector<DecodeResult> run_tokens(const std::vector<Start>& starts, std::span<const int64_t> numbers);

  /// Calls f(row, logits) for every row of hidden states, on the backend's threads. Error(code numeric) where a logit is not finite.
  void each_logits(const Tensor& hidden, const std::function<void(int64_t, std::span<const double>)>& f);
  Tensor gather_live(std::span<const int32_t> live);

  const Layout& layout() const { return layout_; }
  Transformer& transformer() { return transformer_; }
  /// Numbers for rows of a further pass.
  int64_t take_rows(int64_t count) { return std::exchange(next_row_, next_row_ + count); }
  /// One more pass of rows of ids.
  void run_pass(const Pass& pass, Reads reads = Reads::tiled);

 private:
  // An answer that is still written.
  struct Active {
    std::size_t result, start;
    int64_t question, sample;
    int32_t next, position;     // the token to run, and where it stands
    int32_t ends;               // EOS to come
    std::vector<int32_t> keys;  // rows of its K and V
  };

  std::vector<int32_t> choose(const Tensor& hidden, const std::vector<std::size_t>& row_of);
  void take(const std::vector<int32_t>& ids);
  void tell_done(const Active& done);
  void run_token();

  Model& model_;
  Ops& ops_;
  Arena& arena_;
  const DecodeOptions& options_;
  const int32_t ends_;
  const Layout layout_;
  Transformer transformer_;
  std::vector<DecodeResult> results_;
  std::vector<Active> active_;
  std::vector<int64_t> open_;  // by start: answers that are still written
  int64_t next_row_ = 0, token_live_ = 0;
};

}  // namespace kava
