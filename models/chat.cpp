#include "models/chat.h"

#include <fmt/core.h>

#include <filesystem>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/files/paths.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kLargestTemplate = std::size_t{1} << 20;

bool holds(const std::string& source, std::string_view text) { return source.find(text) != std::string::npos; }

// The message that a template gives where there is none: a literal `<|im_start|>system\nTEXT<|im_end|>` in it, its line end as such or
// escaped.
std::string default_system(const std::string& source) {
  for (std::string_view opening : {"<|im_start|>system\\n", "<|im_start|>system\n"})
    for (std::size_t at = source.find(opening); at != std::string::npos; at = source.find(opening, at + 1)) {
      const std::size_t begin = at + opening.size(), end = source.find("<|im_end|>", begin);
      if (end == std::string::npos) continue;
      const std::string text = source.substr(begin, end - begin);
      if (!text.empty() && text.find_first_of("'\"{}<>") == std::string::npos) return text;
    }
  return "";
}

ChatText chatml(const std::string& source, const std::string& bos) {
  const std::string system = default_system(source), first = holds(source, "bos_token") ? bos : "";
  return {ChatFamily::chatml, first + (system.empty() ? "" : "<|im_start|>system\n" + system + "<|im_end|>\n") + "<|im_start|>user\n",
          "<|im_end|>\n<|im_start|>assistant\n"};
}

ChatText llama3(const std::string& source, const std::string& bos) {
  const auto header = [](const char* role) { return fmt::format("<|start_header_id|>{}<|end_header_id|>\n\n", role); };
  const bool dated = holds(source, "Cutting Knowledge Date: December 2023");
  const std::string system = dated ? header("system") + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>" : "";
  const std::string literal = source.empty() || holds(source, "<|begin_of_text|>") ? "<|begin_of_text|>" : "";
  return {ChatFamily::llama3, (holds(source, "bos_token") ? bos : literal) + system + header("user"), "<|eot_id|>" + header("assistant")};
}

// Written as they are to what a special token must be.
void require_tokens(const Tokenizer& tokenizer, ChatFamily family, const std::string& folder) {
  using Names = std::vector<const char*>;
  const Names names = family == ChatFamily::llama3 ? Names{"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
                                                   : Names{"<|im_start|>", "<|im_end|>"};
  for (const char* name : names)
    if (tokenizer.encode_with_special(name).size() != 1)
      throw Error(Exit::data, shown_path(folder), fmt::format("has no token {}, which a chat of form {} needs", name, name_of(family)),
                  "give the form that the model was trained with, or --chat none");
}

}  // namespace

ChatText chat_text(ChatFamily family, const std::string& source, const std::string& bos) {
  switch (family) {
    case ChatFamily::llama3:
      return llama3(source, bos);
    case ChatFamily::chatml:
      return chatml(source, bos);
    case ChatFamily::none:
      break;
  }
  return {};
}

ChatFamily recognised_chat(const std::string& source, const std::string& where) {
  if (source.empty()) return ChatFamily::none;
  const bool headers = holds(source, "<|start_header_id|>") && holds(source, "<|eot_id|>");
  const bool marks = holds(source, "<|im_start|>") && holds(source, "<|im_end|>");
  const bool foreign =
      holds(source, "[INST]") || holds(source, "<start_of_turn>") || holds(source, "<|user|>") || holds(source, "<|im_sep|>");
  if (headers && !marks && !foreign) return ChatFamily::llama3;
  if (marks && !headers && !foreign) return ChatFamily::chatml;
  throw Error(Exit::data, where, fmt::format("the chat template \"{}\" is of no family that is known here", escaped(source, 60)),
              "name the form that it writes by --chat llama3 or chatml, or ask without by --chat none");
}

std::string chat_source(const std::string& folder) {
  const fs::path own = fs::path(folder) / "chat_template.jinja", config = fs::path(folder) / "tokenizer_config.json";
  if (is_there(own)) return read_file(own.string(), kLargestTemplate);
  if (!is_there(config)) return "";
  const Json json = read_json(config.string());
  const auto found = json.is_object() ? json.find("chat_template") : json.end();
  if (found == json.end() || found->is_null()) return "";
  if (found->is_string()) return found->get<std::string>();
  // Several, by name.
  if (found->is_array())
    for (const Json& one : *found)
      if (one.is_object() && one.value("name", Json()) == "default" && one.contains("template") && one["template"].is_string())
        return one["template"].get<std::string>();
  throw Error(Exit::data, shown_path(config), "chat_template is neither a text nor a list with one named default",
              "correct the file, or ask without by --chat none");
}

std::string chat_bos(const std::string& folder) {
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
    const fs::path path = fs::path(folder) / name;
    if (!is_there(path)) continue;
    const Json json = read_json(path.string());
    const auto found = json.is_object() ? json.find("bos_token") : json.end();
    if (found == json.end()) continue;
    const Json token = found->is_object() ? found->value("content", Json()) : *found;
    return token.is_string() ? token.get<std::string>() : "";
  }
  return "";
}

ChatForm chat_form(const std::string& word, const std::string& folder, const Tokenizer& tokenizer) {
  const auto named = choice_of<ChatFamily>(word);
  if (!named && word != "auto")
    throw Error(Exit::usage, "--chat", "\"" + escaped(word) + "\" is none of its values", "give none, llama3, chatml or auto");
  if (named == ChatFamily::none) return {};
  const std::string source = chat_source(folder);
  const ChatText text = chat_text(named ? *named : recognised_chat(source, shown_path(folder)), source, chat_bos(folder));
  if (text.family == ChatFamily::none) return {};
  require_tokens(tokenizer, text.family, folder);
  return {text.family, tokenizer.encode_with_special(text.before), tokenizer.encode_with_special(text.after)};
}

}  // namespace kava
