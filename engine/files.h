// Files: whole reads with a limit, writes that survive a kill at any moment, digests.
#pragma once
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace kava {

/// The whole file. A missing, unreadable or larger one, or a directory, is Error(`code`, path).
std::string read_file(const std::string& path, std::size_t most_bytes, int code = 4);

/// Writes beside the target (`path` + ".part"), fsyncs, renames, fsyncs the folder. Error(code write) on failure; nothing is left behind.
void write_file(const std::string& path, std::string_view bytes);

void sync_directory(const std::filesystem::path& directory);

/// Lower-case hex SHA-256.
std::string sha256(std::string_view bytes);
std::string sha256_file(const std::string& path);

}  // namespace kava
