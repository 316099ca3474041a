// Where a run stands, and the two files of a checkpoint that hold it beside the adapter (docs/formats.md):
//   optimizer.safetensors   value.NAME, m.NAME, v.NAME of every trainable, in the type they are computed in, so that a resumed run has the
//                           bytes of an uninterrupted one (the adapter is f32, and rounds the values of an f64 run)
//   state.json              the counters below, the best step, the digests of what the run reads
#pragma once
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "engine/files/writers.h"
#include "models/contents.h"
#include "models/model.h"

namespace kava {

struct Best {
  int64_t step = 0;
  double score = 0;  // share of the validation rows that are right by the strict rule
  double loss = std::numeric_limits<double>::infinity();
  /// Whether a validation of this score and loss takes its place: a higher score, or the same and a lower loss.
  bool beaten_by(double new_score, double new_loss) const {
    return new_score > score || (new_score == score && (new_loss < loss || (std::isnan(loss) && !std::isnan(new_loss))));
  }
};

struct TrainingState {
  int64_t step = 0;            // optimiser steps done
  int64_t total_steps = 0;     // of the whole run
  int64_t epoch = 0;           // of the next batch, from 0
  int64_t cursor = 0;          // samples of that epoch already used
  int64_t samples = 0;         // seen so far
  int64_t updates = 0;         // steps whose update was made
  int64_t moment_updates = 0;  // of those, since the moments were last zero
  int64_t skipped_in_row = 0;  // steps just before this one whose loss or gradient was not finite
  int64_t validated_step = -1;
  std::optional<int64_t> last_stage;  // of methods with stages: that of the run's last step, with which it is decoded
  double seconds = 0;                 // spent on steps
  std::optional<Best> best;
  // The keys that --extend changes, as the run has them: the batches' partition is the same on any number of devices. -1: not recorded.
  int64_t max_steps = -1, epochs = -1, micro_batch = -1;
  std::string device;
  std::vector<DataDigest> data;
  std::string base;     // digest of the base model's config.json and weight headers
  FileDigests model;    // of the base; empty where an older run does not say
  FileDigests adapter;  // of model.adapter
  bool older = false;   // by an older version, whose configuration hash covers other keys
  bool finished() const { return step >= total_steps; }
};

/// Writes both files into the folder, one tensor at a time. Error(code write).
void save_training_state(FolderWriter& folder, const Model& model, const TrainingState& state);

/// state.json of a checkpoint folder. Error(code data) where a key is missing or of the wrong type.
TrainingState load_training_state(const std::filesystem::path& folder);

/// Sets values and moments of all trainables from optimizer.safetensors. Error(code data) naming the tensor unless the file holds exactly
/// them.
void load_optimizer(Model& model, const std::filesystem::path& folder);

}  // namespace kava
