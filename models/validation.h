// Validation during training: exact match by decoding, and teacher-forced accuracy, over the rows of data.valid.
#pragma once
#include <functional>
#include <optional>
#include <span>

#include "models/evaluate.h"
#include "models/trainer.h"

namespace kava {

class Validator {
 public:
  /// Reads data.valid; `text` must outlive this. Error(code data) for a malformed file, or where no row is short enough for
  /// data.max_tokens.
  Validator(const TextModel& text, const RunConfig& config);

  /// Rows that are decoded; of those, rows left out of the teacher-forced part.
  int64_t rows() const { return static_cast<int64_t>(file_.rows.size()); }
  const LeftOut& left_out() const { return left_out_; }
  DataDigest digest() const { return {"data.valid", file_.sha256, name_of(file_.format)}; }
  std::span<const Sample> samples() const { return samples_; }

  /// Its score is strict (by equal ids where there is no tokenizer). Values: every scorer's accuracy, "forced" (share of the samples whose
  /// whole answer, prompt included, is the argmax under teacher forcing), "passes", "passes_merged", "limit_hits", "too_long" (not run,
  /// wrong) and the losses. Nothing where `stop` asked to stop. What is run is that of the stage, without draws. `progress`: as EvalOptions
  /// has it; may be empty. Ranks share the questions and the forwards, and all get the result of one; `stop` then has to say the same on
  /// all.
  std::optional<Validation> run(Model& model, Arena& arena, int64_t stage, const std::function<bool()>& stop,
                                const std::function<void(int64_t, int64_t, int64_t)>& progress = {}, Comm* comm = nullptr) const;

 private:
  const TextModel* text_;
  RowFile file_;
  std::vector<Sample> samples_;
  LeftOut left_out_;
};

}  // namespace kava
