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
constexpr int64_t kMostCells = 30'000;  // of heat maps in one figure

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
      throw Error(Exit::data, fmt::format("{}:{}", escaped(path.string(), 4096), number), "is no object with a step", "remove the line");
    (valid ? out.validations : out.steps)[object["step"].get<int64_t>()] = object;
  }
  return out;
}

std::vector<Series> series_of(const std::map<int64_t, Json>& lines, std::initializer_list<const char*> keys, double scale = 1) {
  std::vector<Series> out;
  for (const char* key : keys) {
    Series s{key, {}};
    for (const auto& [step, line] : lines)
      if (line.contains(key) && line[key].is_number()) s.points.emplace_back(static_cast<double>(step), scale * line[key].get<double>());
    if (std::ranges::any_of(s.points, [](const auto& p) { return p.second != 0; })) out.push_back(std::move(s));
  }
  return out;
}

std::string metric_figures(const Metrics& m, const std::string& prefix) {
  std::string out = line_plot(prefix + "loss", "Loss and its terms, unweighted", "loss",
                              series_of(m.steps, {"loss", "student_ce", "teacher_ce", "kv", "codi"}), true);
  out += line_plot(prefix + "validation", "Validation: exact match and upstream's criterion", "%",
                   series_of(m.validations, {"strict", "forced"}, 100), false);
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

// Controls and sweeps as they stand in a result: an accuracy for each name.
std::string extras(const Json& result, const std::string& prefix, const std::string& title) {
  std::string out;
  for (const char* key : {"controls", "sweep"}) {
    if (!result.contains(key)) continue;
    std::vector<Bar> bars;
    auto add = [&](const std::string& name, const Json& value) {
      if (!value.is_object() || !value.contains("accuracy")) return;
      const Json& a = value["accuracy"];
      const double share = a.is_number()                                                      ? a.get<double>()
                           : a.is_object() && a.contains("strict") && a["strict"].is_number() ? a["strict"].get<double>()
                                                                                              : NAN;
      if (std::isfinite(share)) bars.push_back({name, 100 * share, 100 * share, 100 * share, true, {}});
    };
    if (result[key].is_object())
      for (const auto& [name, value] : result[key].items()) add(name, value);
    if (result[key].is_array())
      for (const Json& value : result[key])
        if (value.is_object())
          add(fmt::format("M = {}, T = {}", value.value("latents", Json()).dump(), value.value("passes", Json()).dump()), value);
    out += bar_plot(prefix + key,
                    title + (key[0] == 'c' ? ": latents replaced, accuracy in %" : ": other numbers of latents and passes, accuracy in %"),
                    bars, false);
  }
  return out;
}

std::string questions_of(const Json& records) {
  std::vector<std::vector<std::string>> rows = {{"", "question", "gold", "answer", "passes"}};
  for (bool wanted : {false, true}) {
    std::size_t shown = 0;
    for (const Json& r : records) {
      if (!r.is_object() || !r.contains("correct") || !r["correct"].is_object()) continue;
      const bool right = r["correct"].value("strict", false);
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

namespace {

// A probe's file, with its tensors read.
class ProbeFile {
 public:
  explicit ProbeFile(const std::string& path) : file_(SafetensorsFile::open(path)), path_(path) {
    const auto found = file_.metadata().find("kava.probe");
    if (found == file_.metadata().end()) throw Error(Exit::data, escaped(path, 4096), "is no probe", "make one with kava_inspect probe");
    about_ = parse_json(found->second, path);
  }
  const Json& about() const { return about_; }
  const std::string& path() const { return path_; }
  bool has(const char* name) const { return file_.find(name) != nullptr; }

  /// The tensor, of this many dimensions.
  const TensorInfo& info(const char* name, std::size_t dimensions) const {
    const TensorInfo* t = file_.find(name);
    if (!t || t->shape.size() != dimensions)
      throw Error(Exit::data, escaped(path_, 4096), fmt::format("holds no {} of {} dimensions", name, dimensions), "make it again");
    return *t;
  }
  std::vector<int32_t> whole(const char* name, std::size_t dimensions) const {
    const TensorInfo& t = info(name, dimensions);
    if (t.dtype != "I32") throw Error(Exit::data, escaped(path_, 4096), std::string(name) + " is not of I32", "make it again");
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

std::string latents_in_words(const ProbeFile& probe, const std::string& prefix) {
  const TensorInfo& t = probe.info("latent.top", 3);
  const auto passes = static_cast<std::size_t>(t.shape[0]), B = static_cast<std::size_t>(t.shape[1]),
             M = static_cast<std::size_t>(t.shape[2]);
  const std::vector<int32_t> top = probe.whole("latent.top", 3), nearest = probe.whole("latent.nearest", 3);
  if (nearest.size() != top.size())
    throw Error(Exit::data, escaped(probe.path(), 4096), "latent.top and latent.nearest differ in shape", "make it again");
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

// [L, H, rows, columns] as maps, of each head; or where that would be too many cells the means over heads.
std::vector<HeatMap> maps_of(const std::vector<float>& values, const std::vector<int64_t>& shape) {
  const int64_t L = shape[0], H = shape[1], cells = shape[2] * shape[3];
  const bool each = L * H * cells <= kMostCells;
  std::vector<HeatMap> maps;
  for (int64_t l = 0; l < L && maps.size() * static_cast<std::size_t>(cells) <= kMostCells; ++l)
    for (int64_t h = 0; h < (each ? H : 1); ++h) {
      HeatMap map{each ? fmt::format("layer {}, head {}", l, h) : fmt::format("layer {}", l),
                  static_cast<int>(shape[2]),
                  static_cast<int>(shape[3]),
                  {}};
      for (int64_t c = 0; c < cells; ++c) {
        float sum = 0;
        for (int64_t k = 0; k < (each ? 1 : H); ++k) sum += values[static_cast<std::size_t>(((l * H) + h + k) * cells + c)];
        map.values.push_back(each ? sum : sum / static_cast<float>(H));
      }
      maps.push_back(std::move(map));
    }
  return maps;
}

// Of one question: which tokens of the trace each head kept.
std::string kept_tokens(const ProbeFile& probe, const std::string& prefix) {
  const TensorInfo& t = probe.info("rkv.kept", 4);
  const std::vector<int32_t> kept = probe.whole("rkv.kept", 4), ids = probe.whole("trace.ids", 1),
                             offsets = probe.whole("trace.offsets", 1);
  const int64_t L = t.shape[1], H = t.shape[2], M = t.shape[3];
  if (static_cast<int64_t>(offsets.size()) != t.shape[0] + 1)
    throw Error(Exit::data, escaped(probe.path(), 4096), "trace.offsets is of another length", "make it again");
  std::string out;
  for (std::size_t b = 0; b < std::min<std::size_t>(static_cast<std::size_t>(t.shape[0]), 4); ++b) {
    const int32_t begin = offsets[b], end = offsets[b + 1];
    if (begin < 0 || end < begin || end > static_cast<int32_t>(ids.size()))
      throw Error(Exit::data, escaped(probe.path(), 4096), "trace.offsets leaves trace.ids", "make it again");
    std::string trace;
    for (int32_t i = begin; i < end; ++i) trace += (i == begin ? "" : " ") + probe.token(ids[static_cast<std::size_t>(i)]);
    HeatMap map{trace, static_cast<int>(L * H), std::max(1, end - begin), {}};
    map.values.assign(static_cast<std::size_t>(map.rows * map.columns), 0);
    for (int64_t row = 0; row < L * H; ++row)
      for (int64_t m = 0; m < M; ++m)
        if (const int32_t at = kept[static_cast<std::size_t>((static_cast<int64_t>(b) * L * H + row) * M + m)]; at >= 0 && at < map.columns)
          map.values[static_cast<std::size_t>(row * map.columns + at)] = 1;
    if (static_cast<int64_t>(map.values.size()) <= kMostCells)
      out += heat_maps(fmt::format("{}kept{}", prefix, b == 0 ? "" : std::to_string(b)),
                       b == 0 ? "Tokens of the trace that each head kept" : "",
                       "Rows: layers and key/value heads in order; columns: tokens of the trace.", {map});
  }
  return "<div class=\"wide\">" + out + "</div>";
}

}  // namespace

std::string probe_section(const std::string& file, const std::string& prefix) {
  const ProbeFile probe(file);
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
    const bool each = t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3] <= kMostCells;
    out += heat_maps(prefix + "similarity_" + which, std::string("Cosine of student and teacher, ") + (which[0] == 'k' ? "keys" : "values"),
                     std::string("Rows: latents of the last pass; columns: kept tokens of the trace.") + (each ? "" : " Means over heads."),
                     maps_of(probe.real(name.c_str(), 4), t.shape));
  }
  return out + kept_tokens(probe, prefix);
}

}  // namespace kava::report
