#include "tools/replicate_plan.h"

#include <fmt/chrono.h>
#include <fmt/core.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <map>
#include <set>
#include <thread>

#include "engine/cli.h"
#include "engine/data/data.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json_at.h"
#include "engine/files/parts.h"
#include "models/weights.h"
#include "tools/say.h"
#include "tools/terminal.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

bool lies_in(const fs::path& path, const fs::path& folder) {
  const std::string below = path.lexically_normal().lexically_relative(folder).string();
  return !below.empty() && !below.starts_with("..");
}

RunConfig config_of(const ReplicaTable& table, const Work& work, const fs::path& out) {
  const TableRow& row = table.rows[work.row];
  return load_config((table.folder / row.config).lexically_normal().string(), settings_of(table, row, out, work.seed));
}

// What works read and do not make: files, and the folders of models and adapters.
struct Needs {
  std::set<std::string> files, folders;
  bool cover(const std::string& file) const {
    return files.contains(file) || std::ranges::any_of(folders, [&](const std::string& folder) { return lies_in(file, folder); });
  }
};

bool holds_text(const DataFile& file) {
  if (file.format) return *file.format != DataFormat::ids;
  try {
    return read_rows(file.path).format != DataFormat::ids;
  } catch (const Error&) {
    return true;
  }
}

// A model's folder, or that of an adapter; `names`: of files in it.
void add_folder(Needs& needs, const std::string& folder, const std::vector<std::string>& names, bool weights) {
  const fs::path normal = fs::path(folder).lexically_normal();
  needs.folders.insert(normal.string());
  for (const std::string& name : names) needs.files.insert((normal / name).string());
  if (weights)
    for (const std::string& file : weight_paths(normal.string())) needs.files.insert(file);
}

// Of the two files that an adapter may lie in, the one that is there.
std::string adapter_file(const fs::path& folder) {
  const bool pickled = !is_there(folder / "adapter_model.safetensors") && is_there(folder / "adapter_model.bin");
  return pickled ? "adapter_model.bin" : "adapter_model.safetensors";
}

void add_training(Needs& needs, const RunConfig& config, const fs::path& out) {
  if (!lies_in(config.model.path, out)) {
    add_folder(needs, config.model.path, {"config.json"}, config.model.init == Init::pretrained);
    const std::string tokenizer = (fs::path(config.model.path).lexically_normal() / "tokenizer.json").string();
    // Whether rows are text is asked only where it matters: large files take seconds to read.
    if (is_there(tokenizer) || std::ranges::any_of(config.data.train, holds_text)) needs.files.insert(tokenizer);
  }
  if (const std::string& adapter = config.model.adapter; !adapter.empty() && !lies_in(adapter, out)) {
    const bool whole = config.train.trainable == Trainable::all;
    if (whole) add_folder(needs, adapter, {"config.json"}, true);
    else add_folder(needs, adapter, {"adapter_config.json", adapter_file(adapter)}, false);
  }
  for (const DataFile& file : config.data.train) needs.files.insert(fs::path(file.path).lexically_normal().string());
  if (!config.data.valid.empty()) needs.files.insert(fs::path(config.data.valid).lexically_normal().string());
}

Needs needs_of(const ReplicaTable& table, const std::vector<Work>& works, const fs::path& out, bool of_done = false) {
  Needs needs;
  for (const Work& work : works) {
    if (!of_done)
      if (const auto state = read_state(out, work); state && state->done) continue;
    if (work.kind == WorkKind::eval) needs.files.insert(table_path(table, table.columns[work.column].data, out, work.seed).string());
    if (work.kind == WorkKind::train) add_training(needs, config_of(table, work, out), out);
  }
  std::erase_if(needs.files, [&](const std::string& file) { return lies_in(file, out); });
  return needs;
}

// Of a column whose form is not given, what its file shows: the scorer gsm_hard applies to its own form alone.
void require_gsm_hard(const ReplicaTable& table, const std::vector<Work>& works, const fs::path& out) {
  std::set<std::string> seen;
  for (const Work& work : works)
    for (std::size_t i = 0; work.kind == WorkKind::eval && i < table.columns.size(); ++i) {
      const TableColumn& c = table.columns[i];
      if (data_column(table, i) != work.column || c.format || c.scorer != Scorer::gsm_hard) continue;
      const std::string file = table_path(table, c.data, out, work.seed).string();
      if (!is_there(file) || !seen.insert(file).second) continue;
      if (const DataFormat format = read_rows(file).format; format != DataFormat::gsm_hard)
        throw Error(Exit::usage, c.scorer_place,
                    fmt::format("scorer gsm_hard of column {} does not apply to {}, of form {}", c.name, shown_path(file), name_of(format)),
                    "give another scorer, or format = \"gsm_hard\"");
    }
}

// The table's digests by file. What only rows that are not asked for need is left out, and what is not made yet.
std::map<std::string, std::string> digests_to_check(const ReplicaTable& table, const Needs& needs, const fs::path& out) {
  std::map<std::string, std::string> digests;
  std::optional<Needs> of_all;
  const auto read_all = [&] {
    of_all.emplace();
    for (const Work& work : works_of(table, {}, out)) try {
        Needs of_one = needs_of(table, {work}, out, true);
        of_all->files.merge(of_one.files), of_all->folders.merge(of_one.folders);
      } catch (const Error&) {  // of a row that nobody asks for
      }
  };
  for (const auto& [name, digest] : table.digests) {
    const std::string file = table_path(table, name, out, 0).string();
    if (lies_in(file, out) && !is_there(file)) continue;
    if (!needs.cover(file)) {
      if (!of_all) read_all();
      if (of_all->cover(file)) continue;
    }
    digests[file] = digest;
  }
  return digests;
}

// What kava_train --plan says of one run.
struct RunPlan {
  std::optional<double> seconds;
  double disk = 0, steps = 0;
  bool fits = true;
};

struct TempFolder {
  TempFolder() : name((fs::temp_directory_path() / "kava_replicate_XXXXXX").string()) {
    if (::mkdtemp(name.data()) == nullptr) fail_write(name, errno);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    std::error_code ignored;
    fs::remove_all(name, ignored);
  }
  std::string name;
};

int wait_for(ChildProcess& process) {
  std::optional<int> code;
  while (!(code = process.ended())) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  return *code;
}

Error child_failed(int code, const std::string& where, const std::string& what) {
  return {static_cast<Exit>(code > 0 ? code : 1), where, what};
}

// Where {out} is for the plans: OUT, or `temp` with the data that OUT has not yet.
fs::path planned_out(const std::vector<Work>& works, const fs::path& out, const fs::path& temp) {
  for (const Work& work : works) {
    if (work.kind != WorkKind::data) continue;
    if (const auto state = read_state(out, work); state && state->done) continue;
    std::vector<std::string> command = work.arguments;
    *(std::ranges::find(command, "--out") + 1) = (temp / "data").string();
    ChildProcess process(command, temp / "data.log", {});
    if (const int code = wait_for(process); code != 0) throw child_failed(code, "data", "kava_data synth: " + process.last_words());
    return temp;
  }
  return out;
}

// Whether a setting, KEY=VALUE, is of the model that a row begins from.
bool names_base(const std::string& set) {
  const std::string_view key = stripped(std::string_view(set).substr(0, set.find('=')));
  return key == "model.path" || key == "model.adapter";
}

RunPlan plan_of(const ReplicaTable& table, const Work& work, const fs::path& out, const fs::path& temp, const RunOptions& options,
                std::optional<double> rate) {
  const std::string file = (temp / (work.id + ".json")).string();
  const TableRow& row = table.rows[work.row];
  std::vector<std::string> command = {"kava_train", work.arguments[1], "--plan", "--json", file, "--device", options.device};
  if (rate) command.insert(command.end(), {"--rate", fmt::format("{}", *rate)});
  for (const std::string& set : settings_of(table, row, out, work.seed))
    if (row.start.empty() || !names_base(set)) command.insert(command.end(), {"--set", set});
  // A start that is not trained yet has the shape of what it starts from itself.
  if (const TableRow* start = table.find(row.start)) {
    const TableRow* first = start;
    while (const TableRow* before = table.find(first->start)) first = before;
    const RunConfig config = load_config((table.folder / first->config).string(), settings_of(table, *first, out, work.seed));
    command.insert(command.end(), {"--set", "model.path=" + Json(config.model.path).dump()});
  }
  ChildProcess process(command, temp / (work.id + ".log"), {});
  if (const int code = wait_for(process); code != 0 && !(code == static_cast<int>(Exit::preflight) && is_there(file)))
    throw child_failed(code, "row " + row.name, "kava_train --plan: " + process.last_words());
  const Json value = read_json(file);
  const JsonAt root(value, file);
  RunPlan plan;
  auto real = [&](const char* key) {
    if (!root.at(key).value().is_number()) root.at(key).refuse("is no number", "");
    return root.at(key).value().get<double>();
  };
  if (root.has("seconds")) plan.seconds = real("seconds");
  plan.disk = real("disk_bytes"), plan.steps = real("steps"), plan.fits = root.at("fits").boolean();
  return plan;
}

std::string local_time(double seconds_from_now) {
  const std::time_t at = std::time(nullptr) + static_cast<std::time_t>(seconds_from_now);
  return fmt::format("{:%Y-%m-%d %H:%M}", fmt::localtime(at));
}

// "63 %, 0:12:00 left" where the run tells.
std::string progress_text(const fs::path& run) {
  try {
    const Json json = read_json((run / "progress.json").string(), 1 << 20);
    std::string out = fmt::format("{:.0f} %", json.at("percent").get<double>());
    if (json.contains("eta_s") && json["eta_s"].is_number()) out += fmt::format(", {} left", duration_text(json["eta_s"].get<double>()));
    return out;
  } catch (const std::exception&) {
    return "begun";
  }
}

bool is_running(const Work& work) { return PathLock(work.log, PathLock::Kind::exclusive, false).error() == EWOULDBLOCK; }

}  // namespace

void require_files(const ReplicaTable& table, const std::vector<Work>& works, const fs::path& out) {
  Needs needs = needs_of(table, works, out);
  const std::map<std::string, std::string> digests = digests_to_check(table, needs, out);
  for (const auto& [file, digest] : digests) needs.files.insert(file);
  std::vector<std::string> missing;
  for (const std::string& file : needs.files)
    if (std::error_code failed; !fs::is_regular_file(file, failed)) missing.push_back(shown_path(file));
  if (!missing.empty())
    throw Error(Exit::data, shown_path(table.file), fmt::format("needs what is not there: {}", fmt::join(missing, ", ")),
                "put it there, or change the table");
  require_gsm_hard(table, works, out);
  for (const auto& [file, digest] : digests)
    if (sha256_file(file) != digest)
      throw Error(Exit::data, shown_path(file), "has another SHA-256 than the table says, " + escaped(digest),
                  "take the file from its origin again");
}

Json digests_of_inputs(const ReplicaTable& table, const Work& work, const fs::path& out) {
  std::vector<std::string> files;
  if (work.kind == WorkKind::eval) files.push_back(table_path(table, table.columns[work.column].data, out, work.seed).string());
  if (work.kind == WorkKind::train) {
    const RunConfig config = config_of(table, work, out);
    for (const DataFile& file : config.data.train) files.push_back(file.path);
    if (!config.data.valid.empty()) files.push_back(config.data.valid);
  }
  Json inputs = Json::object();
  for (const std::string& file : files) {
    const fs::path path = (table.folder / file).lexically_normal();
    if (!lies_in(path, out) && is_there(path)) inputs[path.lexically_relative(table.folder).string()] = sha256_file(path.string());
  }
  return inputs;
}

void require_same_contents(const ReplicaTable& table, const fs::path& out) {
  std::map<std::string, std::string> now;
  for (const Work& work : works_of(table, {}, out)) {
    const auto state = read_state(out, work);
    if (!state || !state->done) continue;
    for (const auto& [name, digest] : state->inputs.get_ref<const Json::object_t&>()) {
      const std::string file = (table.folder / name).lexically_normal().string();
      if (!is_there(file)) continue;
      const auto [found, fresh] = now.try_emplace(file);
      if (fresh) found->second = sha256_file(file);
      if (found->second != digest.get_ref<const std::string&>())
        throw Error(Exit::data, shown_path(file), fmt::format("holds something else than when {} was done", work.id),
                    "put back what it held, or choose another --out");
    }
  }
}

void print_counts(const std::vector<Work>& works, const fs::path& out) {
  std::size_t trainings = 0, evaluations = 0;
  for (const Work& work : works) {
    const auto state = read_state(out, work);
    if (state && state->done) continue;
    trainings += work.kind == WorkKind::train, evaluations += work.kind == WorkKind::eval;
  }
  say(fmt::format("runs        {} trainings, {} evaluations", trainings, evaluations));
}

int print_plan(const ReplicaTable& table, const std::vector<Work>& works, const fs::path& out, const RunOptions& options,
               std::optional<double> rate) {
  double seconds = 0, disk = 0;
  bool known = true;
  const TempFolder temp;
  const fs::path planned = planned_out(works, out, temp.name);
  say(fmt::format("{:<34}{:>6}{:>10}{:>12}{:>12}{:>7}", "row", "runs", "steps", "hours each", "GB each", "fits"));
  std::map<std::size_t, std::vector<const Work*>> open;  // trainings by row
  for (const Work& work : works)
    if (work.kind == WorkKind::train)
      if (const auto state = read_state(out, work); !state || !state->done) open[work.row].push_back(&work);
  for (const auto& [row, trainings] : open) {
    const RunPlan plan = plan_of(table, *trainings[0], planned, temp.name, options, rate);
    const auto runs = static_cast<double>(trainings.size());
    disk += plan.disk * runs, seconds += plan.seconds.value_or(0) * runs;
    known = known && plan.seconds.has_value();
    say(fmt::format("{:<34}{:>6}{:>10.0f}{:>12}{:>12.2f}{:>7}", table.rows[row].name, trainings.size(), plan.steps,
                    plan.seconds ? fmt::format("{:.2f}", *plan.seconds / 3600) : "-", plan.disk * 1e-9, plan.fits ? "yes" : "no"));
  }
  say(known ? fmt::format("hours       {:.2f} planned, {:.2f} with {} at a time; evaluation is not in it", seconds / 3600,
                          seconds / 3600 / options.jobs, options.jobs)
            : std::string("hours       not known: no rate measured here; give --rate TFLOPS"));
  say(fmt::format("disk        {:.2f} GB", disk * 1e-9));
  if (known) say("end         " + local_time(seconds / options.jobs) + ", begun now");
  require_printed();
  return 0;
}

int print_commands(const std::vector<Work>& works, const fs::path& out, const RunOptions& options) {
  for (const Work& work : works) {
    const auto state = read_state(out, work);
    if (state && state->done) continue;
    std::string line;
    for (const std::string& word : command_of(work, options)) line += (line.empty() ? "" : " ") + shell_word(word);
    fmt::print("{}\n", line);
  }
  require_printed();
  return 0;
}

int print_status(const ReplicaTable& table, const std::vector<Work>& works, const fs::path& out) {
  std::size_t done = 0, failed = 0, running = 0;
  for (const Work& work : works) {
    const auto state = read_state(out, work);
    if (state && state->done) ++done;
    else if (is_running(work))
      ++running, fmt::print("running  {}: {}\n", work.id, work.kind == WorkKind::train ? progress_text(work.run) : "begun");
    else if (state && !state->stopped())
      ++failed, fmt::print("failed   {} ({}), {} times: {}; log: {}\n", work.id, state->code, state->attempts, state->reason,
                           shown_path(work.log));
  }
  fmt::print("{}: {} of {} works done, {} running, {} failed, {} open\n", table.title, done, works.size(), running, failed,
             works.size() - done - running - failed);
  require_printed();
  return 0;
}

}  // namespace kava
