// Text to token ids and back, as the Hugging Face `tokenizers` library does it for a byte-level BPE tokenizer.json: added tokens, NFC,
// pre-tokenizers, byte-pair merging. Equal ids were checked against tokenizers 0.23.3 (tests/golden/make_tokenizer_golden.py).
//
// What differs from the library, by intent: "truncation" and "padding" of the file are ignored, as transformers does (nothing is ever
// cut silently); an added token whose id in the file is not the one the library would give it is refused; (?i) in a split pattern folds
// no character into two (the sharp s is not ss).
// As in the library: a byte that has no token in the vocabulary (SmolLM2 lacks the control characters 0x04, 0x06, ...) becomes unk_token,
// or nothing where there is none; decoding skips ids that no token has.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kava {

class Tokenizer {
 public:
  /// Reads FOLDER/tokenizer.json, and tokenizer_config.json, special_tokens_map.json and added_tokens.json where they are. Error(code data)
  /// with the file on anything malformed or not supported.
  static Tokenizer load(const std::string& folder);
  /// Error(code data): the folder has no tokenizer.json, without which `what_for`. Where it has an older form of a tokenizer, vocab.json
  /// and merges.txt, the remedy makes the newer one of it, else it is the one given.
  [[noreturn]] static void refuse_missing(const std::string& folder, const std::string& what_for, const std::string& remedy);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // All functions below may be called from several threads at once.

  /// Text of data rows and of typed questions: special added tokens in it are plain text, other added tokens are recognised. No BOS or
  /// EOS. Broken UTF-8 is Error(code data).
  std::vector<std::int32_t> encode(std::string_view text) const;

  /// The same with special added tokens recognised: `encode(text, add_special_tokens=False)` of the library.
  std::vector<std::int32_t> encode_with_special(std::string_view text) const;

  /// Broken UTF-8 becomes U+FFFD. skip_special: special added tokens are left out.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special = false) const;

  /// The largest id of any token, added ones included, plus 1. (The library's get_vocab_size counts tokens: it is smaller when ids have
  /// holes, and a new token of that id would then be another one's.)
  std::int32_t size() const;

  /// The id put before a single sequence when special tokens are asked for: what the template of the file's post_processor says. Without a
  /// template none; add_bos_token and add_eos_token of tokenizer_config.json are not read (transformers 5 drops them).
  std::optional<std::int32_t> bos() const;

  /// As TokenFiles::eos_token.
  std::optional<std::string> eos_token() const;

  /// A line for the user where the folder's files disagree and one of them was followed; mostly "".
  const std::string& note() const;

  /// Error(code data) naming file and token where a token's id has no row in an embedding of so many.
  void require_ids_below(std::int64_t rows, const std::string& folder) const;

  /// Id of a token by its spelling in the file (byte-level symbols and all).
  std::optional<std::int32_t> id_of(std::string_view token) const;

  /// Text of one token, for display; "" where no token has the id.
  std::string token(std::int32_t id) const;

 private:
  struct Parts;
  explicit Tokenizer(std::unique_ptr<Parts> parts);
  std::vector<std::int32_t> encode(std::string_view text, bool special_as_text) const;
  std::unique_ptr<Parts> parts_;
};

}  // namespace kava
