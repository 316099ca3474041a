// The commit that programs name is that of the build, not of an older configuration.
#include <catch2/catch_test_macros.hpp>
#include <cstdlib>
#include <filesystem>

#include "engine/files/files.h"
#include "tests/folders.h"

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

}  // namespace kava
