// A tiny run to evaluate, made without training, and the programs run on it.
#pragma once
#include <algorithm>
#include <map>
#include <set>

#include "engine/files/checkpoint.h"
#include "models/adapter.h"
#include "models/evaluate.h"
#include "models/open_model.h"
#include "tests/programs/programs.h"

namespace kava {

struct Finished {
  int code;
  std::string output;  // stdout, then stderr
};

inline Finished run(const std::string& command) {
  const Ended e = run_command(command);
  return {e.code, e.out + e.err};
}

// A byte-level tokenizer of single printable characters; ids 0.. are '!', '"', ...; 94 is the space, 95 the end.
inline std::string tokenizer_json() {
  Json vocab = Json::object();
  for (int c = 33; c < 127; ++c) vocab[std::string(1, static_cast<char>(c))] = c - 33;
  vocab["\u0120"] = 94;
  const Json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  return Json{{"version", "1.0"},
              {"truncation", nullptr},
              {"padding", nullptr},
              {"added_tokens",
               {{{"id", 95},
                 {"content", "<end>"},
                 {"special", true},
                 {"single_word", false},
                 {"lstrip", false},
                 {"rstrip", false},
                 {"normalized", false}}}},
              {"normalizer", nullptr},
              {"pre_tokenizer", byte_level},
              {"post_processor", nullptr},
              {"decoder", byte_level},
              {"model",
               {{"type", "BPE"},
                {"dropout", nullptr},
                {"unk_token", nullptr},
                {"continuing_subword_prefix", nullptr},
                {"end_of_word_suffix", nullptr},
                {"fuse_unk", false},
                {"byte_fallback", false},
                {"vocab", vocab},
                {"merges", Json::array()}}}}
      .dump();
}

// A run of method kava on a random tiny base: config.toml, one checkpoint linked as best, and the final adapter.
struct TextRun {
  TextRun() {
    const std::filesystem::path base = folder.path() / "base";
    std::filesystem::create_directories(base);
    overwrite(base / "config.json", Json{{"model_type", "llama"},
                                         {"architectures", {"LlamaForCausalLM"}},
                                         {"hidden_size", 16},
                                         {"intermediate_size", 24},
                                         {"num_hidden_layers", 2},
                                         {"num_attention_heads", 4},
                                         {"num_key_value_heads", 2},
                                         {"vocab_size", 97},
                                         {"max_position_embeddings", 512},
                                         {"rms_norm_eps", 1e-5},
                                         {"rope_theta", 10000.0},
                                         {"hidden_act", "silu"},
                                         {"tie_word_embeddings", false},
                                         {"torch_dtype", "float32"}}
                                        .dump());
    overwrite(base / "tokenizer.json", tokenizer_json());
    overwrite(base / "tokenizer_config.json", R"({"eos_token": "<end>"})");
    config.model.path = base.string(), config.model.init = Init::random, config.model.dtype = StorageType::f32;
    config.data.train = {{(folder.path() / "train.txt").string(), std::nullopt}};
    config.lora.rank = 2, config.lora.dropout = 0;
    config.latent.count = 4, config.latent.iterations = 2;
    std::filesystem::create_directories(dir);
    overwrite(dir / "config.toml", to_toml(config));
    const auto ops = make_cpu_ops(1);
    Model model(*ops, config, ModelConfig::load(base.string()));
    save_adapter(model, (dir / "adapter").string());
    write_checkpoint(dir, 3, config_hash(config), [&](FolderWriter& checkpoint) { save_adapter(model, checkpoint, "adapter/"); });
    set_link(dir, "best", 3);
  }
  std::string write(const std::string& name, const std::string& text) const {
    overwrite(folder.path() / name, text);
    return folder / name;
  }
  TempFolder folder;
  std::filesystem::path dir = folder.path() / "run";
  RunConfig config;
};

// A model of a run, ready.
struct Ready {
  explicit Ready(const std::filesystem::path& path)
      : opened(open_model(path.string())), ops(make_cpu_ops(2)), model(load_model(*ops, opened)), arena(*ops) {}
  EvalResult evaluate(const RowFile& file, const EvalOptions& options = {}) {
    return kava::evaluate(*model, arena, opened.text, file, options);
  }
  OpenedModel opened;
  std::unique_ptr<Ops> ops;
  std::unique_ptr<Model> model;
  Arena arena;
};

// Makes the token that most of these answers hold the end of sequence, so that they end.
inline void let_end(TextModel& text, const std::vector<std::vector<int32_t>>& answers) {
  std::map<int32_t, int64_t> held;
  for (const std::vector<int32_t>& ids : answers)
    for (int32_t id : std::set<int32_t>(ids.begin(), ids.end())) ++held[id];
  text.eos = std::ranges::max_element(held, {}, [](const auto& h) { return h.second; })->first;
}

inline const char* const kQuestions = "What is 2+2?||<<2+2=4>>#### 4\nTom has 3 hats.||#### 3\nA||#### 12\nHow many?||#### 7\n";

inline int64_t correct(const EvalResult& r, Scorer scorer) {
  for (std::size_t s = 0; s < r.scorers.size(); ++s)
    if (r.scorers[s] == scorer) return r.correct(s);
  return -1;
}

}  // namespace kava
