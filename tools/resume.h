// How kava_train begins in a folder: anew, or from a checkpoint and with what of the configuration changed.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "engine/config/config.h"
#include "engine/files/checkpoint.h"
#include "models/training_state.h"

namespace kava {

/// Error(code data) where `resume` is asked for and there is no such folder, (code preflight) where none could be made or written.
/// Without it, tells on stdout of a folder that is there and empty that the run begins in it.
void require_place(const std::filesystem::path& out, bool resume);

/// The checkpoint that a run in `out` goes on from; nothing where it begins at step 0. For the process that has locked it. Tells on stdout
/// what it passed over, and that a run which died before its first checkpoint begins again, but for what require_place has told. Error(code
/// usage) where there is a run and `resume` is not asked for, (code data) where there is nothing to go on from.
std::optional<Checkpoint> checkpoint_to_begin_from(const std::filesystem::path& out, bool resume);

/// What a run goes on with.
struct Continued {
  TrainingState state;
  RunConfig config;                 // with the partition of the batches that the run was started with
  RunConfig before;                 // as config.toml says it
  std::vector<std::string> length;  // what differs of train.max_steps and train.epochs, in words
  std::vector<std::string> notes;   // what else goes on differently, in words

  bool same_length() const { return length.empty() && notes.empty(); }
};

/// The checkpoint's state under the configuration `given`. Error(code usage) naming what has changed: a fixed key, or without `extend` one
/// that only it may change. A run with a constant learning rate, whose warm-up stays over, may become longer without it. Any number of
/// ranks may go on; where train.micro_batch becomes 0 it is that of `ranks`.
Continued go_on(const std::filesystem::path& out, const Checkpoint& checkpoint, const RunConfig& given, bool extend, int ranks);

/// Error(code data) naming a file or folder of the configuration that a run cannot go on without and that is not there.
void require_contents_there(const RunConfig& config);

/// Whether two configurations name the same model and data.
bool same_inputs(const RunConfig& a, const RunConfig& b);
/// `config` with model and data as `before` names them where all that it names anew is not there.
RunConfig with_inputs_there(RunConfig config, const RunConfig& before);

/// Error(code usage) where a run in `out` would write over a file that it reads. `file` is that of the configuration.
void require_out_is_no_input(const std::filesystem::path& out, const std::string& file, const RunConfig& config, bool resume);

}  // namespace kava
