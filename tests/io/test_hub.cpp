#include <catch2/catch_test_macros.hpp>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "engine/config/config.h"
#include "engine/error.h"
#include "engine/files/hub.h"
#include "tests/folders.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

// A hub cache in which org/model has one snapshot; HF_HUB_CACHE names it while the object lives.
class HubCache {
 public:
  HubCache() {
    fs::create_directories(model() / "refs");
    fs::create_directories(model() / "snapshots" / "0123abcd");
    overwrite(model() / "refs" / "main", "0123abcd");
    ::setenv("HF_HUB_CACHE", (folder_.path() / "hub").c_str(), 1);
  }
  ~HubCache() { ::unsetenv("HF_HUB_CACHE"); }

  fs::path root() const { return folder_.path(); }
  fs::path model() const { return folder_.path() / "hub" / "models--org--model"; }
  std::string snapshot() const { return (model() / "snapshots" / "0123abcd").string(); }

 private:
  TempFolder folder_;
};

}  // namespace

TEST_CASE("a name of the hub's cache is its snapshot of the branch main") {
  const HubCache cache;
  CHECK(model_folder("org/model") == cache.snapshot());
  CHECK(model_folder("org/other") == "org/other");
  CHECK(model_folder("../org/model") == "../org/model");
  // What is there by this path comes first.
  fs::create_directories(cache.root() / "here" / "org" / "model");
  CHECK(model_folder(cache.root() / "here", "org/model") == (cache.root() / "here" / "org" / "model").string());
  CHECK(model_folder(cache.root() / "elsewhere", "org/model") == cache.snapshot());

  ::unsetenv("HF_HUB_CACHE");
  ::setenv("HF_HOME", cache.root().c_str(), 1);
  CHECK(model_folder("org/model") == cache.snapshot());
  ::unsetenv("HF_HOME");
}

TEST_CASE("a configuration may name models of the hub's cache") {
  const HubCache cache;
  const std::string file = (cache.root() / "run.toml").string();
  overwrite(file, "[model]\npath = \"org/model\"\n");
  CHECK(load_config(file, {}).model.path == cache.snapshot());
  CHECK(load_config(file, {"model.path=org/missing"}).model.path.ends_with("/org/missing"));
}

TEST_CASE("a name that is neither a folder nor in the hub's cache is told with the cache and how to get the model") {
  const HubCache cache;
  const auto told = [](const std::string& missing) -> std::string {
    try {
      require_no_hub_name(missing);
    } catch (const Error& e) {
      CHECK(e.code() == Exit::data);
      return e.what();
    }
    return "";
  };
  const std::string hub = (cache.root() / "hub").string(),
                    remedy = "; check the path, or get the model by tools/fetch.sh model org/other --from URL";
  CHECK(told("org/other") == "org/other: is no folder, and not in the hub's local cache " + hub + remedy + " and give weights/other");
  const std::string behind = (cache.root() / "org" / "other").string();
  CHECK(told(behind) == behind + ": is no folder, and org/other not in the hub's local cache " + hub + remedy + " and give weights/other");
  for (const std::string& other :
       {std::string("other"), std::string("../org/other"), std::string("a/org/other"), hub + "/other",
        (cache.root() / "a" / "org" / "other").string(), std::string("org/ other"), (cache.root() / "hub/../weights/other").string(),
        (cache.root() / "weights/other").string(), std::string("runs/other")})
    CHECK(told(other).empty());
  std::filesystem::create_directory(cache.root() / "org");
  CHECK(told(behind).empty());  // a name in a folder of one's own
}

TEST_CASE("a cached model without a whole snapshot is refused by the cache's folder") {
  const HubCache cache;
  for (const char* commit : {"", "fedc", "../snapshots/0123abcd", ".."}) {
    CAPTURE(commit);
    overwrite(cache.model() / "refs" / "main", commit);
    try {
      model_folder("org/model");
      FAIL("nothing was thrown");
    } catch (const Error& e) {
      CHECK(e.code() == Exit::data);
      CHECK(std::string(e.what()).find("models--org--model") != std::string::npos);
    }
  }
}
