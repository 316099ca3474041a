// Whether the training data has the chains that a method learns from.
#pragma once
#include <string>
#include <vector>

#include "engine/data/data.h"

namespace kava {

/// What a run makes of a sample's trace: no use, the teacher sees it, it is the chain that is learnt, or L_KV's targets come from it.
enum class TraceUse { none, seen, learnt, target };
TraceUse trace_use(const RunConfig& config);
/// What a row without a trace lacks.
const char* lost_without_trace(TraceUse use);

/// Error(code data) where no sample has a trace token and a loss needs one: L_KV, or the cross-entropy of a written chain (full_cot, icot,
/// coconut). Where only the teacher goes without, or a file beside others that have chains, lines that say so; else nothing.
std::string require_traces(const RunConfig& config, const std::vector<FileFacts>& files, const std::vector<Sample>& samples);

}  // namespace kava
