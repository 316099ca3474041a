#include "engine/text/bpe.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <queue>

#include "engine/text/unicode.h"

namespace kava {

namespace {

constexpr std::uint64_t kNoPair = ~std::uint64_t{0};
constexpr std::uint32_t kNoRank = ~std::uint32_t{0};
constexpr std::size_t kShort = 32;  // up to here scanning for the lowest rank beats a heap

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
}

// Both halves of a product: either id moves all bits, also where a file's ids have a pattern.
std::size_t hash(std::uint64_t pair) {
  const auto product = static_cast<unsigned __int128>(pair ^ 0xA0761D6478BD642Fu) * 0xE7037ED1A0B428DBu;
  return static_cast<std::size_t>(static_cast<std::uint64_t>(product >> 64) ^ static_cast<std::uint64_t>(product));
}

// GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others in order for U+0100 and on.
struct ByteAlphabet {
  std::array<char32_t, 256> symbol{};
  std::array<int, 0x144> byte;  // -1: not of the alphabet
  constexpr ByteAlphabet() : byte{} {
    for (int& b : byte) b = -1;
    char32_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      symbol[static_cast<std::size_t>(b)] = printable ? static_cast<char32_t>(b) : next++;
      byte[symbol[static_cast<std::size_t>(b)]] = b;
    }
  }
};
constexpr ByteAlphabet kAlphabet;

}  // namespace

std::string symbol_of_byte(unsigned char byte) {
  std::string symbol;
  append_utf8(symbol, kAlphabet.symbol[byte]);
  return symbol;
}

std::optional<std::string> bytes_of_symbols(std::string_view token) {
  std::string bytes;
  for (std::size_t i = 0; i < token.size();) {
    const char32_t c = next_code_point(token, i);
    if (c >= kAlphabet.byte.size() || kAlphabet.byte[c] < 0) return std::nullopt;
    bytes += static_cast<char>(kAlphabet.byte[c]);
  }
  return bytes;
}

Bpe Bpe::load(const JsonAt& model) {
  if (model.has("type") && model.at("type").string() != "BPE")
    model.refuse(fmt::format("the model {} is not supported", escaped(model.at("type").string())), "use a byte-level BPE tokenizer");
  if (model.has("dropout") && !(model.at("dropout").value().is_number() && model.at("dropout").value().get<double>() == 0))
    model.at("dropout").refuse("BPE dropout is not supported", "set it to null");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (model.has(key) && !model.at(key).string().empty()) model.at(key).refuse("is not supported", "use a byte-level BPE tokenizer");
  if (model.boolean_or("byte_fallback", false)) model.at("byte_fallback").refuse("is not supported", "use a byte-level BPE tokenizer");
  Bpe bpe;
  bpe.load_vocabulary(model.at("vocab"));
  bpe.load_merges(model.at("merges"));
  bpe.load_bytes(model);
  if (model.boolean_or("ignore_merges", false)) {
    std::size_t bytes = 0;
    for (const std::string& token : bpe.tokens_) bytes += token.size();
    bpe.whole_ids_ = TokenTable(bpe.tokens_.size(), bytes);
    for (std::int32_t id = 0; id <= bpe.largest_id(); ++id)
      if (const std::string* token = bpe.token(id))
        if (const auto own = bytes_of_symbols(*token); own && !own->empty()) bpe.whole_ids_.add(*own, id);
  }
  return bpe;
}

void Bpe::load_vocabulary(const JsonAt& vocabulary) {
  const auto& listed = vocabulary.object().at("").get_ref<const Json::array_t&>();  // a token, its id, the next token, ...
  if (listed.empty()) vocabulary.refuse("is empty");
  const std::size_t count = listed.size() / 2;
  std::size_t bytes = 0;
  for (std::size_t n = 0; n < count; ++n) bytes += listed[2 * n].get_ref<const std::string&>().size();
  tokens_.reserve(count);
  ids_ = TokenTable(count, bytes);
  for (std::size_t n = 0; n < count; ++n) {
    const std::string& token = listed[2 * n].get_ref<const std::string&>();
    const Json& id = listed[2 * n + 1];
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= static_cast<std::uint64_t>(kMostTokenIds))
      vocabulary.refuse(fmt::format("the id of \"{}\" must be a whole number below {}, is {}", escaped(token), kMostTokenIds,
                                    escaped(id.dump(-1, ' ', true, Json::error_handler_t::replace), 40)));
    const auto i = id.get<std::size_t>();
    if (i >= index_of_id_.size()) index_of_id_.resize(i + 1, -1);
    if (index_of_id_[i] >= 0)
      vocabulary.refuse(fmt::format("\"{}\" and \"{}\" have the same id {}", escaped(tokens_[static_cast<std::size_t>(index_of_id_[i])]),
                                    escaped(token), i));
    index_of_id_[i] = static_cast<std::int32_t>(tokens_.size());
    if (!ids_.add(tokens_.emplace_back(token), static_cast<std::int32_t>(i)))
      vocabulary.refuse(fmt::format("the token \"{}\" is given twice", escaped(token)));
  }
}

void Bpe::load_merges(const JsonAt& merges) {
  const auto& list = merges.array();
  merges_.assign(std::bit_ceil(list.size() * 3 / 2 + 2), Merge{kNoPair, kNoRank, -1});
  std::uint32_t rank = 0;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const Json& merge = list[i];
    if (merge.is_string() != list[0].is_string()) merges.at(i).refuse("merges of both spellings in one file");
    if (merge.is_array()) {
      if (merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string()) merges.at(i).refuse("must be two strings");
      add_merge(merges, i, merge[0].get_ref<const std::string&>(), merge[1].get_ref<const std::string&>(), rank++);
      continue;
    }
    if (!merge.is_string()) merges.at(i).string();  // says what it is
    const std::string_view line = merge.get_ref<const std::string&>();
    if (line.starts_with("#version")) continue;
    const std::size_t space = line.find(' ');
    if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos)
      merges.at(i).refuse(fmt::format("\"{}\" is not two tokens with one space between them", escaped(line)));
    add_merge(merges, i, line.substr(0, space), line.substr(space + 1), rank++);
  }
}

void Bpe::add_merge(const JsonAt& merges, std::size_t at, std::string_view left, std::string_view right, std::uint32_t rank) {
  auto id = [&](std::string_view token) {
    const std::int32_t found = ids_.id_of(token);
    if (found < 0) merges.at(at).refuse(fmt::format("the token \"{}\" is not in the vocabulary", escaped(token)));
    return found;
  };
  std::string whole;
  whole.reserve(left.size() + right.size());
  whole.append(left).append(right);
  const Merge entry{pair_key(id(left), id(right)), rank, id(whole)};
  const std::size_t mask = merges_.size() - 1;
  std::size_t slot = hash(entry.pair) & mask;
  while (merges_[slot].pair != kNoPair && merges_[slot].pair != entry.pair) slot = (slot + 1) & mask;
  merges_[slot] = entry;  // the last of equal pairs wins
}

void Bpe::load_bytes(const JsonAt& model) {
  fuse_unknown_ = model.boolean_or("fuse_unk", false);
  std::optional<std::int32_t> unknown;
  if (model.has("unk_token")) unknown = id_of(model.at("unk_token").string());
  for (std::size_t b = 0; b < 256; ++b) {
    const auto id = id_of(symbol_of_byte(static_cast<unsigned char>(b)));
    // 0xC0, 0xC1 and 0xF5 to 0xFF never occur in UTF-8.
    const bool occurs = b != 0xC0 && b != 0xC1 && b < 0xF5;
    if (!id && occurs && model.has("unk_token") && !unknown)
      model.at("unk_token").refuse(fmt::format("\"{}\" is not in the vocabulary", escaped(model.at("unk_token").string())));
    unknown_[b] = !id && unknown;
    id_of_byte_[b] = id ? *id : unknown.value_or(-1);
  }
}

std::optional<std::int32_t> Bpe::id_of(std::string_view token) const {
  const std::int32_t id = ids_.id_of(token);
  return id < 0 ? std::nullopt : std::optional(id);
}

const std::string* Bpe::token(std::int32_t id) const {
  if (id < 0 || id > largest_id() || index_of_id_[static_cast<std::size_t>(id)] < 0) return nullptr;
  return &tokens_[static_cast<std::size_t>(index_of_id_[static_cast<std::size_t>(id)])];
}

const Bpe::Merge* Bpe::find_merge(std::int32_t left, std::int32_t right) const {
  const std::uint64_t pair = pair_key(left, right);
  const std::size_t mask = merges_.size() - 1;
  for (std::size_t slot = hash(pair) & mask; merges_[slot].pair != kNoPair; slot = (slot + 1) & mask)
    if (merges_[slot].pair == pair) return &merges_[slot];
  return nullptr;
}

void Bpe::encode(std::string_view piece, std::vector<std::int32_t>& ids) const {
  if (!whole_ids_.empty())
    if (const std::int32_t id = whole_ids_.id_of(piece); id >= 0) {
      ids.push_back(id);
      return;
    }
  const std::size_t first = ids.size();
  bool after_unknown = false;
  for (char c : piece) {
    const auto b = static_cast<unsigned char>(c);
    if (id_of_byte_[b] < 0) continue;
    if (!(unknown_[b] && after_unknown && fuse_unknown_)) ids.push_back(id_of_byte_[b]);
    after_unknown = unknown_[b];
  }
  if (ids.size() - first <= kShort) merge_short(ids, first);
  else merge_long(ids, first);
}

void Bpe::merge_short(std::vector<std::int32_t>& ids, std::size_t first) const {
  std::size_t n = ids.size() - first;
  if (n < 2) return;
  std::int32_t* id = ids.data() + first;
  const Merge* merge[kShort];  // of id[i] and id[i+1]
  for (std::size_t i = 0; i + 1 < n; ++i) merge[i] = find_merge(id[i], id[i + 1]);
  for (;;) {
    std::size_t best = 0;
    std::uint32_t rank = kNoRank;
    for (std::size_t i = 0; i + 1 < n; ++i)
      if (merge[i] && merge[i]->rank < rank) rank = merge[i]->rank, best = i;
    if (rank == kNoRank) break;
    id[best] = merge[best]->id;
    for (std::size_t i = best + 1; i + 1 < n; ++i) {
      id[i] = id[i + 1];
      merge[i] = i + 2 < n ? merge[i + 1] : nullptr;
    }
    --n;
    if (best > 0) merge[best - 1] = find_merge(id[best - 1], id[best]);
    if (best + 1 < n) merge[best] = find_merge(id[best], id[best + 1]);
  }
  ids.resize(first + n);
}

// The same by a heap of (rank, position) over a linked list, n log n. An entry is stale when the pair at its position has changed.
void Bpe::merge_long(std::vector<std::int32_t>& ids, std::size_t first) const {
  const std::size_t n = ids.size() - first;
  if (n > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
    throw Error(Exit::data, "", "a stretch of text without a split is longer than 2 GiB", "break it into lines");
  std::vector<Symbol> symbols(n);
  struct Candidate {
    std::uint32_t rank;
    std::int32_t position, id;
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : position > other.position; }
  };
  std::priority_queue<Candidate> heap;
  auto propose = [&](std::int32_t position) {
    const Symbol& s = symbols[static_cast<std::size_t>(position)];
    if (s.next < 0) return;
    if (const Merge* m = find_merge(s.id, symbols[static_cast<std::size_t>(s.next)].id)) heap.push({m->rank, position, m->id});
  };
  for (std::size_t i = 0; i < n; ++i)
    symbols[i] = {ids[first + i], static_cast<std::int32_t>(i) - 1, i + 1 < n ? static_cast<std::int32_t>(i) + 1 : -1};
  for (std::size_t i = 0; i < n; ++i) propose(static_cast<std::int32_t>(i));
  while (!heap.empty()) {
    const Candidate best = heap.top();
    heap.pop();
    Symbol& left = symbols[static_cast<std::size_t>(best.position)];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[static_cast<std::size_t>(left.next)];
    const Merge* now = find_merge(left.id, right.id);
    if (!now || now->id != best.id) continue;
    left.id = best.id;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = best.position;
    if (left.previous >= 0) propose(left.previous);
    propose(best.position);
  }
  ids.resize(first);
  for (const Symbol& s : symbols)
    if (s.id >= 0) ids.push_back(s.id);
}

}  // namespace kava
