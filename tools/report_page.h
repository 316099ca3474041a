// The frame of a report: one HTML page without scripts, fonts or anything else from elsewhere.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "engine/files/json.h"

namespace kava::report {

/// A whole page. `body` is HTML.
std::string page(const std::string& title, const std::string& body);

/// <table> of texts; the first row is the header. Cells are escaped.
std::string text_table(const std::vector<std::vector<std::string>>& rows);

/// The folder's last two names, as ROW/SEED of a run of replicate.
std::string run_name(const std::string& folder);

/// The sections of a run folder and of a replicate's folder; ids of figures begin with `prefix`. probe: a file of kava_inspect probe, or
/// "". Error(code data) for files that are broken.
std::string run_section(const std::string& folder, const std::string& prefix);
/// Some figures of several runs, each a number and a folder, in one each, and in which keys of the configuration each differs from the
/// first.
std::string runs_section(const std::vector<std::pair<std::string, std::string>>& runs);
/// Error(code usage) for a probe of none of the `runs`, where there are any and it says whose it is.
std::string probe_section(const std::string& file, const std::string& prefix, const std::vector<std::pair<std::string, std::string>>& runs);
std::string table_section(const std::string& folder, const std::string& prefix);

}  // namespace kava::report
