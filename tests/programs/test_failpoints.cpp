// Every program but kava_train (tests/kill_resume.cpp) at each of its failpoints (engine/files/disk.h): killed there, the next call gives
// what a call that was not killed gives; with an error there, it ends with 7 and one line, and leaves what was there before, as it does
// after a signal that ends it there.
#include <map>
#include <regex>
#include <sstream>

#include "tests/programs/text_run.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

using Tree = std::map<std::string, std::string>;

std::vector<std::string> keys_of(const Json& object) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : object.items()) keys.push_back(key);
  return keys;
}

// Of a folder: names, and what the files hold, but for times.
Tree tree_of(const fs::path& folder) {
  Tree tree;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    static const std::regex date("[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(-[0-9]{2}){2}\\.[0-9]{6}");
    const std::string name = std::regex_replace(entry.path().lexically_relative(folder).string(), date, "DATE");
    if (entry.is_directory()) {
      tree[name] = "folder";
      continue;
    }
    tree[name] = read_file(entry.path().string(), 1 << 26);
    if (!name.ends_with(".json")) continue;
    Json json = Json::parse(tree[name], nullptr, false);
    if (json.is_discarded() || !json.contains("results")) continue;
    for (const char* key : {"date", "total_evaluation_time_seconds"}) json.erase(key);
    for (Json& result : json["results"])
      for (const std::string& key : keys_of(result))
        if (key == "seconds" || key.starts_with("ms")) result.erase(key);
    tree[name] = json.dump();
  }
  return tree;
}

// What there is besides the parts of a writer that was killed, which go away with the next one.
Tree without_parts(Tree tree) {
  std::erase_if(tree, [](const auto& entry) { return entry.first.find(".part") != std::string::npos; });
  return tree;
}

// The files without the answers of an evaluation that goes on (tools/partial_result.h), for which a folder may have been made.
Tree without_partials(Tree tree) {
  std::erase_if(tree, [](const auto& entry) { return entry.second == "folder" || entry.first.find(".partial") != std::string::npos; });
  return tree;
}

class Failing {
 public:
  // `line` writes below `folder`, which holds what it does at the start, and goes on from what it left in `state`.
  Failing(std::string line, fs::path folder, fs::path state)
      : line_(std::move(line)), folder_(std::move(folder)), state_(std::move(state)) {
    fs::copy(folder_, start_.path() / "start", fs::copy_options::recursive);
  }

  void check_all() {
    INFO(line_);
    const Ended counted = call("count");
    REQUIRE(counted.code == 0);
    if (counted.err.find("failpoints: ") == counted.err.npos) SKIP("built without KAVA_FAILPOINTS");
    whole_ = tree_of(folder_);
    std::istringstream words(counted.err.substr(counted.err.find("failpoints: ") + 12));
    int points = 0;
    for (std::string kind, range; words >> kind >> range;) {
      const int last = std::stoi(range.substr(range.find("..") + 2));
      for (int k = 1; k <= last; ++k, ++points) check(kind, k);
    }
    CHECK(points >= 4);
  }

 private:
  Ended call(const std::string& fail) {
    fs::remove_all(state_);
    fs::remove_all(folder_);
    fs::copy(start_.path() / "start", folder_, fs::copy_options::recursive);
    return run_command(line_, ".", "KAVA_FAIL=" + fail);
  }

  void check(const std::string& kind, int k) {
    static constexpr const char* kErrors[] = {"eio", "enospc", "erofs", "emfile"};
    const std::string point = fmt::format("{}:{}", kind, k);
    INFO(point);
    const Tree before = tree_of(start_.path() / "start");
    const Ended killed = call(point + ":kill");
    CHECK(killed.code == 128 + 9);
    for (const auto& [name, bytes] : without_parts(tree_of(folder_)))  // old or new, never half
      if (bytes != "folder")
        CHECK((before.contains(name) ? bytes == before.at(name) || bytes == whole_.at(name) : bytes == whole_.at(name)));
    if (tree_of(folder_) != whole_) CHECK(run_command(line_).code == 0);
    CHECK(tree_of(folder_) == whole_);
    const Ended failed = call(point + ":" + kErrors[k % 4]);
    CHECK(failed.code == 7);
    CHECK(failed.err.starts_with("error: "));
    CHECK(std::count(failed.err.begin(), failed.err.end(), '\n') == 1);
    const Tree after = tree_of(folder_);
    CHECK((after == before || after == whole_));
    const Ended ended = call(point + ":term");
    const Tree left = tree_of(folder_);
    INFO("exit " << ended.code << ", " << ended.err << changed(before, left));
    CHECK((ended.code == 128 + 15 || ended.code == 0 || ended.code == 75));
    // A slow kava_eval may have answers by then, which it keeps for the next call.
    const bool kept = ended.code == 75 && without_partials(left) == without_partials(before);
    CHECK((kept || left == before || left == whole_));
    if (kept) CHECK(run_command(line_).code == 0);
    if (kept) CHECK(tree_of(folder_) == whole_);
  }

  static std::string changed(const Tree& before, const Tree& after) {
    std::string text;
    for (const auto& [name, bytes] : after)
      if (!before.contains(name) || before.at(name) != bytes) text += fmt::format("now {} ({} bytes)\n", name, bytes.size());
    for (const auto& [name, bytes] : before)
      if (!after.contains(name)) text += "gone " + name + "\n";
    return text;
  }

  std::string line_;
  fs::path folder_, state_;
  TempFolder start_;
  Tree whole_;
};

}  // namespace

TEST_CASE("no program loses or half writes a file when it is killed or fails at any of its writes") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions), dir = tiny.dir.string();
  const fs::path out = tiny.folder.path() / "out";
  const std::string to = out.string() + "/";
  auto writes = [&](const std::string& line, const std::string& old = "") {
    fs::remove_all(out);
    fs::create_directory(out);
    if (!old.empty()) overwrite(to + old, "old");
    Failing(line, out, tiny.dir / "eval").check_all();
  };
  const std::string step = "kava_inspect step " + source_dir() + "/tests/golden/cases/kava_defaults.toml --threads 1 --out ";
  SECTION("kava_inspect step, over an old file") { writes(step + to + "o.safetensors", "o.safetensors"); }
  SECTION("kava_eval --out") { writes("kava_eval " + dir + " --threads 1 --data " + data + " --out " + to + "r.json"); }
  SECTION("kava_merge") {
    writes("kava_merge " + source_dir() + "/tests/golden/adapters/llama_plain --threads 1 --base " + source_dir() +
           "/tests/golden/models/llama --out " + to + "merged");
  }
  SECTION("kava_report, over an old page") { writes("kava_report " + dir + " --out " + to + "page.html", "page.html"); }
  SECTION("kava_inspect probe") {
    writes("kava_inspect probe " + dir + " --threads 1 --data " + data + " --out " + to + "probe.safetensors");
  }
  SECTION("kava_train --plan --json") {
    writes("kava_train " + source_dir() + "/tests/golden/cases/kava_defaults.toml --threads 1 --plan --json " + to + "plan.json");
  }
  SECTION("kava_eval into a run") { Failing("kava_eval " + dir + " --threads 1 --data " + data, tiny.dir, tiny.dir / "eval").check_all(); }
  SECTION("kava_eval --log-samples") { writes("kava_eval " + dir + " --threads 1 --data " + data + " --log-samples " + to + "samples"); }
  SECTION("kava_data convert, over an old file") { writes("kava_data convert " + data + " " + to + "rows.jsonl", "rows.jsonl"); }
  SECTION("kava_data synth") { writes("kava_data synth --rows 10 --out " + to + "ring"); }
}
