#include "tests/folders.h"

namespace kava {

namespace {
std::filesystem::path own_folder() { return std::filesystem::read_symlink("/proc/self/exe").parent_path(); }
}  // namespace

// In an unpacked archive both lie beside the tests.
std::string source_dir() {
  const std::filesystem::path above = own_folder().parent_path();
  return std::filesystem::exists(above / "tests/golden") ? above.string() : KAVA_SOURCE_DIR;
}
std::string bin_dir() { return std::filesystem::exists(own_folder() / "kava_train") ? own_folder().string() : KAVA_BIN_DIR; }

}  // namespace kava
