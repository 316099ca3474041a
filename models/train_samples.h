// data.train as samples. Those of large files are kept in the user's cache folder (engine/files/cache.h), so that later starts do not read
// and tokenise the rows again.
#pragma once
#include <vector>

#include "engine/data/data.h"
#include "models/text.h"

namespace kava {

struct TrainSamples {
  std::vector<Sample> samples;   // in file order, without those that are left out
  std::vector<FileFacts> files;  // of data.train
  LeftOut left_out;
};

/// Reads data.train some rows at a time. Errors are those of read_rows and read_samples.
TrainSamples read_train_samples(const TextModel& text, const RunConfig& config);

}  // namespace kava
