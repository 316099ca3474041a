#include "engine/data/data.h"

#include <algorithm>

#include "engine/data/malformed.h"
#include "engine/data/row_forms.h"
#include "engine/files/files.h"

namespace kava {

namespace {

constexpr std::size_t kMostBytes = std::size_t{4} << 30;
constexpr std::string_view kSpace = " \t\n\v\f\r";

// What people hand over in place of a data file.
void refuse_other_files(std::string_view text, const std::string& file) {
  const struct {
    std::string_view start, what, remedy;
  } others[] = {{"PAR1", "a Parquet file", "turn it into JSON lines by tools/parquet_to_jsonl.py"},
                {"\x1f\x8b", "compressed by gzip", "unpack it by gunzip"},
                {"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it by unzstd"},
                {std::string_view("PK\x03\x04"), "a zip archive", "unpack it by unzip"},
                {"version https://git-lfs", "a pointer of Git LFS and not the file", "fetch the file by git lfs pull"},
                {"<?xml", "XML", "turn it into JSON lines of question and answer"},
                {"<!DOCTYPE html", "a web page", "download the file itself"}};
  for (const auto& other : others)
    if (text.starts_with(other.start)) throw Error(Exit::data, file, fmt::format("is {}", other.what), std::string(other.remedy));
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
    RowPlace{file_, line_}.refuse("not a valid JSON list: " + what, "correct the file");
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

namespace {

constexpr std::size_t kRowsOfPart = 4096;

// Malformed rows end the reading, or are told in `malformed` where it is given. Where `part` is given it takes rows as soon as there are
// some.
RowFile read_file_rows(const std::string& path, std::optional<DataFormat> format, MalformedRows* malformed,
                       const std::function<void(RowFile&)>& part = {}) {
  const std::string bytes = read_file(path, kMostBytes);
  const std::string file = escaped(path, 4096);
  std::string_view text = bytes;
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  refuse_other_files(text, file);

  const std::string_view body = stripped(text);
  const bool list = body.starts_with('[') && format != DataFormat::icot_text;
  if (!format && !list && !body.starts_with('{')) format = DataFormat::icot_text;
  RowFile out{path, DataFormat::icot_text, {}, sha256(bytes), "text"};
  bool none = true;
  auto take = [&](auto parse, std::string_view row_text, int64_t line) {
    try {
      out.rows.push_back(parse(row_text, RowPlace{file, line}));
      out.rows.back().line = line;
      none = false;
      if (part && out.rows.size() == kRowsOfPart) part(out), out.rows.clear();
    } catch (const Error& e) {
      if (!malformed || e.code() != Exit::data) throw;
      if (++malformed->count <= 5) malformed->first.push_back(e);
    }
    return true;
  };
  auto parse_object = [&](std::string_view row_text, const RowPlace& place) {
    if (!list && stripped(row_text) == "{") place.refuse("a JSON object over several lines", "write one object a line, or a list of them");
    const Json row = parse_json(row_text, place.text());
    if (none && row.is_object()) out.keys = key_list(row);
    if (!format) format = row.is_object() ? recognised_format(row) : DataFormat::jsonl;
    out.format = *format;
    return parse_json_row(row, *format, place);
  };
  auto add_json = [&](std::string_view row_text, int64_t line) { return take(parse_object, row_text, line); };
  auto add_text = [&](std::string_view row_text, int64_t line) { return take(parse_text_row, row_text, line); };
  if (format == DataFormat::icot_text) each_line(text, add_text);
  else if (list) ElementCutter(text, file).each(add_json);
  else each_line(text, add_json);
  if (none && !(malformed && malformed->count > 0)) throw Error(Exit::data, file, "holds no row", "name a file with data");
  out.format = format.value_or(DataFormat::jsonl);
  if (part && !out.rows.empty()) part(out), out.rows.clear();
  return out;
}

bool has_chain(const Row& row) { return !row.steps.empty() || !row.trace_ids.empty(); }

}  // namespace

RowFile read_rows(const std::string& path, std::optional<DataFormat> format) { return read_file_rows(path, format, nullptr); }

FileFacts facts_of(const RowFile& file) {
  return {file.path, file.format, file.sha256, file.keys, std::ssize(file.rows), std::ranges::any_of(file.rows, has_chain)};
}

FileFacts read_parts(const std::string& path, std::optional<DataFormat> format, const std::function<void(RowFile& part)>& take) {
  int64_t rows = 0;
  bool chain = false;
  const RowFile file = read_file_rows(path, format, nullptr, [&](RowFile& part) {
    rows += std::ssize(part.rows);
    chain = chain || std::ranges::any_of(part.rows, has_chain);
    take(part);
  });
  return {path, file.format, file.sha256, file.keys, rows, chain};
}

RowFile read_wellformed_rows(const std::string& path, std::optional<DataFormat> format, MalformedRows& malformed) {
  return read_file_rows(path, format, &malformed);
}

}  // namespace kava
