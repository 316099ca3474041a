#include "engine/text/added_tokens.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "engine/text/unicode.h"

namespace kava {

namespace {

// Of all spellings together; a node of the automaton takes some 70 bytes.
constexpr std::size_t kMostAddedBytes = std::size_t{1} << 22;

std::size_t start_of_last_character(std::string_view text) {
  std::size_t i = text.size() - 1;
  while (i > 0 && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) --i;
  return i;
}

}  // namespace

AddedTokens AddedTokens::load(const JsonAt& section, const Bpe& model, const Normalizer& normalize) {
  AddedTokens added;
  for (std::size_t i = 0; i < section.array().size(); ++i) added.add(section.at(i), model, normalize);
  if (const auto shared = added.build_finders())
    section.refuse(fmt::format("two added tokens are both \"{}\" once normalized", escaped(*shared)));
  return added;
}

std::vector<NamedToken> AddedTokens::extend(std::span<const NamedToken> named, const Bpe& model, const Normalizer& normalize) {
  std::vector<NamedToken> fresh;
  std::int32_t next = largest_id_ >= model.count() ? largest_id_ + 1 : model.count();
  for (const NamedToken& token : named) {
    if (token.content.empty()) continue;  // as the library does
    const auto refuse = [&](const std::string& what, const std::string& remedy) {
      throw Error(Exit::data, token.file,
                  fmt::format("{}the token \"{}\" {}", token.place.empty() ? "" : token.place + ": ", escaped(token.content), what),
                  remedy);
    };
    const auto added = id_of(token.content);
    const auto known = added ? added : model.id_of(token.content);
    if (token.must_exist && !known)
      refuse("is in no other file, and versions of transformers differ in whether it is one",
             "add it to tokenizer.json, or remove it here");
    const std::int32_t id = known ? *known : next++;
    if (token.id && *token.id != id)
      refuse(fmt::format("has id {} here, but {} by tokenizer.json", *token.id, id), "make the files agree, or remove the entry");
    if (const std::string* other = model.token(id); id >= kMostTokenIds || (other && *other != token.content))
      refuse(fmt::format("would get id {}, which is taken or too large", id), "add it to tokenizer.json, or remove it here");
    if (!known) fresh.push_back(token);
    if (!added || token.replaces) put(token, id, normalize);
    else if (token.special) special_.insert(token.content);
  }
  if (const auto shared = build_finders())
    throw Error(Exit::data, named.front().file, fmt::format("two added tokens are both \"{}\" once normalized", escaped(*shared)),
                "remove one of them");
  return fresh;
}

void AddedTokens::put(const NamedToken& named, std::int32_t id, const Normalizer& normalize) {
  Token token{named.content, named.content, named.single_word, named.lstrip, named.rstrip, named.normalized, named.special};
  if (token.normalized) token.spelling = normalize(token.content);
  bytes_ += token.spelling.size();
  if (bytes_ > kMostAddedBytes)
    throw Error(Exit::data, named.file, fmt::format("the added tokens take more than {} bytes together", kMostAddedBytes), "remove some");
  if (token.special) special_.insert(token.content);  // and what was special stays so, as in the library
  id_of_content_[token.content] = id;
  largest_id_ = std::max(largest_id_, id);
  tokens_.insert_or_assign(id, std::move(token));
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
  // The library ignores the id of the file: it takes that of the vocabulary, or counts on from the vocabulary's number of tokens.
  const auto known = id_of_content_.find(content);
  const std::int32_t given = known != id_of_content_.end() ? known->second : model.id_of(content).value_or(model.count() + outside_model_);
  if (given != id)
    entry.refuse(
        fmt::format("the added token \"{}\" has id {} here, but its place in the vocabulary gives it {}", escaped(content), id, given));
  if (const std::string* other = model.token(id); other && *other != content)
    entry.refuse(fmt::format("the added token \"{}\" has the id {} of \"{}\"", escaped(content), id, escaped(*other)));
  if (token.normalized) token.spelling = normalize(content);
  if (known != id_of_content_.end()) {
    if (token == tokens_.at(id)) return;
    entry.refuse(fmt::format("the added token \"{}\" is given twice, in two forms", escaped(content)));
  }
  bytes_ += token.spelling.size();
  if (bytes_ > kMostAddedBytes) entry.refuse(fmt::format("the added tokens take more than {} bytes together", kMostAddedBytes));
  if (token.special) special_.insert(content);
  if (!model.id_of(content)) ++outside_model_;
  id_of_content_[content] = id;
  largest_id_ = std::max(largest_id_, id);
  tokens_.emplace(id, std::move(token));
}

std::optional<std::string> AddedTokens::build_finders() {
  raw_ = normalized_ = Finder();
  for (const auto& [id, token] : tokens_) {
    if (!(token.normalized ? normalized_ : raw_).add(token.spelling, id)) return token.spelling;
    if (token.single_word && !word_) word_ = SplitPattern::regex(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200C\u200D])");
  }
  raw_.link();
  normalized_.link();
  return std::nullopt;
}

std::int32_t AddedTokens::Finder::child(std::int32_t node, unsigned char byte) const {
  const auto it = child_.find(static_cast<std::uint64_t>(node) << 8 | byte);
  return it == child_.end() ? -1 : it->second;
}

bool AddedTokens::Finder::add(std::string_view spelling, std::int32_t id) {
  std::int32_t node = 0;
  for (auto c = spelling.rbegin(); c != spelling.rend(); ++c) {
    const auto byte = static_cast<unsigned char>(*c);
    const auto [it, fresh] = child_.try_emplace(static_cast<std::uint64_t>(node) << 8 | byte, static_cast<std::int32_t>(nodes_.size()));
    if (fresh) nodes_.push_back({node, 0, -1, nodes_[static_cast<std::size_t>(node)].depth + 1, byte});
    if (node == 0) of_root_[byte] = it->second;
    node = it->second;
  }
  std::int32_t& end = nodes_[static_cast<std::size_t>(node)].id;
  return std::exchange(end, id) < 0;
}

void AddedTokens::Finder::link() {
  std::vector<std::int32_t> order(nodes_.size());
  std::iota(order.begin(), order.end(), 0);
  auto node = [&](std::int32_t i) -> Node& { return nodes_[static_cast<std::size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return node(a).depth < node(b).depth; });
  for (std::int32_t i : order) {
    if (i == 0) continue;
    Node& n = node(i);
    std::int32_t from = node(n.parent).fall, to = -1;
    for (; from >= 0 && (to = child(from, n.byte)) < 0;) from = node(from).fall;
    n.fall = std::max(to, 0);
    if (n.id < 0) n.id = node(n.fall).id;
  }
}

std::vector<AddedTokens::Start> AddedTokens::Finder::find(std::string_view text) const {
  std::vector<Start> starts;
  std::int32_t node = 0;
  for (std::size_t i = child_.empty() ? 0 : text.size(); i-- > 0;) {
    const auto byte = static_cast<unsigned char>(text[i]);
    std::int32_t to = 0;
    while (node > 0 && (to = child(node, byte)) < 0) node = nodes_[static_cast<std::size_t>(node)].fall;
    node = node > 0 ? to : of_root_[byte];
    if (const std::int32_t id = nodes_[static_cast<std::size_t>(node)].id; id >= 0) starts.push_back({i, id});
  }
  return starts;
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
  std::vector<Part> parts;
  std::size_t behind = 0;     // end of the last part
  std::size_t match_end = 0;  // of the last token, without what it strips
  std::size_t space_end = 0;  // of the white space behind the last token with rstrip
  const std::vector<Start> starts = (stage == Stage::raw ? raw_ : normalized_).find(text);
  for (auto start = starts.rbegin(); start != starts.rend(); ++start) {
    const auto [at, id] = *start;
    if (at < match_end) continue;
    const Token& token = tokens_.at(id);
    match_end = at + token.spelling.size();
    std::size_t begin = at, end = match_end;
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
    if (token.rstrip) {
      end = std::max(end, space_end);
      for (std::size_t k = end; k < text.size() && is_white_space(next_code_point(text, k));) end = k;
      space_end = end;
    }
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
