#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <filesystem>

#include "engine/cli.h"
#include "engine/data/malformed.h"
#include "engine/data/row_forms.h"
#include "engine/files/files.h"
#include "tools/choice_option.h"
#include "tools/data_files.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

bool same(const Row& a, const Row& b) { return a.question == b.question && a.steps == b.steps && a.answer == b.answer; }

// The ids of a row's trace, by steps where it has several.
Json trace_of(const Row& row) {
  if (row.step_lengths.size() < 2) return row.trace_ids;
  Json steps = Json::array();
  auto at = row.trace_ids.begin();
  for (const auto length : row.step_lengths) steps.push_back(std::vector(at, at + length)), at += length;
  return steps;
}

std::string json_line(const Row& row) {
  Json out = Json::object();
  if (row.is_ids) {
    out["question"] = row.question_ids, out["trace"] = trace_of(row), out["answer"] = row.answer_ids;
    if (row.prompt) out["prompt"] = *row.prompt;
  } else {
    out["question"] = row.question, out["steps"] = row.steps, out["answer"] = row.answer;
  }
  return out.dump();
}

// Steps by one space: what reads back as the same row, or an error.
std::string text_line(const RowFile& file, const Row& row) {
  const auto refuse = [&](const std::string& what) -> void { throw Error(Exit::data, file.where(row), what, "convert to jsonl"); };
  if (row.is_ids) refuse("ids cannot be written as icot_text");
  std::string line = row.question + "||";
  for (const std::string& step : row.steps) line += step + " ";
  line += "#### " + row.answer;
  if (line.find_first_of("\n\r") != std::string::npos) refuse("a row with a line end in its text cannot be written as icot_text");
  const std::string where = shown_path(file.path);
  if (!same(parse_text_row(line, {where, row.line}), row))
    refuse(
        "written as icot_text, the row would read differently: its text holds || or ####, or its steps are not those that text splits "
        "into");
  return line;
}

// Endings of forms that other programs write.
void require_written_form(const fs::path& out) {
  std::string ending = out.extension().string();
  std::ranges::transform(ending, ending.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const char* other :
       {".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx", ".xml", ".yaml", ".gz", ".bz2", ".xz", ".zst", ".zip"})
    if (ending == other)
      throw Error(Exit::usage, "OUT", shown_path(out) + " names a form that is not written",
                  "name it .jsonl or .txt, or give --to jsonl or icot_text");
}

DataFormat target_format(const ConvertCommand& command) {
  if (command.to) {
    const auto to = choice_of<DataFormat>(*command.to);
    if (to != DataFormat::jsonl && to != DataFormat::icot_text)
      throw Error(Exit::usage, "--to", "\"" + escaped(*command.to) + "\" is not written", "give jsonl or icot_text");
    return *to;
  }
  require_written_form(command.out);
  return fs::path(command.out).extension() == ".txt" ? DataFormat::icot_text : DataFormat::jsonl;
}

}  // namespace

int convert_data(const ConvertCommand& command) {
  const auto format = choice_option<DataFormat>("--format", command.format);
  const DataFormat to = target_format(command);
  std::error_code ignored;
  if (fs::equivalent(command.in, command.out, ignored)) throw Error(Exit::usage, "OUT", "is the file that is read", "name another file");
  require_writable("OUT", command.out);
  MalformedRows malformed;
  const RowFile file = command.skip_malformed ? read_wellformed_rows(command.in, format, malformed) : read_rows(command.in, format);
  for (const Error& e : malformed.first) print_note(std::string("left out: ") + e.what());
  if (malformed.count > static_cast<int64_t>(malformed.first.size()))
    print_note(fmt::format("and {} more malformed rows", malformed.count - static_cast<int64_t>(malformed.first.size())));
  if (file.rows.empty()) throw Error(Exit::data, shown_path(file.path), "holds no row that can be read", "name its form by --format");
  std::string text;
  for (const Row& row : file.rows) text += (to == DataFormat::jsonl ? json_line(row) : text_line(file, row)) + "\n";
  fmt::print("{}: {} rows of {} written as {}, {} malformed ones left out\n", shown_path(command.out), file.rows.size(),
             name_of(file.format), file.format == DataFormat::ids ? "ids" : name_of(to), malformed.count);
  require_printed();
  write_file(command.out, text);
  return 0;
}

}  // namespace kava
