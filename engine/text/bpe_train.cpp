#include "engine/text/bpe_train.h"

#include <nlohmann/json.hpp>
#include <set>

#include "engine/text/bpe.h"

namespace kava {

namespace {

using TokenPair = std::pair<std::string, std::string>;

// A word as its present tokens, and how often it occurs.
struct Word {
  std::vector<std::string> tokens;
  int64_t count;
};

void merge(Word& word, const TokenPair& pair) {
  std::vector<std::string> merged;
  for (std::size_t i = 0; i < word.tokens.size(); ++i) {
    const bool here = i + 1 < word.tokens.size() && word.tokens[i] == pair.first && word.tokens[i + 1] == pair.second;
    merged.push_back(here ? pair.first + pair.second : word.tokens[i]);
    i += here;
  }
  word.tokens = std::move(merged);
}

}  // namespace

BpeVocabulary train_bpe(const std::map<std::string, int64_t>& words, std::size_t most_merges) {
  std::vector<std::string> alphabet;
  for (int byte = 0; byte < 256; ++byte) alphabet.push_back(symbol_of_byte(static_cast<unsigned char>(byte)));
  BpeVocabulary out{alphabet, {}};
  std::set<std::string> known(alphabet.begin(), alphabet.end());
  std::vector<Word> corpus;
  for (const auto& [text, count] : words) {
    corpus.push_back({{}, count});
    for (char c : text) corpus.back().tokens.push_back(alphabet[static_cast<unsigned char>(c)]);
  }
  while (out.merges.size() < most_merges) {
    std::map<TokenPair, int64_t> pairs;
    for (const Word& word : corpus)
      for (std::size_t i = 1; i < word.tokens.size(); ++i) pairs[{word.tokens[i - 1], word.tokens[i]}] += word.count;
    if (pairs.empty()) break;
    auto best = pairs.begin();
    for (auto i = pairs.begin(); i != pairs.end(); ++i)
      if (i->second > best->second) best = i;
    for (Word& word : corpus) merge(word, best->first);
    out.merges.push_back(best->first);
    // Two merges can spell the same token; it has one id.
    if (const std::string token = best->first.first + best->first.second; known.insert(token).second) out.tokens.push_back(token);
  }
  return out;
}

std::string tokenizer_json(const BpeVocabulary& vocabulary, const std::string& special) {
  using nlohmann::ordered_json;
  ordered_json ids = ordered_json::object(), merges = ordered_json::array();
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) ids[vocabulary.tokens[i]] = i;
  for (const auto& [left, right] : vocabulary.merges) merges.push_back(left + " " + right);
  ordered_json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  ordered_json out;
  out["version"] = "1.0";
  out["truncation"] = nullptr;
  out["padding"] = nullptr;
  out["added_tokens"] = ordered_json::array({{{"id", vocabulary.tokens.size()},
                                              {"content", special},
                                              {"single_word", false},
                                              {"lstrip", false},
                                              {"rstrip", false},
                                              {"normalized", false},
                                              {"special", true}}});
  out["normalizer"] = nullptr;
  out["pre_tokenizer"] = byte_level;
  out["post_processor"] = nullptr;
  out["decoder"] = byte_level;
  out["model"] = {{"type", "BPE"},
                  {"dropout", nullptr},
                  {"unk_token", nullptr},
                  {"continuing_subword_prefix", nullptr},
                  {"end_of_word_suffix", nullptr},
                  {"fuse_unk", false},
                  {"byte_fallback", false},
                  {"ignore_merges", false},
                  {"vocab", ids},
                  {"merges", merges}};
  return out.dump(1) + "\n";
}

}  // namespace kava
