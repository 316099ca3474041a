// Training of a small byte-level BPE vocabulary.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kava {

/// Tokens in the spelling of a tokenizer.json, where each byte is one printable character. A token's id is its index.
struct BpeVocabulary {
  std::vector<std::string> tokens;  // the 256 bytes, then one per merge
  std::vector<std::pair<std::string, std::string>> merges;
};

/// Merges the most frequent pair, of equally frequent ones the first in byte order, until every word is one token or there are
/// `most_merges`. words: pre-tokens with their leading space, and how often each occurs.
BpeVocabulary train_bpe(const std::map<std::string, int64_t>& words, std::size_t most_merges);

/// tokenizer.json with GPT-2's split pattern and one special token, whose id is the number of tokens.
std::string tokenizer_json(const BpeVocabulary& vocabulary, const std::string& special);

}  // namespace kava
