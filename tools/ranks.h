// Ranks of one program: their options, and how they begin together, agree, and end.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <string_view>

#include "engine/config/config.h"
#include "engine/device/world.h"
#include "tools/device.h"

namespace kava {

void add_rank_options(CLI::App& app, RankOptions& options);

/// Joins the ranks, runs `body` on each and ends their time together; returns its result, or the code of what all have refused together
/// (below). Standard output is rank 0's alone. A rank whose `body` throws leaves without a word to the others, who then fail in the
/// collective that they are in.
int on_ranks(const RankOptions& options, const DeviceOptions& device, const std::function<int(Comm& comm, const World& world)>& body);

/// Runs `body` on every rank; returns when all of them have. Where it is refused (Error) on any, all ranks end with the code of the first
/// of these, which alone says why.
void together(Comm& comm, const char* what, const std::function<void()>& body);

/// Refused on every rank with this code, naming `what` and the first rank whose text is not that of rank 0, where there is one.
void require_same(Comm& comm, const char* what, std::string_view mine, Exit code);
/// The same for configurations, but for their paths: names the key.
void require_same_config(Comm& comm, const RunConfig& config);

/// How many of the ranks share the memory that this one's backend takes its own of: the machine's, or its device's.
int ranks_on_its_memory(Comm& comm, const Ops& ops);

}  // namespace kava
