// What the system does not let this process read, in difference to what is not there or damaged.
#pragma once
#include <string>

#include "engine/error.h"

namespace kava {

/// A file or folder that could not be read for want of a permission, a descriptor or memory, or by a fault of the disk. What it holds is
/// not known, so it must not be passed over as what is missing or damaged is: no older checkpoint is taken for it.
class Unreadable : public Error {
 public:
  using Error::Error;
};

/// "could not ACTION: " and what the system says. Unreadable, or Error where `error` (an errno) says that there is nothing at this path.
[[noreturn]] void fail_to_read(Exit code, const std::string& path, const char* action, int error);

}  // namespace kava
