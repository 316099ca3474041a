// Oniguruma's dialect into PCRE2's. Differences that are treated: \w, \b, \h, \v, scripts and the POSIX brackets (other sets), \u1234,
// {,n}, {n}? and {n,m}+ (an optional and a repeated interval, no laziness or possession), (?m) (dot matches newline). Refused: sets within
// sets and &&, options and escapes that one of the two lacks or reads otherwise.
#include <cctype>
#include <optional>
#include <stdexcept>

#include "engine/error.h"
#include "engine/text/split_pattern.h"

namespace kava {

namespace {

// \w of Oniguruma in UTF-8, as the inside of a bracket expression. In its own brackets it is kWord; alone, and for \b, the superscripts and
// fractions of Latin-1 count too.
constexpr std::string_view kWord = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
const std::string kWordAlone = std::string(kWord) + R"(\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE})";
constexpr std::string_view kHex = "0-9a-fA-F";

struct PosixSet {
  std::string_view name, inside, negated;  // negated: "" where a bracket expression cannot hold the complement
};
constexpr PosixSet kPosixSets[] = {
    {"alpha", R"(\p{Alphabetic})", R"(\P{Alphabetic})"},
    {"upper", R"(\p{Uppercase})", R"(\P{Uppercase})"},
    {"lower", R"(\p{Lowercase})", R"(\P{Lowercase})"},
    {"digit", R"(\p{Nd})", R"(\P{Nd})"},
    {"space", R"(\s)", R"(\S)"},
    {"cntrl", R"(\p{Cc})", R"(\P{Cc})"},
    {"alnum", R"(\p{Alphabetic}\p{Nd})", ""},
    {"word", kWord, ""},
    {"punct", R"(\p{P}\p{S})", ""},
    {"xdigit", kHex, ""},
    {"blank", R"(\t\p{Zs})", ""},
};

class Translator {
 public:
  explicit Translator(std::string_view in) : in_(in) {}

  std::string run() {
    while (i_ < in_.size()) element();
    return out_;
  }

 private:
  [[noreturn]] void refuse(std::string_view what) const { throw std::invalid_argument(fmt::format("{} at byte {}", what, i_)); }
  bool starts(std::string_view s) const { return in_.substr(i_).starts_with(s); }
  char peek(std::size_t ahead = 0) const { return i_ + ahead < in_.size() ? in_[i_ + ahead] : '\0'; }

  void atom(std::string_view text) {
    atom_ = out_.size();
    out_ += text;
  }

  void element() {
    switch (peek()) {
      case '\\':
        return escape();
      case '[':
        return bracket();
      case '(':
        return open_group();
      case ')':
        if (!groups_.empty()) {
          atom_ = groups_.back();
          groups_.pop_back();
        }
        out_ += in_[i_++];
        return;
      case '{':
        return interval();
      case '*':
      case '+':
      case '?':
        out_ += in_[i_++];
        return;
      default: {
        atom_ = out_.size();
        do out_ += in_[i_++];
        while (i_ < in_.size() && (static_cast<unsigned char>(in_[i_]) & 0xC0) == 0x80);
      }
    }
  }

  void open_group() {
    groups_.push_back(out_.size());
    if (starts("(*")) refuse("a construct beginning with (*");
    out_ += in_[i_++];
    if (peek() != '?') return;
    out_ += in_[i_++];
    if (std::string_view(":=!>#").find(peek()) != std::string_view::npos && peek()) {
      if (peek() == '#') {  // a comment, to its end; it is no atom
        while (i_ < in_.size() && peek() != ')') out_ += in_[i_++];
        if (i_ < in_.size()) out_ += in_[i_++];
        groups_.pop_back();
        return;
      }
      out_ += in_[i_++];
      return;
    }
    if (peek() == '<') {
      out_ += in_[i_++];
      return;
    }
    bool off = false;
    for (; std::isalpha(static_cast<unsigned char>(peek())) || peek() == '-'; ++i_) {
      const char option = peek();
      if (option == '-') off = true;
      else if (option != 'i' && option != 'm' && option != 'x') refuse(fmt::format("the group option '{}'", option));
      out_ += option == 'm' ? 's' : option;
    }
    if (peek() != ':' && peek() != ')') refuse(off ? "a group option" : "a kind of group");
  }

  // {n}, {n,}, {n,m}, {,m} as quantifiers, followed perhaps by ? or +; any other brace is a character.
  void interval() {
    std::size_t j = i_ + 1;
    auto digits = [&] {
      const std::size_t from = j;
      while (j < in_.size() && std::isdigit(static_cast<unsigned char>(in_[j]))) ++j;
      return std::string(in_.substr(from, j - from));
    };
    const std::string least = digits();
    std::optional<std::string> most;
    if (j < in_.size() && in_[j] == ',') {
      ++j;
      most = digits();
    }
    if (j >= in_.size() || in_[j] != '}' || (least.empty() && (!most || most->empty()))) {
      atom(R"(\{)");
      ++i_;
      return;
    }
    i_ = j + 1;
    out_ += '{' + (least.empty() ? "0" : least) + (most ? "," + *most : "") + '}';
    if (peek() == '+' || (peek() == '?' && !most)) {
      out_.insert(atom_, "(?:");
      out_ += ')';
      out_ += in_[i_++];
    }
  }

  void escape() {
    const char c = peek(1);
    switch (c) {
      case 'w':
        atom(fmt::format("[{}]", kWordAlone));
        break;
      case 'W':
        atom(fmt::format("[^{}]", kWordAlone));
        break;
      case 'h':
        atom(fmt::format("[{}]", kHex));
        break;
      case 'H':
        atom(fmt::format("[^{}]", kHex));
        break;
      case 'b':
        atom(fmt::format("(?:(?<=[{0}])(?![{0}])|(?<![{0}])(?=[{0}]))", kWordAlone));
        break;
      case 'B':
        atom(fmt::format("(?:(?<=[{0}])(?=[{0}])|(?<![{0}])(?![{0}]))", kWordAlone));
        break;
      default: {
        const std::string same = common_escape();
        atom(same);
        return;
      }
    }
    i_ += 2;
  }

  // Escapes that both dialects read alike, in and out of brackets; moves behind it.
  std::string common_escape() {
    const char c = peek(1);
    if (i_ + 1 >= in_.size()) refuse("a lone backslash");
    if (c == 'u') {
      for (std::size_t k = 2; k < 6; ++k)
        if (!std::isxdigit(static_cast<unsigned char>(peek(k)))) refuse("\\u without four hexadecimal digits");
      std::string code = fmt::format("\\x{{{}}}", in_.substr(i_ + 2, 4));
      i_ += 6;
      return code;
    }
    if (c == 'v') {
      i_ += 2;
      return "\\x0B";
    }
    if (c == 'p' || c == 'P') {
      if (peek(2) != '{') refuse("a property without braces");
      const std::size_t end = in_.find('}', i_);
      if (end == std::string_view::npos) refuse("a property without a closing brace");
      std::string_view name = in_.substr(i_ + 3, end - i_ - 3);
      const bool complement = name.starts_with('^');
      if (complement) name.remove_prefix(1);
      for (char n : name)
        if (!std::isalnum(static_cast<unsigned char>(n)) && n != '_' && n != ' ' && n != '-') refuse("an unknown property");
      i_ = end + 1;
      // A script's name alone means the script extensions in PCRE2, the script in Oniguruma.
      const std::string script = fmt::format("sc:{}", name);
      return fmt::format("\\{}{{{}{}}}", c, complement ? "^" : "", pcre_compiles(fmt::format("\\p{{{}}}", script)) ? script : name);
    }
    if (c == 'x' && peek(2) != '{') {
      if (!std::isxdigit(static_cast<unsigned char>(peek(2))) || peek(2) > '7') refuse("\\x of a byte that is not ASCII");
    } else if (std::isalnum(static_cast<unsigned char>(c)) &&
               std::string_view("dDsSnrtfaeAzZGRXxNK0123456789k").find(c) == std::string_view::npos) {
      refuse(fmt::format("the escape \\{}", c));
    }
    std::string same(in_.substr(i_, 2));
    i_ += 2;
    if (static_cast<unsigned char>(c) >= 0x80) {  // a whole character, and no escape
      same.erase(0, 1);
      while (i_ < in_.size() && (static_cast<unsigned char>(in_[i_]) & 0xC0) == 0x80) same += in_[i_++];
    }
    return same;
  }

  void bracket() {
    ++i_;
    const bool negated = peek() == '^';
    if (negated) ++i_;
    std::string inside, outside;  // outside: complements that a bracket expression cannot hold, each as an alternative
    for (bool first = true;; first = false) {
      if (i_ >= in_.size()) refuse("a bracket that is not closed");
      if (peek() == ']' && !first) break;
      if (starts("&&")) refuse("the intersection of sets (&&)");
      if (starts("[:")) posix(inside);
      else if (peek() == '[') refuse("a set within a set");
      else if (peek() == ']') inside += "\\]", ++i_;
      else if (starts("\\w")) inside += kWord, i_ += 2;
      else if (starts("\\h")) inside += kHex, i_ += 2;
      else if (starts("\\W")) outside += fmt::format("|[^{}]", kWord), i_ += 2;
      else if (starts("\\H")) outside += fmt::format("|[^{}]", kHex), i_ += 2;
      else if (starts("\\b")) inside += "\\x08", i_ += 2;
      else if (peek() == '\\') inside += common_escape();
      else inside += in_[i_++];
    }
    ++i_;
    if (outside.empty()) return atom(fmt::format("[{}{}]", negated ? "^" : "", inside));
    const std::string any = inside.empty() ? outside.substr(1) : fmt::format("[{}]{}", inside, outside);
    atom(negated ? fmt::format("(?:(?!{})(?s:.))", any) : fmt::format("(?:{})", any));
  }

  void posix(std::string& inside) {
    const std::size_t end = in_.find(":]", i_);
    if (end == std::string_view::npos) refuse("a set within a set");
    std::string_view name = in_.substr(i_ + 2, end - i_ - 2);
    const bool negated = name.starts_with('^');
    if (negated) name.remove_prefix(1);
    for (const PosixSet& set : kPosixSets) {
      if (set.name != name || (negated && set.negated.empty())) continue;
      inside += negated ? set.negated : set.inside;
      i_ = end + 2;
      return;
    }
    refuse(fmt::format("the set [:{}:]", name));
  }

  std::string_view in_;
  std::size_t i_ = 0;
  std::string out_;
  std::size_t atom_ = 0;             // where the last atom begins in out_
  std::vector<std::size_t> groups_;  // where the open groups begin in out_
};

}  // namespace

std::string pcre_pattern(std::string_view oniguruma) { return Translator(oniguruma).run(); }

}  // namespace kava
