#include "engine/data/data.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "engine/data/json_rows.h"
#include "engine/data/malformed.h"
#include "engine/data/row_forms.h"
#include "engine/files/files.h"

namespace kava {

namespace {

// What people hand over in place of a data file.
void refuse_other_files(std::string_view text, const std::string& file) {
  const struct {
    std::string_view start, what, remedy;
  } others[] = {{"PAR1", "a Parquet file", "turn it into JSON lines by tools/parquet_to_jsonl.py"},
                {"\x1f\x8b", "compressed by gzip", "unpack it by gunzip"},
                {"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it by unzstd"},
                {std::string_view("PK\x03\x04"), "a zip archive", "unpack it by unzip"},
                {"version https://git-lfs", "a pointer of Git LFS and not the file", "fetch the file by git lfs pull"}};
  const std::string_view first_line = text.substr(0, text.find('\n'));
  for (const std::string_view ending : {".csv", ".tsv"})
    if (file.ends_with(ending) && first_line.find("||") == std::string_view::npos && !first_line.starts_with('{'))
      throw Error(Exit::data, file, "is a table of text", "turn it into JSON lines by tools/parquet_to_jsonl.py");
  for (const auto& other : others)
    if (text.starts_with(other.start)) throw Error(Exit::data, file, fmt::format("is {}", other.what), std::string(other.remedy));
  // A question may begin with < too.
  const bool tag = first_line.size() > 1 && first_line[0] == '<' && first_line.find("||") == std::string_view::npos &&
                   (first_line[1] == '!' || first_line[1] == '?' || std::isalpha(static_cast<unsigned char>(first_line[1])));
  if (!tag) return;
  for (const std::string_view page : {"<!DOCTYPE html", "<!doctype html", "<html"})
    if (text.starts_with(page)) throw Error(Exit::data, file, "is a web page", "download the file itself");
  throw Error(Exit::data, file, "is XML", "turn it into JSON lines of question and answer");
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

}  // namespace

std::string_view stripped(std::string_view s) {
  const auto first = s.find_first_not_of(kSpace);
  return first == std::string_view::npos ? std::string_view{} : s.substr(first, s.find_last_not_of(kSpace) - first + 1);
}

std::string answer_text(double number) {
  KAVA_CHECK(std::isfinite(number), "an answer must be finite");
  // The fewest digits that read back, "-d.ddde+XX"; to_chars gives more of a large number when asked for none of an exponent.
  char shortest[32];
  const auto end = std::to_chars(shortest, shortest + sizeof shortest, number == 0 ? 0.0 : number, std::chars_format::scientific);
  std::string digits(shortest, end.ptr);
  const std::string sign = digits[0] == '-' ? "-" : "";
  const int exponent = std::atoi(digits.substr(digits.find('e') + 1).c_str());
  digits.erase(digits.find('e'));
  std::erase_if(digits, [](char c) { return c < '0' || c > '9'; });
  const int count = static_cast<int>(digits.size());
  if (exponent < 0) return sign + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  if (exponent + 1 >= count) return sign + digits + std::string(static_cast<std::size_t>(exponent + 1 - count), '0');
  return sign + digits.insert(static_cast<std::size_t>(exponent + 1), 1, '.');
}

std::string RowFile::where(const Row& row) const { return fmt::format("{}:{}", shown_path(path), row.line); }

namespace {

constexpr std::size_t kRowsOfPart = 4096;

// Malformed rows end the reading, or are told in `malformed` where it is given. Where `part` is given it takes rows as soon as there are
// some.
RowFile read_file_rows(const std::string& path, std::optional<DataFormat> format, MalformedRows* malformed,
                       const std::function<void(RowFile&)>& part = {}) {
  const std::string bytes = read_file(path, kLargestDataFile);
  const std::string file = shown_path(path);
  std::string_view text = bytes;
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  refuse_other_files(text, file);

  const std::string_view body = stripped(text);
  const bool json = body.starts_with('[') || body.starts_with('{');
  if (!format && !json) format = DataFormat::icot_text;
  const std::optional<WholeObject> whole =
      body.starts_with('{') && format != DataFormat::icot_text ? whole_object(text, file) : std::nullopt;
  const bool list = format != DataFormat::icot_text && (body.starts_with('[') || (whole && whole->list));
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
    if (!list && !whole && stripped(row_text) == "{")
      place.refuse("a JSON object over several lines", "write one object a line, or a list of them");
    const Json row = unwrapped(parse_json(row_text, place.text()), place);
    if (none && row.is_object()) out.keys = key_list(row);
    if (!format) format = row.is_object() ? recognised_format(row) : DataFormat::jsonl;
    out.format = *format;
    return parse_json_row(row, *format, place);
  };
  auto add_json = [&](std::string_view row_text, int64_t line) { return take(parse_object, row_text, line); };
  auto add_text = [&](std::string_view row_text, int64_t line) { return take(parse_text_row, row_text, line); };
  if (format == DataFormat::icot_text) each_line(text, add_text);
  else if (list) each_element(whole ? *whole->list : text, file, whole ? whole->line : 1, add_json);
  else if (whole) add_json(body, whole->line);
  else each_line(text, add_json);
  if (none && !(malformed && malformed->count > 0)) throw Error(Exit::data, file, "holds no row", "name a file with data");
  out.format = format.value_or(DataFormat::jsonl);
  if (part && !out.rows.empty()) part(out), out.rows.clear();
  return out;
}

bool has_chain(const Row& row) { return !row.steps.empty() || !row.trace_ids.empty(); }

}  // namespace

RowFile read_rows(const std::string& path, std::optional<DataFormat> format) { return read_file_rows(path, format, nullptr); }

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
