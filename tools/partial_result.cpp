#include "tools/partial_result.h"

#include <algorithm>

#include "engine/files/files.h"
#include "engine/files/parts.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kLargest = std::size_t{1} << 30;

Json json_of(const DecodeResult& r) {
  Json json = {{"ids", r.ids}, {"tokens", r.tokens}, {"passes", r.passes}, {"passes_merged", r.passes_merged}, {"hit_limit", r.hit_limit}};
  if (r.gold_tokens > 0) json["gold_nll"] = r.gold_nll, json["gold_tokens"] = r.gold_tokens;
  return json;
}

DecodeResult answer_of(const Json& json) {
  DecodeResult r;
  r.ids = json.at("ids").get<std::vector<int32_t>>();
  r.tokens = json.at("tokens"), r.passes = json.at("passes"), r.passes_merged = json.at("passes_merged");
  r.hit_limit = json.at("hit_limit");
  if (json.contains("gold_tokens")) r.gold_nll = json.at("gold_nll"), r.gold_tokens = json.at("gold_tokens");
  return r;
}

std::string line_of(std::size_t row, std::span<const DecodeResult> answers) {
  Json json = {{"row", row}, {"answers", Json::array()}};
  for (const DecodeResult& r : answers) json["answers"].push_back(json_of(r));
  return json.dump();
}

}  // namespace

KeptAnswers kept_answers(const std::string& lines, std::span<const std::size_t> counts) {
  KeptAnswers kept;
  std::size_t at = 0;
  for (std::size_t end; (end = lines.find('\n', at)) != std::string::npos; at = end + 1) {
    try {
      const Json line = Json::parse(lines.substr(at, end - at));
      const auto row = line.at("row").get<std::size_t>();
      std::vector<DecodeResult> answers = kept.contains(row) ? kept.at(row) : std::vector<DecodeResult>();
      for (const Json& a : line.at("answers")) answers.push_back(answer_of(a));
      const bool whole = std::ranges::find(counts, answers.size()) != counts.end() &&
                         std::ranges::all_of(
                             answers, [](const DecodeResult& r) { return std::ranges::all_of(r.ids, [](int32_t id) { return id >= 0; }); });
      if (!whole) break;
      kept[row] = std::move(answers);
    } catch (const Json::exception&) {
      break;
    }
  }
  return kept;
}

PartialResult::PartialResult(fs::path result, std::string header) : path_(fs::absolute(result)), header_(std::move(header) + "\n") {
  path_ += ".partial";
  if (!is_there(path_)) return;
  const std::string text = read_file(path_.string(), kLargest);
  if (text.starts_with(header_)) lines_ = text.substr(header_.size());
}

void PartialResult::add(std::size_t row, std::span<const DecodeResult> answers, const KeptAnswers& known) {
  if (!writer_) {
    // Anew with what was read of it, so that nothing follows a torn line.
    const MadeFolder folder(path_.parent_path());
    std::string text = header_;
    for (const auto& [number, of] : known) text += line_of(number, of) + "\n";
    write_file(path_.string(), text);
    writer_ = std::make_unique<LineWriter>(path_.string());
  }
  writer_->append(line_of(row, answers));
}

void PartialResult::remove() {
  writer_.reset();
  std::error_code ignored;
  fs::remove(path_, ignored);
}

}  // namespace kava
