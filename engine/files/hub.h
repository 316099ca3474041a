// Models of the Hugging Face hub's local cache, by name and without the network.
#pragma once
#include <filesystem>
#include <string>

namespace kava {

/// The folder that `given` names: itself where it is there, else the cached snapshot of its branch main where it is a name of the hub's
/// cache, as "org/model" (HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub). What is
/// neither is returned as it is: opening it says so. Error(code data) where the cache holds the name without a whole snapshot.
std::string model_folder(const std::string& given);

/// The same for a path that is relative to `folder`; absolute where it is found, or folder / given.
std::string model_folder(const std::filesystem::path& folder, const std::string& given);

/// Error(code data) for a folder that is not there where its path is a name "org/model", alone or behind an absolute path that is there
/// (as a configuration's folder is put before it), and org/ is no folder here: that the hub's cache does not hold it, and how to get it.
/// weights/, runs/ and paths with .. are no such names.
void require_no_hub_name(const std::filesystem::path& missing);

}  // namespace kava
