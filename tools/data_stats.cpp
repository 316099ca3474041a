#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>

#include "engine/data/data.h"
#include "engine/error.h"
#include "engine/files/hub.h"
#include "engine/text/tokenizer.h"
#include "tools/choice_option.h"
#include "tools/data_files.h"

namespace kava {

namespace {

bool is_of_ids(const RowFile& file) { return file.format == DataFormat::ids; }

// Mean, quantiles (the smallest value that a share of all does not exceed) and the largest.
void print_lengths(const char* name, std::vector<int64_t> all) {
  if (all.empty()) return;
  std::sort(all.begin(), all.end());
  double sum = 0;
  for (int64_t n : all) sum += static_cast<double>(n);
  const auto at = [&](double share) {
    const auto rank = static_cast<std::size_t>(std::max(0.0, share * static_cast<double>(all.size()) - 1e-9));
    return all[std::min(rank, all.size() - 1)];
  };
  fmt::print("  {:<26}{:>10.1f}{:>8}{:>8}{:>8}{:>8}\n", name, sum / static_cast<double>(all.size()), at(0.5), at(0.95), at(0.99),
             all.back());
}

int64_t characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
}

void print_row(const std::string& name, int64_t count, std::size_t all) {
  const double share = static_cast<double>(count) / static_cast<double>(all);
  const std::string bar(static_cast<std::size_t>(share * 40 + 0.5), '#');
  fmt::print("  {:<26}{:>10}{:>8.2f} %{}{}\n", name, count, 100 * share, bar.empty() ? "" : "  ", bar);
}

void print_steps(const RowFile& file) {
  constexpr std::size_t kMost = 12;
  std::map<std::size_t, int64_t> rows;
  for (const Row& row : file.rows) ++rows[std::min(row.steps.size(), kMost)];
  fmt::print("  {:<26}{:>10}\n", "steps of a row", "rows");
  for (const auto& [steps, count] : rows)
    print_row(steps == kMost ? fmt::format("{} and more", kMost) : fmt::format("{}", steps), count, file.rows.size());
}

// How the traces fill M latents: none, parts of M, and more.
void print_trace_histogram(const std::vector<int64_t>& traces, int64_t latents) {
  std::vector<int64_t> ends{1};  // each bin ends before
  for (int64_t part : {latents / 4, latents / 2, 3 * latents / 4, latents, latents + 1, 2 * latents, 4 * latents})
    if (part > ends.back()) ends.push_back(part);
  ends.push_back(std::numeric_limits<int64_t>::max());
  fmt::print("  {:<26}{:>10}\n", fmt::format("n_c against M = {}", latents), "rows");
  for (std::size_t i = 0; i < ends.size(); ++i) {
    const int64_t first = i == 0 ? 0 : ends[i - 1], end = ends[i];
    const auto count = std::count_if(traces.begin(), traces.end(), [&](int64_t n) { return n >= first && n < end; });
    const std::string name = i + 1 == ends.size() ? fmt::format("{} and more", first)
                             : end == first + 1   ? fmt::format("{}", first)
                                                  : fmt::format("{} to {}", first, end - 1);
    print_row(name, count, traces.size());
  }
}

void print_tokens(const RowFile& file, const Tokenizer* tokenizer, const StatsCommand& command) {
  SampleOptions options;
  options.max_tokens = std::numeric_limits<int64_t>::max();
  options.drop_last_step = !command.all_steps;
  options.vocab_size = std::numeric_limits<int32_t>::max();
  constexpr std::size_t kShown = 5;
  LeftOut none;
  int64_t over = 0, longest = 0;
  std::vector<std::string> first;  // of those over the limit
  std::vector<int64_t> question, trace, answer, whole;
  for (const Sample& s : make_samples({file}, tokenizer, options, &none)) {
    question.push_back(static_cast<int64_t>(s.question.size()));
    trace.push_back(static_cast<int64_t>(s.trace.size()));
    answer.push_back(static_cast<int64_t>(s.answer.size()));
    whole.push_back(question.back() + answer.back() + std::max(trace.back(), command.latents + 2));
    if (whole.back() > command.max_tokens && ++over <= static_cast<int64_t>(kShown))
      first.push_back(fmt::format("{}: {} tokens", file.where(file.rows[static_cast<std::size_t>(s.row)]), whole.back()));
    longest = std::max(longest, whole.back());
  }
  print_lengths("question", question);
  print_lengths(command.all_steps || is_of_ids(file) ? "trace (n_c)" : "trace (n_c), last dropped", trace);
  print_lengths("prompt, answer, EOS", answer);
  print_lengths("longest sequence", whole);
  print_trace_histogram(trace, command.latents);
  fmt::print("  {} of {} rows would be left out: over max_tokens = {} (the longest sequence has {})\n", over, whole.size(),
             command.max_tokens, longest);
  for (const std::string& text : first) fmt::print("  left out: {}\n", text);
  if (over > std::ssize(first)) fmt::print("  and {} more\n", over - std::ssize(first));
}

void print_text_lengths(const RowFile& file) {
  std::vector<int64_t> question, chain, answer, steps;
  for (const Row& row : file.rows) {
    question.push_back(characters(row.question)), answer.push_back(characters(row.answer));
    int64_t all = 0;
    for (const std::string& step : row.steps) all += characters(step);
    chain.push_back(all), steps.push_back(static_cast<int64_t>(row.steps.size()));
  }
  print_lengths("question, characters", question);
  print_lengths("chain, characters", chain);
  print_lengths("answer, characters", answer);
  print_lengths("steps", steps);
}

}  // namespace

int describe_data(const StatsCommand& command) {
  const auto format = choice_option<DataFormat>("--format", command.format);
  std::optional<Tokenizer> tokenizer;
  std::vector<RowFile> files;
  for (const std::string& path : command.files) files.push_back(read_rows(path, format));
  if (!command.of_tokens.empty() && !command.tokenizer && std::ranges::none_of(files, &is_of_ids))
    throw Error(Exit::usage, command.of_tokens, "counts tokens, which rows of text have by a tokenizer", "add --tokenizer DIR");
  if (command.tokenizer) tokenizer.emplace(Tokenizer::load(model_folder(*command.tokenizer)));
  for (const RowFile& file : files) {
    const bool ids = is_of_ids(file);
    fmt::print("{}: {}, {} rows\n  {:<26}{:>10}{:>8}{:>8}{:>8}{:>8}\n", shown_path(file.path), name_of(file.format), file.rows.size(), "",
               "mean", "median", "95 %", "99 %", "most");
    if (!ids) print_text_lengths(file);
    if (tokenizer || ids) print_tokens(file, tokenizer ? &*tokenizer : nullptr, command);
    if (!ids) print_steps(file);
  }
  return 0;
}

}  // namespace kava
