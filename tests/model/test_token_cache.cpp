// Kept samples: read back as they were, and nothing else is taken for them.
#include <catch2/catch_test_macros.hpp>

#include "engine/files/files.h"
#include "models/token_cache.h"
#include "tests/model/train_rig.h"
#include "tests/programs/programs.h"

using namespace kava;

TEST_CASE("kept samples read back as they were, and a file that is cut or changed anywhere is not used") {
  TempFolder folder;
  const WithVariable cache_folder("KAVA_CACHE", folder.path().string());
  TinyRun tiny;
  TrainSamples all{tiny.samples, {}, {}};
  const std::vector<DataFile>& files = tiny.config.data.train;
  all.files.push_back({files[0].path, DataFormat::ids, "sha", "answer, question, trace", 5, true});
  const TokenCache cache("abc"), other("abd");
  CHECK_FALSE(cache.read(files, tiny.text.shape.vocab));
  cache.write(all);
  const auto back = cache.read(files, tiny.text.shape.vocab);
  REQUIRE(back);
  REQUIRE(back->samples.size() == all.samples.size());
  for (std::size_t i = 0; i < all.samples.size(); ++i) {
    const Sample &a = back->samples[i], &b = all.samples[i];
    CHECK((a.question == b.question && a.trace == b.trace && a.answer == b.answer && a.steps == b.steps));
    CHECK((a.prompt == b.prompt && a.row == b.row && a.line == b.line && a.blank == b.blank));
  }
  CHECK((back->files[0].keys == all.files[0].keys && back->files[0].rows == 5 && back->files[0].chain));
  CHECK_FALSE(cache.read(files, 10));  // ids that the model does not have
  CHECK_FALSE(cache.read({}, tiny.text.shape.vocab));
  const std::string path = folder / "tokens/abc.bin", bytes = read_file(path, 1 << 20);
  overwrite(folder / "tokens/abd.bin", bytes);  // another key's
  CHECK_FALSE(other.read(files, tiny.text.shape.vocab));
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::string changed = bytes;
    changed[i] = static_cast<char>(changed[i] ^ 0x41);
    overwrite(path, changed);
    CHECK_FALSE(cache.read(files, tiny.text.shape.vocab));
    overwrite(path, bytes.substr(0, i));
    CHECK_FALSE(cache.read(files, tiny.text.shape.vocab));
  }
  overwrite(path, bytes);
  CHECK(cache.read(files, tiny.text.shape.vocab));
}
