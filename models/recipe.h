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
  int32_t latents = 0, iterations = 0;    // N and T of the student
  bool forced = true;                     // decoding: the prompt is given
};

/// What training runs at a stage; methods without stages have stage 0 alone.
Recipe recipe_of(const RunConfig& config, int64_t stage = 0);

/// What decoding runs before the first token: a student on the question, of whose answer only the prompt is given, if that.
Recipe decoding_recipe(const RunConfig& config);

/// What a recipe makes of one sample: its latents, and the part of its trace that the student still writes.
struct Cut {
  int32_t latents = 0, iterations = 0;
  int32_t begin = 0, end = 0;  // rest = trace[begin, end)
  int32_t rest() const { return end - begin; }
};
Cut cut_of(const Recipe& recipe, const Sample& sample);

/// What follows Q in the teacher, and eot (or Q) in the student: every token is supervised.
std::vector<int32_t> teacher_tail(const Sample& sample);
std::vector<int32_t> student_tail(const Sample& sample, const Cut& cut);

/// In tokens; 0 for a sequence that is not run.
struct Lengths {
  int64_t teacher = 0, student = 0;            // whole sequences, new tokens included
  int64_t teacher_tail = 0, student_tail = 0;  // the supervised part
  int64_t tokens = 0;                          // of the data that the sequences hold, each once
  int64_t latents = 0;
  int64_t longest() const { return teacher > student ? teacher : student; }
};
Lengths lengths_of(const Recipe& recipe, const Sample& sample, const Cut& cut);
inline Lengths lengths_of(const Recipe& recipe, const Sample& sample) { return lengths_of(recipe, sample, cut_of(recipe, sample)); }

/// Tokens of the longest sequence that a run puts the sample into.
int64_t longest_sequence(const RunConfig& config, const Sample& sample);

}  // namespace kava
