// Paths: where one stands from another, and whether two name the same file.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

namespace kava {

inline std::string path_in(const std::string& folder, const char* name) { return (std::filesystem::path(folder) / name).string(); }

/// With a leading ~ or ~/ as the home folder.
std::string expand_home(const std::string& path);

/// `path` as it is to be written into a file of `folder`: relative, by as few steps upwards as symbolic links allow, so that what lies
/// together can be moved together. Absolute where no relative path leads there.
std::string relative_path(const std::filesystem::path& folder, const std::string& path);

/// The absolute path without steps upwards, through links as they are named where that leads to the same place.
std::string plain_path(const std::string& path);

/// Whether two paths lead to the same place, which need not be there.
bool same_path(const std::string& a, const std::string& b);

/// A path read from a file of `folder` (absolute, without symbolic links), with its leading steps upwards taken.
std::string path_from(const std::filesystem::path& folder, const std::string& path);

/// Error(code usage) where `out`, which `option` names and a program is about to write, is one of the files that it reads: one of `inputs`
/// or, where an input is a folder, a file in it; by another name, a symbolic or a hard link too. Folders named eval are no inputs.
void require_no_input(const std::string& option, const std::string& out, const std::vector<std::string>& inputs);

}  // namespace kava
