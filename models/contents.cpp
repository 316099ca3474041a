#include "models/contents.h"

#include <filesystem>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/text/unicode.h"
#include "models/weights.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kLargestText = std::size_t{256} << 20;  // of a model's files beside its weights
constexpr const char* kChanged = "has changed since the run began";

// The path that stands at the i-th place of the files that a run reads.
std::string data_path(const RunConfig& config, std::size_t i) {
  return i < config.data.train.size() ? config.data.train[i].path : config.data.valid;
}

std::size_t count_of(const std::vector<DataDigest>& all, const std::string& key) {
  std::size_t n = 0;
  for (const DataDigest& d : all) n += d.key == key;
  return n;
}

}  // namespace

FileDigests model_digests(const std::string& base, const ModelConfig& shape, Init init) {
  const fs::path folder = base;
  FileDigests digests;
  for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                           "vocab.json", "merges.txt"})
    if (is_there(folder / name)) digests[name] = sha256(read_file((folder / name).string(), kLargestText));
  if (init == Init::pretrained)
    for (const std::string& path : WeightFiles::open(base, shape).paths()) digests[fs::path(path).filename().string()] = sha256_file(path);
  return digests;
}

bool may_be_read(const fs::path& file) {
  const std::string ending = file.extension().string();
  return is_utf8(file.filename().string()) && (ending == ".json" || ending == ".safetensors" || ending == ".bin");
}

FileDigests folder_digests(const std::string& folder) {
  FileDigests digests;
  std::error_code failed;
  for (fs::directory_iterator entry(folder, failed); !failed && entry != fs::directory_iterator(); entry.increment(failed))
    if (may_be_read(entry->path()) && fs::is_regular_file(entry->path()))
      digests[entry->path().filename().string()] = sha256_file(entry->path().string());
  return digests;
}

void require_same_data(const RunConfig& config, const std::vector<DataDigest>& before, const std::vector<DataDigest>& now) {
  for (const char* key : {"data.train", "data.valid"})
    if (const std::size_t old = count_of(before, key), there = count_of(now, key); old != there)
      throw Error(Exit::data, key, fmt::format("names {} files, and the run began with {}", there, old),
                  "restore it, or train into another --out");
  for (std::size_t i = 0; i < now.size(); ++i) {
    const std::string where = shown_path(data_path(config, i));
    if (before[i].sha256 != now[i].sha256)
      throw Error(Exit::data, where, kChanged,
                  fmt::format("restore the file, name it where it lies now with --set {}=..., or train into another --out", now[i].key));
    if (!before[i].format.empty() && before[i].format != now[i].format)
      throw Error(Exit::data, where, fmt::format("is read as {}, and was read as {}", now[i].format, before[i].format),
                  "restore its format in the configuration");
  }
}

void require_same_files(const std::string& key, const std::string& folder, const FileDigests& before, const FileDigests& now,
                        const std::string& remedy) {
  auto refuse = [&](const std::string& name, const std::string& what) {
    throw Error(Exit::data, shown_path(fs::path(folder) / name), what, "restore " + key + "'s folder, or " + remedy);
  };
  for (const auto& [name, sha256] : before) {
    if (key == "model.adapter" && !may_be_read(name)) continue;  // older runs recorded every file
    const auto found = now.find(name);
    if (found == now.end()) refuse(name, "is not there, and was when the run began");
    if (found->second != sha256) refuse(name, kChanged);
  }
  for (const auto& [name, sha256] : now)
    if (!before.contains(name)) refuse(name, "was not there when the run began");
}

}  // namespace kava
