// What an answer owes to the latents: every question answered once more with the latents of the last pass replaced by something that says
// nothing of it. Their keys (before RoPE, turned to the row's own position) and values are replaced in every layer:
//   zero        by zeros
//   mean        by the mean of the slot over all questions
//   shuffle     by those of question (i + 1) mod n
//   boundaries  they are left out; eot stays at its usual position
#pragma once
#include <array>
#include <functional>
#include <span>
#include <vector>

#include "engine/choice.h"
#include "models/decode.h"

namespace kava {

KAVA_CHOICE(Control, zero, mean, shuffle, boundaries)
constexpr std::size_t kControls = 4;

/// A question's answer, and the gold one under teacher forcing.
struct Controlled {
  DecodeResult answer;
  double gold_nll = 0;      // sum over the gold answer's tokens, EOS among them, prompt not
  int64_t gold_tokens = 0;  // of those; 0 where they end behind the model's last position, and are not run
};
struct ControlledQuestion {
  Controlled intact;
  std::array<Controlled, kControls> controls;  // by Control
};

/// Decodes all questions, whose answers are read, greedily, five times. The recipe has latents. `done` is told of the questions that are
/// through with part of it, from 0 to 1 each. The same for any batch.
std::vector<ControlledQuestion> decode_controls(Model& model, Arena& arena, std::span<const Sample> samples, const DecodeOptions& options,
                                                const std::function<void(double done)>& progress);

}  // namespace kava
