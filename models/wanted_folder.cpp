#include "models/wanted_folder.h"

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/hub.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr const char* kModel = "config.json";
constexpr const char* kAdapter = "adapter_config.json";

// Where a run has what it made last: in adapter/, and until it is finished in its checkpoints alone.
fs::path made_by(const fs::path& run) {
  for (const fs::path& made : {run / "adapter", run / "last" / "adapter"})
    if (is_there(made / kModel) || is_there(made / kAdapter)) return made;
  return {};
}

}  // namespace

void require_in_folder(const fs::path& folder, const std::string& file) {
  if (is_there(folder / file)) return;
  if (file == kModel && !is_there(folder)) require_no_hub_name(folder);
  const bool run = is_there(folder / "config.toml"), checkpoint = is_there(folder / "manifest.json");
  const fs::path made = run || checkpoint ? made_by(folder) : fs::path();
  if (made.empty()) return;
  const bool whole = is_there(made / kModel);
  const std::string what = std::string("is the folder of a ") + (run ? "run" : "checkpoint"), its = shown_path(made);
  if (is_there(made / file)) throw Error(Exit::data, shown_path(folder), what, "give " + its);
  if (whole) throw Error(Exit::data, shown_path(folder), what + " that trained the whole model", "give " + its + " in model.path");
  throw Error(Exit::data, shown_path(folder), what + " that trained an adapter",
              "give its base in model.path and " + its + " in model.adapter, or the folder that kava_merge makes of them");
}

}  // namespace kava
