// Files of torch.save: a dict that torch itself wrote, and the same file with bytes changed.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "engine/files/torch_file.h"
#include "tests/folders.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;

namespace {

const std::string kDict = source_dir() + "/tests/fuzz/corpus/dict.bin";

std::vector<float> torch_values(const SafetensorsFile& file, const std::string& name) {
  const TensorInfo* t = file.find(name);
  INFO(name);
  REQUIRE(t);
  std::vector<float> out(static_cast<std::size_t>(t->count()));
  file.read_as(*t, DType::f32, out.data());
  return out;
}

// The message for the dict's file with one text in the place of another of its length, everywhere.
std::string refusal_of_changed(const TempFolder& folder, const std::string& from, const std::string& to) {
  std::string bytes = read_file(kDict, 1 << 20);
  REQUIRE(from.size() == to.size());
  REQUIRE(bytes.find(from) != std::string::npos);
  for (std::size_t at = 0; (at = bytes.find(from, at)) != std::string::npos;) bytes.replace(at, to.size(), to);
  overwrite(folder / "changed.bin", bytes);
  try {
    open_torch_file(folder / "changed.bin");
  } catch (const Error& e) {
    CHECK(e.code() == Exit::data);
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("a dict of tensors that torch.save wrote is read, each type, what is shared and parts") {
  const SafetensorsFile file = open_torch_file(kDict);
  REQUIRE(file.tensors().size() == 5);
  const std::vector<float> table = {0, 0.25f, 0.5f, 0.75f, 1, 1.25f};
  CHECK(torch_values(file, "embed.weight") == table);
  CHECK(torch_values(file, "tied") == table);
  CHECK(torch_values(file, "part") == std::vector<float>(table.begin() + 2, table.end()));
  CHECK(torch_values(file, "head.weight") == std::vector<float>{-3, -2, -1, 0, 1, 2});
  CHECK(torch_values(file, "norm") == std::vector<float>{1, -2});
  CHECK(file.find("embed.weight")->shape == std::vector<std::int64_t>{3, 2});
  CHECK(file.find("part")->shape == std::vector<std::int64_t>{2, 2});
  CHECK(file.find("head.weight")->dtype == "BF16");
  CHECK(file.find("norm")->dtype == "F16");
}

TEST_CASE("a folder's tensors are those of its safetensors file, else of torch's") {
  const TempFolder folder;
  CHECK_THROWS_AS(open_either_file(folder.path().string(), "model", "other"), Error);
  std::filesystem::copy_file(kDict, folder / "other.bin");
  CHECK(open_either_file(folder.path().string(), "model", "other").find("tied"));
  const float one = 1;
  write_safetensors(folder / "model.safetensors", {{"a", "F32", {1}, &one}});
  CHECK(open_either_file(folder.path().string(), "model", "other").find("a"));
}

TEST_CASE("a pickle that would do more than make tensors is refused by what it names") {
  const TempFolder folder;
  CHECK(refusal_of_changed(folder, "part", "Part").empty());
  CHECK_THAT(refusal_of_changed(folder, "_rebuild_tensor_v2", "_rebuild_tensor_v3"), ContainsSubstring("torch._utils _rebuild_tensor_v3"));
  CHECK_THAT(refusal_of_changed(folder, "ccollections\nOrderedDict", "cposixsystem\nOrderedDict"), ContainsSubstring("posixsystem"));
  CHECK_THAT(refusal_of_changed(folder, "ctorch\nHalfStorage", "ctorch\nGulfStorage"), ContainsSubstring("GulfStorage"));
  CHECK_THAT(refusal_of_changed(folder, "little", "bigger"), ContainsSubstring("little-endian"));
  CHECK_THAT(refusal_of_changed(folder, "tied", "part"), ContainsSubstring("\"part\" is there twice"));
  CHECK_THAT(refusal_of_changed(folder, "data/2", "data/7"), ContainsSubstring("lacks"));
  CHECK_THAT(refusal_of_changed(folder, "data.pkl", "data.bin"), ContainsSubstring("data.pkl"));
}

TEST_CASE("a file of torch.save that is cut, or has any byte changed, is refused or read, never worse") {
  const TempFolder folder;
  const std::string whole = read_file(kDict, 1 << 20);
  for (std::size_t size = 0; size < whole.size(); size += 7) {
    overwrite(folder / "cut.bin", whole.substr(0, size));
    CHECK_THROWS_AS(open_torch_file(folder / "cut.bin"), Error);
  }
  int read = 0;
  for (std::size_t at = 0; at < whole.size(); ++at) {
    std::string bytes = whole;
    bytes[at] = static_cast<char>(bytes[at] ^ 0xff);
    overwrite(folder / "changed.bin", bytes);
    try {
      const SafetensorsFile file = open_torch_file(folder / "changed.bin");
      for (const TensorInfo& t : file.tensors()) {
        std::string data(t.end - t.begin, '\0');
        file.read(t, data.data());
      }
      ++read;
    } catch (const Error& e) {
      CHECK(e.code() == Exit::data);
    }
  }
  CHECK(read > 0);
}
