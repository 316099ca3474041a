// What an evaluation has answered so far, kept beside its result so that an interrupted one goes on where it was.
#pragma once
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/files/json.h"
#include "engine/files/writers.h"
#include "models/decode.h"

namespace kava {

/// By the row of the data file.
using KeptAnswers = std::map<std::size_t, std::vector<DecodeResult>>;
/// Those of the lines of a PartialResult, where a row may have several, up to the first line that is not whole or after which its row has
/// another number of answers than one of `counts`.
KeptAnswers kept_answers(const std::string& lines, std::span<const std::size_t> counts);

/// RESULT.partial: a line of JSON that says what is evaluated and how, then a line for what was answered of a question. It is written after
/// each batch but the last, and gone when the result is there. One of another evaluation is begun anew.
class PartialResult {
 public:
  /// header: all that an answer depends on, on one line.
  PartialResult(std::filesystem::path result, std::string header);

  /// The lines that are there already.
  const std::string& lines() const { return lines_; }
  /// Only the answers of `known` stay of them.
  void add(std::size_t row, std::span<const DecodeResult> answers, const KeptAnswers& known);
  void remove();

 private:
  std::filesystem::path path_;
  std::string header_, lines_;
  std::unique_ptr<LineWriter> writer_;
};

}  // namespace kava
