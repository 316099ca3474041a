// What replicate makes of results: means, comparisons, and the forms of a table.
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <regex>
#include <sstream>

#include "engine/clock.h"
#include "tests/programs/table_rig.h"
#include "tools/replicate_results.h"

using namespace kava;
using Catch::Matchers::WithinAbs;

TEST_CASE("a table includes one table beside it, and none by an empty name") {
  const TableRig rig;
  rig.save(TableRig::kRows, "include = \"\"\nseeds = [1, 2]\n");
  CHECK(rig.read().rows.size() == 2);
  rig.model.write("over.toml", "include = \"table.toml\"\nseeds = [3]\n");
  const ReplicaTable over = read_table(rig.model.folder / "over.toml");
  CHECK(over.seeds == std::vector<int64_t>{3});
  CHECK(over.rows.size() == 2);
  rig.model.write("third.toml", "include = \"over.toml\"\n");
  CHECK_THROWS_WITH(read_table(rig.model.folder / "third.toml"), ContainsSubstring("over.toml:1:1: is a second include"));
}

TEST_CASE("means, sample deviations, flags and comparisons of a table") {
  const TableRig rig;
  rig.save(
      row("first",
          "published = [{ column = \"test\", value = 53.4, source = \"a\" }, { column = \"test\", value = 60, sd = 20, source = \"b|c\" },"
          " { column = \"test\", value = 55, sd = 2, source = \"b|c\" }]\n") +
          row("second", "groups = [\"other\"]\n"),
      "seeds = [1, 2, 3]\nreference = \"other\"\n");
  rig.put_result("first", 1, "1100");
  rig.put_result("first", 2, "1110");
  rig.put_result("second", 1, "0000");
  rig.put_result("second", 3, "1111");
  const Json json = aggregate(rig.read(), rig.out(), false);
  const Json& cell = json["rows"][0]["cells"][0];
  CHECK(cell["n"] == 2);
  CHECK(cell["values"] == Json{50.0, 75.0, nullptr});
  CHECK(cell["mean"] == 62.5);
  CHECK_THAT(cell["sd"].get<double>(), WithinAbs(12.5 * std::sqrt(2.0), 1e-12));
  CHECK(cell["published"][0]["flags"] == Json{"points"});                // 9.1 is over 3, not over 2 of 17.7
  CHECK(cell["published"][1]["flags"] == Json::array());                 // 2.5
  CHECK(cell["published"][2]["flags"] == Json{"points", "deviations"});  // 7.5 against a published 2
  // Only seed 1 is in both.
  REQUIRE(json["comparisons"].size() == 1);
  const Json& c = json["comparisons"][0];
  CHECK(c["seeds"] == 1);
  CHECK(c["difference"] == 50.0);
  CHECK(c["low"].get<double>() >= 0);
  CHECK(c["high"].get<double>() <= 100);
  CHECK(json["missing"].size() == 4);
  CHECK(json["measures"] == Json{"accuracy", "passes"});
  CHECK(aggregate(rig.read(), rig.out(), true)["rows"][0]["cells"][2]["mean"] == 1.25);
}

TEST_CASE("a paired bootstrap gives the interval of the normal approximation where there are many questions") {
  std::string a, b;
  for (int i = 0; i < 4000; ++i) a += i % 5 < 3 ? '1' : '0', b += i % 2 == 0 ? '1' : '0';
  const Paired p = paired_bootstrap({a, a}, {b, b});
  // Differences are +1 for 3/10 and -1 for 2/10 of the questions: mean 0.1, variance 0.5 - 0.01.
  CHECK_THAT(p.difference, WithinAbs(10, 1e-9));
  const double half = 196 * std::sqrt(0.49 / 4000);
  // The 2.5 % quantile of 2,000 draws has a standard error of 0.06 standard deviations; four of them are 0.12 of the half interval.
  CHECK_THAT(p.high - p.difference, WithinAbs(half, 0.13 * half));
  CHECK_THAT(p.difference - p.low, WithinAbs(half, 0.13 * half));
  const Paired same = paired_bootstrap({a}, {a});
  CHECK((same.low == 0 && same.high == 0));
}

TEST_CASE("Markdown, LaTeX, CSV and JSON of a table hold the same numbers") {
  const TableRig rig;
  rig.save("[[column]]\nname = \"codi\"\ndata = \"test.txt\"\nscorer = \"codi\"\n" +
           row("first",
               "title = \"One & two_%, \\\"x\\\"\"\nblock = \"B|1\"\npublished = [{ column = \"test\", value = 61.25, sd = 0.5, source = "
               "\"p, q\" }]\n") +
           row("second", "block = \"B|1\"\ngroups = [\"other\"]\n") + row("third"));
  rig.put_result("first", 1, "1100", 7.25);
  rig.put_result("first", 2, "1110", 7.75);
  rig.put_result("second", 1, "0001", 3);
  const std::string reason = "stopped at 50 %, with \"x\" & y_z";
  for (const Work& work : works_of(rig.read(), {}, rig.out()))
    if (work.id == "third.1.train") write_state(rig.out(), work, {false, 2, 5, reason, 1.5, work.fingerprint, nullptr});
  write_tables(rig.read(), rig.out(), false);
  const Json json = rig.table();
  // What each form says, in reading order, is what the JSON rounds to.
  std::vector<std::string> expected;
  auto text = [](const Json& v) { return fmt::format("{:.2f}", v.get<double>()); };
  for (const Json& measure : json["measures"])
    for (const Json& r : json["rows"])
      for (const Json& cell : r["cells"]) {
        if (cell["measure"] != measure) continue;
        for (const char* key : {"mean", "sd"})
          if (!cell[key].is_null()) expected.push_back(text(cell[key]));
        for (const Json& p : cell["published"]) expected.push_back(text(p["value"])), expected.push_back(text(p["sd"]));
      }
  auto numbers = [](const std::string& form, const std::string& row_start) {
    std::vector<std::string> out;
    std::istringstream lines(form);
    const std::regex number("[0-9]+\\.[0-9][0-9]");
    for (std::string line; std::getline(lines, line);)
      if (line.starts_with(row_start + "One") || line.starts_with(row_start + "second"))
        for (std::sregex_iterator i(line.begin(), line.end(), number), end; i != end; ++i) out.push_back(i->str());
    return out;
  };
  REQUIRE(expected.size() == 11);
  CHECK(numbers(rig.form("table.md"), "| ") == expected);
  CHECK(numbers(rig.form("table.tex"), "") == expected);
  CHECK_THAT(rig.form("table.tex"), ContainsSubstring("One \\& two\\_\\%"));
  CHECK_THAT(rig.form("table.md"), ContainsSubstring("**B\\|1**"));
  CHECK_THAT(rig.form("table.md"), !ContainsSubstring("****"));
  const std::string csv = rig.form("table.csv");
  for (const Json& r : json["rows"])
    for (const Json& cell : r["cells"]) {
      const std::string line =
          fmt::format("measured,{},{},{},{},{},{},{},,,,,,,,\n", r["block"].get<std::string>(), r["name"].get<std::string>(),
                      cell["column"].get<std::string>(), cell["measure"].get<std::string>(),
                      cell["mean"].is_null() ? "" : cell["mean"].dump(), cell["sd"].is_null() ? "" : cell["sd"].dump(), cell["n"].dump());
      CHECK_THAT(csv, ContainsSubstring(line));
    }
  CHECK_THAT(csv, ContainsSubstring("published,B|1,first,test,accuracy,61.25,0.5,,\"p, q\","));
  // The comparison, and what is not done.
  REQUIRE(json["comparisons"].size() == 1);
  const Json& c = json["comparisons"][0];
  auto signed_text = [](const Json& v) { return fmt::format("{:+.2f}", v.get<double>()); };
  const std::string difference = signed_text(c["difference"]), interval = signed_text(c["low"]) + " to " + signed_text(c["high"]);
  CHECK_THAT(rig.form("table.md"), ContainsSubstring("| first | second | test | 4 | 1 | " + difference + " | " + interval + " |\n"));
  CHECK_THAT(rig.form("table.tex"), ContainsSubstring("first & second & test & 4 & 1 & " + difference + " & " + interval + " \\\\\n"));
  CHECK_THAT(csv, ContainsSubstring(fmt::format("comparison,,first,test,accuracy,{},,1,,,second,4,{},{},,\n", c["difference"].dump(),
                                                c["low"].dump(), c["high"].dump())));
  REQUIRE(json["missing"].size() == 6);
  for (const Json& m : json["missing"]) {
    const auto id = m["work"].get<std::string>(), latex = std::regex_replace(id, std::regex("_"), "\\_");
    CAPTURE(id);
    CHECK_THAT(rig.form("table.md"), ContainsSubstring(id));
    CHECK_THAT(rig.form("table.tex"), ContainsSubstring(latex));
    CHECK_THAT(csv, ContainsSubstring(fmt::format("\n{},,,,,,,,,,,,,,{},", m["status"].get<std::string>(), id)));
  }
  CHECK_THAT(rig.form("table.md"), ContainsSubstring("* third.1.train failed: " + reason));
  CHECK_THAT(rig.form("table.tex"), ContainsSubstring("% not done: third.1.train failed: stopped at 50 \\%, with \"x\" \\& y\\_z\n"));
  CHECK_THAT(csv, ContainsSubstring("third.1.train,\"stopped at 50 %, with \"\"x\"\" & y_z\"\n"));
}

TEST_CASE("two hundred finished runs are aggregated") {
  const TableRig rig;
  std::string rows, seeds = "1";
  for (int i = 0; i < 20; ++i) rows += row(fmt::format("row{}", i), i == 0 ? "groups = [\"other\"]\n" : "");
  for (int s = 2; s <= 10; ++s) seeds += fmt::format(", {}", s);
  for (const char* name : {"more", "most"}) rows += fmt::format("[[column]]\nname = \"{0}\"\ndata = \"{0}.txt\"\n", name);
  rig.save(rows, "seeds = [" + seeds + "]\nreference = \"other\"\n");
  const ReplicaTable table = rig.read();
  fs::create_directories(rig.out() / "state");
  int verdict = 0;
  Json written;
  for (const Work& work : works_of(table, {}, rig.out())) {
    WorkState state{true, 1, 0, "", 1.5, work.fingerprint, nullptr};
    std::string verdicts;  // of the questions of GSM8k
    for (int i = 0; i < 1319; ++i) verdict = verdict * 5 % 10007 + 3, verdicts += verdict % 2 == 0 ? '1' : '0';
    if (work.kind == WorkKind::eval)
      state.result = {
          {"data", "d"}, {"questions", 1319}, {"questions_sha256", "q"},           {"weights", "best"}, {"accuracy", {{"strict", 0.5}}},
          {"passes", 2}, {"ms", 1.25},        {"verdicts", {{"strict", verdicts}}}};
    if (written.is_null()) write_state(rig.out(), work, state), written = read_json(state_path(rig.out(), work.id));
    written["work"] = work.id, written["fingerprint"] = work.fingerprint, written["result"] = state.result;
    overwrite(state_path(rig.out(), work.id), written.dump());  // not flushed, which would take longer than all else
  }
  const auto start = std::chrono::steady_clock::now();
  write_tables(table, rig.out(), true);
  std::printf("two hundred runs were aggregated in %.1f s\n", seconds_since(start));
  CHECK(rig.table()["comparisons"].size() == 57);
  CHECK(rig.table()["missing"].empty());
}
