// Decoding with a K,V cache: the question, bot and the latents through all passes, then `<eot> prompt`, then token after token, the best
// one or one that is drawn. A token is a new pass of one row for each answer that is still written; a finished one leaves the batch. What a
// question gives does not depend on what else is in the batch, to the byte.
#pragma once
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "engine/data/data.h"
#include "models/model.h"
#include "models/recipe.h"
#include "models/sampling.h"

namespace kava {

/// Samples decoded together, where memory allows.
constexpr int64_t kDecodeBatch = 128;

/// In place of what the run was trained with: its method, its last stage, the number of latents and of iterations on them.
struct DecodeChoice {
  std::optional<Method> method;
  std::optional<int64_t> stage, latents, iterations;
};

/// The configuration and recipe that decode by a choice. codi iterates once per latent, unless told otherwise. latents and iterations are
/// for methods without stages.
struct Decoding {
  RunConfig config;
  Recipe recipe;
};
Decoding decoding_of(const RunConfig& run, const DecodeChoice& choice);

struct DecodeResult;

struct DecodeOptions : DecodeChoice {
  int64_t max_new_tokens = 10;   // EOS counts as one
  int32_t eos = -1;              // a negative one never comes
  int64_t batch = kDecodeBatch;  // fewer are taken where they would need more than 2 GiB
  bool keep_latents = false;
  Sampling sampling;
  std::vector<int64_t> numbers;  // of the questions, for what is drawn; empty: their places
  /// Told of every token but the last EOS as it comes: of which result in the order of this batch's.
  std::function<void(std::size_t result, int32_t id)> on_token;
  /// Told of a question, by its number, once all its answers are there, without latents.
  std::function<void(int64_t number, std::span<const DecodeResult> answers)> on_answers;
};

/// The latents of pass T, in order.
struct LatentStates {
  std::vector<float> values;       // [M, K*D]: their value rows in the first layer
  std::vector<float> hidden;       // [M, C]: their final hidden states
  std::vector<int32_t> top;        // [M]: the head's argmax on those
  std::vector<int32_t> positions;  // [M]
};

struct DecodeResult {
  std::vector<int32_t> ids;  // generated, without EOS
  int64_t tokens = 0;        // generated, EOS included
  bool hit_limit = false;    // max_new_tokens, or the last position, came before EOS
  // Forward passes that are run, by the rule of docs/method.md section 7: with markers 1 + T + 1 (eot, a given prompt, the first token), T
  // being iterations_run, else 1 (everything given), and one for each generated token after the first, EOS included. merged: pass T and
  // eot count as one.
  int64_t passes = 0, passes_merged = 0;
  LatentStates latents;  // if asked for, with latents
  // Beside controls of the latents (models/controls.h): the gold answer under teacher forcing.
  double gold_nll = 0;      // sum over the gold answer's tokens, EOS among them, prompt not
  int64_t gold_tokens = 0;  // of those; 0 where they end behind the model's last position, and are not run
};

/// The longest question that is decoded, in tokens with bot, latents, eot and prompt: attention over it needs the square of that.
constexpr int64_t kLongestPrompt = 4096;
int64_t prompt_length(const Recipe& decoding, const Sample& question);
/// The same for a model, whose positions may be fewer.
int64_t longest_prompt(const ModelConfig& shape);

/// Decodes after each sample's question and, where the recipe gives it, the prompt that its answer starts with; trace and the rest of the
/// answer are not read. Every sample is at most longest_prompt long. The answers of a question follow each other, sampling.samples of them.
std::vector<DecodeResult> decode(Model& model, Arena& arena, std::span<const Sample> questions, const DecodeOptions& options);

}  // namespace kava
