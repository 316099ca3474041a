#include "engine/text/tokenizer.h"

#include <deque>
#include <filesystem>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json_at.h"
#include "engine/text/added_tokens.h"
#include "engine/text/bpe.h"
#include "engine/text/named_tokens.h"
#include "engine/text/pre_tokenizer.h"
#include "engine/text/unicode.h"

namespace kava {

struct Tokenizer::Parts {
  Bpe model;
  PreTokenizer pre_tokenizer;
  AddedTokens added = {};
  bool nfc = false;
  bool byte_level_decoder = false;  // else tokens are joined by spaces
  std::optional<std::int32_t> bos = {};
  std::optional<std::string> eos_token = {};
  std::string note = {};
  std::vector<NamedToken> from_other_files = {};  // those that tokenizer.json lacks

  const std::string* spelling(std::int32_t id) const {
    const std::string* added_spelling = added.spelling(id);
    return added_spelling ? added_spelling : model.token(id);
  }
  std::optional<std::int32_t> id_of(std::string_view token) const {
    const auto id = added.id_of(token);
    return id ? id : model.id_of(token);
  }
};

namespace {

JsonAt member_or_null(const JsonAt& root, const char* key) {
  static const Json null;
  return root.has(key) ? root.at(key) : JsonAt(null, root.file(), key);
}

// Whether the normalizer is NFC (true) or nothing (false).
bool load_normalizer(const JsonAt& section) {
  if (section.is_null()) return false;
  const std::string& type = section.at("type").string();
  if (type == "NFC") return true;
  if (type != "Sequence") section.refuse(fmt::format("the normalizer {} is not supported", escaped(type)), "NFC, Sequence and none are");
  const JsonAt members = section.at("normalizers");
  bool nfc = false;
  for (std::size_t i = 0; i < members.array().size(); ++i) nfc = load_normalizer(members.at(i)) || nfc;
  return nfc;
}

// Whether the decoder is ByteLevel (true) or missing (false).
bool load_decoder(const JsonAt& section) {
  if (section.is_null()) return false;
  const std::string& type = section.at("type").string();
  if (type == "ByteLevel") return true;
  if (type == "Sequence" && section.at("decoders").array().size() == 1) return load_decoder(section.at("decoders").at(std::size_t{0}));
  section.refuse(fmt::format("the decoder {} is not supported", escaped(type)), "ByteLevel is");
}

// The ids that the post-processor puts before a single sequence, once a template tells them.
void load_prefix(const JsonAt& section, std::optional<std::vector<std::int32_t>>& prefix) {
  if (section.is_null()) return;
  const std::string& type = section.at("type").string();
  if (type == "ByteLevel") return;
  if (type == "Sequence") {
    const JsonAt processors = section.at("processors");
    for (std::size_t i = 0; i < processors.array().size(); ++i) load_prefix(processors.at(i), prefix);
    return;
  }
  if (type != "TemplateProcessing")
    section.refuse(fmt::format("the post-processor {} is not supported", escaped(type)), "ByteLevel, TemplateProcessing and Sequence are");
  // The library takes what the first one made of one text for a pair.
  if (prefix) section.refuse("a second TemplateProcessing is not supported", "use a post-processor with one");
  prefix.emplace();
  const JsonAt single = section.at("single");
  bool before = true;
  for (std::size_t i = 0; i < single.array().size(); ++i) {
    const JsonAt piece = single.at(i);
    if (piece.has("Sequence")) {
      if (piece.at("Sequence").at("id").string() != "A") piece.refuse("the template of a single sequence must hold sequence A only");
      if (!before) piece.refuse("the template of a single sequence must hold it once");
      before = false;
      continue;
    }
    const JsonAt ids = section.at("special_tokens").at(piece.at("SpecialToken").at("id").string().c_str()).at("ids");
    for (std::size_t k = 0; k < ids.array().size(); ++k)
      if (const std::int32_t id = ids.at(k).whole(kMostTokenIds - 1); before) prefix->push_back(id);
  }
  if (before) single.refuse("the template does not hold the sequence");
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

void Tokenizer::refuse_missing(const std::string& folder, const std::string& what_for, const std::string& remedy) {
  const std::filesystem::path path = folder;
  std::string older;
  for (const char* name : {"vocab.json", "merges.txt"})
    if (is_there(path / name)) older += older.empty() ? name : std::string(" and ") + name;
  throw Error(Exit::data, shown_path(folder),
              older.empty() ? "has no tokenizer.json, without which " + what_for
                            : fmt::format("has {}, which are not read, and no tokenizer.json, without which {}", older, what_for),
              older.empty() ? remedy : "write it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)");
}

Tokenizer Tokenizer::load(const std::string& folder) {
  const std::string file = (std::filesystem::path(folder) / "tokenizer.json").string();
  const Json json = read_json(file, kMostJson, {"model", "vocab"});
  const JsonAt root(json, file);
  const TokenFiles others(folder);

  if (root.has("version") && root.at("version").string() != "1.0")
    root.at("version").refuse(fmt::format("version \"{}\" is not supported", escaped(root.at("version").string())), "1.0 is");
  const bool nfc_wanted = load_normalizer(member_or_null(root, "normalizer"));
  auto parts = std::make_unique<Parts>(Parts{Bpe::load(root.at("model")), PreTokenizer::load(member_or_null(root, "pre_tokenizer"))});
  parts->nfc = nfc_wanted;
  parts->byte_level_decoder = load_decoder(member_or_null(root, "decoder"));
  const auto normalize = [&](std::string_view text) { return nfc_wanted ? nfc(text) : std::string(text); };
  if (root.has("added_tokens")) parts->added = AddedTokens::load(root.at("added_tokens"), parts->model, normalize);
  if (const std::vector<NamedToken> named = others.tokens(); !named.empty())
    parts->from_other_files = parts->added.extend(named, parts->model, normalize);

  std::optional<std::vector<std::int32_t>> from_template;
  load_prefix(member_or_null(root, "post_processor"), from_template);
  const std::vector<std::int32_t> prefix = from_template.value_or(std::vector<std::int32_t>{});
  if (prefix.size() > 1)
    root.refuse(fmt::format("post_processor: puts {} tokens before a text", prefix.size()), "one at most is supported");
  if (!prefix.empty()) {
    if (!parts->spelling(prefix[0])) root.refuse(fmt::format("post_processor: no token has the id {}", prefix[0]));
    parts->bos = prefix[0];
  }
  parts->eos_token = others.eos_token();
  parts->note = others.note();
  return Tokenizer(std::move(parts));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const { return encode(text, true); }
std::vector<std::int32_t> Tokenizer::encode_with_special(std::string_view text) const { return encode(text, false); }

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool special_as_text) const {
  if (const std::size_t at = invalid_utf8(text); at != std::string_view::npos)
    throw Error(Exit::data, "", fmt::format("the text is not valid UTF-8 at byte {}: \"{}\"", at, escaped(text.substr(at), 20)),
                "convert it to UTF-8");
  std::vector<std::int32_t> ids;
  ids.reserve(text.size() / 3 + 1);
  for (const AddedTokens::Part& part : parts_->added.find(text, AddedTokens::Stage::raw, special_as_text)) {
    if (part.id >= 0) {
      ids.push_back(part.id);
      continue;
    }
    std::string_view stretch = text.substr(part.begin, part.end - part.begin);
    std::string normalized;
    if (parts_->nfc) stretch = normalized = nfc(stretch);
    for (const AddedTokens::Part& inner : parts_->added.find(stretch, AddedTokens::Stage::normalized, special_as_text)) {
      if (inner.id >= 0) {
        ids.push_back(inner.id);
        continue;
      }
      std::deque<std::string> added;
      for (std::string_view piece : parts_->pre_tokenizer.split(stretch.substr(inner.begin, inner.end - inner.begin), added))
        parts_->model.encode(piece, ids);
    }
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  std::string bytes;
  bool first = true;
  for (std::int32_t id : ids) {
    const std::string* spelling = parts_->spelling(id);
    if (!spelling || (skip_special && parts_->added.is_special(*spelling))) continue;
    if (!parts_->byte_level_decoder) bytes += (first ? "" : " ") + *spelling;
    else if (auto own = bytes_of_symbols(*spelling)) bytes += *own;
    else bytes += *spelling;
    first = false;
  }
  return lossy_utf8(bytes);
}

std::int32_t Tokenizer::size() const { return std::max(parts_->model.largest_id(), parts_->added.largest_id()) + 1; }
std::optional<std::int32_t> Tokenizer::bos() const { return parts_->bos; }
std::optional<std::string> Tokenizer::eos_token() const { return parts_->eos_token; }
const std::string& Tokenizer::note() const { return parts_->note; }

void Tokenizer::require_ids_below(std::int64_t rows, const std::string& folder) const {
  for (const NamedToken& token : parts_->from_other_files)
    if (const std::int32_t id = *parts_->id_of(token.content); id >= rows)
      throw Error(Exit::data, token.file,
                  fmt::format("{}the token \"{}\" is not in tokenizer.json and gets the id {}, but vocab_size is {}",
                              token.place.empty() ? "" : token.place + ": ", escaped(token.content), id, rows),
                  "remove it there, or give the model rows for it");
  if (size() > rows)
    throw Error(Exit::data, (std::filesystem::path(folder) / "tokenizer.json").string(),
                fmt::format("has {} tokens, but vocab_size is {}", size(), rows), "use the tokenizer that belongs to the model");
}

std::optional<std::int32_t> Tokenizer::id_of(std::string_view token) const { return parts_->id_of(token); }
std::string Tokenizer::token(std::int32_t id) const { return decode({&id, 1}); }

}  // namespace kava
