// What every program shares: the wrapper that turns exceptions into one line and an exit code, --version, signals.
#pragma once
#include <functional>
#include <string>

namespace kava {

/// Runs `body`, prints `error: ...` on stderr for what it throws and returns the exit code (docs/design.md, errors). CLI11's own parse errors
/// are reported in the same form with exit 2; --help prints on stdout and is exit 0. SIGPIPE is ignored.
int run_program(int argc, char** argv, const std::function<int(int, char**)>& body);

/// Name, version, commit, compiler, devices: what --version prints.
std::string version_text(const std::string& program);

/// Installs handlers for SIGTERM and SIGINT that set a flag; a second signal ends the process at once.
void catch_signals();
bool stop_requested();

}  // namespace kava
