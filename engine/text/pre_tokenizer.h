// The pre_tokenizer section of a tokenizer.json: cuts a text into the pieces that byte-pair merging works on. Split, Digits, ByteLevel
// and Sequence; others are refused by name.
#pragma once
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/files/json_at.h"
#include "engine/text/split_pattern.h"

namespace kava {

class PreTokenizer {
 public:
  /// Error(code data) on what is not supported. ByteLevel must be there, once and last: without it the model is not byte-level.
  static PreTokenizer load(const JsonAt& section);

  /// The pieces of `text` (valid UTF-8), none empty. They point into `text`, or into `added` where ByteLevel puts a space before one.
  std::vector<std::string_view> split(std::string_view text, std::deque<std::string>& added) const;

 private:
  enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };
  enum class Kind { split, digits, prefix_space };
  struct Step {
    Kind kind;
    Behavior behavior = Behavior::isolated;
    bool invert = false;
    std::optional<SplitPattern> pattern = {};
  };

  void load_step(const JsonAt& step);
  static Step load_split(const JsonAt& step);
  static void cut(const std::vector<Stretch>& stretches, const Step& step, std::string_view text, std::vector<std::string_view>& out);

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace kava
