#include "engine/added_tokens.h"

#include <algorithm>

#include "engine/unicode.h"

namespace kava {

namespace {

// Searching takes at most this many steps per byte of text.
constexpr std::size_t kLongestContent = 1024;

std::size_t start_of_last_character(std::string_view text) {
  std::size_t i = text.size() - 1;
  while (i > 0 && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) --i;
  return i;
}

}  // namespace

AddedTokens AddedTokens::load(const JsonAt& section, const Bpe& model, const Normalizer& normalize) {
  AddedTokens added;
  for (std::size_t i = 0; i < section.array().size(); ++i) added.add(section.at(i), model, normalize);
  added.build_trees(section);
  for (const auto& [id, token] : added.tokens_)
    if (token.single_word) added.word_ = SplitPattern::regex(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200C\u200D])");
  return added;
}

void AddedTokens::add(const JsonAt& entry, const Bpe& model, const Normalizer& normalize) {
  const std::string& content = entry.at("content").string();
  const std::int32_t id = entry.at("id").whole(kMostTokenIds - 1);
  Token token{content,
              content,
              entry.at("single_word").boolean(),
              entry.at("lstrip").boolean(),
              entry.at("rstrip").boolean(),
              entry.at("normalized").boolean(),
              entry.at("special").boolean()};
  if (content.empty()) return;  // as the library does
  if (content.size() > kLongestContent) entry.at("content").refuse(fmt::format("is longer than {} bytes", kLongestContent));
  // The library ignores the id of the file: it takes that of the vocabulary, or the next free one.
  std::int32_t given = std::max(model.count(), largest_id_ + 1);
  if (auto known = id_of_content_.find(content); known != id_of_content_.end()) given = known->second;
  else if (auto in_model = model.id_of(content)) given = *in_model;
  if (given != id)
    entry.refuse(
        fmt::format("the added token \"{}\" has id {} here, but its place in the vocabulary gives it {}", escaped(content), id, given));
  if (const std::string* other = model.token(id); other && *other != content)
    entry.refuse(fmt::format("the added token \"{}\" has the id {} of \"{}\"", escaped(content), id, escaped(*other)));
  if (token.normalized) token.spelling = normalize(content);
  if (token.special) special_.insert(content);
  id_of_content_[content] = id;
  largest_id_ = std::max(largest_id_, id);
  tokens_.insert_or_assign(id, std::move(token));
}

void AddedTokens::build_trees(const JsonAt& section) {
  for (const auto& [id, token] : tokens_) {
    Tree& tree = token.normalized ? normalized_ : raw_;
    std::int32_t node = 0;
    for (char c : token.spelling) {
      const std::uint64_t key = static_cast<std::uint64_t>(node) << 8 | static_cast<unsigned char>(c);
      auto [it, fresh] = tree.child.try_emplace(key, static_cast<std::int32_t>(tree.id.size()));
      if (fresh) tree.id.push_back(-1);
      node = it->second;
    }
    std::int32_t& end = tree.id[static_cast<std::size_t>(node)];
    if (end >= 0) section.refuse(fmt::format("two added tokens are both \"{}\" once normalized", escaped(token.spelling)));
    end = id;
  }
}

bool AddedTokens::is_word(char32_t c) const {
  std::string character;
  append_utf8(character, c);
  std::vector<Stretch> stretches;
  word_->find_all(character, stretches);
  return stretches.front().matched;
}

bool AddedTokens::stands_alone(std::string_view text, std::size_t begin, std::size_t end) const {
  if (begin > 0) {
    std::size_t i = start_of_last_character(text.substr(0, begin));
    if (is_word(next_code_point(text, i))) return false;
  }
  return end == text.size() || !is_word(next_code_point(text, end));
}

std::vector<AddedTokens::Part> AddedTokens::find(std::string_view text, Stage stage, bool special_as_text) const {
  const Tree& tree = stage == Stage::raw ? raw_ : normalized_;
  std::vector<Part> parts;
  std::size_t behind = 0;  // end of the last part
  auto longest_at = [&](std::size_t i) {
    std::pair<std::size_t, std::int32_t> best{0, -1};
    std::int32_t node = 0;
    for (std::size_t k = i; k < text.size(); ++k) {
      auto it = tree.child.find(static_cast<std::uint64_t>(node) << 8 | static_cast<unsigned char>(text[k]));
      if (it == tree.child.end()) break;
      node = it->second;
      if (tree.id[static_cast<std::size_t>(node)] >= 0) best = {k + 1, tree.id[static_cast<std::size_t>(node)]};
    }
    return best;
  };
  for (std::size_t i = 0; !tree.child.empty() && i < text.size();) {
    const auto [match_end, id] = longest_at(i);
    if (id < 0) {
      ++i;
      continue;
    }
    std::size_t begin = i, end = match_end;
    i = match_end;
    const Token& token = tokens_.at(id);
    if (special_as_text && special_.contains(token.content)) continue;
    if (token.single_word && !stands_alone(text, begin, end)) continue;
    if (token.lstrip) {
      while (begin > behind) {
        const std::size_t last = start_of_last_character(text.substr(0, begin));
        std::size_t k = last;
        if (!is_white_space(next_code_point(text, k))) break;
        begin = last;
      }
      begin = std::max(begin, behind);
    }
    if (token.rstrip)
      for (std::size_t k = end; k < text.size() && is_white_space(next_code_point(text, k));) end = k;
    if (behind < begin) parts.push_back({behind, begin, -1});
    if (begin < end) parts.push_back({begin, end, id});  // an earlier token's rstrip may have taken it
    behind = end;
  }
  if (behind < text.size()) parts.push_back({behind, text.size(), -1});
  return parts;
}

std::optional<std::int32_t> AddedTokens::id_of(std::string_view content) const {
  auto it = id_of_content_.find(std::string(content));
  return it == id_of_content_.end() ? std::nullopt : std::optional(it->second);
}

const std::string* AddedTokens::spelling(std::int32_t id) const {
  auto it = tokens_.find(id);
  return it == tokens_.end() ? nullptr : &it->second.spelling;
}

}  // namespace kava
