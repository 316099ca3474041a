// The added_tokens section of a tokenizer.json, and what the files beside it add: tokens that are found in the text before anything else is
// done with it, leftmost first and the longest of those.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "engine/files/json_at.h"
#include "engine/text/bpe.h"
#include "engine/text/named_tokens.h"
#include "engine/text/split_pattern.h"

namespace kava {

class AddedTokens {
 public:
  /// Text before normalization, and after.
  enum class Stage { raw, normalized };

  /// A stretch of text: an added token (id >= 0) or text (id -1).
  struct Part {
    std::size_t begin, end;
    std::int32_t id;
  };

  using Normalizer = std::function<std::string(std::string_view)>;

  AddedTokens() = default;

  /// Error(code data) on malformed entries, on one token in two forms, and where the library would give a token another id than the file
  /// says.
  static AddedTokens load(const JsonAt& section, const Bpe& model, const Normalizer& normalize);

  /// Adds what other files name, with the ids that the library gives. Error(code data) naming file and token where a file says another id,
  /// or where versions of the library differ. Returns the tokens that are new.
  std::vector<NamedToken> extend(std::span<const NamedToken> named, const Bpe& model, const Normalizer& normalize);

  /// The parts that cover `text`. Tokens with "normalized" are found at the normalized stage only, the others at the raw one.
  /// special_as_text: an occurrence of a special token stays text (nothing else is found within it).
  std::vector<Part> find(std::string_view text, Stage stage, bool special_as_text) const;

  std::optional<std::int32_t> id_of(std::string_view content) const;
  /// How the token is spelt when decoding; null where no added token has the id.
  const std::string* spelling(std::int32_t id) const;
  bool is_special(std::string_view spelling) const { return special_.contains(std::string(spelling)); }
  std::int32_t largest_id() const { return largest_id_; }

 private:
  struct Token {
    std::string content, spelling;  // spelling: normalized where the token is
    bool single_word, lstrip, rstrip, normalized, special;
    bool operator==(const Token&) const = default;
  };
  struct Start {
    std::size_t at;
    std::int32_t id;
  };
  // Finds the tokens of one stage by Aho and Corasick's automaton over their reversed spellings: a text read from its end tells at each
  // character the longest token that begins there, in time that does not depend on the tokens. Node 0 is the root.
  class Finder {
   public:
    /// False where another token has this spelling.
    bool add(std::string_view spelling, std::int32_t id);
    /// After the last add.
    void link();
    /// The longest token at each place where one begins, from the last place to the first.
    std::vector<Start> find(std::string_view text) const;

   private:
    struct Node {
      std::int32_t parent = -1, fall = -1;  // fall: the node of the longest proper suffix
      std::int32_t id = -1;                 // of the longest token that ends here
      std::int32_t depth = 0;
      unsigned char byte = 0;
    };
    std::int32_t child(std::int32_t node, unsigned char byte) const;

    std::vector<Node> nodes_ = std::vector<Node>(1);
    std::array<std::int32_t, 256> of_root_{};                // the root's children, 0 for none: most of a text begins no token
    std::unordered_map<std::uint64_t, std::int32_t> child_;  // node << 8 | byte
  };

  void add(const JsonAt& entry, const Bpe& model, const Normalizer& normalize);
  void put(const NamedToken& named, std::int32_t id, const Normalizer& normalize);
  // Returns a spelling that two tokens share; nothing can be found then.
  std::optional<std::string> build_finders();
  bool is_word(char32_t c) const;
  bool stands_alone(std::string_view text, std::size_t begin, std::size_t end) const;

  std::unordered_map<std::int32_t, Token> tokens_;
  std::unordered_map<std::string, std::int32_t> id_of_content_;
  std::unordered_set<std::string> special_;
  Finder raw_, normalized_;
  std::optional<SplitPattern> word_;  // for single_word
  std::int32_t largest_id_ = -1;
  std::int32_t outside_model_ = 0;  // tokens that the model's vocabulary lacks
  std::size_t bytes_ = 0;           // of all spellings
};

}  // namespace kava
