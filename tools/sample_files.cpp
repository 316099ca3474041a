#include "tools/sample_files.h"

#include <fmt/chrono.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <numeric>

#include "engine/cli.h"
#include "engine/files/files.h"
#include "engine/files/parts.h"
#include "models/score.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

// Keys stand in the order in which they are set: the hashes below are of texts.
using Ordered = nlohmann::ordered_json;

constexpr const char* kMetric = "exact_match";

// The harness's names for the two ways of reading an answer that it has for GSM8K; its own for the other scorers.
std::string filter_of(Scorer scorer) {
  if (scorer == Scorer::strict) return "strict-match";
  if (scorer == Scorer::codi) return "flexible-extract";
  return name_of(scorer);
}

// What the scorer compares, as text; the harness's word where there is nothing.
std::string filtered(Scorer scorer, const EvalAnswer& a, bool is_ids) {
  constexpr const char* kNothing = "[invalid]";
  if (a.hit_limit) return kNothing;
  if (scorer == Scorer::strict) return a.vote.value_or(kNothing);
  if (scorer != Scorer::codi) return a.output;
  const std::optional<double> number = last_number(is_ids ? a.text : a.output);
  return number ? answer_text(*number) : kNothing;
}

// Runs of characters that are none of a file's name become "__".
std::string folder_name(std::string_view model) {
  std::string out;
  bool inside = false;
  for (char c : model) {
    const bool bad = std::string_view("\"<>:/|\\?*[]").find(c) != std::string_view::npos;
    if (!bad) out += c;
    else if (!inside) out += "__";
    inside = bad;
  }
  return out.empty() || out == "." || out == ".." ? "model" : out;
}

std::string task_name(std::string_view data) {
  std::string name = fs::path(data).stem().string();
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c)) || static_cast<unsigned char>(c) > 127) c = '_';
  return name.empty() ? "data" : name;
}

// As Python's json.dumps(doc, indent=2, ensure_ascii=False).
std::string hash_of(const Ordered& doc) { return sha256(doc.dump(2)); }

class Task {
 public:
  Task(std::string name, const SampleFilesHeader& header, const EvalResult& result) : name_(std::move(name)), header_(header), r_(result) {
    const Json& s = header.settings;
    asked_ = {{"until", header.eos.empty() ? Ordered::array() : Ordered::array({header.eos})},
              {"max_gen_toks", r_.max_new_tokens},
              {"do_sample", r_.temperature > 0},
              {"temperature", r_.temperature}};
    if (r_.temperature > 0) asked_["top_p"] = s.value("top_p", 1.0);
    for (std::size_t s = 0; s < r_.scorers.size(); ++s)
      for (std::size_t i = 0; i < r_.records.size(); ++i) add(i, s);
  }

  const std::string& name() const { return name_; }
  const std::string& lines() const { return lines_; }
  std::string hash() const { return sha256(hashes_); }

  Ordered summary() const {
    Ordered json = {{"alias", name_}, {"sample_len", r_.count()}};
    for (std::size_t s = 0; s < r_.scorers.size(); ++s) {
      const std::string key = std::string(kMetric) + "," + filter_of(r_.scorers[s]),
                        error = std::string(kMetric) + "_stderr," + filter_of(r_.scorers[s]);
      const double n = static_cast<double>(r_.count()), mean = r_.accuracy(s);
      json[key] = mean;
      json[error] = n > 1 ? Ordered(std::sqrt(mean * (1 - mean) / (n - 1))) : Ordered("N/A");
    }
    return json;
  }

  Ordered config() const {
    Ordered filters = Ordered::array();
    for (Scorer s : r_.scorers) filters.push_back({{"name", filter_of(s)}});
    return {{"task", name_},
            {"dataset_path", name_},
            {"doc_to_text", header_.chat_before + "{{question}}" + header_.chat_after},
            {"doc_to_target", "{{answer}}"},
            {"num_fewshot", 0},
            {"metric_list", Ordered::array({{{"metric", kMetric}, {"aggregation", "mean"}, {"higher_is_better", true}}})},
            {"output_type", "generate_until"},
            {"generation_kwargs", asked_},
            {"repeats", r_.samples},
            {"filter_list", filters},
            {"metadata", {{"version", 1}, {"method", name_of(r_.method)}}}};
  }

 private:
  void add(std::size_t i, std::size_t scorer) {
    const EvalRecord& record = r_.records[i];
    const Ordered doc = {{"question", record.question}, {"answer", record.gold}};
    const std::string prompt = header_.chat_before + record.question + header_.chat_after;
    const std::string doc_hash = hash_of(doc), prompt_hash = sha256(prompt), target_hash = sha256(record.gold);
    Ordered texts = Ordered::array();
    for (const EvalAnswer& a : record.samples) texts.push_back(a.output);
    if (record.samples.empty()) texts.push_back(record.output);
    const Ordered line = {{"doc_id", i},
                          {"doc", doc},
                          {"target", record.gold},
                          {"arguments", {{"gen_args_0", {{"arg_0", prompt}, {"arg_1", asked_}}}}},
                          {"resps", Ordered::array({texts})},
                          {"filtered_resps", Ordered::array({filtered(r_.scorers[scorer], record, r_.format == DataFormat::ids)})},
                          {"filter", filter_of(r_.scorers[scorer])},
                          {"metrics", Ordered::array({kMetric})},
                          {"doc_hash", doc_hash},
                          {"prompt_hash", prompt_hash},
                          {"target_hash", target_hash},
                          {kMetric, record.correct[scorer] ? 1.0 : 0.0}};
    lines_ += line.dump() + "\n";
    hashes_ += doc_hash + prompt_hash + target_hash;
  }

  std::string name_;
  const SampleFilesHeader& header_;
  const EvalResult& r_;
  Ordered asked_;
  std::string lines_, hashes_;
};

Ordered summary_of(const SampleFilesHeader& header, const std::vector<Task>& tasks,
                   const std::vector<std::pair<std::string, EvalResult>>& results) {
  Ordered json = {{"results", Ordered::object()}};
  double seconds = 0;
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    const std::string& name = tasks[t].name();
    const int64_t n = results[t].second.count();
    json["results"][name] = tasks[t].summary();
    json["group_subtasks"][name] = Ordered::array();
    json["configs"][name] = tasks[t].config();
    json["versions"][name] = 1;
    json["n-shot"][name] = 0;
    json["higher_is_better"][name] = {{kMetric, true}};
    json["n-samples"][name] = {{"original", n}, {"effective", n}};
    json["task_hashes"][name] = tasks[t].hash();
    seconds += results[t].second.seconds;
  }
  json["config"] = {
      {"model", "kava"},         {"model_args", {{"pretrained", header.model}}},    {"batch_size", header.settings.value("batch", 0)},
      {"device", header.device}, {"limit", header.settings.value("limit", Json())}, {"gen_kwargs", Ordered(header.settings)}};
  json["git_hash"] = nullptr;
  json["date"] = std::chrono::duration<double>(header.date.time_since_epoch()).count();
  json["pretty_env_info"] = release_text("kava");
  json["transformers_version"] = nullptr;
  json["lm_eval_version"] = "0.4.13";
  json["upper_git_hash"] = nullptr;
  json["model_source"] = "kava";
  json["model_name"] = header.model;
  json["model_name_sanitized"] = folder_name(header.model);
  json["system_instruction"] = nullptr;
  json["system_instruction_sha"] = nullptr;
  json["fewshot_as_multiturn"] = false;
  json["chat_template"] = nullptr;
  json["chat_template_sha"] = nullptr;
  json["total_evaluation_time_seconds"] = fmt::format("{}", seconds);
  return json;
}

}  // namespace

void require_sample_folder(const std::string& out, const std::string& model) {
  const fs::path folder = fs::path(out) / folder_name(model);
  require_outside_checkpoints("--log-samples", folder.string());
  if (const std::optional<FolderFault> fault = folder_fault(folder))
    throw Error(fault->is_no_folder ? Exit::usage : Exit::preflight, "--log-samples " + shown_path(out), fault->what,
                "name another folder");
}

std::vector<std::string> write_sample_files(const std::string& out, const SampleFilesHeader& header,
                                            const std::vector<std::pair<std::string, EvalResult>>& results) {
  std::vector<Task> tasks;
  std::map<std::string, int> used;
  for (const auto& [data, result] : results) {
    std::string name = task_name(data);
    if (const int before = used[name]++; before > 0) name += fmt::format("_{}", before + 1);
    tasks.emplace_back(std::move(name), header, result);
  }
  const auto whole = std::chrono::floor<std::chrono::seconds>(header.date);
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(header.date - whole).count();
  const std::string date = fmt::format("{:%Y-%m-%dT%H-%M-%S}.{:06}", fmt::localtime(std::chrono::system_clock::to_time_t(whole)), micros);
  const fs::path folder = fs::path(out) / folder_name(header.model);
  const MadeFolder made(folder);
  // Their names hold the time, so that no later writer has the same.
  remove_stale_parts(folder, [](std::string_view name) { return name.starts_with("samples_") || name.starts_with("results_"); });
  std::vector<std::string> written;
  const auto write = [&](const std::string& name, const std::string& text) {
    written.push_back((folder / name).string());
    write_file(written.back(), text);
  };
  try {
    for (const Task& task : tasks) write(fmt::format("samples_{}_{}.jsonl", task.name(), date), task.lines());
    write(fmt::format("results_{}.json", date), summary_of(header, tasks, results).dump(2));
  } catch (...) {
    std::error_code ignored;
    for (const std::string& path : written) fs::remove(path, ignored);
    throw;
  }
  return written;
}

}  // namespace kava
