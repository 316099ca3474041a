#include "tools/replicate_work.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <set>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json_at.h"
#include "engine/files/unreadable.h"
#include "models/recipe.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr int kFormat = 1;

bool is_asked_for(const TableRow& row, const Selection& selection) {
  if (selection.only.empty()) return true;
  return std::ranges::any_of(
      selection.only, [&](const std::string& word) { return word == row.name || std::ranges::find(row.groups, word) != row.groups.end(); });
}

void require_known_words(const ReplicaTable& table, const Selection& selection) {
  for (const std::string& word : selection.only)
    if (std::ranges::none_of(table.rows, [&](const TableRow& row) { return is_asked_for(row, {{word}, {}}); }))
      throw Error(Exit::usage, "--only", "\"" + escaped(word) + "\" is no row and no group of the table",
                  "give names or groups of rows, separated by commas");
}

// The rows asked for and those that they start from.
std::vector<bool> needed_rows(const ReplicaTable& table, const Selection& selection) {
  require_known_words(table, selection);
  std::vector<bool> needed(table.rows.size());
  for (std::size_t i = table.rows.size(); i-- > 0;) {
    needed[i] = needed[i] || is_asked_for(table.rows[i], selection);
    if (!needed[i] || table.rows[i].start.empty()) continue;
    needed[static_cast<std::size_t>(table.find(table.rows[i].start) - table.rows.data())] = true;  // starts stand above
  }
  return needed;
}

std::string synth_fingerprint(const SynthOptions& s) { return sha256(fmt::format("synth {} {} {}", s.rows, s.steps, s.seed)); }

// A path by the folder that it lies in: OUT, or the table's with its surroundings, so that both can be moved.
std::string place_of(const ReplicaTable& table, const fs::path& out, const std::string& path) {
  if (path.empty()) return "";
  const fs::path whole = (table.folder / path).lexically_normal();
  const std::string below = whole.lexically_relative(out).string();
  return below.starts_with("..") ? whole.lexically_relative(table.folder).string() : "{out}/" + below;
}

// Why the adapter that one configuration trains cannot be read by another: it must hold exactly the tensors that this one trains. Empty
// where it can.
std::string adapter_difference(const RunConfig& from, const RunConfig& to) {
  const auto as_set = [](const std::vector<std::string>& names) { return std::set(names.begin(), names.end()); };
  const bool markers = recipe_of(from).markers;
  if (to.train.trainable == Trainable::all) return "this one trains all weights";
  if (from.lora.rank != to.lora.rank) return "lora.rank differs";
  if (from.lora.alpha != to.lora.alpha) return "lora.alpha differs";
  if (as_set(from.lora.targets) != as_set(to.lora.targets)) return "lora.targets differ";
  if (markers != recipe_of(to).markers)
    return fmt::format("{} has new tokens, {} has none", name_of((markers ? from : to).method), name_of((markers ? to : from).method));
  if (markers && from.latent.projection != to.latent.projection) return "latent.projection differs";
  if (markers && from.kv.projection != to.kv.projection) return "kv.projection differs";
  return "";
}

// Of all that a run's result depends on: what may change when kava_train goes on with a run too, but not what its files hold.
std::string training_fingerprint(const ReplicaTable& table, const RunConfig& config, const fs::path& out) {
  std::string text = config_hash(config);
  for (const std::string& line : config_differences(method_defaults(config.method), config, OnResume::extend)) text += "\n" + line;
  text += fmt::format("\n{} {}", config.train.valid_every, config.valid.floor);
  for (const std::string& path : {config.model.path, config.model.adapter, config.data.valid}) text += "\n" + place_of(table, out, path);
  for (const DataFile& file : config.data.train)
    text += fmt::format("\n{} {}", file.format ? name_of(*file.format) : "", place_of(table, out, file.path));
  return sha256(text);
}

class Planner {
 public:
  Planner(const ReplicaTable& table, const Selection& selection, fs::path out)
      : table_(table), selection_(selection), out_(std::move(out)) {}

  std::vector<Work> works() {
    const std::vector<bool> needed = needed_rows(table_, selection_);
    if (table_.synth) add_data(*table_.synth);
    for (int64_t seed : selection_.seeds.empty() ? table_.seeds : selection_.seeds)
      for (std::size_t row = 0; row < table_.rows.size(); ++row)
        if (needed[row]) add_row(row, seed, is_asked_for(table_.rows[row], selection_));
    return std::move(works_);
  }

 private:
  void add(Work work) {
    index_[work.id] = works_.size();
    works_.push_back(std::move(work));
  }

  void add_data(const SynthOptions& s) {
    Work work;
    work.id = "data", work.fingerprint = synth_fingerprint(s);
    work.log = out_ / "runs" / "data.log";
    work.arguments = {"kava_data", "synth",
                      "--out",     (out_ / "data").string(),
                      "--rows",    fmt::format("{}", s.rows),
                      "--steps",   fmt::format("{}", s.steps),
                      "--seed",    fmt::format("{}", s.seed)};
    add(std::move(work));
  }

  void add_row(std::size_t index, int64_t seed, bool evaluated) {
    const TableRow& row = table_.rows[index];
    const std::string config = (table_.folder / row.config).lexically_normal().string();
    const std::vector<std::string> sets = settings_of(table_, row, out_, seed);
    const RunConfig loaded = load_row(row, config, sets);
    require_for_training(loaded, config);
    require_start(row, loaded, seed);
    if (row.shown) require_scorers(row, loaded.method);
    Work work;
    work.kind = WorkKind::train, work.id = train_id(row, seed), work.row = index, work.seed = seed;
    work.run = out_ / "runs" / row.name / fmt::format("{}", seed);
    work.log = work.run / "log" / "train.log";
    work.fingerprint = training_fingerprint(table_, loaded, out_);
    if (table_.synth) work.needs.push_back(index_.at("data"));
    if (!row.start.empty()) {
      work.needs.push_back(index_.at(train_id(*table_.find(row.start), seed)));
      work.fingerprint = sha256(work.fingerprint + works_[work.needs.back()].fingerprint);
    }
    if (table_.synth) work.fingerprint = sha256(work.fingerprint + synth_fingerprint(*table_.synth));
    work.arguments = {"kava_train", config, "--out", work.run.string()};
    for (const std::string& set : sets) work.arguments.insert(work.arguments.end(), {"--set", set});
    const Work train = work;
    add(std::move(work));
    if (!row.shown || !evaluated) return;
    for (std::size_t column = 0; column < table_.columns.size(); ++column)
      if (data_column(table_, column) == column) add_evaluation(train, row, column);
  }

  RunConfig load_row(const TableRow& row, const std::string& config, const std::vector<std::string>& sets) const {
    try {
      return load_config(config, sets);
    } catch (const Error& e) {
      if (!e.where().starts_with("--set ")) throw;
      throw Error(e.code(), row.sets_place, fmt::format("row {}: {}", row.name, e.what()));
    }
  }

  // Its trained adapter, where it is no model of its own, and nothing else is set in its place.
  void require_start(const TableRow& row, const RunConfig& config, int64_t seed) const {
    const TableRow* start = table_.find(row.start);
    if (!start || config.model.adapter != adapter_of(*start, out_, seed)) return;
    const RunConfig from =
        load_config((table_.folder / start->config).lexically_normal().string(), settings_of(table_, *start, out_, seed));
    if (const std::string why = adapter_difference(from, config); !why.empty())
      throw Error(Exit::usage, row.start_place,
                  fmt::format("row {} cannot start from the LoRA adapter of {}: {}", row.name, row.start, why),
                  fmt::format("set train.trainable=all in row {}, or leave out start", row.start));
  }

  void require_scorers(const TableRow& row, Method method) const {
    for (const TableColumn& c : table_.columns) {
      // A form that is not given may still be any.
      const DataFormat format = c.format.value_or(c.scorer == Scorer::gsm_hard ? DataFormat::gsm_hard : DataFormat::icot_text);
      const std::vector<Scorer> scorers = scorers_for(method, format, true);
      const Scorer scorer = scorer_of(row, c);
      if (std::ranges::find(scorers, scorer) != scorers.end()) continue;
      std::vector<std::string> names;
      for (Scorer s : scorers) names.push_back(name_of(s));
      throw Error(Exit::usage, scorer == c.scorer ? c.scorer_place : row.scorer_place,
                  fmt::format("scorer {} of column {} does not apply to row {}, of method {}{}", name_of(scorer), c.name, row.name,
                              name_of(method), c.format ? ", and data of form " + name_of(format) : ""),
                  fmt::format("give one of {}", fmt::join(names, ", ")));
    }
  }

  void add_evaluation(const Work& train, const TableRow& row, std::size_t column) {
    const TableColumn& c = table_.columns[column];
    Work work;
    work.kind = WorkKind::eval, work.id = eval_id(table_, row, train.seed, column);
    work.row = train.row, work.column = column, work.seed = train.seed, work.run = train.run;
    work.needs = {index_.at(train.id)};
    work.log = work.run / "log" / ("eval_" + c.name + ".log"), work.result = work.run / "log" / ("eval_" + c.name + ".json");
    const std::string form = c.format ? name_of(*c.format) : "";
    work.fingerprint = sha256(fmt::format("{} {} {} {}", train.fingerprint, c.data, form, c.limit));
    work.arguments = {"kava_eval", work.run.string(),    "--data", table_path(table_, c.data, out_, train.seed).string(),
                      "--out",     work.result.string(), "--force"};
    if (c.format) work.arguments.insert(work.arguments.end(), {"--format", form});
    if (c.limit > 0) work.arguments.insert(work.arguments.end(), {"--limit", fmt::format("{}", c.limit)});
    add(std::move(work));
  }

  const ReplicaTable& table_;
  const Selection& selection_;
  const fs::path out_;
  std::vector<Work> works_;
  std::map<std::string, std::size_t> index_;
};

std::optional<WorkState> state_at(const fs::path& out, const std::string& id) {
  const fs::path path = state_path(out, id);
  if (!is_there(path)) return std::nullopt;
  const std::string file = path.string();
  try {
    const Json json = read_json(file);
    const JsonAt root(json, file);
    if (root.at("format").whole(1 << 20) != kFormat) root.refuse("is of another format");
    WorkState state;
    const std::string& status = root.at("status").string();
    if (status != "done" && status != "failed" && status != "stopped") root.at("status").refuse("is neither done nor failed nor stopped");
    state.done = status == "done", state.attempts = root.at("attempts").whole(1 << 20);
    state.code = root.at("code").whole(255), state.reason = root.at("reason").string();
    state.fingerprint = root.at("fingerprint").string();
    if (!root.at("seconds").value().is_number()) root.at("seconds").refuse("is no number");
    state.seconds = json["seconds"].get<double>(), state.result = root.at("result").value();
    if (root.has("inputs")) {
      for (const auto& input : root.at("inputs").object()) (void)root.at("inputs").at(input.first.c_str()).string();
      state.inputs = root.at("inputs").value();
    }
    if (state.done && id.find(".eval_") != std::string::npos) {
      const JsonAt result = root.at("result");
      for (const auto& [scorer, verdicts] : result.at("verdicts").object()) (void)result.at("verdicts").at(scorer.c_str()).string();
      (void)result.at("accuracy").object(), (void)result.at("questions_sha256").string();
      for (const char* key : {"passes", "ms", "questions"})
        if (const Json& value = result.at(key).value(); !value.is_number() && !(value.is_null() && std::string_view(key) == "ms"))
          result.at(key).refuse("is no number");
    }
    return state;
  } catch (const Unreadable&) {
    throw;
  } catch (const Error&) {
    throw Error(Exit::data, shown_path(path), "is no whole state of a work", "remove it, and this work is done again");
  }
}

}  // namespace

std::size_t data_column(const ReplicaTable& table, std::size_t column) {
  const TableColumn& c = table.columns[column];
  for (std::size_t i = 0; i < column; ++i)
    if (table.columns[i].data == c.data && table.columns[i].format == c.format && table.columns[i].limit == c.limit) return i;
  return column;
}

std::string train_id(const TableRow& row, int64_t seed) { return fmt::format("{}.{}.train", row.name, seed); }

std::string eval_id(const ReplicaTable& table, const TableRow& row, int64_t seed, std::size_t column) {
  return fmt::format("{}.{}.eval_{}", row.name, seed, table.columns[data_column(table, column)].name);
}

std::vector<Work> works_of(const ReplicaTable& table, const Selection& selection, const fs::path& out) {
  return Planner(table, selection, out).works();
}

fs::path state_path(const fs::path& out, const std::string& id) { return out / "state" / (id + ".json"); }

std::optional<WorkState> read_state(const fs::path& out, const Work& work) {
  auto state = state_at(out, work.id);
  if (state && state->fingerprint != work.fingerprint) {
    if (state->done)
      throw Error(Exit::usage, shown_path(state_path(out, work.id)), "is the result of another configuration than the table's",
                  work.kind == WorkKind::train ? "choose another --out, or remove it and the run" : "choose another --out, or remove it");
    return std::nullopt;
  }
  return state;
}

void write_state(const fs::path& out, const Work& work, const WorkState& state) {
  Json json = {{"format", kFormat},
               {"work", work.id},
               {"status", state.done        ? "done"
                          : state.stopped() ? "stopped"
                                            : "failed"},
               {"attempts", state.attempts},
               {"code", state.code},
               {"reason", state.reason},
               {"log", work.log.lexically_relative(out).string()},
               {"seconds", state.seconds},
               {"fingerprint", state.fingerprint},
               {"result", state.result},
               {"inputs", state.inputs}};
  write_file(state_path(out, work.id).string(), json.dump(1) + "\n");
}

Json evaluation_summary(const std::string& path) {
  const Json json = read_json(path);
  const JsonAt root(json, path), results = root.at("results");
  if (results.array().size() != 1) results.refuse("is not of one data file");
  const JsonAt result = results.at(std::size_t{0}), records = result.at("records");
  Json verdicts = Json::object();
  for (const auto& [scorer, value] : result.at("accuracy").object()) {
    std::string line;
    for (std::size_t i = 0; i < records.array().size(); ++i) line += records.at(i).at("correct").at(scorer.c_str()).boolean() ? '1' : '0';
    verdicts[scorer] = line;
  }
  Json questions = Json::array();
  for (std::size_t i = 0; i < records.array().size(); ++i) questions.push_back(records.at(i).at("question").string());
  return {{"prompt", result.at("prompt").string()}, {"data", result.at("sha256").string()},
          {"questions", records.array().size()},    {"questions_sha256", sha256(questions.dump())},
          {"weights", root.at("weights").string()}, {"accuracy", result.at("accuracy").value()},
          {"passes", result.at("passes").value()},  {"ms", result.at("ms_per_question").value()},
          {"verdicts", std::move(verdicts)}};
}

}  // namespace kava
