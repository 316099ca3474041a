#include "models/traces.h"

#include <algorithm>

#include "engine/error.h"
#include "models/recipe.h"

namespace kava {

namespace {

// What needs a trace, and how to do without it; nothing where no loss does.
struct Need {
  std::string what, without;
};

Need need_of(const RunConfig& config) {
  const TraceUse use = trace_use(config);
  if (use == TraceUse::target) return {"kv.weight > 0 needs one", "set kv.weight = 0"};
  if (use == TraceUse::learnt) return {fmt::format("method {} learns to write one", name_of(config.method)), "use method no_cot"};
  return {};
}

// A curriculum that begins where nothing of a trace is left: later stages leave no more. Latents stand for steps, in every row as many.
bool writes_nothing(const RunConfig& config, const Recipe& recipe) {
  if (recipe.rest == Recipe::Rest::steps) return recipe.removed > recipe.max_stage && recipe.pad_to_max && config.stages.mix == 0;
  return recipe.rest == Recipe::Rest::tokens && config.icot.remove_all_from > 0 && first_stage(config) >= config.icot.remove_all_from;
}

std::string without_chain(const FileFacts& file) { return fmt::format("no row has a chain; its keys are {}", file.keys); }

// Files that may keep their chains under a key that is not known, beside others that have some.
std::string files_without_chain(const RunConfig& config, const std::vector<FileFacts>& files) {
  const Recipe recipe = recipe_of(config);
  std::string lines;
  for (const FileFacts& file : files)
    if ((recipe.teacher || trace_use(config) == TraceUse::learnt) && !file.chain)
      lines += fmt::format("{}{}: {}", lines.empty() ? "" : "\n", shown_path(file.path), without_chain(file));
  return lines;
}

}  // namespace

TraceUse trace_use(const RunConfig& config) {
  if (config.kv.weight > 0) return TraceUse::target;
  const Recipe recipe = recipe_of(config);
  if (writes_nothing(config, recipe)) return TraceUse::none;
  if (!recipe.student || recipe.has_stages()) return TraceUse::learnt;
  return recipe.teacher && (config.loss.teacher > 0 || config.codi.weight > 0) ? TraceUse::seen : TraceUse::none;
}

const char* lost_without_trace(TraceUse use) {
  if (use == TraceUse::target) return "L_KV has no target";
  return use == TraceUse::learnt ? "there is no chain to learn" : "the teacher sees no chain";
}

std::string require_traces(const RunConfig& config, const std::vector<FileFacts>& files, const std::vector<Sample>& samples) {
  if (std::ranges::any_of(samples, [](const Sample& s) { return !s.trace.empty(); })) return files_without_chain(config, files);
  const bool steps = std::ranges::any_of(files, &FileFacts::chain);
  const std::string rows = steps ? "no row has more than the one step that data.drop_last_step drops" : without_chain(files[0]);
  // Rows of ids say that a trace is empty; other forms may keep theirs under a key that is not known.
  const bool as_given = std::ranges::all_of(files, [](const FileFacts& f) { return f.format == DataFormat::ids; });
  const Need need = as_given ? Need{} : need_of(config);
  if (!need.what.empty())
    throw Error(
        Exit::data, shown_path(files[0].path), fmt::format("no trace token in data.train, and {}: {}", need.what, rows),
        fmt::format("{}, or {}", steps ? "set data.drop_last_step = false" : "put the chain under \"steps\" (a list) or \"cot\" (a text)",
                    need.without));
  if (trace_use(config) == TraceUse::none) return "";
  if (as_given) return fmt::format("{}: every \"trace\" is empty, so {}", shown_path(files[0].path), lost_without_trace(trace_use(config)));
  return fmt::format("{}: no trace token in data.train, so the teacher sees no chain: {}", shown_path(files[0].path), rows);
}

}  // namespace kava
