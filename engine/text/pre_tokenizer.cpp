#include "engine/text/pre_tokenizer.h"

#include <algorithm>
#include <stdexcept>

#include "engine/text/unicode.h"

namespace kava {

namespace {

// The pattern of ByteLevel with use_regex (GPT-2's): contractions, letters, numbers, other characters, spaces.
constexpr std::string_view kByteLevelPattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Real files have up to five.
constexpr std::size_t kMostSteps = 100;
// A search compares up to this many bytes at each place of a text.
constexpr std::size_t kLongestLiteral = 4096;

// Each numeric character is a match.
void find_numerics(std::string_view text, std::vector<Stretch>& out) {
  std::size_t behind = 0;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t start = i;
    if (!is_numeric(next_code_point(text, i))) continue;
    if (start > behind) out.push_back({behind, start, false});
    out.push_back({start, i, true});
    behind = i;
  }
  if (behind < text.size()) out.push_back({behind, text.size(), false});
}

}  // namespace

PreTokenizer PreTokenizer::load(const JsonAt& section) {
  PreTokenizer p;
  if (!section.is_null()) p.load_step(section);
  if (!p.byte_level_) section.refuse("there is no ByteLevel pre-tokenizer", "use a byte-level BPE tokenizer");
  return p;
}

void PreTokenizer::load_step(const JsonAt& step) {
  const std::string& type = step.at("type").string();
  if (type == "Sequence") {
    const JsonAt steps = step.at("pretokenizers");
    for (std::size_t i = 0; i < steps.array().size(); ++i) load_step(steps.at(i));
    return;
  }
  if (byte_level_) step.refuse("a pre-tokenizer after ByteLevel is not supported", "use a tokenizer whose last pre-tokenizer is ByteLevel");
  if (steps_.size() == kMostSteps) step.refuse(fmt::format("more than {} pre-tokenizers are not supported", kMostSteps), "use fewer");
  if (type == "Split") {
    steps_.push_back(load_split(step));
  } else if (type == "Digits") {
    steps_.push_back({Kind::digits, step.at("individual_digits").boolean() ? Behavior::isolated : Behavior::contiguous});
  } else if (type == "ByteLevel") {
    byte_level_ = true;
    if (step.at("add_prefix_space").boolean()) steps_.push_back({Kind::prefix_space});
    if (step.boolean_or("use_regex", true))
      steps_.push_back({Kind::split, Behavior::isolated, false, SplitPattern::regex(kByteLevelPattern)});
  } else {
    step.refuse(fmt::format("the pre-tokenizer {} is not supported", escaped(type)), "Split, Digits, ByteLevel and Sequence are");
  }
}

PreTokenizer::Step PreTokenizer::load_split(const JsonAt& step) {
  constexpr std::pair<std::string_view, Behavior> kBehaviors[] = {{"Removed", Behavior::removed},
                                                                  {"Isolated", Behavior::isolated},
                                                                  {"MergedWithPrevious", Behavior::merged_with_previous},
                                                                  {"MergedWithNext", Behavior::merged_with_next},
                                                                  {"Contiguous", Behavior::contiguous}};
  const JsonAt pattern = step.at("pattern"), behavior = step.at("behavior");
  const auto* known = std::find_if(std::begin(kBehaviors), std::end(kBehaviors), [&](auto& b) { return b.first == behavior.string(); });
  if (known == std::end(kBehaviors)) behavior.refuse(fmt::format("unknown split behavior \"{}\"", escaped(behavior.string())));
  const bool invert = step.at("invert").boolean();
  if (pattern.object().size() != 1 || !(pattern.has("Regex") || pattern.has("String")))
    pattern.refuse("must hold either \"Regex\" or \"String\"");
  if (pattern.has("String")) {
    const JsonAt literal = pattern.at("String");
    if (literal.string().size() > kLongestLiteral)
      literal.refuse(fmt::format("a text of more than {} bytes to split at is not supported", kLongestLiteral), "use a shorter one");
    return {Kind::split, known->second, invert, SplitPattern::literal(literal.string())};
  }
  const JsonAt regex = pattern.at("Regex");
  try {
    return {Kind::split, known->second, invert, SplitPattern::regex(regex.string())};
  } catch (const std::invalid_argument& e) {
    regex.refuse(fmt::format("the split pattern \"{}\" is not supported: {}", escaped(regex.string()), escaped(e.what())),
                 "use a pattern that both Oniguruma and PCRE2 read");
  }
}

void PreTokenizer::cut(const std::vector<Stretch>& stretches, const Step& step, std::string_view text, std::vector<std::string_view>& out) {
  const Behavior behavior = step.behavior;
  const bool invert = step.invert;
  auto emit = [&](std::size_t begin, std::size_t end) {
    if (begin < end) out.push_back(text.substr(begin, end - begin));
  };
  if (behavior == Behavior::isolated || behavior == Behavior::removed) {
    for (const Stretch& s : stretches)
      if (behavior == Behavior::isolated || s.matched == invert) emit(s.begin, s.end);
    return;
  }
  // The others join a stretch to its neighbour: contiguous where both are matches or both are not; merged_with_previous a match to what
  // comes before it unless that is a match too; merged_with_next the mirror image, from the end.
  const std::size_t n = stretches.size();
  const bool backwards = behavior == Behavior::merged_with_next;
  std::vector<Stretch> joined;
  bool previous = false;
  for (std::size_t k = 0; k < n; ++k) {
    const Stretch& s = stretches[backwards ? n - 1 - k : k];
    const bool matched = s.matched != invert;
    const bool join = behavior == Behavior::contiguous ? matched == previous : matched && !previous;
    if (!join || joined.empty()) joined.push_back(s);
    else if (backwards) joined.back().begin = s.begin;
    else joined.back().end = s.end;
    previous = matched;
  }
  if (backwards) std::reverse(joined.begin(), joined.end());
  for (const Stretch& s : joined) emit(s.begin, s.end);
}

std::vector<std::string_view> PreTokenizer::split(std::string_view text, std::deque<std::string>& added) const {
  std::vector<std::string_view> pieces, next;
  std::vector<Stretch> stretches;
  if (!text.empty()) pieces.push_back(text);
  for (const Step& step : steps_) {
    next.clear();
    for (std::string_view piece : pieces) {
      if (step.kind == Kind::prefix_space) {
        next.push_back(piece.front() == ' ' ? piece : std::string_view(added.emplace_back(1, ' ').append(piece)));
        continue;
      }
      stretches.clear();
      if (step.kind == Kind::split) step.pattern->find_all(piece, stretches);
      else find_numerics(piece, stretches);
      cut(stretches, step, piece, next);
    }
    pieces.swap(next);
  }
  return pieces;
}

}  // namespace kava
