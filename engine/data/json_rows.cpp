#include "engine/data/json_rows.h"

#include <algorithm>
#include <vector>

namespace kava {

namespace {

// Goes over JSON text by its brackets and strings alone.
class Cutter {
 public:
  explicit Cutter(std::string_view text, int64_t line = 1) : text_(text), line_(line) {}

  int64_t line() const { return line_; }
  bool ended() const { return at_ == text_.size(); }

  /// The next byte that is no white space, 0 at the end.
  char next() {
    while (!ended() && kSpace.find(text_[at_]) != std::string_view::npos) step();
    return ended() ? '\0' : text_[at_];
  }
  bool take(char c) {
    if (next() != c) return false;
    step();
    return true;
  }
  /// A value, up to what ends it: a , or a bracket that closes what it lies in; of a key up to its colon.
  std::string_view cut(char end = ',') {
    (void)next();
    const std::size_t start = at_;
    int64_t depth = 0;
    for (bool in_string = false; !ended(); step()) {
      const char c = text_[at_];
      if (in_string) {
        if (c == '\\' && at_ + 1 < text_.size()) step();
        else if (c == '"') in_string = false;
      } else if (c == '"') {
        in_string = true;
      } else if (c == '{' || c == '[') {
        ++depth;
      } else if (depth == 0 && (c == end || c == ']' || c == '}')) {
        break;
      } else if (c == '}' || c == ']') {
        --depth;
      }
    }
    return text_.substr(start, at_ - start);
  }

 private:
  void step() { line_ += text_[at_++] == '\n'; }

  std::string_view text_;
  std::size_t at_ = 0;
  int64_t line_;
};

// Null where it is broken: its place tells of that later.
Json parsed(std::string_view text) {
  try {
    return parse_json(text, "");
  } catch (const Error&) {
    return nullptr;
  }
}

struct Part {
  std::string key;
  std::string_view value;
  int64_t line;
};

// The members of the one object that the text is; nothing where it is none.
std::optional<std::vector<Part>> members_of(std::string_view text) {
  Cutter cutter(text);
  std::vector<Part> parts;
  if (!cutter.take('{')) return std::nullopt;
  do {
    const Json key = parsed(cutter.cut(':'));
    if (!key.is_string() || !cutter.take(':')) return std::nullopt;
    (void)cutter.next();
    const int64_t line = cutter.line();
    parts.push_back({key.get<std::string>(), stripped(cutter.cut()), line});
  } while (cutter.take(','));
  if (!cutter.take('}') || cutter.next() != '\0') return std::nullopt;
  return parts;
}

// Of a list of objects that may be rows: no messages of a conversation.
bool may_be_rows(const Part& part) {
  Cutter cutter(part.value);
  if (!cutter.take('[') || cutter.next() != '{') return false;
  const Json first = parsed(cutter.cut());
  return !(first.contains("role") || first.contains("from"));
}

}  // namespace

void each_element(std::string_view list, const std::string& file, int64_t line,
                  const std::function<void(std::string_view element, int64_t line)>& take) {
  Cutter cutter(list, line);
  const auto refuse = [&](const std::string& what) {
    RowPlace{file, cutter.line()}.refuse("not a valid JSON list: " + what, "correct the file");
  };
  if (!cutter.take('[')) refuse("the list must start with [");
  if (!cutter.take(']')) {
    do {
      (void)cutter.next();
      const int64_t begin = cutter.line();
      take(cutter.cut(), begin);
    } while (cutter.take(','));
    if (!cutter.take(']')) refuse("a , or the closing ] is missing after an element");
  }
  if (cutter.next() != '\0') refuse("there is text after the closing ]");
}

std::optional<WholeObject> whole_object(std::string_view text, const std::string& file) {
  const std::optional<std::vector<Part>> parts = members_of(text);
  if (!parts) return std::nullopt;
  const WholeObject row = {std::nullopt, 1 + std::count(text.begin(), text.begin() + static_cast<int64_t>(text.find('{')), '\n')};
  std::vector<const Part*> lists;
  for (const Part& part : *parts) {
    if (names_question(part.key)) return row;
    if (may_be_rows(part)) lists.push_back(&part);
  }
  // A page of a hub's server names its columns in such a list too.
  if (lists.size() > 1)
    for (const Part* part : lists)
      if (part->key == "rows") return WholeObject{part->value, part->line};
  if (lists.size() > 1)
    throw Error(Exit::data, file,
                fmt::format("holds several lists of rows, under \"{}\" and \"{}\"", escaped(lists[0]->key, 60), escaped(lists[1]->key, 60)),
                "write the list that is meant into a file of its own");
  return lists.empty() ? row : WholeObject{lists[0]->value, lists[0]->line};
}

Json unwrapped(Json row, const RowPlace& place) {
  if (!row.is_object() || !row.contains("row_idx") || !row.contains("row") || !row["row"].is_object()) return row;
  if (const auto cut = row.find("truncated_cells"); cut != row.end() && cut->is_array() && !cut->empty())
    place.refuse("the hub's server has cut cells of this row off", "take the Parquet file, by tools/parquet_to_jsonl.py");
  return std::move(row["row"]);
}

}  // namespace kava
