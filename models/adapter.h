// Adapter folders: LoRA in PEFT's format with kava.safetensors beside it; with train.trainable = "all" a whole Hugging Face folder instead
// (docs/formats.md).
#pragma once
#include <string>

#include "models/model.h"

namespace kava {

/// Sets every trainable of the model from the folder. Names, shapes and adapter_config.json must match the run's configuration exactly, all
/// values must be finite: else Error(code data) naming the tensor or the key.
void load_adapter(Model& model, const std::string& folder);

/// Writes the folder (made if missing). Error(code write).
void save_adapter(const Model& model, const std::string& folder);

}  // namespace kava
