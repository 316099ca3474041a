// Files that torch.save wrote of a dict of tensors: a zip archive, uncompressed, with a pickle that says where each tensor lies. The pickle
// is read as data: it can build numbers, texts, tuples, dicts and tensors, and nothing that it names is run.
#pragma once
#include <string>

#include "engine/files/safetensors.h"

namespace kava {

/// The tensors with their dtypes by the names of safetensors. Error(code data) unless the file is whole, of torch 1.6 or newer,
/// little-endian, every value of the dict a contiguous tensor inside its storage, and its pickle one of those that such a dict takes.
SafetensorsFile open_torch_file(const std::string& path);

/// A folder's STEM.safetensors, or, where there is none, its TORCH_STEM.bin as open_torch_file reads it.
SafetensorsFile open_either_file(const std::string& folder, const std::string& stem, const std::string& torch_stem);

}  // namespace kava
