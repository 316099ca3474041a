// Tokens that the files beside a tokenizer.json name, as transformers 4.57.6 and 5.24.0 read them: tokenizer_config.json; where that has no
// `added_tokens_decoder` also special_tokens_map.json, whose values win, and added_tokens.json.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/files/json_at.h"

namespace kava {

struct NamedToken {
  std::string content;
  std::optional<std::int32_t> id = {};  // as the file says it; none: the next free one
  bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = true;
  // What becomes of a token that tokenizer.json has: replaced it gets these properties, else it only becomes special where this one is.
  bool replaces = false;
  // Versions of transformers differ in whether the name makes a token: it must be there already.
  bool must_exist = false;
  std::string file = {}, place = {};  // where it is named
};

class TokenFiles {
 public:
  /// Those of the files that the folder has. Error(code data) on malformed JSON.
  explicit TokenFiles(const std::string& folder);
  TokenFiles(const TokenFiles&) = delete;
  TokenFiles& operator=(const TokenFiles&) = delete;

  /// In the order in which the library adds them. Error(code data) on a malformed entry.
  std::vector<NamedToken> tokens() const;

  /// eos_token of tokenizer_config.json, else of special_tokens_map.json; where the two differ and tokenizer_config.json has no
  /// added_tokens_decoder, that of special_tokens_map.json. null counts as missing.
  std::optional<std::string> eos_token() const;

  /// A line that names both values where the two files differ and special_tokens_map.json wins; else "".
  std::string note() const;

 private:
  struct File {
    std::string path;
    Json json;
    explicit File(std::string file);
    JsonAt root() const { return {json, path}; }
  };

  bool has_decoder() const;
  void append_decoder(std::vector<NamedToken>& all) const;
  void append_added(std::vector<NamedToken>& all, const std::vector<NamedToken>& special) const;
  std::vector<NamedToken> special_tokens() const;

  File config_, map_, added_;
};

}  // namespace kava
