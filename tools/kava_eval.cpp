// kava_eval: accuracy by every scorer and forward passes on data files; and the comparison of two results.
#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <deque>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>

#include "engine/cli.h"
#include "engine/files/files.h"
#include "engine/files/paths.h"
#include "models/contents.h"
#include "models/evaluate.h"
#include "tools/choice_option.h"
#include "tools/command.h"
#include "tools/compare.h"
#include "tools/eval_table.h"
#include "tools/model_options.h"
#include "tools/partial_result.h"
#include "tools/ranks.h"
#include "tools/results.h"
#include "tools/sample_files.h"
#include "tools/terminal.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

struct EvalCommand {
  ModelOptions model;
  RankOptions ranks;
  std::optional<std::string> out, format, log_samples;
  std::vector<std::string> data;
  int64_t limit = 0, batch = kDecodeBatch;
  Sampling sampling;
  // As given; temperature absent: 1 for several samples, else 0.
  std::optional<double> temperature, top_p;
  std::optional<int64_t> seed;
  bool controls = false, force = false;
  std::optional<std::string> sweep_latents, sweep_passes;
};

struct Range {
  int64_t first = 0, last = -1;
};

// JSON holds no bytes that are not UTF-8.
std::string json_text(const std::string& path) { return is_utf8(path) ? path : shown_path(path); }

std::string result_kind(const EvalCommand& command) {
  return command.controls ? "controls" : command.sweep_latents || command.sweep_passes ? "sweep" : "";
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
            {"chat", name_of(opened.text.chat.family)},
            {"controls", command.controls},
            {"sweep_latents", command.sweep_latents ? Json(*command.sweep_latents) : Json()},
            {"sweep_passes", command.sweep_passes ? Json(*command.sweep_passes) : Json()},
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
  const auto document = [&](std::size_t i) { return with_results(head, Json::array({documents[i]})); };
  // All are compared before the first is written: what is refused leaves everything as it was.
  for (std::size_t i = 0; i < paths.size(); ++i) require_same_result(paths[i], document(i), command.force);
  if (command.out) {
    // The run's own results are not replaced unseen by this way either.
    std::error_code failed;
    const bool own = !opened.plain() && fs::weakly_canonical(*command.out, failed).parent_path() == opened.run_dir / "eval";
    const Json all = with_results(head, documents);
    if (own) require_same_result(*command.out, all, command.force);
    write_file(*command.out, all.dump(1) + "\n");
    fmt::print("written {}\n", shown_path(*command.out));
  }
  for (std::size_t i = 0; i < paths.size(); ++i) {
    write_result(paths[i], document(i));
    fmt::print("written {}\n", shown_path(paths[i]));
  }
}

// The results as another program's files.
void log_samples(const EvalCommand& command, const OpenedModel& opened, const Json& head,
                 const std::vector<std::pair<std::string, EvalResult>>& results) {
  if (!command.log_samples) return;
  SampleFilesHeader header;
  header.model = json_text(command.model.model), header.device = head.at("device"), header.settings = head.at("options");
  header.date = std::chrono::system_clock::now();
  if (const std::optional<Tokenizer>& tokenizer = opened.text.tokenizer) {
    header.chat_before = tokenizer->decode(opened.text.chat.before, false),
    header.chat_after = tokenizer->decode(opened.text.chat.after, false);
    header.eos = tokenizer->token(*opened.text.eos);
  }
  for (const std::string& path : write_sample_files(*command.log_samples, header, results)) fmt::print("written {}\n", shown_path(path));
}

void require_out_usable(const EvalCommand& command, const OpenedModel& opened) {
  if (command.log_samples) require_sample_folder(*command.log_samples, json_text(command.model.model));
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
  s.top_p = command.top_p.value_or(s.top_p);
  if (command.seed) s.seed = static_cast<uint64_t>(*command.seed);
  if (!(s.temperature >= 0 && s.temperature <= 1000))
    throw Error(Exit::usage, "--temperature", fmt::format("is {}", s.temperature), "give 0 for the best token, or at most 1000");
  if (!(s.top_p > 0 && s.top_p <= 1)) throw Error(Exit::usage, "--top-p", fmt::format("is {}", s.top_p), "give more than 0 and at most 1");
}

// Of what is drawn only, where nothing is.
void tell_unused(const EvalCommand& command) {
  if (!command.sampling.greedy() || (!command.top_p && !command.seed)) return;
  print_note(fmt::format("note: {} without effect, as answers are greedy; give --temperature or --samples to draw them",
                         command.top_p && command.seed ? "--top-p and --seed are"
                         : command.top_p               ? "--top-p is"
                                                       : "--seed is"));
}

// "A..B", or one number.
Range range_of(const char* option, const std::optional<std::string>& text) {
  Range r;
  if (!text) return r;
  const std::size_t dots = text->find("..");
  const auto number = [&](std::string_view digits) {
    int64_t n = -1;
    const auto [stop, failed] = std::from_chars(digits.data(), digits.data() + digits.size(), n);
    if (failed != std::errc() || stop != digits.data() + digits.size() || n < 0 || n > 4096) n = -1;
    return n;
  };
  r.first = number(std::string_view(*text).substr(0, dots));
  r.last = dots == std::string::npos ? r.first : number(std::string_view(*text).substr(dots + 2));
  if (r.first < 0 || r.last < r.first)
    throw Error(Exit::usage, option, "\"" + escaped(*text) + "\" is no range", "give A..B, whole numbers from 0 to 4096");
  return r;
}

void require_latents(const EvalCommand& command, const Decoding& decoding) {
  const bool sweep = command.sweep_latents || command.sweep_passes;
  if (!command.controls && !sweep) return;
  const char* option = command.controls ? "--controls" : command.sweep_latents ? "--sweep-latents" : "--sweep-passes";
  if (command.controls && sweep) throw Error(Exit::usage, option, "is given beside a sweep", "give them in two calls");
  if (command.sampling.samples > 1 || !command.sampling.greedy())
    throw Error(Exit::usage, option, "compares greedy answers", "leave --samples and --temperature out");
  if (decoding.recipe.latents == 0) refuse_without_latents(option, decoding.config.method, decoding.recipe);
  if (sweep && decoding.recipe.has_stages())
    throw Error(Exit::usage, option, "method " + name_of(decoding.config.method) + " has its latents by stages", "use --stage K");
}

// The result under every number of latents, then of passes, that was asked for.
Json sweeps(const EvalCommand& command, const Decoding& decoding, const EvalOptions& options, const EvalResult& intact,
            const std::function<EvalResult(const EvalOptions&, const std::string& point)>& run) {
  Json json = Json::object();
  const int64_t latents = decoding.config.latent.count, iterations = decoding.config.latent.iterations;
  const auto sweep = [&](const char* name, const char* option, const std::optional<std::string>& text, auto set) {
    const Range range = range_of(option, text);
    std::vector<SweepPoint> points;
    for (int64_t n = range.first; n <= range.last; ++n) {
      EvalOptions o = options;
      set(o, n);
      const RunConfig::Latent used = decoding_of(decoding.config, o).config.latent;
      const bool as_trained = used.count == latents && used.iterations == iterations;
      points.push_back({used.count, used.iterations, as_trained ? intact : run(o, fmt::format(".{}-{}", used.count, used.iterations))});
    }
    if (text) json[name] = sweep_json(intact, points);
  };
  sweep("latents", "--sweep-latents", command.sweep_latents, [](EvalOptions& o, int64_t n) { o.latents = n; });
  sweep("passes", "--sweep-passes", command.sweep_passes, [](EvalOptions& o, int64_t n) { o.iterations = n; });
  return json;
}

EvalOptions options_of(const EvalCommand& command, const DecodeChoice& choice) {
  EvalOptions options;
  static_cast<DecodeChoice&>(options) = choice;
  options.max_new_tokens = command.model.max_new_tokens;
  options.limit = command.limit, options.batch = command.batch;
  options.sampling = command.sampling, options.controls = command.controls, options.measure_single = true;
  return options;
}

// What every rank reads before its first question.
struct Prepared {
  Prepared(const EvalCommand& command, int device)
      : chosen(choose_model(command.model, device)),
        decoding(decoding_of(chosen.opened.config, chosen.choice)),
        options(options_of(command, chosen.choice)) {
    const OpenedModel& opened = chosen.opened;
    require_latents(command, decoding);
    require_out_usable(command, opened);
    for (const std::string& path : command.data) files.push_back(read_rows(path, choice_option<DataFormat>("--format", command.format)));
    model = load_model(*chosen.ops, opened);
    head = header(command, opened, *model, decoding.config.method);
    for (const RowFile& file : files)
      if (!opened.plain()) paths.push_back(result_path(opened, file, options, result_kind(command)));
    for (const fs::path& path : paths) {
      require_same_options(path, head, command.force);
      if (command.out && paths.size() > 1 && same_path(*command.out, path.string()))
        throw Error(Exit::usage, "--out " + shown_path(*command.out), "is where the run keeps the result of one of the data files",
                    "name another file");
    }
  }
  std::string digests() const {
    std::string text;
    for (const RowFile& file : files) text += file.sha256 + " ";
    return text;
  }

  const ChosenModel chosen;
  const Decoding decoding;
  EvalOptions options;
  std::vector<RowFile> files;
  std::unique_ptr<Model> model;
  Json head;
  std::vector<fs::path> paths;
};

// Names, sizes and times of a folder's files that may be read: weights that are written anew give other answers.
Json state_of(const fs::path& folder) {
  std::map<std::string, std::string> files;
  std::error_code failed;
  for (const fs::directory_entry& e : fs::directory_iterator(folder, failed))
    if (may_be_read(e.path()) && e.is_regular_file(failed))
      files[json_text(e.path().filename().string())] =
          fmt::format("{} {}", e.file_size(failed), e.last_write_time(failed).time_since_epoch().count());
  return files;
}

// All that an answer depends on. How many questions are decoded together changes none.
std::string asked_of(const Prepared& p, const RowFile& file) {
  Json head = p.head;
  head["options"].erase("batch");
  head["sha256"] = file.sha256, head["format"] = name_of(file.format), head["release"] = release_text("kava");
  head["files"] = {state_of(p.chosen.opened.config.model.path), state_of(p.chosen.opened.adapter)};
  return head.dump();
}

// The options with what an interrupted evaluation of this file has answered, and with this rank's answers kept from now on. `point` of a
// sweep, "" for what the run was trained with.
EvalOptions keeping(const EvalCommand& command, const Prepared& p, std::size_t number, EvalOptions options, const std::string& point,
                    Comm& comm, std::deque<PartialResult>& partials) {
  const RowFile& file = p.files[number];
  // The same contents once more are answered as a file of their own.
  if (std::ranges::any_of(std::span(p.files).first(number), [&](const RowFile& f) { return f.sha256 == file.sha256; })) return options;
  // A pipe or a device has no place beside it.
  std::error_code failed;
  std::string result;
  if (!p.paths.empty()) result = p.paths[number].string() + point;
  else if (command.out && (!is_there(*command.out) || fs::is_regular_file(*command.out, failed)))
    result = fmt::format("{}.{}{}", *command.out, number, point);
  result = comm.broadcast(result, "reading an interrupted evaluation");
  if (result.empty()) return options;
  const std::string asked = comm.broadcast(asked_of(p, file) + point, "reading an interrupted evaluation");
  PartialResult& partial = partials.emplace_back(result, asked, comm.rank());
  std::vector<std::size_t> counts{static_cast<std::size_t>(options.sampling.samples)};
  if (options.controls) counts = {kFirstAnswers, kAllAnswers};
  std::string lines;
  together(comm, "reading an interrupted evaluation", [&] {
    if (comm.leads()) lines = text_of(partial.take_over(counts));
  });
  add_kept(options.known, comm.broadcast(lines, "reading an interrupted evaluation"), counts);
  options.answered = [&partial](std::size_t row, std::span<const DecodeResult> answers) { partial.add(row, answers); };
  if (!options.known.empty() && comm.leads())
    print_note(fmt::format("{}: {} answers of an interrupted evaluation are taken over", shown_path(file.path), options.known.size()));
  return options;
}

// Error(code stopped), on every rank, where a signal has asked any for it.
void require_going_on(Comm& comm, int64_t done, int64_t total, bool kept) {
  if (done >= total || !comm.any(stop_requested(), "asking for a stop")) return;
  together(comm, "stopping", [&] {
    if (comm.leads())
      throw Error(Exit::stopped, "kava_eval", fmt::format("stopped after {} of {} questions", done, total),
                  kept ? "give the same command again to go on" : "give the same command again");
  });
}

// Whether all answers are of one batch, which is not worth keeping where the disk refuses.
bool is_one_batch(const EvalCommand& command, const Prepared& p, int ranks) {
  return p.files.size() == 1 && std::ssize(p.files[0].rows) <= p.options.batch * ranks && !command.sweep_latents && !command.sweep_passes;
}

// The result of a file, and what is written of it.
std::pair<EvalResult, Json> evaluate_file(const EvalCommand& command, Prepared& p, Arena& arena, std::size_t number, Comm& comm,
                                          std::deque<PartialResult>& partials) {
  const RowFile& file = p.files[number];
  const auto run = [&](EvalOptions o) {
    // A launcher may put a pseudo-terminal between a rank and its own output.
    std::optional<WorkLine> line;
    if (comm.alone()) line.emplace(stderr, escaped(fs::path(file.path).filename().string(), 60) + ":", "questions");
    o.progress = [&](int64_t done, int64_t total, int64_t correct) {
      std::vector<std::string> fields;
      if (correct >= 0 && done > 0)
        fields.push_back(fmt::format("strict {:.1f} %", 100.0 * static_cast<double>(correct) / static_cast<double>(done)));
      if (line) line->at(done, total, fields);
      require_going_on(comm, done, total, !partials.empty());
    };
    EvalResult r = evaluate(*p.model, arena, p.chosen.opened.text, file, o);
    if (line) line->end();
    return r;
  };
  const auto kept_run = [&](const EvalOptions& o, const std::string& point) {
    return run(keeping(command, p, number, o, point, comm, partials));
  };
  EvalResult result = kept_run(p.options, "");
  Json json = to_json(result);
  json["data"] = json_text(file.path), json["sha256"] = file.sha256;
  json["seconds"] = result.seconds, json["ms_per_question"] = result.timed > 0 ? Json(result.ms_per_question()) : Json();
  json["ms_batch_1"] = result.ms_batch_1 ? Json(*result.ms_batch_1) : Json();
  if (command.sweep_latents || command.sweep_passes) json["sweep"] = sweeps(command, p.decoding, p.options, result, kept_run);
  return {std::move(result), std::move(json)};
}

int evaluate_files(const EvalCommand& command, Comm& comm, const World& world) {
  std::optional<Prepared> prepared;
  together(comm, "reading model and data", [&] { prepared.emplace(command, world.local_rank); });
  Prepared& p = *prepared;
  const OpenedModel& opened = p.chosen.opened;
  require_same(comm, "the options and the model", p.head.dump(), Exit::usage);
  require_same(comm, "the data", p.digests(), Exit::data);
  Arena arena(*p.chosen.ops);
  fmt::print("model {}: {}, method {}, {}, {}\n", shown_path(command.model.model), opened.weights, name_of(p.decoding.config.method),
             name_of(opened.config.model.dtype), asked_as(opened));
  std::fflush(stdout);

  if (comm.leads()) tell_unused(command);

  p.options.comm = &comm;
  std::vector<std::pair<std::string, EvalResult>> results;
  std::deque<PartialResult> partials;
  Json documents = Json::array();
  try {
    for (std::size_t i = 0; i < p.files.size(); ++i) {
      auto [result, document] = evaluate_file(command, p, arena, i, comm, partials);
      documents.push_back(std::move(document));
      results.emplace_back(escaped(fs::path(p.files[i].path).filename().string(), 300), std::move(result));
    }
    together(comm, "writing the results", [&] {
      if (!comm.leads()) return;
      print_results(results, documents);
      write_results(command, opened, p.head, p.paths, documents);
      log_samples(command, opened, p.head, results);
    });
  } catch (const Error& e) {
    const bool lost = e.code() == Exit::write && comm.leads() && is_one_batch(command, p, comm.size());
    if (lost || e.code() == Exit::usage)  // a result that is refused is not asked for again
      for (PartialResult& partial : partials) partial.remove();
    throw;
  }
  for (PartialResult& partial : partials) partial.remove();
  return 0;
}

int evaluate_files(EvalCommand& command) {
  settle_sampling(command);
  range_of("--sweep-latents", command.sweep_latents), range_of("--sweep-passes", command.sweep_passes);
  if (command.model.model.empty()) throw Error(Exit::usage, "MODEL", "is missing", "see kava_eval --help");
  if (command.data.empty()) throw Error(Exit::usage, "--data", "is missing", "name at least one data file");
  catch_signals();
  return on_ranks(command.ranks, command.model.device,
                  [&](Comm& comm, const World& world) { return evaluate_files(command, comm, world); });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Evaluates a model on data files: accuracy by every scorer, forward passes, every answer", "kava_eval");
  app.footer(
      "Examples (after tools/quickstart.sh):\n  kava_eval runs/quickstart/kava --data runs/quickstart/data/test.txt --limit 100\n"
      "  kava_eval compare runs/quickstart/kava.json runs/quickstart/no_cot.json");
  EvalCommand command;
  kava::add_model_options(app, command.model);
  kava::add_rank_options(app, command.ranks);
  app.add_option("--data", command.data, "Data files; their form is recognised from the first row")->type_name("FILE")->expected(1, -1);
  app.add_option("--format", command.format, "The form of all data files, where it is not recognised: " + kava::format_words());
  app.add_option("--limit", command.limit, "Only the first N rows of each file (default: all)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  app.add_option("--batch", command.batch, "Questions decoded together; changes no result")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app.add_option("--samples", command.sampling.samples, "Answers to each question; the majority's counts")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--temperature", command.temperature, "0: the best token; else drawn (default: 0, or 1 for several samples)");
  app.add_option("--top-p", command.top_p,
                 fmt::format("Draw from the fewest best tokens that have this share (default: {})", command.sampling.top_p));
  app.add_option("--seed", command.seed, fmt::format("Seed of what is drawn (default: {})", command.sampling.seed))
      ->check(CLI::Range(int64_t{0}, std::numeric_limits<int64_t>::max() - 1));  // numbers beyond are read as the largest
  app.add_flag("--controls", command.controls, "Also with the latents replaced: by zeros, means, another question's, or nothing");
  app.add_option("--sweep-latents", command.sweep_latents, "Also with A..B latents");
  app.add_option("--sweep-passes", command.sweep_passes, "Also with A..B iterations on the latents");
  app.add_option("--out", command.out,
                 "JSON file for the results with every question's record (a run keeps them in its eval/ in any case)");
  app.add_option("--log-samples", command.log_samples, "Folder for every answer in the layout of lm-evaluation-harness");
  app.add_flag("--force", command.force, "Replace another result of the same name in the run's eval/");
  std::string a, b;
  CLI::App* compare = app.add_subcommand("compare", "Compare two results of --out, question by question");
  compare->add_option("A", a, "A result")->required();
  compare->add_option("B", b, "Another, on the same data")->required();
  compare->footer("Example (after tools/quickstart.sh):\n  kava_eval compare runs/quickstart/kava.json runs/quickstart/no_cot.json");
  return kava::command_main(argc, argv, app, [&] { return compare->parsed() ? compare_results(a, b) : evaluate_files(command); });
}
