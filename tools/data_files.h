// The commands of kava_data on data files: check, stats and convert.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/config/config.h"

namespace kava {

struct CheckCommand {
  std::vector<std::string> files, against;
  std::optional<std::string> format;
  std::optional<int64_t> modulo;
};

/// Prints what each file holds: rows, malformed ones by line, equations, repeated questions; and what the two sets share. Error(code data)
/// where a row is malformed or a question lies on both sides.
int check_data(const CheckCommand& command);

struct StatsCommand {
  std::vector<std::string> files;
  std::optional<std::string> format, tokenizer;
  int64_t latents = 24, max_tokens = 512;
  bool all_steps = false;
  std::string of_tokens;  // the option given, if any, that only rows counted in tokens have a use for
};

/// Prints how long the parts of the rows are: in characters and steps, with a tokenizer in tokens, and the trace against the latents.
int describe_data(const StatsCommand& command);

struct ConvertCommand {
  std::string in, out;
  std::optional<std::string> format, to;
  bool skip_malformed = false;
};

/// Writes the rows of a file of any form as JSON lines or text. Error(code data) for a row that the new form cannot hold.
int convert_data(const ConvertCommand& command);

}  // namespace kava
