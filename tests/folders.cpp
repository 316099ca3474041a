#include "tests/folders.h"

namespace kava {

std::string source_dir() { return KAVA_SOURCE_DIR; }
std::string bin_dir() { return KAVA_BIN_DIR; }

}  // namespace kava
