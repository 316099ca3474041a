// What a person sees while a program works: on a terminal of any width, through a pipe, and where nothing can move.
#include <catch2/matchers/catch_matchers_string.hpp>
#include <regex>
#include <set>

#include "tests/model/train_rig.h"
#include "tests/programs/text_run.h"
#include "tools/terminal.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;

namespace {

// What a terminal of so many columns is sent by a command; the window has them, or COLUMNS says them.
std::string on_terminal(const std::string& command, int columns, const std::string& variables = "TERM=xterm", bool by_variable = false) {
  const TempFolder folder;
  const std::string record = folder / "record";
  const std::string told = by_variable ? fmt::format("COLUMNS={}", columns) : "-u COLUMNS";
  const int status = std::system(fmt::format("env {} {} script -qec \"stty cols {}; '{}'/{}\" '{}' >/dev/null 2>&1 </dev/null", told,
                                             variables, by_variable ? 300 : columns, bin_dir(), command, record)
                                     .c_str());
  REQUIRE(status == 0);
  const std::string text = read_file(record, 1 << 24);
  return text.substr(text.find('\n') + 1);  // after script's own line
}

// The lines of all drawings, in their order.
std::vector<std::string> drawn_lines(const std::string& text) {
  std::vector<std::string> lines(1);
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (text[at] == '\x1b') at = text.find_first_of("AJK", at);
    else if (text[at] != '\r' && text[at] != '\n') {
      lines.back() += text[at];
      continue;
    }
    if (!lines.back().empty()) lines.emplace_back();
  }
  return lines;
}

bool has_line(const std::string& text, const std::string& form) {
  return std::ranges::any_of(drawn_lines(text), [&](const std::string& line) { return std::regex_match(line, std::regex(form)); });
}

bool has_script() { return std::system("command -v script >/dev/null 2>&1") == 0; }

std::string tiny_training(const TempFolder& folder) {
  overwrite(folder / "c.toml", tiny_toml());
  return "kava_train " + (folder / "c.toml") + " --threads 1 --set data.valid=" + kGolden + "data/rows.jsonl" +
         " --set train.max_steps=40 --set train.valid_every=20 --out " + (folder / "run");
}

}  // namespace

TEST_CASE("a line drops whole fields from the right, and numbers have separators") {
  CHECK(fitted({"12/1,600", "ETA 0:31", "248 samples/s"}, 33) == "12/1,600  ETA 0:31  248 samples/s");
  CHECK(fitted({"12/1,600", "ETA 0:31", "248 samples/s"}, 32) == "12/1,600  ETA 0:31");
  CHECK(fitted({"12/1,600", "ETA 0:31", "x"}, 17) == "12/1,600");  // nothing that comes after one that was dropped
  CHECK(fitted({"12/1,600"}, 3) == "12/1,600");
  CHECK(thousands(0) == "0");
  CHECK(thousands(999) == "999");
  CHECK(thousands(1000) == "1,000");
  CHECK(thousands(-1234567) == "-1,234,567");
  CHECK(thousands(-123) == "-123");
  CHECK(rate_text(1700.4) == "1,700");
  CHECK(rate_text(99.94) == "99.9");
  CHECK(rate_text(0.508) == "0.508");
  CHECK(duration_text(59.9) == "0:59");
  CHECK(duration_text(3600 * 13 + 45 * 60 + 12) == "13:45:12");
}

TEST_CASE("a training run redraws whole fields at any width, and tells its validation and its end in sentences") {
  if (!has_script()) SKIP("no script(1)");
  const std::regex field(
      R"(\[[#.]{12}\]|\d+/40|ETA (\d+:)?\d+:\d\d|[\d.,]+ (samples|tokens)/s|\d+ % of the matrix rate|loss [\d.]+|(student|teacher) CE [\d.]+|L_KV [\d.]+|L_CODI [\d.]+|grad [\d.e+-]+|lr \d\.\de[+-]\d\d)");
  std::set<std::size_t> counts;
  for (const int columns : {40, 60, 80, 200}) {
    TempFolder folder;
    const std::string text = on_terminal(tiny_training(folder), columns, "TERM=xterm", columns == 60);
    std::size_t drawn = 0, most = 0;
    for (const std::string& line : drawn_lines(text)) {
      if (line.find("/40") == line.npos && !line.starts_with("loss ")) continue;
      CAPTURE(columns, line);
      CHECK(line.size() < static_cast<std::size_t>(columns));
      std::size_t fields = 0;
      for (std::size_t at = 0; at < line.size(); ++fields) {
        const std::size_t end = std::min(line.find("  ", at), line.size());
        CHECK(std::regex_match(line.substr(at, end - at), field));
        at = end + 2;
      }
      most = std::max(most, fields);
      ++drawn;
    }
    CHECK(drawn >= 4);
    CHECK(most >= 2);
    counts.insert(most);
    CHECK_THAT(text, ContainsSubstring("step 20: valid "));
    CHECK(has_line(text, R"(step 40: valid [\d.]+ % strict \(best [\d.]+ at step \d+\), [\d.]+ passes a question, .*)"));
    CHECK_THAT(text, ContainsSubstring("finished at step 40 in "));
    CHECK_THAT(text, ContainsSubstring(" GB"));
    CHECK_THAT(text, ContainsSubstring("next: "));
  }
  CHECK(counts.size() >= 3);  // wider windows tell more
}

TEST_CASE("a recording is rendered as what the terminal shows in the end") {
  const TempFolder folder;
  const auto rendered = [&](const std::string& text) {
    overwrite(folder / "record", "Script started on some day\n" + text + "\nScript done on that day\n");
    const std::string script = source_dir() + "/tools/record_quickstart.sh";
    REQUIRE(std::system(fmt::format("'{}' --render '{}' >'{}'", script, folder / "record", folder / "shown").c_str()) == 0);
    return read_file(folder / "shown", 1 << 20);
  };
  CHECK(rendered("a\r\nb\r\n") == "a\nb\n");
  CHECK(rendered("12345\r6\x1b[K\r\nx  \r\n\r\ny\r\n") == "6\nx\n\ny\n");
  CHECK(rendered("a\r\n1/2\x1b[K\r\nloss 9\x1b[K\r\x1b[1A2/2\x1b[K\r\nloss\x1b[K\r\n\r\nb\r\n") == "a\n2/2\nloss\n\nb\n");
  CHECK(rendered("row 1\r\n1 of 2 questions\r\x1b[Jrow 2\r\n") == "row 1\nrow 2\n");
}

TEST_CASE("nothing moves on a dumb terminal or through a pipe, and terms that do not run are not told of") {
  TempFolder folder;
  overwrite(folder / "c.toml", "method = \"full_cot\"\n" + tiny_toml());
  const std::string command = "kava_train " + (folder / "c.toml") + " --threads 1 --set train.max_steps=3 --out ";
  const std::string piped = run_command(command + (folder / "piped")).out;
  CHECK(piped.find('\x1b') == piped.npos);
  CHECK(piped.find('\r') == piped.npos);
  CHECK_THAT(piped, ContainsSubstring("step 3/3  loss "));
  CHECK_THAT(piped, ContainsSubstring("teacher CE"));
  for (const char* absent : {"student CE", "L_KV", "L_CODI"}) CHECK(piped.find(absent) == piped.npos);
  if (!has_script()) SKIP("no script(1)");
  const std::string dumb = on_terminal(command + (folder / "dumb"), 80, "TERM=dumb");
  CHECK(dumb.find('\x1b') == dumb.npos);
  CHECK_THAT(dumb, ContainsSubstring("step 3/3  loss "));
}

TEST_CASE("an evaluation on a terminal tells how far it is and leaves nothing of that") {
  if (!has_script()) SKIP("no script(1)");
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions);
  const std::string command = "kava_eval " + tiny.dir.string() + " --threads 1 --batch 1 --force --data " + data;
  const std::regex whole(R"(rows.txt: \d of 4 questions(  strict [\d.]+ %(  ETA 0:\d\d(  [\d.]+ questions/s)?)?)?)");
  for (const int columns : {40, 60, 80, 200}) {
    const std::string text = on_terminal(command, columns);
    for (const std::string& line : drawn_lines(text)) {
      if (!line.starts_with("rows.txt: ") || line.find(" of 4 questions") == line.npos) continue;
      CAPTURE(columns, line);
      CHECK(line.size() < static_cast<std::size_t>(columns));
      CHECK(std::regex_match(line, whole));
    }
    CHECK(has_line(text, "rows.txt: 0 of 4 questions"));
    CHECK(has_line(text, columns < 60 ? R"(rows.txt: 4 of 4 questions.*)" : R"(rows.txt: 4 of 4 questions  strict [\d.]+ %  ETA 0:00.*)"));
    CHECK_THAT(text, ContainsSubstring("\r\x1b[J"));
  }
  // No colour is used, so that NO_COLOR changes nothing: no sequence that ends in m.
  for (const char* variables : {"TERM=xterm", "TERM=xterm NO_COLOR=1"})
    CHECK(!std::regex_search(on_terminal(command, 80, variables), std::regex("\x1b\\[[0-9;]*m")));
  CHECK(run("kava_eval " + tiny.dir.string() + " --threads 1 --force --data " + data).output.find("ETA") == std::string::npos);
}
