// What an answer owes to the latents: every question answered once more with the latents of the last pass replaced by something that says
// nothing of it. Their keys (before RoPE, turned to the row's own position) and values are replaced in every layer:
//   zero        by zeros
//   mean        by the mean of the slot over all questions
//   shuffle     by those of question (i + 1) mod n
//   boundaries  they are left out; eot stays at its usual position
#pragma once
#include <array>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "engine/choice.h"
#include "engine/device/comm.h"
#include "models/decode.h"

namespace kava {

KAVA_CHOICE(Control, zero, mean, shuffle, boundaries)
constexpr std::size_t kControls = 4;

struct ControlledQuestion {
  DecodeResult intact;
  std::array<DecodeResult, kControls> controls;  // by Control
};

/// A question's answers, the intact model's and one by control. They come in two parts: a mean is known when all questions have been seen.
constexpr std::size_t kAllAnswers = 1 + kControls, kFirstAnswers = kAllAnswers - 1;

struct ControlWork {
  Comm* comm = nullptr;  // ranks that share the questions, and all get the whole result; absent: this process is alone
  /// Told on every rank at once of the questions that are through with part of it, from 0 to 1 each.
  std::function<void(double done)> progress;
  /// By question: [intact, zero, shuffle, boundaries] or, behind them, mean too, from an interrupted call. They are not decoded again.
  std::map<std::size_t, std::vector<DecodeResult>> known;
  /// Told of what comes of this rank's in that order: the first four of a question, later its last.
  std::function<void(std::size_t question, std::span<const DecodeResult> answers)> answered;
};

/// Decodes all questions, whose answers are read, greedily, five times. The recipe has latents. The same for any batch, any number of ranks
/// and any part that is known.
std::vector<ControlledQuestion> decode_controls(Model& model, Arena& arena, std::span<const Sample> samples, const DecodeOptions& options,
                                                const ControlWork& work = {});

}  // namespace kava
