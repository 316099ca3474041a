// Real weights: stories260k against its golden continuation and logits.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "engine/files/json.h"
#include "models/decode.h"
#include "models/kava.h"
#include "models/text.h"
#include "tests/folders.h"

using namespace kava;

TEST_CASE("stories260k continues and scores its golden text") {
  const std::string folder = shared_data("data/models/stories260k");
  if (folder.empty()) SKIP("the shared data are not here");
  const Json golden = read_json(folder + "/golden.json");
  const auto ids = golden.at("ids").get<std::vector<int32_t>>();
  RunConfig config;
  config.method = Method::full_cot;
  config.model.path = folder;
  config.model.dtype = StorageType::f32;
  config.lora.targets.clear();
  config.loss.student = config.kv.weight = config.codi.weight = 0;
  const TextModel text = open_text_model(folder);
  const auto ops = make_cpu_ops(2);
  Model model(*ops, config, text.shape);
  Arena arena(*ops);

  Sample sample;
  sample.question = {ids[0]};
  DecodeOptions options;
  options.max_new_tokens = static_cast<int64_t>(ids.size()) - 1;
  const DecodeResult result = decode(model, arena, std::span(&sample, 1), options)[0];
  CHECK(result.ids == std::vector<int32_t>(ids.begin() + 1, ids.end()));

  sample.answer.assign(ids.begin() + 1, ids.end());
  sample.answer.push_back(2);
  Dump dump;
  StepOptions step;
  step.backward = false, step.dump = &dump;
  run_step(model, arena, std::span(&sample, 1), batch_totals(config, recipe_of(config), std::span(&sample, 1)), step);
  const DumpTensor& logits = dump.at("logits.teacher");
  for (const auto& [place, expected] : golden.at("logits_at_position").items()) {
    const auto row = static_cast<std::size_t>(std::stoll(place));
    REQUIRE(static_cast<int64_t>(expected.size()) == logits.shape[1]);
    double most = 0;
    for (std::size_t j = 0; j < expected.size(); ++j)
      most = std::max(most, std::abs(logits.values[row * expected.size() + j] - expected[j].get<double>()));
    CAPTURE(place, most);
    CHECK(most <= 1e-4);
  }
}
