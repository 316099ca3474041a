// The commit that programs name is that of the build, not of an older configuration, and the threads those that they would take.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cstdlib>
#include <filesystem>

#include "engine/cores.h"
#include "engine/files/files.h"
#include "tests/control_group.h"
#include "tests/folders.h"
#include "tests/programs/programs.h"

using Catch::Matchers::ContainsSubstring;

namespace kava {

TEST_CASE("a build names the commit that it is made from, and an unchanged one changes no file") {
  const TempFolder folder;
  const std::string sources = folder / "sources", header = folder / "generated/commit.h";
  auto run = [&](const std::string& command) { return std::system(("( " + command + " ) >/dev/null 2>&1").c_str()) == 0; };
  if (!run("git --version && cmake --version")) SKIP("git or cmake is not there");
  auto commit = [&] {
    return run("cd '" + sources + "' && date +%N > file && git add file && git -c user.name=a -c user.email=a@b commit -m x");
  };
  auto generate = [&] {
    REQUIRE(run("cmake -DSOURCE='" + sources + "' -DHEADER='" + header + "' -P '" + source_dir() + "/cmake/commit.cmake'"));
    return read_file(header, 1 << 10);
  };
  REQUIRE(run("git init '" + sources + "'"));
  REQUIRE(commit());
  const std::string first = generate();
  CHECK(first.starts_with("#define KAVA_COMMIT \""));
  const auto written = std::filesystem::last_write_time(header);
  CHECK(generate() == first);
  CHECK(std::filesystem::last_write_time(header) == written);
  REQUIRE(commit());
  CHECK(generate() != first);
  REQUIRE(run("rm -rf '" + sources + "/.git'"));
  CHECK(generate() == "#define KAVA_COMMIT \"unknown\"\n");
}

TEST_CASE("what names the commit runs in every build, not when it is configured") {
  const std::string ninja = bin_dir() + "/../build.ninja";
  if (!std::filesystem::exists(ninja)) SKIP("this build is not made by ninja");
  const std::string text = read_file(ninja, std::size_t{64} << 20);
  CHECK_THAT(text, ContainsSubstring("/generated/commit.h -P " + source_dir() + "/cmake/commit.cmake\n"));
  CHECK_THAT(text, ContainsSubstring("build cmake_object_order_depends_target_kava_engine: phony || kava_commit"));
}

TEST_CASE("programs take as many threads as they may use cores, bound to them or by a quota of time") {
  const std::size_t allowed = allowed_cores().size();
  CHECK_THAT(run_command("kava_inspect --version").out, ContainsSubstring(fmt::format(", {} threads", usable_cores())));
  if (allowed < 2) SKIP("there is one core");
  CHECK_THAT(run_command("kava_inspect --version", ".", fmt::format("taskset -c {}", allowed_cores()[1])).out,
             ContainsSubstring(", 1 threads"));
  // Half a core: one thread.
  const ControlGroup group("cpu", {"cpu.cfs_quota_us", "50000"}, {"cpu.max", "50000 100000"});
  if (group.path().empty()) SKIP("no control group can be made here");
  CHECK_THAT(run_command("kava_inspect --version", ".", "echo 0 >" + group.path() + "/cgroup.procs;").out,
             ContainsSubstring(", 1 threads"));
}

}  // namespace kava
