// The results of kava_eval in a run's folder: their names, and that none is replaced unseen.
#pragma once
#include <filesystem>
#include <string>

#include "engine/files/json.h"
#include "models/evaluate.h"
#include "models/open_model.h"

namespace kava {

/// RUN/eval/DATASTEM-SHA8.step_N[.METHOD][.stageK][.limitK][.chatNAME][.sN-tT][.KIND].json: METHOD where it is not the run's, N samples and
/// temperature T where answers are drawn, KIND controls or sweep, `.adapter` in place of the step for weights that no checkpoint names.
std::filesystem::path result_path(const OpenedModel& opened, const RowFile& file, const EvalOptions& options, const std::string& kind);

/// Error(code usage) where there is a folder at `path`; without `force` also where there is what is no result, or a result that was made
/// with other options than the document (which may lack its results) says. Times, places of files and the number of questions decoded
/// together make no difference.
void require_same_options(const std::filesystem::path& path, const Json& document, bool force);
/// The same for another result than the document, by the same measure.
void require_same_result(const std::filesystem::path& path, const Json& document, bool force);

/// Writes it, its folder too, whatever is there. Error(code write).
void write_result(const std::filesystem::path& path, const Json& document);

}  // namespace kava
