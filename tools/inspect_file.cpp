#include "tools/inspect_file.h"

#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <set>

#include "engine/error.h"
#include "engine/files/checkpoint.h"
#include "engine/files/files.h"
#include "engine/files/hub.h"
#include "engine/files/json.h"
#include "engine/files/safetensors.h"
#include "models/adapter.h"
#include "models/config.h"
#include "models/upstream.h"
#include "models/weights.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

[[noreturn]] void fail(const fs::path& path, const std::string& what, const std::string& remedy = "make or get the file again") {
  throw Error(Exit::data, shown_path(path), what, remedy);
}

struct NotFinite {
  std::uint64_t nan = 0, inf = 0;
};

// Of numbers stored in `Bits`, whose exponent is all ones in NaN and infinity and whose fraction is 0 in infinity.
template <class Bits>
void count_not_finite(const std::vector<char>& bytes, std::size_t n, Bits exponent, Bits fraction, NotFinite& out) {
  const Bits* values = reinterpret_cast<const Bits*>(bytes.data());
  for (std::size_t i = 0; i < n / sizeof(Bits); ++i)
    if ((values[i] & exponent) == exponent) ++((values[i] & fraction) != 0 ? out.nan : out.inf);
}

NotFinite scan(const SafetensorsFile& file, const TensorInfo& tensor) {
  NotFinite out;
  if (!SafetensorsFile::is_floating(tensor)) return out;
  std::vector<char> chunk(std::size_t{1} << 20);
  const std::uint64_t total = tensor.end - tensor.begin;
  for (std::uint64_t at = 0; at < total; at += chunk.size()) {
    const std::size_t n = std::min<std::uint64_t>(chunk.size(), total - at);
    file.read(tensor, at, chunk.data(), n);
    if (tensor.dtype == "F64") count_not_finite<std::uint64_t>(chunk, n, 0x7ff0000000000000u, 0x000fffffffffffffu, out);
    else if (tensor.dtype == "F32") count_not_finite<std::uint32_t>(chunk, n, 0x7f800000u, 0x007fffffu, out);
    else if (tensor.dtype == "F16") count_not_finite<std::uint16_t>(chunk, n, 0x7c00u, 0x03ffu, out);
    else count_not_finite<std::uint16_t>(chunk, n, 0x7f80u, 0x007fu, out);
  }
  return out;
}

void list_tensors(const SafetensorsFile& file) {
  NotFinite all;
  std::int64_t elements = 0;
  std::uint64_t bytes = 0;
  fmt::print("{}\n", shown_path(file.path()));
  for (const auto& [key, value] : file.metadata()) fmt::print("  metadata {} = {}\n", escaped(key), escaped(value));
  for (const TensorInfo& t : file.tensors()) {
    const NotFinite found = scan(file, t);
    fmt::print("  {}  {}  {}", escaped(t.name, 200), t.dtype, shape_text(t.shape));
    if (found.nan + found.inf > 0) fmt::print("  nan {} inf {}", found.nan, found.inf);
    fmt::print("\n");
    all.nan += found.nan;
    all.inf += found.inf;
    elements += t.count();
    bytes += t.end - t.begin;
  }
  fmt::print("  {} tensors, {} elements, {} bytes, nan {}, inf {}\n", file.tensors().size(), elements, bytes, all.nan, all.inf);
}

SafetensorsFile list_safetensors(const fs::path& path) {
  SafetensorsFile file = SafetensorsFile::open(path.string());
  list_tensors(file);
  return file;
}

struct AdapterConfig {
  std::int64_t rank = 0;
  std::set<std::string> targets;  // none: they are a pattern, which the names are not held against
  std::string shown;
};

AdapterConfig read_adapter_config(const fs::path& path) {
  const Json json = read_json(path.string(), std::size_t{1} << 20);
  if (!json.is_object()) fail(path, "is not a JSON object");
  if (json.value("peft_type", Json("LORA")) != "LORA") fail(path, "peft_type is not LORA", "only LoRA adapters are read");
  const Json rank = json.value("r", Json()), targets = json.value("target_modules", Json());
  if (!rank.is_number_unsigned() || rank.get<std::uint64_t>() < 1 || rank.get<std::uint64_t>() > (1u << 20)) fail(path, "r is no rank");
  if (!json.value("lora_alpha", Json()).is_number()) fail(path, "lora_alpha is no number");
  AdapterConfig config{rank.get<std::int64_t>(), {}, escaped(targets.dump(-1, ' ', false, Json::error_handler_t::replace), 400)};
  if (targets.is_string() && targets != "") return config;
  if (!targets.is_array() || targets.empty()) fail(path, "target_modules is no list of names and no pattern");
  for (const Json& target : targets) {
    if (!target.is_string()) fail(path, "target_modules is no list of names");
    config.targets.insert(target.get<std::string>());
  }
  return config;
}

// PEFT's names: base_model.model.MODULE.lora_A.weight [r, in] and lora_B.weight [out, r], both for every module, and only for targets.
void check_lora(const SafetensorsFile& file, const AdapterConfig& config) {
  const std::string before = "base_model.model.", a = ".lora_A.weight", b = ".lora_B.weight";
  std::set<std::string> targets_seen;
  for (const TensorInfo& t : file.tensors()) {
    const bool is_a = t.name.ends_with(a), is_b = t.name.ends_with(b);
    const std::string shown = "tensor \"" + escaped(t.name, 200) + "\"";
    if (!t.name.starts_with(before) || !(is_a || is_b)) fail(file.path(), shown + " is not part of a LoRA adapter");
    if (!SafetensorsFile::is_floating(t)) fail(file.path(), shown + " has dtype " + t.dtype);
    if (t.shape.size() != 2 || t.shape[is_a ? 0 : 1] != config.rank)
      fail(file.path(), fmt::format("{} has shape {}, but r is {}", shown, shape_text(t.shape), config.rank));
    const std::string module = t.name.substr(0, t.name.size() - a.size());
    if (!file.find(module + (is_a ? b : a))) fail(file.path(), shown + " has no partner " + (is_a ? b : a).substr(1));
    bool listed = config.targets.empty();
    for (const std::string& target : config.targets)
      if (names_map(target, module)) listed = true, targets_seen.insert(target);
    if (!listed) fail(file.path(), shown + " is for a module that target_modules does not list");
  }
  for (const std::string& target : config.targets)
    if (!targets_seen.contains(target)) fail(file.path(), "has no tensor for the target module " + escaped(target));
}

// kava.safetensors: new_tokens.weight [3, C], latent_projection.* in C, kv_projection.N.{k,v}.weight [D, D].
void check_kava_tensors(const SafetensorsFile& file) {
  const TensorInfo* rows = file.find("new_tokens.weight");
  if (!rows || rows->shape.size() != 2 || rows->shape[0] != 3) fail(file.path(), "has no new_tokens.weight of 3 rows");
  const std::int64_t hidden = rows->shape[1];
  std::map<std::string, std::vector<std::int64_t>> projection;
  for (const char* layer : {"linear1", "linear2"}) projection[fmt::format("latent_projection.{}.weight", layer)] = {hidden, hidden};
  for (const char* layer : {"linear1", "linear2"}) projection[fmt::format("latent_projection.{}.bias", layer)] = {hidden};
  for (const char* name : {"weight", "bias"}) projection[fmt::format("latent_projection.norm.{}", name)] = {hidden};
  std::size_t projection_seen = 0;
  for (const TensorInfo& t : file.tensors()) {
    const std::string shown = "tensor \"" + escaped(t.name, 200) + "\"";
    if (t.dtype != "F32") fail(file.path(), shown + " has dtype " + t.dtype + ", not F32");
    if (&t == rows) continue;
    if (const auto at = projection.find(t.name); at != projection.end()) {
      if (t.shape != at->second) fail(file.path(), shown + " has shape " + shape_text(t.shape) + ", not " + shape_text(at->second));
      ++projection_seen;
    } else if (!t.name.starts_with("kv_projection.")) {
      fail(file.path(), shown + " is not part of a latent adapter");
    } else if (t.shape.size() != 2 || t.shape[0] != t.shape[1]) {
      fail(file.path(), shown + " has shape " + shape_text(t.shape) + ", which is not square");
    }
  }
  if (projection_seen != 0 && projection_seen != projection.size()) fail(file.path(), "has only a part of latent_projection");
}

void list_adapter(const fs::path& folder) {
  const AdapterConfig config = read_adapter_config(folder / "adapter_config.json");
  const SafetensorsFile file = open_adapter_file(folder.string());
  list_tensors(file);
  check_lora(file, config);
  fmt::print("{}: LoRA adapter of rank {} on {}\n", shown_path(folder), config.rank, config.shown);
}

void list_model(const fs::path& folder) {
  const ModelConfig config = ModelConfig::load(folder.string());
  const WeightFiles weights = WeightFiles::open(folder.string(), config);
  for (const std::string& path : weights.paths()) list_safetensors(path);
  fmt::print("{}: {} model of {} layers, hidden size {}, {}/{} heads of {}, vocabulary {}\n", shown_path(folder), config.family,
             config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim, config.vocab);
}

void list_upstream(const fs::path& folder) {
  const UpstreamAdapter adapter = UpstreamAdapter::open(folder.string());
  list_tensors(adapter.file());
  const bool pccot = adapter.program() == UpstreamAdapter::Program::pccot;
  fmt::print("{}: LoRA and new tokens as the program of {} writes them\n", shown_path(folder), pccot ? "PCCoT" : "CODI");
}

// An adapter folder or a model folder, each with kava.safetensors where the method has latents.
void list_weights_folder(const fs::path& folder) {
  if (UpstreamAdapter::is_at(folder.string())) list_upstream(folder);
  else if (is_there(folder / "adapter_config.json")) list_adapter(folder);
  else if (is_there(folder / "config.json")) list_model(folder);
  else fail(folder, "is no run, checkpoint, adapter or model folder", "give one of these or a safetensors file");
  if (is_there(folder / "kava.safetensors")) check_kava_tensors(list_safetensors(folder / "kava.safetensors"));
}

void list_checkpoint(const Checkpoint& checkpoint) {
  const Manifest& manifest = checkpoint.manifest;
  const fs::path& folder = checkpoint.path;
  for (const char* name : {"optimizer.safetensors", "state.json"})
    if (!manifest.has(name)) fail(folder, std::string("is a checkpoint without ") + name, "use another checkpoint");
  list_safetensors(folder / "optimizer.safetensors");
  list_weights_folder(folder / "adapter");
  fmt::print("{}: checkpoint of step {}, configuration {}, {} files verified\n", shown_path(folder), manifest.step,
             escaped(manifest.config_hash), manifest.files.size());
}

// What a run is evaluated by: its best checkpoint, else its adapter, else its last checkpoint.
std::string weights_of_run(const fs::path& run) {
  for (const char* name : {"best", "adapter", "last"})
    if (is_there(run / name)) return (run / name).string();
  fail(run, "the run has no checkpoint and no adapter", "train it first");
}

int inspect_file(const std::string& given) {
  std::error_code ignored;
  std::string path = model_folder(given);
  if (is_there(fs::path(path) / "config.toml")) path = weights_of_run(path);
  // best and last may move, and what they led to may be pruned, between any two looks at them.
  const fs::path named = fs::path(path).has_filename() ? fs::path(path) : fs::path(path).parent_path();
  const bool moving = linked_step(named.parent_path(), named.filename().string()).has_value();
  if (moving || is_there(named / "manifest.json")) list_checkpoint(open_checkpoint(named));
  else if (!fs::is_directory(path, ignored)) list_safetensors(path);
  else list_weights_folder(path);
  fmt::print("ok\n");
  return 0;
}

}  // namespace

void add_file_command(CLI::App& app, std::function<int()>& chosen) {
  CLI::App* command = app.add_subcommand("file", "Check and list a safetensors file, or a run, checkpoint, adapter or model folder");
  const auto path = std::make_shared<std::string>();
  command->add_option("PATH", *path, "A safetensors file, or a folder as MODEL of the other programs, or an adapter")->required();
  command->footer("Example (after tools/quickstart.sh):\n  kava_inspect file runs/quickstart/kava");
  command->callback([&chosen, path] { chosen = [path] { return inspect_file(*path); }; });
}

}  // namespace kava
