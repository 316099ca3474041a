#include "tools/inspect_tokens.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <iostream>
#include <memory>

#include "engine/cli.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/hub.h"
#include "engine/files/json.h"
#include "engine/text/tokenizer.h"
#include "models/open_model.h"
#include "tools/model_options.h"

namespace kava {

namespace {

struct TokensCommand {
  std::string model;
  bool decode = false, json = false;
};

Tokenizer tokenizer_of(const std::string& given) {
  const std::string model = model_folder(given);
  // The tokenizer's files alone are enough.
  if (is_there(std::filesystem::path(model) / "tokenizer.json")) return Tokenizer::load(model);
  const std::string what_for = "no text can be read", remedy = "give a model with a tokenizer";
  if (is_there(std::filesystem::path(model) / "vocab.json")) Tokenizer::refuse_missing(model, what_for, remedy);
  OpenedModel opened = open_model(model);
  require_same_base(opened);
  if (!opened.text.tokenizer) Tokenizer::refuse_missing(opened.text.folder, what_for, remedy);
  return std::move(*opened.text.tokenizer);
}

std::string text_of_line(const std::string& line, bool json, const std::string& where) {
  if (!json) {
    if (!is_utf8(line)) throw Error(Exit::data, where, "broken UTF-8", "give text in UTF-8");
    return line;
  }
  const Json value = parse_json(line, where);
  if (!value.is_string()) throw Error(Exit::data, where, "not a JSON string", "with --json each line is a JSON string");
  return value.get<std::string>();
}

std::vector<int32_t> ids_of_line(const std::string& line, int32_t size, const std::string& where) {
  std::vector<int32_t> ids;
  const char* space = " \t\r";
  for (std::size_t at = line.find_first_not_of(space); at != std::string::npos;) {
    const std::size_t end = std::min(line.find_first_of(space, at), line.size());
    int32_t id = 0;
    const auto [stop, failed] = std::from_chars(line.data() + at, line.data() + end, id);
    if (failed != std::errc() || stop != line.data() + end || id < 0 || id >= size)
      throw Error(Exit::data, where, "\"" + escaped(line.substr(at, end - at), 40) + "\" is no id of the tokenizer",
                  fmt::format("give ids from 0 to {}", size - 1));
    ids.push_back(id);
    at = line.find_first_not_of(space, end);
  }
  return ids;
}

int inspect_tokens(const TokensCommand& command) {
  const Tokenizer tokenizer = tokenizer_of(command.model);
  std::string line;
  // Input without an end must not outlive the reader of the output.
  for (int64_t n = 1; std::cout && next_line(line); ++n) {
    const std::string where = fmt::format("stdin:{}", n);
    if (command.decode) {
      const std::string text = tokenizer.decode(ids_of_line(line, tokenizer.size(), where));
      std::cout << (command.json ? Json(text).dump() : text) << '\n';
    } else {
      std::cout << fmt::format("{}\n", fmt::join(tokenizer.encode_with_special(text_of_line(line, command.json, where)), " "));
    }
  }
  return 0;
}

}  // namespace

void add_tokens_command(CLI::App& app, std::function<int()>& chosen) {
  auto command = std::make_shared<TokensCommand>();
  CLI::App* tokens = app.add_subcommand("tokens", "Encode the lines of standard input to ids, one line each; or decode lines of ids");
  tokens->footer(
      "Example (after tools/quickstart.sh):\n  echo \"How many coins does Mia have?\" | kava_inspect tokens runs/quickstart/kava");
  tokens->add_option("MODEL", command->model, kModelHelp)->required();
  tokens->add_flag("--decode", command->decode, "Ids to text");
  tokens->add_flag("--json", command->json, "Text is written as a JSON string, on either side");
  tokens->callback([command, &chosen] { chosen = [command] { return inspect_tokens(*command); }; });
}

}  // namespace kava
