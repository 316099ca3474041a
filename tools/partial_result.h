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
/// Adds those of the lines of a PartialResult, where a row may have several, up to the first line that is not whole or after which its row
/// has another number of answers than one of `counts`.
void add_kept(KeptAnswers& kept, const std::string& lines, std::span<const std::size_t> counts);
/// As lines.
std::string text_of(const KeptAnswers& kept);

/// RESULT.partial of rank 0, RESULT.partial.R of each other: a line of JSON that says what is evaluated and how, then a line for what was
/// answered of a question, as it is answered. All are gone when the result is there. One of another evaluation is begun anew.
class PartialResult {
 public:
  /// header: all that an answer depends on, on one line.
  PartialResult(const std::filesystem::path& result, std::string header, int rank);

  /// By rank 0 before any rank adds: what ranks have kept of an interrupted evaluation, on however many, from now on in its own file.
  KeptAnswers take_over(std::span<const std::size_t> counts);
  void add(std::size_t row, std::span<const DecodeResult> answers);
  /// This rank's; by rank 0 those that it sees of all ranks.
  void remove();

 private:
  std::vector<std::filesystem::path> of_other_ranks() const;
  void begin(const KeptAnswers& known);

  std::filesystem::path first_, path_;
  std::string header_;
  bool made_folder_ = false;
  std::unique_ptr<LineWriter> writer_;
};

}  // namespace kava
