// Samples of data.train kept in the user's cache folder, under a name that says all that they depend on.
#pragma once
#include <filesystem>
#include <optional>
#include <string>

#include "engine/config/config.h"
#include "models/train_samples.h"

namespace kava {

/// KAVA_CACHE/tokens/KEY.bin. A file that is cut, changed or made by somebody else counts as not there.
class TokenCache {
 public:
  /// key: hex digits.
  explicit TokenCache(const std::string& key);

  /// The samples with facts under the paths of `files`; nothing where they are not kept, or what is kept holds an id that is not below
  /// `vocab` or does not fit together.
  std::optional<TrainSamples> read(const std::vector<DataFile>& files, int64_t vocab) const;
  /// Does nothing where there is no room or no folder. The kMost newest files stay.
  void write(const TrainSamples& samples) const;

  static constexpr std::size_t kMost = 8;

 private:
  std::filesystem::path path_;
  std::string key_;
};

}  // namespace kava
