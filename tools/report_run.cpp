// What a report shows of a run: its metrics, its evaluations, and a probe of its model.
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <sstream>

#include "engine/config/config.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json_at.h"
#include "engine/files/safetensors.h"
#include "tools/report_page.h"
#include "tools/report_plot.h"

namespace kava::report {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kMostMetrics = std::size_t{1} << 30, kMostShown = 40, kMostProbed = 8;
// Of one figure: cells of maps, 7 bytes each where no neighbours are alike; two such figures leave room on a page of 3 MB.
constexpr int64_t kMostCells = 150'000;
constexpr int32_t kMostTokens = 2'000;  // of a trace

// metrics.jsonl: of a step that a resumed run did again, the later line.
struct Metrics {
  std::map<int64_t, Json> steps, validations;
};

Metrics read_metrics(const fs::path& path) {
  Metrics out;
  if (!is_there(path)) return out;
  std::istringstream lines(read_file(path.string(), kMostMetrics));
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    Json json = Json::parse(line, nullptr, false);
    if (json.is_discarded() && lines.eof()) break;  // a run is writing it
    const bool valid = json.is_object() && json.contains("valid");
    const Json& object = valid ? json["valid"] : json;
    if (!object.is_object() || !object.contains("step") || !object["step"].is_number_integer())
      throw Error(Exit::data, fmt::format("{}:{}", shown_path(path), number), "is no object with a step", "remove the line");
    (valid ? out.validations : out.steps)[object["step"].get<int64_t>()] = object;
  }
  return out;
}

// Of the keys that lines have. One that is always 0 stands for what a run has not, but with `zeros`.
std::vector<Series> series_of(const std::map<int64_t, Json>& lines, std::initializer_list<const char*> keys, double scale = 1,
                              bool zeros = false) {
  std::vector<Series> out;
  for (const char* key : keys) {
    Series s{key, {}};
    for (const auto& [step, line] : lines)
      if (line.contains(key) && line[key].is_number()) s.points.emplace_back(static_cast<double>(step), scale * line[key].get<double>());
    if (std::ranges::any_of(s.points, [&](const auto& p) { return zeros || p.second != 0; })) out.push_back(std::move(s));
  }
  return out;
}

std::string metric_figures(const Metrics& m, const std::string& prefix) {
  std::string out = line_plot(prefix + "loss", "Loss (weighted) and its terms (unweighted)", "loss",
                              series_of(m.steps, {"loss", "student_ce", "teacher_ce", "kv", "codi"}), true);
  out += line_plot(prefix + "validation", "Validation: exact match and upstream's criterion", "%",
                   series_of(m.validations, {"strict", "forced"}, 100, true), false);
  out += line_plot(prefix + "validation_loss", "Validation loss", "loss", series_of(m.validations, {"loss", "student_ce", "teacher_ce"}),
                   true);
  out += line_plot(prefix + "rate", "Learning rate", "rate", series_of(m.steps, {"lr"}), false);
  out += line_plot(prefix + "gradient", "Gradient norm before clipping", "norm",
                   series_of(m.steps, {"grad_norm", "grad_student_ce", "grad_teacher_ce", "grad_kv", "grad_codi"}), true);
  out += line_plot(prefix + "throughput", "Throughput", "per second", series_of(m.steps, {"samples_per_s", "tokens_per_s"}), true);
  out += line_plot(prefix + "use", "Share of the measured matrix rate", "%", series_of(m.steps, {"mfu"}, 100), false);
  out += line_plot(prefix + "memory", "Memory", "GB", series_of(m.steps, {"memory_bytes"}, 1e-9), false);
  out +=
      line_plot(prefix + "latents_norm", "Length of latents against embeddings", "ratio", series_of(m.steps, {"latent_norm_ratio"}), false);
  return out + line_plot(prefix + "stage", "Stage", "stage", series_of(m.steps, {"stage"}), false);
}

// Wilson's 95 % interval of k of n.
std::pair<double, double> wilson(double share, double n) {
  constexpr double z = 1.959963984540054;
  const double centre = (share + z * z / (2 * n)) / (1 + z * z / n);
  const double half = z / (1 + z * z / n) * std::sqrt(share * (1 - share) / n + z * z / (4 * n * n));
  return {std::max(0.0, centre - half), std::min(1.0, centre + half)};
}

std::string text_at(const Json& object, const char* key) {
  return object.contains(key) && object[key].is_string() ? object[key].get<std::string>() : "";
}

// A share of right answers with its interval, in percent. Nothing where there is no number.
void add_share(std::vector<Bar>& bars, const std::string& name, const Json& share, const Json& interval) {
  if (!share.is_number()) return;
  Bar bar{name, 100 * share.get<double>(), 0, 0, true, {}};
  const bool both = interval.is_array() && interval.size() == 2 && interval[0].is_number() && interval[1].is_number();
  bar.low = both ? 100 * interval[0].get<double>() : bar.value, bar.high = both ? 100 * interval[1].get<double>() : bar.value;
  bars.push_back(std::move(bar));
}

// Controls and sweeps of a result, beside what the run itself got.
std::string extras(const Json& result, const std::string& prefix, const std::string& title) {
  const auto of = [](const Json& object, const char* key) { return object.is_object() ? object.value(key, Json()) : Json(); };
  std::vector<Bar> controls, sweep;
  if (const Json values = of(result, "controls"); values.is_object()) {
    add_share(controls, "its own latents", of(of(result, "accuracy"), "strict"), of(of(result, "bootstrap"), "strict"));
    for (const auto& [name, value] : values.items()) add_share(controls, name, of(value, "accuracy"), of(value, "bootstrap"));
  }
  for (const char* over : {"latents", "passes"})
    if (const Json points = of(of(result, "sweep"), over); points.is_array())
      for (const Json& point : points)
        add_share(sweep, fmt::format("{} latents, {} iterations", of(point, "latents").dump(), of(point, "iterations").dump()),
                  of(point, "accuracy"), of(point, "bootstrap"));
  return bar_plot(prefix + "controls", title + ": latents replaced, accuracy in %", controls, false) +
         bar_plot(prefix + "sweep", title + ": other numbers of latents and iterations, accuracy in %", sweep, false);
}

std::string questions_of(const Json& records) {
  std::vector<std::vector<std::string>> rows = {{"", "question", "gold", "answer", "passes"}};
  for (bool wanted : {false, true}) {
    std::size_t shown = 0;
    for (const Json& r : records) {
      if (!r.is_object() || !r.contains("correct") || !r["correct"].is_object()) continue;
      const bool right = r["correct"].value("strict", Json()) == true;
      if (right != wanted || ++shown > kMostShown / 2) continue;
      rows.push_back({right ? "right" : "wrong", text_at(r, "question"), text_at(r, "gold"), text_at(r, "output"),
                      r.contains("passes") ? r["passes"].dump() : ""});
    }
  }
  return text_table(rows);
}

std::string evaluations(const fs::path& folder, const std::string& prefix) {
  std::vector<fs::path> files;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(folder / "eval", none))
    if (entry.path().extension() == ".json") files.push_back(entry.path());
  std::ranges::sort(files);
  std::string out;
  std::vector<Bar> bars;
  int number = 0;
  for (const fs::path& path : files) {
    const std::string file = path.string();
    const Json json = read_json(file);
    const JsonAt root(json, file), results = root.at("results");
    for (std::size_t i = 0; i < results.array().size(); ++i) {
      const JsonAt result = results.at(i);
      const std::string name = path.stem().string();
      const double n = static_cast<double>(result.at("records").array().size());
      for (const auto& [scorer, share] : result.at("accuracy").object()) {
        if (!share.is_number() || n == 0) continue;
        const auto [low, high] = wilson(share.get<double>(), n);
        bars.push_back({name.substr(0, 26) + ", " + scorer, 100 * share.get<double>(), 100 * low, 100 * high, true, {}});
      }
      const std::string own = fmt::format("{}{}", prefix, number == 0 ? "" : fmt::format("e{}_", number));
      out += extras(result.value(), own, name);
      out += figure(own + "questions", fmt::format("{}: {} questions, {} passes a question", name, n, result.at("passes").value().dump()),
                    questions_of(result.at("records").value()), "The first wrong and the first right ones, by the strict scorer.");
      ++number;
    }
  }
  return bar_plot(prefix + "results", "Accuracy in %, with 95 % intervals (Wilson)", bars, false) + out;
}

}  // namespace

std::string run_name(const std::string& folder) {
  const fs::path path = fs::absolute(folder / fs::path(".")).lexically_normal().parent_path();
  return (path.parent_path().filename() / path.filename()).string();
}

std::string run_section(const std::string& folder, const std::string& prefix) {
  const RunConfig config = load_run_config(folder);
  const Metrics metrics = read_metrics(fs::path(folder) / "metrics.jsonl");
  const int64_t last = metrics.steps.empty() ? 0 : metrics.steps.rbegin()->first;
  std::string out = "<h2>" + html("Run " + run_name(folder)) + "</h2>\n";
  out += text_table({{"method", "model", "trainable", "seed", "steps logged", "configuration"},
                     {name_of(config.method), fs::path(config.model.path).filename().string(), name_of(config.train.trainable),
                      std::to_string(config.seed), std::to_string(last), config_hash(config).substr(0, 12)}});
  if (metrics.steps.empty()) out += "<p>metrics.jsonl holds no step yet.</p>\n";
  return out + metric_figures(metrics, prefix) + evaluations(folder, prefix);
}

std::string runs_section(const std::vector<std::pair<std::string, std::string>>& runs) {
  std::vector<std::vector<std::string>> rows = {{"run", "differs from the first in"}};
  std::vector<Series> loss, answers, validation, validation_loss;
  const RunConfig first = load_run_config(runs[0].second);
  for (const auto& [number, folder] : runs) {
    const Metrics metrics = read_metrics(fs::path(folder) / "metrics.jsonl");
    const std::string name = number + " " + run_name(folder);
    // Of a run without it too, so that a run has one colour in all figures.
    auto add = [&](std::vector<Series>& to, std::vector<Series> found) {
      to.push_back({name, found.empty() ? decltype(Series::points)() : std::move(found[0].points)});
    };
    add(loss, series_of(metrics.steps, {"loss"})), add(answers, series_of(metrics.steps, {"student_ce"}));
    add(validation, series_of(metrics.validations, {"strict"}, 100, true)), add(validation_loss, series_of(metrics.validations, {"loss"}));
    const RunConfig config = load_run_config(folder);
    std::string differences;
    for (OnResume kind : {OnResume::fixed, OnResume::content, OnResume::extend})
      for (const std::string& line : config_differences(first, config, kind)) differences += (differences.empty() ? "" : "\n") + line;
    rows.push_back({name, differences});
  }
  return "<h2>Runs side by side</h2>\n" + text_table(rows) + line_plot("loss", "Loss (weighted)", "loss", std::move(loss), true) +
         line_plot("student_ce", "Cross-entropy of the student's answers", "loss", std::move(answers), true) +
         line_plot("validation", "Validation: exact match", "%", std::move(validation), false) +
         line_plot("validation_loss", "Validation loss", "loss", std::move(validation_loss), true);
}

namespace {

// A probe's file, with its tensors read.
class ProbeFile {
 public:
  explicit ProbeFile(const std::string& path) : file_(SafetensorsFile::open(path)), path_(path) {
    const auto found = file_.metadata().find("kava.probe");
    if (found == file_.metadata().end()) throw Error(Exit::data, shown_path(path), "is no probe", "make one with kava_inspect probe");
    about_ = parse_json(found->second, path);
  }
  const Json& about() const { return about_; }
  const std::string& path() const { return path_; }
  bool has(const char* name) const { return file_.find(name) != nullptr; }

  /// The tensor, of this many dimensions.
  const TensorInfo& info(const char* name, std::size_t dimensions) const {
    const TensorInfo* t = file_.find(name);
    if (!t || t->shape.size() != dimensions || (dimensions > 1 && t->count() == 0))
      throw Error(Exit::data, shown_path(path_), fmt::format("holds no {} of {} dimensions", name, dimensions), "make it again");
    return *t;
  }
  std::vector<int32_t> whole(const char* name, std::size_t dimensions) const {
    const TensorInfo& t = info(name, dimensions);
    if (t.dtype != "I32") throw Error(Exit::data, shown_path(path_), std::string(name) + " is not of I32", "make it again");
    std::vector<int32_t> out(static_cast<std::size_t>(t.count()));
    file_.read(t, out.data());
    return out;
  }
  std::vector<float> real(const char* name, std::size_t dimensions) const {
    const TensorInfo& t = info(name, dimensions);
    std::vector<float> out(static_cast<std::size_t>(t.count()));
    file_.read_as(t, DType::f32, out.data(), true);
    return out;
  }
  std::string token(int32_t id) const {
    const auto text = about_["tokens"].find(std::to_string(id));
    return text != about_["tokens"].end() && text->is_string() ? text->get<std::string>() : std::to_string(id);
  }

 private:
  SafetensorsFile file_;
  std::string path_;
  Json about_;
};

// Probes of earlier versions do not say whose they are.
void require_run_of(const ProbeFile& probe, const std::vector<std::pair<std::string, std::string>>& runs) {
  const auto of = probe.about().find("config_hash");
  if (of == probe.about().end() || runs.empty()) return;
  for (const auto& [number, folder] : runs)
    if (*of == Json(config_hash(load_run_config(folder)))) return;
  throw Error(Exit::usage, "--probe " + shown_path(probe.path()),
              runs.size() == 1 ? "is of another run than " + shown_path(runs[0].second) : "is of none of these runs",
              "name the probe of " + std::string(runs.size() == 1 ? "this run" : "one of them") + ", or make it with kava_inspect probe");
}

std::string latents_in_words(const ProbeFile& probe, const std::string& prefix) {
  const TensorInfo& t = probe.info("latent.top", 3);
  const auto passes = static_cast<std::size_t>(t.shape[0]), B = static_cast<std::size_t>(t.shape[1]),
             M = static_cast<std::size_t>(t.shape[2]);
  const std::vector<int32_t> top = probe.whole("latent.top", 3), nearest = probe.whole("latent.nearest", 3);
  if (nearest.size() != top.size())
    throw Error(Exit::data, shown_path(probe.path()), "latent.top and latent.nearest differ in shape", "make it again");
  const JsonAt about(probe.about(), probe.path()), questions = about.at("questions"), names = about.at("passes");
  if (questions.array().size() != B || names.array().size() != passes)
    questions.refuse("is of another number than the tensors", "make it again");
  std::string content;
  for (std::size_t b = 0; b < std::min(B, kMostProbed); ++b) {
    const JsonAt q = questions.at(b);
    content += "<p>" + html(q.at("question").string()) + " <b>" + html(q.at("gold").string()) + "</b>, answered " +
               html(q.at("output").string()) + "</p>";
    std::vector<std::vector<std::string>> rows = {{"latent"}};
    for (std::size_t p = 0; p < passes; ++p) rows[0].push_back("pass " + names.value()[p].dump() + ": value | head");
    for (std::size_t m = 0; m < M; ++m) {
      rows.push_back({std::to_string(m)});
      for (std::size_t p = 0; p < passes; ++p) {
        const std::size_t at = (p * B + b) * M + m;
        rows.back().push_back(probe.token(nearest[at]) + " | " + probe.token(top[at]));
      }
    }
    content += text_table(rows);
  }
  return figure(prefix + "latents", "Latents in words, pass by pass", content,
                "The token whose first-layer value row is nearest to the latent's, and the head's top token on its hidden state.");
}

bool is_each_head_drawn(const TensorInfo& t) { return t.shape[0] * t.shape[2] * (t.shape[1] * (t.shape[3] + 1) - 1) <= kMostCells; }

// [L, H, rows, columns] as a map for each layer, its heads side by side with a column between; or their means, where the cells are too
// many.
std::vector<HeatMap> maps_of(const std::vector<float>& values, const TensorInfo& t) {
  const int64_t L = t.shape[0], H = t.shape[1], R = t.shape[2], C = t.shape[3], drawn = is_each_head_drawn(t) ? H : 1;
  const int64_t columns = drawn * (C + 1) - 1;
  std::vector<HeatMap> maps;
  for (int64_t l = 0; l < L && (l + 1) * R * columns <= kMostCells; ++l) {
    HeatMap map{fmt::format("layer {}", l), static_cast<int>(R), static_cast<int>(columns), {}, static_cast<int>(5 * columns), 0};
    map.values.assign(static_cast<std::size_t>(R * columns), 0);
    for (int64_t h = 0; h < H; ++h)
      for (int64_t r = 0; r < R; ++r)
        for (int64_t c = 0; c < C; ++c)
          map.values[static_cast<std::size_t>(r * columns + (drawn == H ? h * (C + 1) : 0) + c)] +=
              values[static_cast<std::size_t>(((l * H + h) * R + r) * C + c)] / static_cast<float>(H / drawn);
    maps.push_back(std::move(map));
  }
  return maps;
}

// Of some questions: which tokens of the trace each head kept.
std::string kept_tokens(const ProbeFile& probe, const std::string& prefix) {
  const TensorInfo& t = probe.info("rkv.kept", 4);
  const std::vector<int32_t> kept = probe.whole("rkv.kept", 4), ids = probe.whole("trace.ids", 1),
                             offsets = probe.whole("trace.offsets", 1);
  const int64_t rows = t.shape[1] * t.shape[2], M = t.shape[3];
  if (static_cast<int64_t>(offsets.size()) != t.shape[0] + 1 || rows > kMostCells)
    throw Error(Exit::data, shown_path(probe.path()), "trace.offsets or rkv.kept is of another length", "make it again");
  std::string out;
  for (std::size_t b = 0; b < std::min<std::size_t>(static_cast<std::size_t>(t.shape[0]), 4); ++b) {
    const int32_t begin = offsets[b], end = offsets[b + 1];
    if (begin < 0 || end < begin || end > static_cast<int32_t>(ids.size()))
      throw Error(Exit::data, shown_path(probe.path()), "trace.offsets leaves trace.ids", "make it again");
    const int32_t shown = std::min(end - begin, kMostTokens);
    std::string trace;
    for (int32_t i = 0; i < shown; ++i) trace += (i == 0 ? "" : " ") + probe.token(ids[static_cast<std::size_t>(begin + i)]);
    if (shown < end - begin) trace += fmt::format(" ... (the first {} of {} tokens)", shown, end - begin);
    HeatMap map{trace, static_cast<int>(rows), std::max(1, shown), {}, 0, static_cast<int>(std::clamp<int64_t>(6 * rows, 16, 900))};
    map.values.assign(static_cast<std::size_t>(map.rows * map.columns), 0);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t m = 0; m < M; ++m)
        if (const int32_t at = kept[static_cast<std::size_t>((static_cast<int64_t>(b) * rows + row) * M + m)]; at >= 0 && at < map.columns)
          map.values[static_cast<std::size_t>(row * map.columns + at)] = 1;
    out +=
        heat_maps(fmt::format("{}kept{}", prefix, b == 0 ? "" : std::to_string(b)), b == 0 ? "Tokens of the trace that each head kept" : "",
                  "Rows: layers and key/value heads in order; columns: tokens of the trace.", {map});
  }
  return out;
}

}  // namespace

std::string probe_section(const std::string& file, const std::string& prefix,
                          const std::vector<std::pair<std::string, std::string>>& runs) {
  const ProbeFile probe(file);
  require_run_of(probe, runs);
  const JsonAt about(probe.about(), probe.path());
  std::string out = "<h2>Probe</h2>\n" +
                    text_table({{"method", "weights", "data"},
                                {about.at("method").string(), about.at("weights").string(), about.at("data").string().substr(0, 12)}});
  (void)about.at("tokens").object();
  if (probe.has("latent.top")) out += latents_in_words(probe, prefix);
  if (!probe.has("similarity.k")) return out + "<p>There is no teacher to hold the latents against.</p>\n";
  for (const char* which : {"k", "v"}) {
    const std::string name = std::string("similarity.") + which;
    const TensorInfo& t = probe.info(name.c_str(), 4);
    out += heat_maps(prefix + "similarity_" + which, std::string("Cosine of student and teacher, ") + (which[0] == 'k' ? "keys" : "values"),
                     std::string("Rows: latents of the last pass; columns: kept tokens of the trace; blue above 0, orange below; ") +
                         (is_each_head_drawn(t) ? "key/value heads side by side." : "means over heads."),
                     maps_of(probe.real(name.c_str(), 4), t));
  }
  return out + kept_tokens(probe, prefix);
}

}  // namespace kava::report
