#include "tools/partial_result.h"

#include <algorithm>

#include "engine/files/files.h"
#include "engine/files/parts.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kLargest = std::size_t{1} << 34;

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

void add_kept(KeptAnswers& kept, const std::string& lines, std::span<const std::size_t> counts) {
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
}

std::string text_of(const KeptAnswers& kept) {
  std::string text;
  for (const auto& [row, answers] : kept) text += line_of(row, answers) + "\n";
  return text;
}

PartialResult::PartialResult(const fs::path& result, std::string header, int rank) : header_(std::move(header) + "\n") {
  first_ = fs::absolute(result);
  first_ += ".partial";
  path_ = first_;
  if (rank > 0) path_ += fmt::format(".{}", rank);
}

std::vector<fs::path> PartialResult::of_other_ranks() const {
  std::vector<fs::path> found;
  const std::string before = first_.filename().string() + ".";
  std::error_code failed;
  for (fs::directory_iterator entry(first_.parent_path(), failed); !failed && entry != fs::directory_iterator(); entry.increment(failed)) {
    const std::string name = entry->path().filename().string();
    if (name.starts_with(before) && name.find_first_not_of("0123456789", before.size()) == std::string::npos)
      found.push_back(entry->path());
  }
  std::ranges::sort(found);
  return found;
}

KeptAnswers PartialResult::take_over(std::span<const std::size_t> counts) {
  KeptAnswers known;
  const std::vector<fs::path> others = of_other_ranks();
  const auto read = [&](const fs::path& path) {
    const std::string text = read_file(path.string(), kLargest);
    if (text.starts_with(header_)) add_kept(known, text.substr(header_.size()), counts);
  };
  if (is_there(first_)) read(first_);
  for (const fs::path& other : others) read(other);
  // Whole, and nothing behind a torn line.
  if (!known.empty()) begin(known);
  std::error_code ignored;
  for (const fs::path& other : others) fs::remove(other, ignored);
  return known;
}

void PartialResult::begin(const KeptAnswers& known) {
  made_folder_ = !is_there(path_.parent_path());
  const MadeFolder folder(path_.parent_path());
  write_file(path_.string(), header_ + text_of(known));
  writer_ = std::make_unique<LineWriter>(path_.string());
}

void PartialResult::add(std::size_t row, std::span<const DecodeResult> answers) {
  if (!writer_) begin({});
  writer_->append(line_of(row, answers));
}

void PartialResult::remove() {
  writer_.reset();
  std::error_code ignored;
  fs::remove(path_, ignored);
  if (path_ == first_)
    for (const fs::path& other : of_other_ranks()) fs::remove(other, ignored);
  if (made_folder_) fs::remove(path_.parent_path(), ignored);  // where nothing is in it
}

}  // namespace kava
