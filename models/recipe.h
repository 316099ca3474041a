// What a method runs, as data. The step, its lengths and FLOPs, the files and decoding ask a recipe and never the method, so that a method
// is a row of recipe_of.
//   teacher  Q C prompt A EOS                          supervised after Q
//   student  Q [bot latent*N eot] rest prompt A EOS    supervised after eot, or after Q where there are no markers
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "engine/config/config.h"
#include "engine/data/data.h"

namespace kava {

struct Recipe {
  bool teacher = false, student = false;  // the sequences that are run
  bool markers = false;                   // the student's bot and eot
  int32_t latents = 0, iterations = 0;    // N and T of the student; with a curriculum of steps, those of the sample with the most

  /// What of the trace the student still writes: nothing, or what is left without `removed` steps or tokens.
  enum class Rest { none, steps, tokens } rest = Rest::none;
  int64_t removed = 0;
  // Steps: `thoughts` latents stand for each of the first max_stage steps.
  int32_t thoughts = 0, max_stage = 0;
  bool pad_to_max = true, feedback = true;
  // Tokens: from which end, and whether those that are left keep the positions that they had.
  bool from_right = false, keep_positions = false;

  // Random draws of a training step: a sample of another stage, further tokens.
  double mix = 0, smoothing = 0;
  int64_t seed = 0, step = 0;

  // Decoding.
  bool forced = true;  // the prompt is given
  int32_t ends = 1;    // how many EOS end the answer

  bool has_stages() const { return rest != Rest::none; }
};

/// What is run at a stage, without draws; methods without stages have stage 0 alone. icot's stage is the number of removed tokens.
Recipe recipe_of(const RunConfig& config, int64_t stage);
/// At the first stage.
Recipe recipe_of(const RunConfig& config);
/// At the first stage of the curriculum, and at its last one.
int64_t first_stage(const RunConfig& config);
int64_t last_stage(const RunConfig& config);

/// What decoding runs before the first token: a student on the question, of whose answer only the prompt is given, if that.
Recipe decoding_recipe(const RunConfig& config, int64_t stage);
/// With the latents of the run's last stage.
Recipe decoding_recipe(const RunConfig& config);

/// What a recipe makes of one sample: its latents, and the part of its trace that the student still writes.
struct Cut {
  int32_t latents = 0, iterations = 0;
  int32_t begin = 0, end = 0;  // rest = trace[begin, end)
  int32_t gap = 0, shift = 0;  // from this row of [Q, rest, ...] on, positions are larger by `shift`
  int32_t rest() const { return end - begin; }
};
/// index: the sample's in the optimiser batch, on which the draws depend.
Cut cut_of(const Recipe& recipe, const Sample& sample, int64_t index);

/// What follows Q in the teacher, and eot (or Q) in the student: every token is supervised.
std::vector<int32_t> teacher_tail(const Sample& sample);
std::vector<int32_t> student_tail(const Sample& sample, const Cut& cut);

/// In tokens; 0 for a sequence that is not run.
struct Lengths {
  int64_t teacher = 0, student = 0;            // whole sequences, new tokens included
  int64_t teacher_tail = 0, student_tail = 0;  // the supervised part
  int64_t tokens = 0;                          // of the data that the sequences hold, each once
  int64_t latents = 0, rest = 0;
  int64_t longest() const { return teacher > student ? teacher : student; }
};
Lengths lengths_of(const Recipe& recipe, const Sample& sample, const Cut& cut);
inline Lengths lengths_of(const Recipe& recipe, const Sample& sample, int64_t index) {
  return lengths_of(recipe, sample, cut_of(recipe, sample, index));
}

/// The stages among which a run's longest sequences and largest batches are.
std::vector<int64_t> planned_stages(const RunConfig& config);
/// Tokens of the longest sequence that a run puts the sample into, draws aside.
int64_t longest_sequence(const RunConfig& config, const Sample& sample);
/// Positions that a run needs for the sample: as many as that, those that icot keeps and those of stages that are drawn included.
int64_t needed_positions(const RunConfig& config, const Sample& sample);

}  // namespace kava
