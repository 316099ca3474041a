// Questions in the form of a chat, as the templates of instruction-tuned models write them: what stands around a user's only message, up to
// where the assistant's answer begins. The templates are Jinja programs; the families that are read here are built in and recognised.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/choice.h"
#include "engine/text/tokenizer.h"

namespace kava {

KAVA_CHOICE(ChatFamily, none, llama3, chatml)

/// As text: a question goes between the two, stripped of white space.
struct ChatText {
  ChatFamily family = ChatFamily::none;
  std::string before, after;
};

/// What a template (tokenizer_config.json's chat_template, or chat_template.jinja; "" for a folder without) writes, in the family's form:
/// the default system message, and llama3's dates, where the template has them. llama3's "Today Date" is the 26 Jul 2024 that the template
/// falls back to, so that a question gives the same tokens on every day. bos: what the template's bos_token is.
ChatText chat_text(ChatFamily family, const std::string& source, const std::string& bos);

/// The family of a template; none for "". Error(code data, `where`) for one that is not known, by what it begins with.
ChatFamily recognised_chat(const std::string& source, const std::string& where);

/// The template of a folder, or "". Error(code data) on malformed files.
std::string chat_source(const std::string& folder);

/// What transformers gives the folder's template as bos_token: that of tokenizer_config.json, else of special_tokens_map.json, else "".
/// Error(code data) on malformed files.
std::string chat_bos(const std::string& folder);

/// The same as ids.
struct ChatForm {
  ChatFamily family = ChatFamily::none;
  std::vector<int32_t> before, after;
};

/// `word`: none, auto, or a family. Error(code usage) for another word; Error(code data) where auto does not know the folder's template, or
/// the tokenizer lacks the family's tokens.
ChatForm chat_form(const std::string& word, const std::string& folder, const Tokenizer& tokenizer);

}  // namespace kava
