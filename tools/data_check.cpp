#include <fmt/format.h>
#include <fmt/ranges.h>

#include <unordered_map>
#include <unordered_set>

#include "engine/data/equation.h"
#include "engine/data/malformed.h"
#include "engine/error.h"
#include "tools/choice_option.h"
#include "tools/data_files.h"

namespace kava {

namespace {

constexpr std::size_t kShown = 5;

// Inner white space is not what tells two questions apart.
std::string words_of(std::string_view text) {
  std::string out;
  for (char c : text) {
    const bool space = c == ' ' || (c >= '\t' && c <= '\r');
    if (!space) out += c;
    else if (!out.empty() && out.back() != ' ') out += ' ';
  }
  return out;
}

// Keys by which rows are compared: the question and the whole trace, as text or as ids.
std::string question_key(const Row& row) {
  return row.is_ids ? fmt::format("ids {}", fmt::join(row.question_ids, " ")) : "text " + words_of(row.question);
}

std::optional<std::string> trace_key(const Row& row) {
  if (row.is_ids) return row.trace_ids.empty() ? std::nullopt : std::optional(fmt::format("ids {}", fmt::join(row.trace_ids, " ")));
  return row.steps.empty() ? std::nullopt : std::optional(fmt::format("text {}", fmt::join(row.steps, "\n")));
}

// Some findings of a kind, and how many there are.
struct Findings {
  int64_t count = 0;
  std::vector<std::string> first;
  void add(const std::string& text) {
    if (++count <= static_cast<int64_t>(kShown)) first.push_back(text);
  }
  void print(const char* kind) const {
    for (const std::string& text : first) fmt::print("  {}: {}\n", kind, text);
    if (count > static_cast<int64_t>(first.size())) fmt::print("  and {} more\n", count - static_cast<int64_t>(first.size()));
  }
};

struct Equations {
  int64_t hold = 0, unreadable = 0;
  Findings wrong;
  int64_t answers = 0;  // that are what the last step gives
  Findings other;
};

Equations judge(const RowFile& file, std::optional<int64_t> modulo) {
  Equations out;
  for (const Row& row : file.rows) {
    for (const std::string& step : row.steps) {
      if (!step.starts_with("<<")) continue;
      const Verdict verdict = judge_equation(step, modulo);
      out.hold += verdict == Verdict::holds, out.unreadable += verdict == Verdict::unreadable;
      if (verdict == Verdict::fails) out.wrong.add(fmt::format("{}: {}", file.where(row), escaped(step)));
    }
    if (row.steps.empty()) continue;
    const Verdict verdict = judge_answer(row.steps.back(), row.answer, modulo);
    out.answers += verdict == Verdict::holds;
    if (verdict == Verdict::fails)
      out.other.add(fmt::format("{}: {}, and the answer {}", file.where(row), escaped(row.steps.back()), escaped(row.answer)));
  }
  return out;
}

// A file with what is wrong in it.
struct Checked {
  RowFile file;
  MalformedRows malformed;
};

Checked checked(const std::string& path, std::optional<DataFormat> format, std::optional<int64_t> modulo) {
  Checked out;
  out.file = read_wellformed_rows(path, format, out.malformed);
  const RowFile& file = out.file;
  int64_t steps = 0, without = 0;
  Findings repeated;
  std::unordered_map<std::string, int64_t> lines;
  for (const Row& row : file.rows) {
    steps += static_cast<int64_t>(row.is_ids ? row.trace_ids.size() : row.steps.size());
    without += !trace_key(row);
    const auto [at, fresh] = lines.emplace(question_key(row), row.line);
    if (!fresh) repeated.add(fmt::format("{}, as in line {}", file.where(row), at->second));
  }
  fmt::print("{}: {}, {} rows, {} {}, {} rows without a trace, {} repeated questions\n", shown_path(file.path), name_of(file.format),
             file.rows.size(), steps, file.format == DataFormat::ids ? "trace ids" : "steps", without, repeated.count);
  repeated.print("repeated");
  if (out.malformed.count > 0) {
    fmt::print("  {} malformed rows\n", out.malformed.count);
    for (const Error& e : out.malformed.first) fmt::print("  malformed: {}\n", e.what());
    if (const auto more = out.malformed.count - static_cast<int64_t>(out.malformed.first.size()); more > 0)
      fmt::print("  and {} more\n", more);
  }
  if (const Equations equations = judge(file, modulo); equations.hold + equations.wrong.count + equations.unreadable > 0) {
    fmt::print("  equations{}: {} hold, {} are false, {} of another form\n", modulo ? fmt::format(" modulo {}", *modulo) : "",
               equations.hold, equations.wrong.count, equations.unreadable);
    equations.wrong.print("false");
    fmt::print("  answers: {} are what the last equation gives, {} are not\n", equations.answers, equations.other.count);
    equations.other.print("other");
  }
  return out;
}

// Questions of a file that an earlier one has too; repeated ones of one file are told with it.
void tell_repeated(const std::vector<Checked>& files) {
  std::unordered_map<std::string, std::string> places;
  Findings repeated;
  for (const auto& [file, malformed] : files) {
    std::unordered_map<std::string, std::string> own;
    for (const Row& row : file.rows) {
      const std::string key = question_key(row);
      if (const auto at = places.find(key); at != places.end()) repeated.add(fmt::format("{}, as {}", file.where(row), at->second));
      else own.emplace(key, file.where(row));
    }
    places.merge(own);
  }
  fmt::print("between these files: {} repeated questions\n", repeated.count);
  repeated.print("repeated");
}

void require_wellformed(const std::vector<Checked>& all) {
  for (const Checked& c : all) {
    if (c.malformed.count == 1) throw c.malformed.first[0];
    if (c.malformed.count > 1) {
      const Error& e = c.malformed.first[0];
      throw Error(e.code(), e.where(), std::string(e.what()).substr(e.where().size() + 2),
                  fmt::format("{} rows of the file are malformed", c.malformed.count));
    }
  }
}

void compare(const std::vector<Checked>& files, const std::vector<Checked>& others) {
  std::unordered_set<std::string> questions, traces;
  for (const Checked& other : others)
    for (const Row& row : other.file.rows) {
      questions.insert(question_key(row));
      if (auto trace = trace_key(row)) traces.insert(*std::move(trace));
    }
  Findings by_question, by_trace;
  for (const auto& [file, malformed] : files)
    for (const Row& row : file.rows) {
      const auto trace = trace_key(row);
      if (questions.contains(question_key(row))) by_question.add(file.where(row));
      if (trace && traces.contains(*trace)) by_trace.add(file.where(row));
    }
  fmt::print("overlap: {} by question, {} by trace\n", by_question.count, by_trace.count);
  by_question.print("question");
  by_trace.print("trace");
  if (by_question.count > 0)
    throw Error(Exit::data, by_question.first[0],
                fmt::format("{} rows share their question with the files of --against", by_question.count), "remove them from one side");
}

}  // namespace

int check_data(const CheckCommand& command) {
  const auto format = choice_option<DataFormat>("--format", command.format);
  std::vector<Checked> files, others;
  for (const std::string& path : command.files) files.push_back(checked(path, format, command.modulo));
  if (files.size() > 1) tell_repeated(files);
  for (const std::string& path : command.against) others.push_back(checked(path, format, command.modulo));
  if (!command.against.empty()) compare(files, others);
  require_wellformed(files);
  require_wellformed(others);
  return 0;
}

}  // namespace kava
