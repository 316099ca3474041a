// What kava_eval and kava_generate share: MODEL and the options for decoding with it.
#pragma once
#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "models/decode.h"
#include "models/open_model.h"
#include "tools/device.h"

namespace kava {

/// What MODEL is, in every program.
inline constexpr const char* kModelHelp =
    "A Hugging Face folder, its name in the hub's local cache, a run directory, or a checkpoint in one";

struct ModelOptions {
  std::string model;
  std::optional<std::string> method, dtype, base;
  std::string chat = "none";
  int64_t max_new_tokens = 0;  // 0: the method's default
  std::optional<int64_t> stage;
  DeviceOptions device;
};

/// Adds the positional MODEL, which it returns, and the options.
CLI::Option* add_model_options(CLI::App& app, ModelOptions& options);

struct ChosenModel {
  std::unique_ptr<Ops> ops;
  OpenedModel opened;
  DecodeChoice choice;  // method and stage in place of the model's
};

/// Error(code usage): `option` is of latents, of which `recipe` has none.
[[noreturn]] void refuse_without_latents(const char* option, Method method, const Recipe& recipe);

/// How questions are asked, for the line that names the model: "questions as they are", or the chat's form.
std::string asked_as(const OpenedModel& opened);

/// The backend and the model, whose weights are not read yet; a note on stderr where a better checkpoint was passed over. Error(code usage)
/// for an unknown word, or a method that the weights cannot do; and the errors of make_ops and open_model.
ChosenModel choose_model(const ModelOptions& options, int device = 0);

}  // namespace kava
