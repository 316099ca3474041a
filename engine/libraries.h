// The libraries that the programs run with.
#pragma once
#include <string>

namespace kava {

/// Their names and versions as they are loaded, not as they were built with: "oneDNN 2.7.2, OpenSSL 3.0.15, ...".
std::string libraries_text();

}  // namespace kava
