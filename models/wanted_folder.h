// What a folder is that is no model's or adapter's, as people name runs and models of the hub in their place.
#pragma once
#include <filesystem>
#include <string>

namespace kava {

/// The folder of a model or adapter has to hold `file`: else Error(code data) that says what it is instead and what to give.
void require_in_folder(const std::filesystem::path& folder, const std::string& file);

}  // namespace kava
