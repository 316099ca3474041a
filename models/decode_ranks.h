// Decoding by several ranks.
#pragma once
#include <span>
#include <vector>

#include "engine/device/comm.h"
#include "models/decode.h"

namespace kava {

/// Those of all ranks, in the order of the ranks. Error(code comm) where a rank is lost.
std::vector<DecodeResult> gather_results(Comm& comm, const std::vector<DecodeResult>& mine);

/// What decode() gives; each rank decodes a part of the questions. The results are those of one rank, since a question's do not depend on
/// its company. Error(code comm) where a rank is lost.
std::vector<DecodeResult> decode_on_ranks(Comm& comm, Model& model, Arena& arena, std::span<const Sample> questions,
                                          const DecodeOptions& options);

}  // namespace kava
