// What every program shares: the wrapper that turns exceptions into one line and an exit code, --version, signals.
#pragma once
#include <cstdio>
#include <functional>
#include <string>

#include "engine/error.h"

namespace kava {

/// Runs `body` and returns the exit code: its result, or that of the exception it throws, which is printed on stderr as one line
/// `error: WHERE: what; remedy` (docs/design.md, errors). Output that could not be written to stdout is exit 7. SIGPIPE and SIGXFSZ are
/// ignored. SIGTERM, SIGINT and SIGHUP end the process without leaving what is not finished (engine/files/parts.h).
int run_program(const std::function<int()>& body);

/// Prints an error as run_program does and ends the process at once with its code: where a destructor would wait without end.
[[noreturn]] void end_here(const Error& error);

/// Error(code write) where something printed so far could not be written to stdout. To be asked before a result is kept in a file (a failed
/// command leaves none), and in a loop that prints for as long as there is input.
void require_printed();

/// A line on stderr beside the work: a stderr that cannot be written to is no reason to fail it.
inline void print_note(const std::string& line) { std::fputs((line + "\n").c_str(), stderr); }

/// The next line of standard input, without its end; false where there is none. Error(code data) where it cannot be read, or is longer than
/// 64 MiB (input without an end of line must not fill the memory).
bool next_line(std::string& line);

/// "NAME VERSION (commit COMMIT)".
std::string release_text(const std::string& program);
/// That, and compiler and devices: what --version prints.
std::string version_text(const std::string& program);

/// Installs handlers, but where a signal is ignored. SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for a stop; one more of them within 2 seconds
/// is the same (Slurm sends two within 12 ms), a later one ends the process at once. SIGUSR2 asks for a checkpoint. Called by the main
/// thread, whose handlers then have a stack of their own; the threads of Threads take no signals.
void catch_signals();
bool stop_requested();
/// Whether a checkpoint was asked for since the last call.
bool checkpoint_requested();

}  // namespace kava
