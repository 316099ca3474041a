#include "tools/eval_table.h"

#include <fmt/core.h>

#include <algorithm>

#include "models/statistics.h"

namespace kava {

namespace {

std::string percent(const EvalResult& r, Scorer scorer) {
  for (std::size_t s = 0; s < r.scorers.size(); ++s)
    if (r.scorers[s] == scorer) return fmt::format("{:.2f}", 100 * r.accuracy(s));
  return "-";
}

// "45.30 (42.61 to 47.99)", in %.
std::string with_interval(const Json& share, const Json& interval) {
  return fmt::format("{:.2f} ({:.2f} to {:.2f})", 100 * share.get<double>(), 100 * interval[0].get<double>(),
                     100 * interval[1].get<double>());
}

void print_intervals(const std::string& name, const EvalResult& r, const Json& json) {
  std::string line;
  for (const auto& [scorer, share] : json["accuracy"].items())
    line += fmt::format("{}{} {}", line.empty() ? "" : ", ", scorer, with_interval(share, json["bootstrap"][scorer]));
  fmt::print("{}: {} %, with the 95 % interval of a bootstrap over the questions\n", name, line);
  if (!json.contains("pass_at")) return;
  const std::string n = std::to_string(r.samples);
  fmt::print("{}: of {} answers at temperature {} the majority's counts; strict: one by one {} %, any of them {} %\n", name, n,
             r.temperature, with_interval(json["pass_at"]["1"], json["bootstrap_pass_at"]["1"]),
             with_interval(json["pass_at"][n], json["bootstrap_pass_at"][n]));
}

// Nothing was measured where every answer was there already.
std::string ms_text(const Json& ms) { return ms.is_null() ? "-" : fmt::format("{:.1f}", ms.get<double>()); }

// One control or one point of a sweep.
void print_paired(const std::string& name, const Json& j, const std::string& more) {
  fmt::print("  {:<26}{:>26}{:>30}{:>14}{}\n", name, with_interval(j["accuracy"], j["bootstrap"]),
             with_interval(j["difference"], j["bootstrap_difference"]), p_text(j["mcnemar_p"].get<double>()), more);
}

void print_controls(const std::string& name, const Json& json) {
  if (!json.contains("controls")) return;
  fmt::print("{}: the latents of the last pass replaced\n  {:<26}{:>26}{:>30}{:>14}{:>12}\n", name, "latents", "strict % (95 %)",
             "against intact, pp (95 %)", "McNemar p", "answer CE");
  fmt::print("  {:<26}{:>26}{:>30}{:>14}{:>12.4f}\n", "intact", with_interval(json["accuracy"]["strict"], json["bootstrap"]["strict"]), "-",
             "-", json["answer_ce"].get<double>());
  for (const auto& [control, j] : json["controls"].items())
    print_paired(control, j, fmt::format("{:>12.4f}", j["answer_ce"].get<double>()));
}

std::string point_name(const Json& j) {
  return fmt::format("{} latents, {} iterations", j["latents"].get<int64_t>(), j["iterations"].get<int64_t>());
}

void print_sweeps(const std::string& name, const Json& json) {
  if (!json.contains("sweep")) return;
  fmt::print("{}: other numbers of latents and iterations\n  {:<26}{:>26}{:>30}{:>14}{:>9}{:>10}{:>11}\n", name, "", "strict % (95 %)",
             "against the run's, pp (95 %)", "McNemar p", "passes", "ms alone", "ms batched");
  for (const auto& [kind, points] : json["sweep"].items())
    for (const Json& j : points)
      print_paired(point_name(j), j,
                   fmt::format("{:>9.2f}{:>10}{:>11}", j["passes"].get<double>(), ms_text(j["ms_batch_1"]), ms_text(j["ms_per_question"])));
}

void tell_too_long(const std::string& name, int64_t count, int64_t most) {
  if (count > 0) fmt::print("{}: {} questions are over {} tokens; they were not run and count as wrong\n", name, count, most);
}

}  // namespace

void print_results(const std::vector<std::pair<std::string, EvalResult>>& results, const Json& documents) {
  std::size_t width = 4;
  for (const auto& [name, r] : results) width = std::max(width, name.size());
  fmt::print("{:<{}}{:>10}{:>9}{:>9}{:>9}{:>9}{:>10}{:>9}{:>9}{:>8}{:>8}{:>10}{:>11}\n", "data", width + 1, "questions", "strict", "raw",
             "codi", "gsm8k", "gsm_hard", "passes", "merged", "tokens", "limit", "ms alone", "ms batched");
  for (const auto& [name, r] : results)
    fmt::print("{:<{}}{:>10}{:>9}{:>9}{:>9}{:>9}{:>10}{:>9.2f}{:>9.2f}{:>8.2f}{:>8}{:>10}{:>11}\n", name, width + 1, r.count(),
               percent(r, Scorer::strict), percent(r, Scorer::raw), percent(r, Scorer::codi), percent(r, Scorer::gsm8k),
               percent(r, Scorer::gsm_hard), r.passes(), r.passes_merged(), r.tokens(), r.limit_hits(),
               ms_text(r.ms_batch_1 ? Json(*r.ms_batch_1) : Json()), ms_text(r.timed > 0 ? Json(r.ms_per_question()) : Json()));
  for (std::size_t i = 0; i < results.size(); ++i) {
    print_intervals(results[i].first, results[i].second, documents[i]);
    print_controls(results[i].first, documents[i]);
    print_sweeps(results[i].first, documents[i]);
  }
  const bool chain = results[0].second.method == Method::full_cot, free = results[0].second.prompt == DecodePrompt::free;
  fmt::print(
      "Scorers in % of all questions. Forward passes per answer: {}; merged: {}. tokens: written, EOS included. limit: questions\n"
      "that reached the largest number of new tokens, which counts as wrong. ms: for a question, decoded alone (the first few) and in\n"
      "batches. "
      "gsm_hard compares the last numbers as doubles with relative 1e-6.\n",
      chain  ? "1, and one for each token after the first, EOS included"
      : free ? "pass 0, T as far as they are run, one for eot and the first token\n"
               "(without eot the pass before gives it), and one for each token after it, those of the prompt that the model writes itself\n"
               "among them"
             : "pass 0, T as far as they are run, one for the prompt and the first token\n"
               "(no_cot: 1 in all), and one for each token after it",
      "pass T and the one behind it as one");
  for (std::size_t i = 0; i < results.size(); ++i) {
    tell_too_long(results[i].first, results[i].second.too_long(), results[i].second.longest_prompt);
    if (!documents[i].contains("sweep")) continue;
    for (const auto& [kind, points] : documents[i]["sweep"].items())
      for (const Json& j : points)
        tell_too_long(results[i].first + ", " + point_name(j), j["too_long"].get<int64_t>(), results[i].second.longest_prompt);
  }
  for (const auto& [name, r] : results)
    if (r.without_prompt() > 0)
      fmt::print("{}: {} answers end without the answer prompt; strict and raw count them as wrong\n", name, r.without_prompt());
  for (const auto& [name, r] : results)
    if (r.golds_beyond > 0)
      fmt::print("{}: {} gold answers end behind the model's last position; they are not in the answer CE\n", name, r.golds_beyond);
  for (const auto& [name, r] : results)
    if (r.golds_over() > 0)
      fmt::print("{}: {} gold answers with EOS{} do not fit into {} new tokens and cannot be reached; raise --max-new-tokens\n", name,
                 r.golds_over(), r.prompt == DecodePrompt::free ? " and the prompt" : "", r.max_new_tokens);
}

}  // namespace kava
