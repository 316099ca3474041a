// What a run reads, by content: a run goes on wherever its data and its base lie, as long as they hold what they held at its start.
#pragma once
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "engine/data/data.h"
#include "models/text.h"

namespace kava {

struct DataDigest {
  std::string key;     // data.train or data.valid
  std::string sha256;  // of the file
  std::string format;  // by which it was read; empty where an older run does not say
  bool operator==(const DataDigest&) const = default;
};

using FileDigests = std::map<std::string, std::string>;  // file of a folder -> SHA-256

/// Of config.json, the tokenizer's files and, unless the weights are random, the weight files of a model folder.
FileDigests model_digests(const std::string& base, const ModelConfig& shape, Init init);

/// Whether a file of a model's or adapter's folder may hold what is read of it, by its name: its configuration, tokenizer or weights.
bool may_be_read(const std::filesystem::path& file);

/// Of the files of an adapter folder that may be read.
FileDigests folder_digests(const std::string& folder);

/// Error(code data) naming the file of data.train or data.valid whose content or form is not that of `before`.
void require_same_data(const RunConfig& config, const std::vector<DataDigest>& before, const std::vector<DataDigest>& now);

/// Error(code data) naming the file of `folder` (which `key` names) that differs from `before`; `remedy` is how to name another folder.
void require_same_files(const std::string& key, const std::string& folder, const FileDigests& before, const FileDigests& now,
                        const std::string& remedy);

}  // namespace kava
