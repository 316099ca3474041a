// Adapters in the forms of PCCoT's and CODI's own programs: the values of a folder of kava's under their names, with the parts of the base
// that they store, mean the same here.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "engine/files/json.h"
#include "engine/files/paths.h"
#include "models/adapter.h"
#include "models/merge.h"
#include "models/upstream.h"
#include "tests/model/step_rig.h"

namespace fs = std::filesystem;
using namespace kava;
using namespace kava::test;
using Catch::Matchers::ContainsSubstring;

namespace {

using Sets = std::vector<std::string>;

constexpr std::int64_t kVocabulary = 61, kHidden = 16, kEnd = 2;  // of the golden llama

// FileTensors to write, with their values.
struct FileTensors {
  void add(const std::string& name, std::vector<std::int64_t> shape, const std::vector<double>& x) {
    names.push_back(name), shapes.push_back(std::move(shape)), values.push_back(x);
  }
  void write(const std::string& path) const {
    std::vector<TensorOut> out;
    for (std::size_t i = 0; i < names.size(); ++i) out.push_back({names[i], "F64", shapes[i], values[i].data()});
    write_safetensors(path, out);
  }
  std::size_t at(const std::string& name) const { return static_cast<std::size_t>(std::ranges::find(names, name) - names.begin()); }

  std::vector<std::string> names;
  std::vector<std::vector<std::int64_t>> shapes;
  std::vector<std::vector<double>> values;
};

std::vector<double> rows_of(const std::vector<double>& x, std::int64_t begin, std::int64_t count) {
  return {x.begin() + begin * kHidden, x.begin() + (begin + count) * kHidden};
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  if (const std::size_t at = text.find(from); at != std::string::npos) text.replace(at, from.size(), to);
  return text;
}

// latent_projection's names in the two programs.
std::string projection_name(std::string name, const std::string& linear1, const std::string& linear2, const std::string& norm) {
  name = replaced(name, "latent_projection.linear1", linear1);
  return replaced(replaced(name, "latent_projection.linear2", linear2), "latent_projection.norm", norm);
}

const std::vector<double> kEndRow = drawn("the row of EOS", kHidden);

// Three tokens were added, so that PEFT stored embedding and head whole; EOS is also what pads.
FileTensors pccot_tensors(const StepRig& rig) {
  FileTensors t;
  for (const Parameter& p : rig.model->parameters.all())
    if (p.name != "new_tokens.weight")
      t.add(projection_name(p.name, "base_model.model.prj.0", "base_model.model.prj.2", "base_model.model.prj.3"), p.file_shape(),
            rig.value(p.name));
  const std::vector<double> tokens = rig.value("new_tokens.weight");
  std::vector<double> rows = rows_of(tokens, 2, 1);  // latent, bot, EOS, eot, EOS
  for (const auto& more : {rows_of(tokens, 0, 1), kEndRow, rows_of(tokens, 1, 1), kEndRow})
    rows.insert(rows.end(), more.begin(), more.end());
  for (const char* table : {"model.embed_tokens", "lm_head"}) {
    const std::string name = std::string("base_model.model.") + table + ".token_adapter.";
    t.add(name + "trainable_tokens_delta", {5, kHidden}, rows);
    t.add(name + "base_layer.weight", {kVocabulary + 3, kHidden}, drawn(name, static_cast<std::size_t>((kVocabulary + 3) * kHidden)));
  }
  return t;
}

void write_pccot(const StepRig& rig, const fs::path& folder, const FileTensors& tensors) {
  fs::create_directory(folder);
  tensors.write((folder / "adapter_model.safetensors").string());
  const Json config = {{"peft_type", "LORA"},
                       {"r", rig.config.lora.rank},
                       {"lora_alpha", rig.config.lora.alpha},
                       {"target_modules", rig.config.lora.targets},
                       {"modules_to_save", {"prj"}},
                       {"trainable_token_indices", {{"embed_tokens", {kVocabulary + 2, kVocabulary, kEnd, kVocabulary + 1, kEnd}}}}};
  overwrite(folder / "adapter_config.json", config.dump());
  overwrite(folder / "pccot_args.json", R"({"bot_token_id": 61, "eot_token_id": 62, "latent_token_id": 63, "num_latent_tokens": 5})");
}

// The whole model, another one than the base's folder holds, and the head that is tied once more.
FileTensors codi_tensors(const StepRig& rig) {
  FileTensors t;
  for (const Parameter& p : rig.model->parameters.all()) {
    if (p.name == "new_tokens.weight") continue;
    std::string name = projection_name(p.name, "prj.1", "prj.3", "prj.ln");
    if (name == p.name) name = "codi." + replaced(name, ".weight", ".default.weight");
    t.add(name, p.file_shape(), rig.value(p.name));
  }
  const std::vector<double> tokens = rig.value("new_tokens.weight");
  for (const WeightSpec& w : weight_specs(rig.text.shape)) {
    std::vector<double> x = drawn("codi " + w.name, static_cast<std::size_t>(w.rows * w.cols));
    std::vector<std::int64_t> shape = w.file_shape();
    if (w.role == WeightSpec::Role::embedding) {
      x.insert(x.end(), kHidden, 9);  // pad
      x.insert(x.end(), tokens.begin(), tokens.begin() + 2 * kHidden);
      shape[0] += 3;
    }
    const std::string module = w.name.substr(0, w.name.size() - std::string(".weight").size());
    const bool adapted = is_adapted(rig.config.lora.targets, module);
    t.add("codi.base_model.model." + module + (adapted ? ".base_layer.weight" : ".weight"), shape, x);
  }
  const std::size_t embedding = t.at("codi.base_model.model.model.embed_tokens.weight");
  t.add("codi.base_model.model.lm_head.weight", t.shapes[embedding], t.values[embedding]);
  return t;
}

// T = M, as CODI has it.
const Sets kCodiSets = {"latent.iterations=5"};

std::string load_refusal(const Sets& sets, const fs::path& folder) {
  StepRig rig(sets, 1, 0);
  try {
    load_adapter(*rig.model, folder.string());
  } catch (const Error& e) {
    CHECK(e.code() == Exit::data);
    return e.what();
  }
  return "";
}

std::vector<double> embedding_of(const StepRig& rig) { return to_host(*rig.ops, rig.model->embedding); }

}  // namespace

TEST_CASE("a folder of PCCoT's program is read: LoRA, new tokens, projection, and the row of EOS in the base") {
  const TempFolder folder;
  StepRig rig({});
  write_pccot(rig, folder.path() / "a", pccot_tensors(rig));
  StepRig read({}, 1, 0);
  std::vector<double> want = embedding_of(read);
  std::ranges::copy(kEndRow, want.begin() + kEnd * kHidden);
  load_adapter(*read.model, folder / "a");
  for (const Parameter& p : rig.model->parameters.all()) {
    INFO(p.name);
    CHECK(read.value(p.name) == rig.value(p.name));
  }
  CHECK(embedding_of(read) == want);
  // What the products read, too: a base in which that row stands gives the same.
  from_host(*rig.ops, rig.model->embedding, want);
  rig.model->parameters.refresh();
  CHECK(read.run().total == rig.run().total);
}

TEST_CASE("a folder of CODI's program is read: the whole model, whatever the base's folder holds") {
  const TempFolder folder;
  StepRig rig(kCodiSets);
  const FileTensors tensors = codi_tensors(rig);
  tensors.write(folder / "model.safetensors");
  StepRig read(kCodiSets, 1, 0);
  load_adapter(*read.model, folder.path().string());
  for (const Parameter& p : rig.model->parameters.all()) {
    INFO(p.name);
    std::vector<double> want = rig.value(p.name);
    if (p.name == "new_tokens.weight") std::fill(want.begin() + 2 * kHidden, want.end(), 0.0);  // no latent there
    CHECK(read.value(p.name) == want);
  }
  for (const WeightSpec& w : weight_specs(rig.text.shape)) {
    INFO(w.name);
    const Tensor t = read.model->base_tensor(w.name);
    std::vector<double> found;
    for (std::int64_t r = 0; r < t.rows; ++r) {
      const std::vector<double> row = to_host(*read.ops, t.row_range(r, r + 1));
      found.insert(found.end(), row.begin(), row.end());
    }
    CHECK(found == drawn("codi " + w.name, static_cast<std::size_t>(w.rows * w.cols)));
  }
  CHECK_THAT(load_refusal({}, folder.path()), ContainsSubstring("no row of latent"));
}

TEST_CASE("what such a folder lacks, has too much or has in another shape is refused by its name") {
  const TempFolder folder;
  StepRig rig({}), codi(kCodiSets);
  const FileTensors pccot = pccot_tensors(rig), model = codi_tensors(codi);
  auto refused = [&](bool of_codi, auto change) {
    const fs::path path = folder.path() / "changed";
    fs::remove_all(path);
    FileTensors t = of_codi ? model : pccot;
    change(t);
    if (of_codi) fs::create_directory(path), t.write((path / "model.safetensors").string());
    else write_pccot(rig, path, t);
    return load_refusal(of_codi ? kCodiSets : Sets{}, path);
  };
  for (const bool of_codi : {false, true}) {
    const FileTensors& whole = of_codi ? model : pccot;
    CHECK(refused(of_codi, [](FileTensors&) {}).empty());
    for (const std::string& name : whole.names) {
      // The head of PCCoT says again what stands elsewhere, the embedding's own rows are the base's.
      if (name.find("lm_head") != std::string::npos || name.ends_with("token_adapter.base_layer.weight")) continue;
      INFO(name);
      CHECK_FALSE(refused(of_codi, [&](FileTensors& t) { t.names[t.at(name)] = "another." + name; }).empty());
      CHECK_FALSE(refused(of_codi, [&](FileTensors& t) {
                    const std::size_t at = t.at(name);
                    t.shapes[at].back() += 1;
                    std::int64_t count = 1;
                    for (const std::int64_t d : t.shapes[at]) count *= d;
                    t.values[at].resize(static_cast<std::size_t>(count));
                  }).empty());
      CHECK_FALSE(refused(of_codi, [&](FileTensors& t) { t.values[t.at(name)].front() = NAN; }).empty());
    }
    CHECK_THAT(refused(of_codi, [](FileTensors& t) { t.add("codi.base_model.model.model.layers.9.mlp.up_proj.weight", {1}, {1}); }),
               ContainsSubstring("layers.9"));
  }
  write_pccot(rig, folder.path() / "p", pccot);
  CHECK_THAT(load_refusal({"method=full_cot"}, folder / "p"), ContainsSubstring("method full_cot has none"));
  CHECK_THAT(load_refusal({"train.trainable=all"}, folder / "p"), ContainsSubstring("train.trainable"));
  CHECK_THAT(load_refusal({"lora.alpha=4.0"}, folder / "p"), ContainsSubstring("lora_alpha"));
  overwrite(folder / "p/pccot_args.json", R"({"bot_token_id": 61, "eot_token_id": 62, "latent_token_id": 60})");
  CHECK_THAT(load_refusal({}, folder / "p"), ContainsSubstring("latent_token_id = 60"));
  overwrite(folder / "p/pccot_args.json", R"({"bot_token_id": 61, "eot_token_id": -1, "latent_token_id": 63})");
  CHECK_THAT(load_refusal({}, folder / "p"), ContainsSubstring("eot_token_id"));
}

TEST_CASE("such an adapter merged is a base with the rows and weights that it holds") {
  const TempFolder folder;
  StepRig rig({}), codi(kCodiSets);
  const std::string base = rig.config.model.path;
  write_pccot(rig, folder.path() / "p", pccot_tensors(rig));
  fs::create_directory(folder.path() / "c");
  const FileTensors model = codi_tensors(codi);
  model.write(folder / "c/model.safetensors");
  const MergeInput inputs[] = {peft_merge_input(folder / "p", base), codi_merge_input(folder / "c", base, codi.config)};
  const SafetensorsFile plain = SafetensorsFile::open(path_in(base, "model.safetensors"));
  for (const MergeInput& input : inputs) {
    const bool of_codi = &input != inputs;
    const std::string out = folder / (of_codi ? "merged_c" : "merged_p");
    FolderWriter writer(out);
    write_merged(*rig.ops, input, DType::f32, writer);
    writer.commit();
    const SafetensorsFile merged = SafetensorsFile::open(path_in(out, "model.safetensors"));
    REQUIRE(merged.tensors().size() == plain.tensors().size());
    for (const WeightSpec& w : weight_specs(rig.text.shape)) {
      INFO(w.name);
      std::vector<double> want(static_cast<std::size_t>(w.rows * w.cols)), found(want.size());
      if (of_codi) want = drawn("codi " + w.name, want.size());
      else plain.read_as(*plain.find(w.name), DType::f64, want.data());
      if (!of_codi && w.role == WeightSpec::Role::embedding) std::ranges::copy(kEndRow, want.begin() + kEnd * kHidden);
      const StepRig& from = of_codi ? codi : rig;
      const std::string lora = kLoraPrefix + w.name.substr(0, w.name.size() - std::string("weight").size());
      if (from.model->parameters.find(lora + "lora_A.weight")) {
        const std::vector<double> a = from.value(lora + "lora_A.weight"), b = from.value(lora + "lora_B.weight");
        const auto rank = static_cast<std::size_t>(from.config.lora.rank), cols = static_cast<std::size_t>(w.cols);
        for (std::size_t i = 0; i < want.size(); ++i)
          for (std::size_t k = 0; k < rank; ++k)
            want[i] += from.config.lora.alpha / static_cast<double>(rank) * b[i / cols * rank + k] * a[k * cols + i % cols];
      }
      merged.read_as(*merged.find(w.name), DType::f64, found.data());
      // Rounded once to f32.
      for (std::size_t i = 0; i < want.size(); ++i) CHECK(std::abs(found[i] - want[i]) <= 0x1p-23 * std::abs(want[i]) + 1e-15);
    }
  }
}
