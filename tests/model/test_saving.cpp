// What a checkpoint costs while it is written.
#include <malloc.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <sstream>

#include "engine/files/files.h"
#include "engine/files/json.h"
#include "models/run_folder.h"
#include "tests/model/resident.h"
#include "tests/model/train_rig.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

// By this process, with what the page cache gave.
std::int64_t bytes_read() {
  std::istringstream io(read_file("/proc/self/io", 1 << 16));
  std::int64_t bytes = -1;
  for (std::string key; io >> key >> bytes;)
    if (key == "rchar:") return bytes;
  FAIL("no rchar in /proc/self/io");
  return bytes;
}

}  // namespace

TEST_CASE("saving a checkpoint takes no more memory than its largest tensor, and reads nothing back") {
#if defined(KAVA_ASAN) || defined(KAVA_TSAN)
  SKIP("a sanitizer keeps what is freed");
#endif
  TempFolder folder;
  // Ten tensors of 8 MiB and more, of each of which a checkpoint holds four copies.
  const bool gpt2 = GENERATE(false, true);  // whose matrices lie in files by columns
  Json shape = read_json(kGolden + (gpt2 ? "models/gpt2/config.json" : "models/llama/config.json"));
  if (gpt2) {
    shape["n_embd"] = 256, shape["n_inner"] = 8192, shape["vocab_size"] = 8192, shape["n_layer"] = 5, shape["n_head"] = 4;
  } else {
    shape["hidden_size"] = 256, shape["intermediate_size"] = 8192, shape["vocab_size"] = 8192, shape["num_hidden_layers"] = 3;
    shape["num_attention_heads"] = 4, shape["num_key_value_heads"] = 2, shape["head_dim"] = 64;
  }
  const std::int64_t largest = std::int64_t{8192} * 256 * 4;
  overwrite(folder / "config.json", shape.dump());
  overwrite(folder / "c.toml", tiny_toml());
  const RunConfig config = load_config(
      folder / "c.toml", {"model.path=" + folder.path().string(), "model.init=random", "train.trainable=all", "latent.count=2"});
  const auto ops = make_cpu_ops(1);
  const Model model(*ops, config, ModelConfig::load(folder.path().string()));
  TrainingState state;
  state.step = 3;
  RunFolder out(folder.path() / "run");
  out.open(config, state);
  out.save(model, state);  // what is loaded once
  ++state.step;
  ::malloc_trim(0);
  if (!forget_highest()) SKIP("/proc/self/clear_refs cannot be written");
  const std::int64_t before = status_bytes("VmRSS"), read_before = bytes_read();
  out.save(model, state);
  const std::int64_t grown = status_bytes("VmHWM") - before, read = bytes_read() - read_before;
  INFO(grown << " bytes; the largest tensor has " << largest);
  // The buffer of a file, parts of a tensor on their way, and what the heap keeps of small things.
  CHECK(grown < largest + (std::int64_t{4} << 20));
  CHECK(read < (std::int64_t{1} << 20));  // what is written is hashed on its way
  CHECK(fs::file_size(folder.path() / "run/last/optimizer.safetensors") > 10 * 3 * static_cast<std::uintmax_t>(largest));
}
