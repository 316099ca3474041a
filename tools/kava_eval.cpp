// kava_eval: accuracy by every scorer and forward passes on data files; and the comparison of two results.
#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <optional>

#include "engine/files/files.h"
#include "engine/files/paths.h"
#include "models/evaluate.h"
#include "tools/choice_option.h"
#include "tools/command.h"
#include "tools/compare.h"
#include "tools/model_options.h"
#include "tools/results.h"
#include "tools/terminal.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

struct EvalCommand {
  ModelOptions model;
  std::optional<std::string> out, format;
  std::vector<std::string> data;
  int64_t limit = 0, batch = kDecodeBatch;
  Sampling sampling;
  std::optional<double> temperature;  // absent: 1 for several samples, else 0
  bool force = false;
};

// JSON holds no bytes that are not UTF-8.
std::string json_text(const std::string& path) { return is_utf8(path) ? path : escaped(path, 4096); }

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

void print_results(const std::vector<std::pair<std::string, EvalResult>>& results, const Json& documents) {
  std::size_t width = 4;
  for (const auto& [name, r] : results) width = std::max(width, name.size());
  fmt::print("{:<{}}{:>10}{:>9}{:>9}{:>9}{:>9}{:>10}{:>9}{:>9}{:>8}{:>8}{:>10}{:>11}\n", "data", width + 1, "questions", "strict", "raw",
             "codi", "gsm8k", "gsm_hard", "passes", "merged", "tokens", "limit", "ms alone", "ms batched");
  for (const auto& [name, r] : results)
    fmt::print("{:<{}}{:>10}{:>9}{:>9}{:>9}{:>9}{:>10}{:>9.2f}{:>9.2f}{:>8.2f}{:>8}{:>10.1f}{:>11.1f}\n", name, width + 1, r.count(),
               percent(r, Scorer::strict), percent(r, Scorer::raw), percent(r, Scorer::codi), percent(r, Scorer::gsm8k),
               percent(r, Scorer::gsm_hard), r.passes(), r.passes_merged(), r.tokens(), r.limit_hits(), r.ms_batch_1.value_or(0),
               r.ms_per_question());
  for (std::size_t i = 0; i < results.size(); ++i) print_intervals(results[i].first, results[i].second, documents[i]);
  const bool chain = results[0].second.method == Method::full_cot, free = results[0].second.prompt == DecodePrompt::free;
  fmt::print(
      "Scorers in % of all questions. Forward passes per answer: {}; merged: {}. tokens: written, EOS included. limit: questions\n"
      "that reached the largest number of new tokens{}. ms: for a question, decoded alone (the first few) and in batches.\n"
      "gsm_hard compares the last numbers as doubles with relative 1e-6.\n",
      chain ? "1, and one for each token after the first, EOS included"
      : free
          ? "pass 0, one for each latent, one for eot and the first token (icot: 1 in all), and one for each token after it, those of the\n"
            "prompt that the model writes itself among them"
          : "pass 0, T, one for the prompt and the first token (no_cot: 1 in all), and one for each token after it",
      "pass T and the one behind it as one", free ? ", which counts as wrong" : "");
  for (const auto& [name, r] : results)
    if (r.too_long() > 0)
      fmt::print("{}: {} questions are over {} tokens; they were not run and count as wrong\n", name, r.too_long(), kLongestPrompt);
  for (const auto& [name, r] : results)
    if (r.golds_over() > 0)
      fmt::print("{}: {} gold answers with EOS do not fit into {} new tokens and cannot be reached; raise --max-new-tokens\n", name,
                 r.golds_over(), r.max_new_tokens);
}

// A document without its results.
Json header(const EvalCommand& command, const OpenedModel& opened, const Model& model, Method method) {
  const ModelOptions& m = command.model;
  const bool drawn = !command.sampling.greedy();
  auto or_null = [](int64_t given) { return given > 0 ? Json(given) : Json(); };
  return {{"program", "kava_eval"},
          {"model", json_text(m.model)},
          {"weights", opened.weights},
          {"base", model.base_digest},
          {"dtype", name_of(opened.config.model.dtype)},
          {"device", model.ops.name()},
          {"options",
           {{"method", name_of(method)},
            {"stage", m.stage ? Json(*m.stage) : Json()},
            {"format", command.format ? Json(*command.format) : Json()},
            {"limit", or_null(command.limit)},
            {"batch", command.batch},
            {"max_new_tokens", or_null(m.max_new_tokens)},
            {"samples", command.sampling.samples},
            {"temperature", command.sampling.temperature},
            {"top_p", drawn ? Json(command.sampling.top_p) : Json()},
            {"seed", drawn ? Json(command.sampling.seed) : Json()},
            {"base", m.base ? Json(json_text(*m.base)) : Json()}}}};
}

Json with_results(Json document, Json results) {
  document["results"] = std::move(results);
  return document;
}

void write_results(const EvalCommand& command, const OpenedModel& opened, const Json& head, const std::vector<fs::path>& paths,
                   const Json& documents) {
  if (command.out) {
    // The run's own results are not replaced unseen by this way either.
    const bool own = !opened.plain() && fs::weakly_canonical(*command.out).parent_path() == opened.run_dir / "eval";
    const Json document = with_results(head, documents);
    if (own) write_result(*command.out, document, command.force);
    else write_file(*command.out, document.dump(1) + "\n");
    fmt::print("written {}\n", escaped(*command.out, 4096));
  }
  for (std::size_t i = 0; i < paths.size(); ++i) {
    write_result(paths[i], with_results(head, Json::array({documents[i]})), command.force);
    fmt::print("written {}\n", escaped(paths[i].string(), 4096));
  }
}

void require_out_usable(const EvalCommand& command, const OpenedModel& opened) {
  if (!command.out) return;
  std::vector<std::string> inputs = command.data;
  inputs.insert(inputs.end(), {opened.run_dir.string(), opened.config.model.path, opened.config.model.adapter, opened.config.data.valid});
  for (const DataFile& file : opened.config.data.train) inputs.push_back(file.path);
  require_no_input("--out", *command.out, inputs);
  require_writable("--out", *command.out);
}

void settle_sampling(EvalCommand& command) {
  Sampling& s = command.sampling;
  s.temperature = command.temperature.value_or(s.samples > 1 ? 1 : 0);
  if (!(s.temperature >= 0 && s.temperature <= 1000))
    throw Error(Exit::usage, "--temperature", fmt::format("is {}", s.temperature), "give 0 for the best token, or at most 1000");
  if (!(s.top_p > 0 && s.top_p <= 1)) throw Error(Exit::usage, "--top-p", fmt::format("is {}", s.top_p), "give more than 0 and at most 1");
}

int evaluate_files(EvalCommand& command) {
  settle_sampling(command);
  if (command.model.model.empty()) throw Error(Exit::usage, "MODEL", "is missing", "see kava_eval --help");
  if (command.data.empty()) throw Error(Exit::usage, "--data", "is missing", "name at least one data file");
  const auto format = choice_option<DataFormat>("--format", command.format);
  const auto [ops, opened, method] = choose_model(command.model);
  EvalOptions options;
  options.method = method, options.stage = command.model.stage, options.max_new_tokens = command.model.max_new_tokens;
  options.limit = command.limit, options.batch = command.batch;
  options.sampling = command.sampling, options.measure_single = true;
  require_out_usable(command, opened);
  std::vector<RowFile> files;
  for (const std::string& path : command.data) files.push_back(read_rows(path, format));
  const std::unique_ptr<Model> model = load_model(*ops, opened);
  Arena arena(*ops);
  const Method by = method.value_or(opened.config.method);
  const Json head = header(command, opened, *model, by);
  std::vector<fs::path> paths;
  for (const RowFile& file : files)
    if (!opened.plain()) paths.push_back(result_path(opened, file, options));
  if (!command.force)
    for (const fs::path& path : paths) require_same_options(path, head);
  fmt::print("model {}: {}, method {}, {}\n", escaped(command.model.model, 4096), opened.weights, name_of(by),
             name_of(opened.config.model.dtype));
  std::fflush(stdout);

  std::vector<std::pair<std::string, EvalResult>> results;
  Json documents = Json::array();
  for (const RowFile& file : files) {
    WorkLine line(stderr, escaped(fs::path(file.path).filename().string(), 60) + ":", "questions");
    options.progress = [&](int64_t done, int64_t total, int64_t correct) {
      line.at(done, total, {fmt::format("strict {:.1f} %", 100.0 * static_cast<double>(correct) / static_cast<double>(done))});
    };
    EvalResult result = evaluate(*model, arena, opened.text, file, options);
    line.end();
    Json json = to_json(result);
    json["data"] = json_text(file.path), json["sha256"] = file.sha256;
    json["seconds"] = result.seconds, json["ms_per_question"] = result.ms_per_question();
    json["ms_batch_1"] = result.ms_batch_1 ? Json(*result.ms_batch_1) : Json();
    documents.push_back(std::move(json));
    results.emplace_back(escaped(fs::path(file.path).filename().string(), 60), std::move(result));
  }
  print_results(results, documents);
  require_printed();
  write_results(command, opened, head, paths, documents);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Evaluates a model on data files: accuracy by every scorer, forward passes, every answer", "kava_eval");
  app.footer(
      "Examples:\n  kava_eval runs/quickstart/kava --data runs/quickstart/data/test.txt --out kava.json\n"
      "  kava_eval compare kava.json no_cot.json");
  EvalCommand command;
  kava::add_model_options(app, command.model);
  app.add_option("--data", command.data, "Data files; their form is recognised from the first row")->expected(1, -1);
  app.add_option("--format", command.format, "The form of all data files, where it is not recognised: " + kava::format_words());
  app.add_option("--limit", command.limit, "Only the first N rows of each file")->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  app.add_option("--batch", command.batch, "Questions decoded together; changes no result")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app.add_option("--samples", command.sampling.samples, "Answers to each question; the majority's counts")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--temperature", command.temperature, "0: the best token; else drawn (default: 0, or 1 for several samples)");
  app.add_option("--top-p", command.sampling.top_p, "Draw from the fewest best tokens that have this share")->capture_default_str();
  app.add_option("--seed", command.sampling.seed, "Of what is drawn")->capture_default_str();
  app.add_option("--out", command.out, "JSON file for the results with every question's record");
  app.add_flag("--force", command.force, "Replace another result of the same name in the run's eval/");
  std::string a, b;
  CLI::App* compare = app.add_subcommand("compare", "Compare two results of --out, question by question");
  compare->add_option("A", a, "A result")->required();
  compare->add_option("B", b, "Another, on the same data")->required();
  compare->footer("Example:\n  kava_eval compare kava.json no_cot.json");
  return kava::command_main(argc, argv, app, [&] { return compare->parsed() ? compare_results(a, b) : evaluate_files(command); });
}
