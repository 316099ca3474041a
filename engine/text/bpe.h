// Byte-level byte-pair encoding: the model section of a tokenizer.json. A piece of text begins as the tokens of its bytes; the adjacent
// pair of lowest rank (the leftmost of equals) is merged until none is left.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/files/json_at.h"
#include "engine/text/token_table.h"

namespace kava {

/// Ids are below this: no model's embedding is near it.
constexpr std::int32_t kMostTokenIds = 1 << 22;

/// The character that stands for a byte in GPT-2's alphabet.
std::string symbol_of_byte(unsigned char byte);
/// The bytes of a token written in GPT-2's byte alphabet (each byte one printable character); nullopt if any character is not of it.
std::optional<std::string> bytes_of_symbols(std::string_view token);

class Bpe {
 public:
  /// From JSON with its "vocab" listed (parse_json). Error(code data) on a model other than BPE, an option that is not supported, or a
  /// malformed vocabulary or merge.
  static Bpe load(const JsonAt& model);
  Bpe(Bpe&&) = default;
  Bpe& operator=(Bpe&&) = default;

  /// Appends the ids of one piece. As in the library, a byte without a token of its own becomes unk_token if there is one, and else
  /// nothing.
  void encode(std::string_view piece, std::vector<std::int32_t>& ids) const;

  std::optional<std::int32_t> id_of(std::string_view token) const;
  /// Text of a token as the vocabulary spells it; null where no token has the id.
  const std::string* token(std::int32_t id) const;
  /// Number of tokens, and the largest id.
  std::int32_t count() const { return static_cast<std::int32_t>(tokens_.size()); }
  std::int32_t largest_id() const { return static_cast<std::int32_t>(index_of_id_.size()) - 1; }

 private:
  Bpe() = default;
  struct Merge {
    std::uint64_t pair;
    std::uint32_t rank;
    std::int32_t id;
  };
  struct Symbol {
    std::int32_t id, previous, next;
  };

  void load_vocabulary(const JsonAt& vocabulary);
  void load_merges(const JsonAt& merges);
  void load_bytes(const JsonAt& model);
  void add_merge(const JsonAt& merges, std::size_t at, std::string_view left, std::string_view right, std::uint32_t rank);
  const Merge* find_merge(std::int32_t left, std::int32_t right) const;
  void merge_short(std::vector<std::int32_t>& ids, std::size_t first) const;
  void merge_long(std::vector<std::int32_t>& ids, std::size_t first) const;

  std::vector<std::string> tokens_;
  std::vector<std::int32_t> index_of_id_;  // into tokens_, -1 for none
  TokenTable ids_;
  TokenTable whole_ids_;                        // with ignore_merges: by the tokens' bytes
  std::vector<Merge> merges_;                   // open addressing, a power of two
  std::array<std::int32_t, 256> id_of_byte_{};  // -1: the byte is dropped
  std::array<bool, 256> unknown_{};             // the byte became unk_token
  bool fuse_unknown_ = false;
};

}  // namespace kava
