// The user's folder for what can be made again: KAVA_CACHE, else XDG_CACHE_HOME/kava, else ~/.cache/kava.
#pragma once
#include <filesystem>

namespace kava {

/// "" where there is no home.
std::filesystem::path cache_folder();

}  // namespace kava
