// Configurations and samples for tests of training: tiny golden models, `ids` rows.
#pragma once
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "engine/files/json.h"
#include "models/adapter.h"
#include "models/text.h"
#include "models/trainer.h"
#include "tests/folders.h"

namespace kava {

inline const std::string kGolden = source_dir() + "/tests/golden/";

/// A configuration on the tiny LLaMA; `more` holds further lines, section headers included.
inline std::string tiny_toml(const std::string& more = "") {
  return "[model]\npath = \"" + kGolden + "models/llama\"\ndtype = \"f32\"\n[data]\ntrain = [\"" + kGolden +
         "data/rows.jsonl\"]\n[train]\nbatch = 2\nlr = 0.01\n[lora]\nrank = 2\nalpha = 3.0\n[latent]\ncount = 5\n" + more;
}

/// A model with its samples.
struct TinyRun {
  RunConfig config;
  std::unique_ptr<Ops> ops;
  TextModel text;
  std::vector<Sample> samples;
  std::unique_ptr<Model> model;

  explicit TinyRun(const std::vector<std::string>& sets = {}, int threads = 1, std::unique_ptr<Ops> backend = nullptr) {
    TempFolder folder;
    overwrite(folder / "c.toml", tiny_toml());
    config = load_config(folder / "c.toml", sets);
    ops = backend ? std::move(backend) : make_cpu_ops(threads);
    text = open_text_model(config.model.path);
    LeftOut left_out;
    samples = read_samples(text, config, read_train_files(config), &left_out);
    model = std::make_unique<Model>(*ops, config, text.shape);
    if (!config.model.adapter.empty()) load_adapter(*model, config.model.adapter);
  }
};

inline std::vector<Json> lines_of(const std::filesystem::path& file) {
  std::vector<Json> lines;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line));
  return lines;
}

}  // namespace kava
