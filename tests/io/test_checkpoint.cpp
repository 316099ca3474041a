#include <sys/stat.h>
#include <sys/syscall.h>

#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <cerrno>
#include <set>
#include <thread>

#include "engine/error.h"
#include "engine/files/checkpoint.h"
#include "engine/files/files.h"
#include "engine/files/unreadable.h"
#include "tests/folders.h"
#include "tests/io/denied_calls.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

fs::path make_checkpoint(const fs::path& run, std::int64_t step, const std::string& content = "state") {
  return write_checkpoint(run, step, "hash", [&](FolderWriter& out) {
    out.write_file("adapter/kava.safetensors", "weights " + content);
    out.write_file("optimizer.safetensors", "moments " + content);
    out.write_file("state.json", content);
  });
}

std::string verify_refusal(const fs::path& checkpoint) {
  try {
    verify_checkpoint(checkpoint);
  } catch (const Error& e) {
    CHECK(e.code() == Exit::data);
    return e.what();
  }
  return "";
}

std::string text_of(const fs::path& path) { return read_file(path.string(), 1 << 20); }

std::set<std::string> names_in(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.insert(entry.path().filename().string());
  return names;
}

}  // namespace

TEST_CASE("a checkpoint holds the chat templates of an adapter that is a whole model folder") {
  TempFolder run;
  const fs::path path = write_checkpoint(run.path(), 3, "hash",
                                         [](FolderWriter& out) { out.write_file("adapter/additional_chat_templates/tool.jinja", "text"); });
  REQUIRE(verify_checkpoint(path).files.size() == 1);
  CHECK(verify_checkpoint(path).files[0].name == "adapter/additional_chat_templates/tool.jinja");
  fs::create_directory(path / "adapter" / "others");
  CHECK_FALSE(verify_refusal(path).empty());
}

TEST_CASE("a committed checkpoint verifies and tells its step, configuration and files") {
  TempFolder run;
  const fs::path path = make_checkpoint(run.path(), 12);
  CHECK(path == run.path() / "checkpoints" / "step_12");
  const Manifest manifest = verify_checkpoint(path);
  CHECK(manifest.step == 12);
  CHECK(manifest.config_hash == "hash");
  REQUIRE(manifest.files.size() == 3);
  CHECK(manifest.files[0].name == "adapter/kava.safetensors");
  CHECK(manifest.files[2].sha256 == sha256("state"));
  CHECK(manifest.has("optimizer.safetensors"));
  CHECK(!manifest.has("manifest.json"));
  CHECK(std::distance(fs::directory_iterator(run.path() / "checkpoints"), fs::directory_iterator()) == 1);
}

TEST_CASE("the newest checkpoint is found by number, past broken ones, and the reason is told") {
  TempFolder run;
  CHECK(!newest_valid_checkpoint(run.path()));
  for (std::int64_t step : {2, 9, 10, 100}) make_checkpoint(run.path(), step);
  const fs::path all = run.path() / "checkpoints";
  CHECK(newest_valid_checkpoint(run.path())->manifest.step == 100);
  overwrite(all / "step_100" / "optimizer.safetensors", "moments stat!");  // same size
  fs::remove(all / "step_10" / "manifest.json");
  fs::create_directory(all / "step_7_old");
  fs::create_directory(all / "step_0200");
  fs::create_directory(all / "step_99999999999999999999");
  overwrite(all / "step_300", "a file, no folder");
  std::vector<std::string> skipped;
  const auto found = newest_valid_checkpoint(run.path(), &skipped);
  REQUIRE(found);
  CHECK(found->manifest.step == 9);
  CHECK(found->path == all / "step_9");
  REQUIRE(skipped.size() == 3);
  CHECK(skipped[0].find("step_300") != std::string::npos);
  CHECK(skipped[1].find("step_100/optimizer.safetensors") != std::string::npos);
  CHECK(skipped[2].find("step_10/manifest.json") != std::string::npos);
  // Who reads the adapter alone is not stopped by moments of the right size.
  CHECK(verify_checkpoint(all / "step_100", "adapter/").step == 100);
  overwrite(all / "step_100" / "optimizer.safetensors", "moments");
  CHECK_THROWS_AS(verify_checkpoint(all / "step_100", "adapter/"), Error);
  // What a checkpoint says of itself is read with any part of it.
  std::string state = read_file((all / "step_9/state.json").string(), 1 << 20);
  CHECK(verify_checkpoint(all / "step_9", "adapter/").step == 9);
  state[state.size() / 2] ^= 1;
  overwrite((all / "step_9/state.json").string(), state);
  CHECK_THROWS_AS(verify_checkpoint(all / "step_9", "adapter/"), Error);
}

TEST_CASE("a checkpoint that cannot be opened is not passed over, nor cleared away") {
  TempFolder run;
  for (std::int64_t step : {1, 2}) make_checkpoint(run.path(), step);
  const fs::path all = run.path() / "checkpoints", part = all / ".step_3.abcdef.part";
  fs::rename(make_checkpoint(run.path(), 3), part);
  std::vector<std::string> skipped;
  std::string said;
  try {
    const FewDescriptors lock_alone(1);
    newest_valid_checkpoint(run.path(), &skipped);
  } catch (const Unreadable& e) {
    CHECK(e.code() == Exit::data);
    said = e.what();
  }
  CHECK(said.ends_with(": Too many open files; raise the limit of open files (ulimit -n)"));
  CHECK(skipped.empty());
  {
    const FewDescriptors folder_alone(1);
    CHECK_THROWS_AS(recover_checkpoints(run.path()), Unreadable);
  }
  CHECK(fs::exists(part / "manifest.json"));
  recover_checkpoints(run.path());
  CHECK(newest_valid_checkpoint(run.path())->manifest.step == 3);
}

TEST_CASE("a checkpoint under another step's name does not count") {
  TempFolder run;
  make_checkpoint(run.path(), 5);
  fs::copy(run.path() / "checkpoints/step_5", run.path() / "checkpoints/step_6", fs::copy_options::recursive);
  std::vector<std::string> skipped;
  CHECK(newest_valid_checkpoint(run.path(), &skipped)->manifest.step == 5);
  CHECK(skipped.size() == 1);
}

TEST_CASE("every damage to a checkpoint's files is found") {
  TempFolder run;
  const fs::path path = make_checkpoint(run.path(), 3);
  const fs::path state = path / "state.json";
  CHECK(verify_refusal(path) == "");
  overwrite(state, "statf");
  CHECK(verify_refusal(path).find("SHA-256") != std::string::npos);
  overwrite(state, "state and more");
  CHECK(verify_refusal(path).find("bytes") != std::string::npos);
  overwrite(state, "");
  CHECK(verify_refusal(path) != "");
  fs::remove(state);
  CHECK(verify_refusal(path).find("state.json") != std::string::npos);
  fs::create_directory(state);
  CHECK(verify_refusal(path) != "");
  fs::remove(state);
  REQUIRE(::mkfifo(state.c_str(), 0600) == 0);
  CHECK(verify_refusal(path) != "");
  fs::remove(state);
  overwrite(run.path() / "elsewhere", "state");
  fs::create_symlink(run.path() / "elsewhere", state);
  CHECK(verify_refusal(path) != "");
  fs::remove(state);
  overwrite(state, "state");
  CHECK(verify_refusal(path) == "");
  overwrite(path / "adapter" / "stray", "x");
  CHECK(verify_refusal(path).find("adapter/stray") != std::string::npos);
  CHECK(verify_refusal(run.path() / "missing") != "");
  CHECK(verify_refusal(state) != "");
}

TEST_CASE("a manifest that is malformed or reaches out of its folder is refused") {
  TempFolder run;
  const fs::path path = make_checkpoint(run.path(), 3);
  const std::string good = text_of(path / "manifest.json");
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string bad = good;
    const auto at = bad.find(from);
    REQUIRE(at != std::string::npos);
    overwrite(path / "manifest.json", bad.replace(at, from.size(), to));
    CAPTURE(from, to);
    CHECK(verify_refusal(path) != "");
  };
  overwrite(run.path() / "outside", "state");
  overwrite(run.path() / "checkpoints" / "outside", "state");
  for (const char* name :
       {"../outside", "/etc/passwd", "", ".", "..", "adapter/../state.json", "adapter/", "adapter/..", "adapter/a/b",
        "adapter/additional_chat_templates/..", "adapter/additional_chat_templates/a/b", "other/state.json", "state.json/", "./state.json",
        "manifest.json", "adapter", "optimizer.safetensors", "a\\\\b", "state.json\\u0000"})
    with("\"state.json\"", fmt::format("\"{}\"", name));
  with("\"format_version\": 1", "\"format_version\": 2");
  with("\"format_version\": 1", "\"format_version\": \"1\"");
  with("\"format_version\": 1,", "");
  with("\"step\": 3", "\"step\": -3");
  with("\"step\": 3", "\"step\": 3.5");
  with("\"step\": 3", "\"step\": 18446744073709551615");
  with("\"config_hash\": \"hash\"", "\"config_hash\": null");
  with("\"size\": 5", "\"size\": 6");
  with("\"size\": 5", "\"size\": -5");
  with("\"size\": 5", "\"size\": 1e30");
  with(sha256("state"), sha256("other"));
  with(sha256("state"), "abc");
  with("\"files\": [", "\"files\": 1, \"more\": [");
  with("\"files\": [", "\"files\": [7,");
  for (std::size_t n = 0; n < good.size() - 2; n += 7) {
    overwrite(path / "manifest.json", good.substr(0, n));
    CAPTURE(n);
    CHECK(verify_refusal(path) != "");
  }
  overwrite(path / "manifest.json", good);
  CHECK(verify_refusal(path) == "");
}

TEST_CASE("a part that verifies is the checkpoint where there is none, and every other part goes away") {
  TempFolder run;
  const fs::path all = run.path() / "checkpoints";
  make_checkpoint(run.path(), 1);
  make_checkpoint(run.path(), 2);
  make_checkpoint(run.path(), 3, "third");
  fs::rename(all / "step_3", all / ".step_3.abcdef.part");  // killed before the rename
  fs::copy(all / "step_2", all / ".step_2.abcdef.part", fs::copy_options::recursive);
  overwrite(all / ".step_2.abcdef.part" / "state.json", "older");
  fs::create_directory(all / ".step_9.abcdef.part");
  overwrite(all / ".step_9.abcdef.part" / "state.json", "half");
  // A reader that may write nothing there finds it where it is.
  CHECK(newest_valid_checkpoint(run.path())->manifest.step == 3);
  recover_checkpoints(run.path());
  CHECK(names_in(all) == std::set<std::string>{"step_1", "step_2", "step_3"});
  CHECK(text_of(all / "step_3" / "state.json") == "third");
  CHECK(text_of(all / "step_2" / "state.json") == "state");

  // Of a damaged one of the same step it takes the place.
  fs::copy(all / "step_3", all / ".step_3.ghijkl.part", fs::copy_options::recursive);
  overwrite(all / "step_3" / "state.json", "thirD");
  recover_checkpoints(run.path());
  CHECK(names_in(all) == std::set<std::string>{"step_1", "step_2", "step_3"});
  CHECK(text_of(all / "step_3" / "state.json") == "third");
}

TEST_CASE("a part that another process is writing is left alone") {
  TempFolder run;
  make_checkpoint(run.path(), 1);
  const fs::path part = run.path() / "checkpoints" / ".step_2.abcdef.part";
  fs::copy(run.path() / "checkpoints" / "step_1", part, fs::copy_options::recursive);
  const PathLock writer(part, PathLock::Kind::exclusive, false);
  REQUIRE(writer.error() == 0);
  recover_checkpoints(run.path());
  CHECK(fs::exists(part));
}

TEST_CASE("a checkpoint written again takes the older one's place") {
  TempFolder run;
  make_checkpoint(run.path(), 1, "first");
  CHECK(make_checkpoint(run.path(), 1, "again") == run.path() / "checkpoints" / "step_1");
  CHECK(text_of(run.path() / "checkpoints/step_1/state.json") == "again");
  CHECK(names_in(run.path() / "checkpoints") == std::set<std::string>{"step_1"});
}

TEST_CASE("without an exchange of names a checkpoint written again steps aside, and comes back where that fails") {
  TempFolder run;
  make_checkpoint(run.path(), 1, "first");
  const fs::path all = run.path() / "checkpoints";
  for (int error : {EINVAL, ENOSYS, EPERM, EXDEV}) {
    CHECK(ends_well_without({{SYS_renameat2, error}}, [&] { make_checkpoint(run.path(), 1, fmt::format("again {}", error)); }));
    CHECK(text_of(all / "step_1/state.json") == fmt::format("again {}", error));
    CHECK(names_in(all) == std::set<std::string>{"step_1"});
  }
  CHECK(ends_well_without({{SYS_renameat2, EINVAL}, {SYS_fsync, EIO}}, [&] {
    try {
      make_checkpoint(run.path(), 1, "lost");
      std::abort();
    } catch (const Error& e) {
      if (e.code() != Exit::write) std::abort();
    }
  }));
  CHECK(text_of(all / "step_1/state.json") == fmt::format("again {}", EXDEV));
  CHECK(names_in(all) == std::set<std::string>{"step_1"});
}

TEST_CASE("a checkpoint that cannot be written leaves all as it was") {
  TempFolder run, fresh;
  make_checkpoint(run.path(), 1);
  const auto fill = [](FolderWriter& out) {
    out.write_file("adapter/kava.safetensors", "x");
    write_file("/dev/full", "x");
  };
  CHECK_THROWS_AS(write_checkpoint(run.path(), 2, "hash", fill), Error);
  CHECK_THROWS_AS(write_checkpoint(run.path(), 1, "hash", fill), Error);
  CHECK(names_in(run.path() / "checkpoints") == std::set<std::string>{"step_1"});
  CHECK(newest_valid_checkpoint(run.path())->manifest.step == 1);
  CHECK_THROWS_AS(write_checkpoint(fresh.path(), 2, "hash", fill), Error);
  CHECK(fs::is_empty(fresh.path()));
  overwrite(run.path() / "file", "");
  CHECK_THROWS_AS(make_checkpoint(run.path() / "file", 1), Error);
}

TEST_CASE("a checkpoint that is being read is pruned the next time only") {
  TempFolder run;
  for (std::int64_t step : {1, 2, 3}) make_checkpoint(run.path(), step);
  {
    const Checkpoint read = open_checkpoint(run.path() / "checkpoints/step_1");
    prune_checkpoints(run.path(), 3, 1, {});
    CHECK(names_in(run.path() / "checkpoints") == std::set<std::string>{"step_1", "step_3"});
    CHECK(verify_checkpoint(read.path).step == 1);
  }
  prune_checkpoints(run.path(), 3, 1, {});
  CHECK(names_in(run.path() / "checkpoints") == std::set<std::string>{"step_3"});
}

TEST_CASE("what a link leads to can be opened while the link moves and older ones go") {
  TempFolder run;
  make_checkpoint(run.path(), 1);
  set_link(run.path(), "best", 1);
  std::atomic<bool> done = false;
  std::atomic<int> opened = 0;
  std::string failure;
  std::thread reader([&] {
    try {
      for (; !done; ++opened) open_checkpoint(run.path() / "best");
    } catch (const Error& e) {
      failure = e.what();
    }
  });
  for (std::int64_t step = 2; step < 60 || (opened < 60 && failure.empty()); ++step) {
    make_checkpoint(run.path(), step);
    set_link(run.path(), "best", step);
    prune_checkpoints(run.path(), step, 1, {});
  }
  done = true;
  reader.join();
  CHECK(failure == "");
}

TEST_CASE("links are relative, replaced in one step and give their step back") {
  TempFolder run;
  CHECK(!linked_step(run.path(), "best"));
  make_checkpoint(run.path(), 1);
  make_checkpoint(run.path(), 20);
  set_link(run.path(), "best", 1);
  fs::create_symlink("checkpoints/step_7", run.path() / ".best.abcdef.part");  // left by a kill
  set_link(run.path(), "best", 20);
  CHECK(fs::read_symlink(run.path() / "best") == "checkpoints/step_20");
  CHECK(linked_step(run.path(), "best") == 20);
  CHECK(verify_checkpoint(run.path() / "best").step == 20);
  CHECK(names_in(run.path()) == std::set<std::string>{"best", "checkpoints"});
  fs::create_directory(run.path() / "last");
  overwrite(run.path() / "last" / "x", "");
  CHECK_THROWS_AS(set_link(run.path(), "last", 1), Error);
  CHECK(names_in(run.path()) == std::set<std::string>{"best", "checkpoints", "last"});
}

TEST_CASE("pruning keeps the newest and the protected") {
  TempFolder run;
  for (std::int64_t step : {1, 2, 3, 10, 11, 30}) make_checkpoint(run.path(), step);
  prune_checkpoints(run.path(), 11, 2, {2, 77});
  std::vector<bool> left;
  for (int step : {1, 2, 3, 10, 11, 30}) left.push_back(fs::exists(run.path() / fmt::format("checkpoints/step_{}", step)));
  CHECK(left == std::vector<bool>{false, true, false, true, true, true});
  CHECK_THROWS_AS(prune_checkpoints(run.path(), 11, -1, {}), Error);
  // What did not verify counts in no whole one's place, and goes once the run is past it.
  CHECK(later_checkpoints(run.path(), 10) == std::set<std::int64_t>{11, 30});
  make_checkpoint(run.path(), 12);
  CHECK(prune_checkpoints(run.path(), 12, 2, {}, {11, 30}).empty());
  CHECK(names_in(run.path() / "checkpoints") == std::set<std::string>{"step_10", "step_12", "step_30"});
}

TEST_CASE("pruning leaves what has a checkpoint's name and is none, and takes the rest of one") {
  TempFolder run;
  const fs::path all = run.path() / "checkpoints";
  for (std::int64_t step : {1, 2, 3, 6}) make_checkpoint(run.path(), step);
  fs::remove(all / "step_1/manifest.json");  // a kill while it was removed
  fs::remove(all / "step_1/state.json");
  fs::create_directories(all / "step_4/checkpoints/step_1");  // another run
  overwrite(all / "step_4/config.toml", "");
  fs::create_directory(all / "step_5");  // a model
  overwrite(all / "step_5/config.json", "{}");
  CHECK(prune_checkpoints(run.path(), 6, 2, {}).empty());
  CHECK(names_in(all) == std::set<std::string>{"step_3", "step_4", "step_5", "step_6"});  // these two count in no checkpoint's place
  CHECK(fs::exists(all / "step_4/checkpoints/step_1"));
  CHECK(fs::exists(all / "step_5/config.json"));
}

TEST_CASE("a link in the place of a checkpoint is replaced or pruned, and what it leads to stays") {
  TempFolder run, other;
  const fs::path checkpoints = run.path() / "checkpoints", elsewhere = make_checkpoint(other.path(), 5);
  make_checkpoint(run.path(), 1);
  fs::create_directory_symlink("nowhere", checkpoints / "step_2");
  fs::create_directory_symlink("step_3", checkpoints / "step_3");
  fs::create_directory_symlink(elsewhere, checkpoints / "step_4");
  fs::create_directory_symlink(elsewhere, checkpoints / "step_5");
  for (std::int64_t step : {2, 3, 4}) {
    CHECK(verify_checkpoint(make_checkpoint(run.path(), step)).step == step);
    CHECK(!fs::is_symlink(checkpoints / fmt::format("step_{}", step)));
  }
  make_checkpoint(run.path(), 6);
  prune_checkpoints(run.path(), 6, 1, {});
  CHECK(!fs::exists(fs::symlink_status(checkpoints / "step_5")));
  CHECK(verify_checkpoint(elsewhere).step == 5);
}
