#include "engine/files/paths.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>

#include "engine/error.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

std::string without_trailing_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

fs::path resolved(const fs::path& path) {
  std::error_code failed;
  const fs::path real = fs::weakly_canonical(path, failed);
  return failed ? fs::path() : real;
}

auto steps_upwards(const fs::path& path) { return std::count(path.begin(), path.end(), fs::path("..")); }

struct FileId {
  dev_t device;
  ino_t inode;
  bool operator==(const FileId&) const = default;
};

bool id_of(const std::string& path, FileId& id) {
  struct stat status;
  if (::stat(path.c_str(), &status) != 0) return false;
  id = {status.st_dev, status.st_ino};
  return true;
}

// The path in or at `input` that is the file, or nothing.
std::string found_in(const std::string& input, const FileId& file) {
  FileId id;
  if (!id_of(input, id)) return "";
  if (id == file) return input;
  std::error_code failed;
  for (fs::recursive_directory_iterator entry(input, failed); !failed && entry != fs::recursive_directory_iterator();
       entry.increment(failed)) {
    const std::string path = entry->path().string();
    if (entry->path().filename() == "eval") entry.disable_recursion_pending();
    else if (id_of(path, id) && id == file) return path;
  }
  return "";
}

}  // namespace

std::string expand_home(const std::string& path) {
  const char* home = std::getenv("HOME");
  const bool asked = path == "~" || path.starts_with("~/");
  return asked && home && *home ? home + path.substr(1) : path;
}

std::string relative_path(const fs::path& folder, const std::string& path) {
  if (path.empty()) return "";
  const fs::path target = fs::absolute(without_trailing_slash(path)), base = fs::absolute(without_trailing_slash(folder.string()));
  const fs::path real_base = resolved(base), real_target = resolved(target);
  if (real_base.empty() || real_target.empty()) return target.string();
  fs::path best;
  // Through links as they were named where that leads to the same file, as a folder may hold a link that belongs to it.
  for (const fs::path& to : {target.lexically_normal(), resolved(target.parent_path()) / target.filename(), real_target})
    for (const fs::path& from : {base.lexically_normal(), real_base}) {
      const fs::path relative = to.lexically_relative(from);
      if (relative.empty() || resolved(real_base / relative) != real_target) continue;
      if (best.empty() || steps_upwards(relative) < steps_upwards(best)) best = relative;
    }
  if (best.empty()) return target.string();
  return best.string().starts_with("~") ? "./" + best.string() : best.string();
}

std::string plain_path(const std::string& path) {
  if (path.empty()) return "";
  const fs::path named = fs::absolute(without_trailing_slash(path)).lexically_normal(), real = resolved(path);
  return (resolved(named) == real || real.empty() ? named : real).string();
}

bool same_path(const std::string& a, const std::string& b) {
  if (a == b) return true;
  std::error_code of_a, of_b;
  return !a.empty() && !b.empty() && fs::weakly_canonical(a, of_a) == fs::weakly_canonical(b, of_b) && !of_a && !of_b;
}

std::string path_from(const fs::path& folder, const std::string& path) {
  if (path.empty() || fs::path(path).is_absolute()) return path;
  fs::path at = folder;
  bool leading = true;
  for (const fs::path& part : fs::path(path)) {
    leading = leading && (part == ".." || part == ".");
    if (!leading) at /= part;
    else if (part == "..") at = at.parent_path();
  }
  return at.string();
}

void require_no_input(const std::string& option, const std::string& out, const std::vector<std::string>& inputs) {
  FileId file;
  std::error_code ignored;
  if (out.empty() || !id_of(out, file) || fs::is_directory(out, ignored)) return;
  for (const std::string& input : inputs)
    if (const std::string found = input.empty() ? "" : found_in(input, file); !found.empty())
      throw Error(Exit::usage, option + " " + shown_path(out), "is " + shown_path(found) + ", which is read here or by the run",
                  "name another file");
}

}  // namespace kava
