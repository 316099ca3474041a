#include "engine/data/data.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"

namespace kava {

namespace {

constexpr std::size_t kMostBytes = std::size_t{4} << 30;
constexpr std::string_view kSpace = " \t\n\v\f\r";

// Where a row stands, and how a fault in it is reported.
struct Place {
  const std::string& file;  // escaped
  int64_t line;
  std::string text() const { return fmt::format("{}:{}", file, line); }
  [[noreturn]] void refuse(const std::string& what, const std::string& remedy = "correct the row") const {
    throw Error(Exit::data, text(), what, remedy);
  }
};

void add_step(std::vector<std::string>& steps, std::string_view step) {
  step = stripped(step);
  if (!step.empty()) steps.emplace_back(step);
}

// Calls `take` with the pieces of `text` between separators; each keeps its first `kept` bytes of the separator.
template <class Take>
void split(std::string_view text, std::string_view separator, std::size_t kept, Take take) {
  for (std::size_t at; (at = text.find(separator)) != std::string_view::npos; text.remove_prefix(at + separator.size()))
    take(text.substr(0, at + kept));
  take(text);
}

std::vector<std::string> split_trace(std::string_view trace) {
  std::vector<std::string> steps;
  trace = stripped(trace);
  if (trace.starts_with("<<")) {
    while (!trace.empty()) {
      const auto end = std::min(trace.find_first_of(kSpace), trace.size());
      steps.emplace_back(trace.substr(0, end));
      trace = stripped(trace.substr(end));
    }
  } else {
    const bool lines = trace.find('\n') != std::string_view::npos;
    split(trace, lines ? "\n" : ". ", lines ? 0 : 1, [&](std::string_view step) { add_step(steps, step); });
  }
  return steps;
}

void set_text(Row& row, std::string_view question, std::string_view answer, const Place& place) {
  row.question = stripped(question);
  row.answer = stripped(answer);
  if (row.question.empty()) place.refuse("the question is empty");
  if (row.answer.empty()) place.refuse("the answer is empty");
}

Row parse_icot(std::string_view line, const Place& place) {
  if (!is_utf8(line)) place.refuse("is not valid UTF-8", "save the file as UTF-8");
  const auto bars = line.find("||");
  if (bars == std::string_view::npos) place.refuse("no || after the question", "write question||steps #### answer");
  const std::string_view rest = line.substr(bars + 2);
  const auto marks = rest.rfind("####");
  if (marks == std::string_view::npos) place.refuse("no #### before the answer", "write question||steps #### answer");
  Row row;
  set_text(row, line.substr(0, bars), rest.substr(marks + 4), place);
  row.steps = split_trace(rest.substr(0, marks));
  return row;
}

const Json& member(const Json& object, const char* key, const Place& place) {
  const auto i = object.find(key);
  if (i == object.end()) place.refuse(fmt::format("the row has no \"{}\"", key), "correct the row, or give the file's format");
  return *i;
}

const std::string& string_of(const Json& object, const char* key, const Place& place) {
  const Json& value = member(object, key, place);
  if (!value.is_string()) place.refuse(fmt::format("\"{}\" must be a string, not {}", key, value.type_name()));
  return value.get_ref<const std::string&>();
}

std::string number_of(const Json& object, const char* key, const Place& place) {
  const Json& value = member(object, key, place);
  if (value.is_number_unsigned()) return fmt::format("{}", value.get<uint64_t>());
  if (value.is_number_integer()) return fmt::format("{}", value.get<int64_t>());
  if (!value.is_number_float()) place.refuse(fmt::format("\"{}\" must be a number, not {}", key, value.type_name()));
  return answer_text(value.get<double>());
}

std::vector<int32_t> ids_of(const Json& object, const char* key, const Place& place) {
  const Json& value = member(object, key, place);
  if (!value.is_array()) place.refuse(fmt::format("\"{}\" must be a list of token ids, not {}", key, value.type_name()));
  std::vector<int32_t> ids;
  ids.reserve(value.size());
  for (const Json& id : value) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > std::numeric_limits<int32_t>::max())
      place.refuse(fmt::format("\"{}\" holds {}, which is no token id", key, escaped(id.dump(-1, ' ', true), 40)));
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

Row parse_ids(const Json& object, const Place& place) {
  Row row;
  row.is_ids = true;
  row.question_ids = ids_of(object, "question", place);
  row.trace_ids = ids_of(object, "trace", place);
  row.answer_ids = ids_of(object, "answer", place);
  if (row.question_ids.empty()) place.refuse("the question is empty");
  if (row.answer_ids.empty()) place.refuse("the answer is empty");
  if (const auto prompt = object.find("prompt"); prompt != object.end()) {
    if (!prompt->is_number_unsigned() || prompt->get<uint64_t>() >= row.answer_ids.size())
      place.refuse(
          fmt::format("\"prompt\" must be a whole number from 0 to {}: less than the length of the answer", row.answer_ids.size() - 1));
    row.prompt = prompt->get<int64_t>();
  }
  return row;
}

Row parse_jsonl(const Json& object, const Place& place) {
  Row row;
  set_text(row, string_of(object, "question", place), string_of(object, "answer", place), place);
  const Json& steps = member(object, "steps", place);
  if (!steps.is_array()) place.refuse(fmt::format("\"steps\" must be a list of strings, not {}", steps.type_name()));
  for (const Json& step : steps) {
    if (!step.is_string()) place.refuse(fmt::format("\"steps\" must hold strings, not {}", step.type_name()));
    add_step(row.steps, step.get_ref<const std::string&>());
  }
  return row;
}

std::string without_annotations(std::string_view text) {
  std::string out;
  for (;;) {
    const auto open = text.find("<<"), close = text.find(">>", open == std::string_view::npos ? open : open + 2);
    if (close == std::string_view::npos) return out.append(text);
    out.append(text.substr(0, open));
    text.remove_prefix(close + 2);
  }
}

Row parse_gsm8k(const Json& object, const Place& place) {
  const std::string_view text = stripped(string_of(object, "answer", place));
  const auto newline = text.rfind('\n');
  const auto start = newline == std::string_view::npos ? 0 : newline + 1;
  const std::string_view last = stripped(text.substr(start));
  if (!last.starts_with("####")) place.refuse("no #### before the answer: the last line of \"answer\" must be #### ANSWER");
  Row row;
  set_text(row, string_of(object, "question", place), last.substr(4), place);
  row.steps = split_trace(without_annotations(text.substr(0, start)));
  return row;
}

Row parse_gsm_hard(const Json& object, const Place& place) {
  Row row;
  row.has_trace = false;
  set_text(row, string_of(object, "input", place), number_of(object, "target", place), place);
  return row;
}

Row parse_svamp(const Json& object, const Place& place) {
  const std::string &body = string_of(object, "Body", place), &question = string_of(object, "Question", place);
  if (stripped(question).empty()) place.refuse("\"Question\" is empty");
  Row row;
  row.has_trace = false;
  set_text(row, body + " " + question, number_of(object, "Answer", place), place);
  return row;
}

Row parse_json_row(std::string_view text, DataFormat format, const Place& place) {
  const Json object = parse_json(text, place.text());
  if (!object.is_object()) place.refuse(fmt::format("a row must be a JSON object, not {}", object.type_name()));
  switch (format) {
    case DataFormat::ids:
      return parse_ids(object, place);
    case DataFormat::jsonl:
      return parse_jsonl(object, place);
    case DataFormat::gsm8k:
      return parse_gsm8k(object, place);
    case DataFormat::gsm_hard:
      return parse_gsm_hard(object, place);
    default:
      return parse_svamp(object, place);
  }
}

DataFormat recognised(std::string_view first_line, const Place& place) {
  const std::string_view line = stripped(first_line);
  if (line.starts_with('[')) return DataFormat::svamp;
  if (!line.starts_with('{')) return DataFormat::icot_text;
  const Json object = parse_json(line, place.text());
  if (const auto question = object.find("question"); question != object.end() && question->is_array()) return DataFormat::ids;
  if (object.contains("steps")) return DataFormat::jsonl;
  return object.contains("input") ? DataFormat::gsm_hard : DataFormat::gsm8k;
}

// Calls take(line, its number) for each line that is not blank, until it returns false.
template <class Take>
void each_line(std::string_view text, Take take) {
  for (int64_t number = 1; !text.empty(); ++number) {
    const auto end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.find_first_not_of(kSpace) != std::string_view::npos && !take(line, number)) return;
  }
}

// A JSON list is cut into its elements here, so that a fault in one is reported with its line.
class ElementCutter {
 public:
  ElementCutter(std::string_view text, const std::string& file) : text_(text), file_(file) {}

  template <class Take>
  void each(Take take) {
    skip_space();
    if (next() != '[') refuse("the list must start with [");
    ++at_;
    skip_space();
    if (next() == ']') ++at_;
    else
      for (bool more = true; more;) {
        skip_space();
        const int64_t line = line_;
        const std::string_view element = cut_element();
        take(element, line);
        skip_space();
        if (next() != ',' && next() != ']') refuse("a , or the closing ] is missing after an element");
        more = next() == ',';
        ++at_;
      }
    skip_space();
    if (at_ < text_.size()) refuse("there is text after the closing ]");
  }

 private:
  char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  [[noreturn]] void refuse(const std::string& what) const {
    Place{file_, line_}.refuse("not a valid JSON list: " + what, "correct the file");
  }

  void step() { line_ += text_[at_++] == '\n'; }

  void skip_space() {
    while (at_ < text_.size() && kSpace.find(text_[at_]) != std::string_view::npos) step();
  }

  std::string_view cut_element() {
    const std::size_t start = at_;
    int64_t depth = 0;
    for (bool in_string = false; at_ < text_.size(); step()) {
      const char c = text_[at_];
      if (in_string) {
        if (c == '\\' && at_ + 1 < text_.size()) step();
        else if (c == '"') in_string = false;
      } else if (c == '"') {
        in_string = true;
      } else if (c == '{' || c == '[') {
        ++depth;
      } else if (depth == 0 && (c == ',' || c == ']')) {
        break;
      } else if (c == '}' || c == ']') {
        --depth;
      }
    }
    return text_.substr(start, at_ - start);
  }

  std::string_view text_;
  const std::string& file_;
  std::size_t at_ = 0;
  int64_t line_ = 1;
};

}  // namespace

std::string_view stripped(std::string_view s) {
  const auto first = s.find_first_not_of(kSpace);
  return first == std::string_view::npos ? std::string_view{} : s.substr(first, s.find_last_not_of(kSpace) - first + 1);
}

std::string RowFile::where(const Row& row) const { return fmt::format("{}:{}", escaped(path, 4096), row.line); }

std::string answer_text(double number) {
  KAVA_CHECK(std::isfinite(number), "an answer must be finite");
  char digits[400];  // 309 before the point, or 17 behind some 320 zeros
  const auto end = std::to_chars(digits, digits + sizeof digits, number == 0 ? 0.0 : number, std::chars_format::fixed);
  return std::string(digits, end.ptr);
}

RowFile read_rows(const std::string& path, std::optional<DataFormat> format) {
  const std::string bytes = read_file(path, kMostBytes);
  const std::string file = escaped(path, 4096);
  std::string_view text = bytes;
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);

  if (!format)
    each_line(text, [&](std::string_view line, int64_t number) {
      format = recognised(line, {file, number});
      return false;
    });
  RowFile out{path, format.value_or(DataFormat::icot_text), {}, sha256(bytes)};
  auto add = [&](std::string_view row_text, int64_t line) {
    const Place place{file, line};
    out.rows.push_back(out.format == DataFormat::icot_text ? parse_icot(row_text, place) : parse_json_row(row_text, out.format, place));
    out.rows.back().line = line;
    return true;
  };
  if (out.format == DataFormat::svamp && !stripped(text).empty()) ElementCutter(text, file).each(add);
  else each_line(text, add);
  if (out.rows.empty()) throw Error(Exit::data, file, "holds no row", "name a file with data");
  return out;
}

}  // namespace kava
