#include "tests/fuzz/targets.h"

#include <optional>
#include <stdexcept>

#include "engine/config/config.h"
#include "engine/config/toml_file.h"
#include "engine/data/data.h"
#include "engine/data/equation.h"
#include "engine/error.h"
#include "engine/files/checkpoint.h"
#include "engine/files/json.h"
#include "engine/files/safetensors.h"
#include "engine/files/torch_file.h"
#include "engine/text/split_pattern.h"
#include "engine/text/tokenizer.h"
#include "models/config.h"
#include "models/merge.h"
#include "models/training_state.h"
#include "models/upstream.h"
#include "models/weights.h"
#include "tests/folders.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

using Read = std::function<void(const std::string& path)>;

// A target that reads its bytes from a file of this name in a folder.
FuzzTarget of_file(std::string name, std::vector<std::string> endings, const std::string& file, Read read) {
  return {std::move(name), std::move(endings), [file, read = std::move(read)](const fs::path& room, std::string_view bytes) {
            overwrite(room / file, std::string(bytes));
            read((room / file).string());
          }};
}

std::string folder_of(const std::string& path) { return fs::path(path).parent_path().string(); }

void read_values(const SafetensorsFile& file) {
  std::vector<float> values;
  for (const TensorInfo& t : file.tensors()) {
    if (t.count() > 1 << 16 || !SafetensorsFile::is_floating(t)) continue;
    values.resize(static_cast<std::size_t>(t.count()));
    file.read_as(t, DType::f32, values.data());
  }
}

void read_safetensors(const std::string& path) { read_values(SafetensorsFile::open(path)); }

void read_torch(const std::string& path) { read_values(open_torch_file(path)); }

// CODI's weights: all that is asked of them on a base.
void read_upstream(const std::string& folder, const std::string& base) {
  if (!UpstreamAdapter::is_at(folder)) return;
  const UpstreamAdapter adapter = UpstreamAdapter::open(folder);
  const ModelConfig shape = ModelConfig::load(base);
  adapter.rows(shape);
  for (const WeightSpec& spec : weight_specs(shape)) adapter.base_tensor(spec, shape);
}

void read_pccot(const std::string& folder) {
  const float row = 1;
  overwrite(fs::path(folder) / "adapter_config.json", R"({"trainable_token_indices": {"embed_tokens": [61, 62, 63]}})");
  write_safetensors(folder + "/adapter_model.safetensors",
                    {{"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "F32", {1, 1}, &row}});
  UpstreamAdapter::open(folder);
}

void read_tokenizer(const std::string& path) {
  const Tokenizer tokenizer = Tokenizer::load(folder_of(path));
  for (const char* text : {"12 + 3 = 15", "a\xc3\xa9\xe4\xb8\xad  \n", ""}) tokenizer.decode(tokenizer.encode_with_special(text));
}

// A pattern that means nothing is refused by another exception: it has no file.
void read_pattern(std::string_view bytes) {
  try {
    std::vector<Stretch> found;
    SplitPattern::regex(bytes).find_all("it's 12,345 \xc3\xa9 words\n", found);
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace

std::vector<FuzzTarget> fuzz_targets(const fs::path& models) {
  const std::string llama = (models / "llama").string();
  std::vector<FuzzTarget> all = {
      {"json", {".json", ".jsonl"}, [](const fs::path&, std::string_view bytes) { parse_json(bytes, "fuzz"); }},
      {"pattern", {".txt", ".toml"}, [](const fs::path&, std::string_view bytes) { read_pattern(bytes); }},
      {"equation", {".txt"}, [](const fs::path&, std::string_view bytes) { judge_equation(bytes, 10); }},
      of_file("config", {".toml"}, "a.toml", [](const std::string& path) { load_config(path); }),
      of_file("toml", {".toml"}, "a.toml", [](const std::string& path) { read_toml(path); }),
      of_file("safetensors", {".safetensors"}, "a.safetensors", read_safetensors),
      of_file("torch", {".bin"}, "a.bin", read_torch),
      of_file("upstream", {"model.safetensors"}, "model.safetensors",
              [llama](const std::string& path) { read_upstream(folder_of(path), llama); }),
      of_file("pccot_args", {"pccot_args.json"}, "pccot_args.json", [](const std::string& path) { read_pccot(folder_of(path)); }),
      of_file("model_config", {"config.json"}, "config.json", [](const std::string& path) { ModelConfig::load(folder_of(path)); }),
      of_file("tokenizer", {"tokenizer.json"}, "tokenizer.json", read_tokenizer),
      of_file("manifest", {"manifest.json"}, "manifest.json", [](const std::string& path) { open_checkpoint(folder_of(path)); }),
      of_file("state", {"state.json"}, "state.json", [](const std::string& path) { load_training_state(folder_of(path)); }),
      of_file("index", {"index.json"}, "model.safetensors.index.json",
              [llama](const std::string& path) { WeightFiles::open(folder_of(path), ModelConfig::load(llama)); }),
      of_file("adapter_config", {"adapter_config.json"}, "adapter_config.json",
              [llama](const std::string& path) { peft_merge_input(folder_of(path), llama); }),
      of_file("adapter", {"adapter_model.safetensors"}, "adapter_model.safetensors",
              [llama](const std::string& path) {
                overwrite(fs::path(path).parent_path() / "adapter_config.json",
                          R"({"peft_type":"LORA","r":2,"lora_alpha":3,"target_modules":["q_proj","k_proj","v_proj","o_proj"]})");
                peft_merge_input(folder_of(path), llama);
              }),
  };
  for (const std::string& form : names_of(DataFormat{}))
    all.push_back(of_file("rows_" + form, {".jsonl", ".txt"}, "rows",
                          [form = choice_of<DataFormat>(form)](const std::string& path) { read_rows(path, form); }));
  all.push_back(of_file("rows", {".jsonl", ".txt"}, "rows", [](const std::string& path) { read_rows(path); }));
  return all;
}

}  // namespace kava
