#include "models/training_state.h"

#include <algorithm>
#include <limits>

#include "engine/cli.h"
#include "engine/files/json.h"
#include "engine/files/json_at.h"
#include "engine/files/safetensors.h"

namespace kava {

namespace {

constexpr int kFormatVersion = 2;
constexpr const char* kOptimizer = "optimizer.safetensors";
constexpr const char* kState = "state.json";
constexpr int64_t kMostSteps = int64_t{1} << 53;

// The flat buffers whose parts are stored, and the prefixes of their names.
struct Part {
  const char* prefix;
  const Tensor& (ParameterStore::*flat)() const;
};
constexpr Part kParts[] = {{"value.", &ParameterStore::value}, {"m.", &ParameterStore::m}, {"v.", &ParameterStore::v}};

const char* file_type(DType t) { return t == DType::f64 ? "F64" : "F32"; }

int64_t whole(const JsonAt& at, int64_t least) {
  const Json& v = at.value();
  if (!v.is_number_integer() || v.get<double>() < static_cast<double>(least) || v.get<double>() > static_cast<double>(kMostSteps))
    at.refuse("is no count", "use another checkpoint");
  return v.get<int64_t>();
}

// Each of these counts a part of what another one counts.
void require_consistent(const JsonAt& root, const TrainingState& s) {
  const auto require = [&](bool holds, const char* key) {
    if (!holds) root.at(key).refuse("contradicts the other counts", "use another checkpoint");
  };
  require(s.step <= s.total_steps, "step");
  require(s.updates <= std::min<int64_t>(s.step, std::numeric_limits<int32_t>::max() - 1), "updates");
  require(s.moment_updates <= s.updates, "moment_updates");
  require(s.skipped_in_row <= s.step - s.updates, "skipped_in_row");
  require(s.cursor <= s.samples, "cursor");
  require(s.validated_step <= s.step, "validated_step");
  require(!s.best || s.best->step <= s.step, "best");
}

double real(const JsonAt& at) {
  if (!at.value().is_number()) at.refuse("is no number", "use another checkpoint");
  return at.value().get<double>();
}

}  // namespace

void save_training_state(FolderWriter& folder, const Model& model, const TrainingState& state) {
  const ParameterStore& parameters = model.parameters;
  std::vector<TensorOut> tensors;
  for (const Part& part : kParts)
    for (const Parameter& p : parameters.all()) {
      const Tensor t = parameters.part((parameters.*part.flat)(), p);
      tensors.push_back({part.prefix + p.name, file_type(t.dtype), p.file_shape(), nullptr, [&parameters, &p, t](void* out) {
                           if (t.dtype == DType::f64) parameters.download_as_stored(p, t, static_cast<double*>(out));
                           else parameters.download_as_stored(p, t, static_cast<float*>(out));
                         }});
    }
  FileWriter file = folder.file(kOptimizer);
  write_safetensors(file, std::move(tensors));

  Json json = {{"format_version", kFormatVersion},
               {"kava", release_text("kava")},
               {"step", state.step},
               {"total_steps", state.total_steps},
               {"epoch", state.epoch},
               {"cursor", state.cursor},
               {"samples", state.samples},
               {"updates", state.updates},
               {"moment_updates", state.moment_updates},
               {"skipped_in_row", state.skipped_in_row},
               {"validated_step", state.validated_step},
               {"seconds", state.seconds},
               {"max_steps", state.max_steps},
               {"epochs", state.epochs},
               {"micro_batch", state.micro_batch},
               {"device", state.device},
               {"best", nullptr},
               {"data", Json::array()},
               {"base", state.base},
               {"model", state.model},
               {"adapter", state.adapter}};
  if (state.last_stage) json["last_stage"] = *state.last_stage;
  if (state.best) json["best"] = {{"step", state.best->step}, {"score", state.best->score}, {"loss", state.best->loss}};
  for (const DataDigest& d : state.data) json["data"].push_back({{"key", d.key}, {"sha256", d.sha256}, {"format", d.format}});
  folder.write_file(kState, json.dump(1) + "\n");
}

TrainingState load_training_state(const std::filesystem::path& folder) {
  const std::string file = (folder / kState).string();
  const Json json = read_json(file, std::size_t{16} << 20);
  const JsonAt root(json, file);
  const int64_t version = whole(root.at("format_version"), 0);
  if (version < 1 || version > kFormatVersion)
    root.at("format_version").refuse(fmt::format("is none of 1 to {}", kFormatVersion), "use the version of the program that wrote it");
  TrainingState s;
  s.older = version < 2;
  const std::pair<const char*, int64_t TrainingState::*> counts[] = {{"step", &TrainingState::step},
                                                                     {"total_steps", &TrainingState::total_steps},
                                                                     {"epoch", &TrainingState::epoch},
                                                                     {"cursor", &TrainingState::cursor},
                                                                     {"samples", &TrainingState::samples},
                                                                     {"updates", &TrainingState::updates},
                                                                     {"skipped_in_row", &TrainingState::skipped_in_row}};
  for (const auto& [name, member] : counts) s.*member = whole(root.at(name), 0);
  s.moment_updates = root.has("moment_updates") ? whole(root.at("moment_updates"), 0) : s.updates;
  s.validated_step = whole(root.at("validated_step"), -1);
  if (root.has("last_stage")) s.last_stage = whole(root.at("last_stage"), 0);
  s.seconds = real(root.at("seconds"));
  s.base = root.at("base").string();
  if (root.has("best")) {
    const JsonAt best = root.at("best");
    s.best = {whole(best.at("step"), 0), real(best.at("score"))};
    if (best.has("loss")) s.best->loss = real(best.at("loss"));
  }
  require_consistent(root, s);
  const JsonAt data = root.at("data");
  for (std::size_t i = 0; i < data.array().size(); ++i) {
    const JsonAt at = data.at(i);
    s.data.push_back({s.older ? "" : at.at("key").string(), at.at("sha256").string(), s.older ? "" : at.at("format").string()});
  }
  if (s.older) return s;
  s.max_steps = whole(root.at("max_steps"), -1), s.epochs = whole(root.at("epochs"), -1);
  s.micro_batch = whole(root.at("micro_batch"), -1);
  s.device = root.at("device").string();
  for (const auto& [name, member] : {std::pair("model", &TrainingState::model), std::pair("adapter", &TrainingState::adapter)})
    for (const auto& [file, digest] : root.at(name).object()) (s.*member)[file] = root.at(name).at(file.c_str()).string();
  return s;
}

void load_optimizer(Model& model, const std::filesystem::path& folder) {
  const ParameterStore& parameters = model.parameters;
  const SafetensorsFile file = SafetensorsFile::open((folder / kOptimizer).string());
  auto refuse = [&](const std::string& what) { throw Error(Exit::data, file.path(), what, "use another checkpoint"); };
  std::size_t found = 0;
  for (const Part& part : kParts)
    for (const Parameter& p : parameters.all()) {
      const Tensor t = parameters.part((parameters.*part.flat)(), p);
      const std::string name = part.prefix + p.name;
      const TensorInfo* info = file.find(name);
      if (!info) refuse(fmt::format("tensor {} is missing", name));
      if (info->dtype != file_type(t.dtype) || info->shape != p.file_shape())
        refuse(fmt::format("tensor {} is {} {}, the run has {} {}", name, info->dtype, shape_text(info->shape), file_type(t.dtype),
                           shape_text(p.file_shape())));
      read_tensor(model.ops, t, file, *info, p.transposed);
      ++found;
    }
  if (found != file.tensors().size()) refuse(fmt::format("holds {} tensors, the run has {}", file.tensors().size(), found));
  model.parameters.refresh();
}

}  // namespace kava
