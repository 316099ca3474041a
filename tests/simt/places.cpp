// Names of code, asked of addr2line: kernels are compiled with line tables.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <regex>
#include <string>
#include <vector>

#include "watch.h"

namespace simt {

namespace {

struct CodePlace {
  std::string file;  // that holds it
  std::size_t offset = 0;
};
CodePlace code_place(const void* code) {
  Dl_info info{};
  if (!dladdr(code, &info) || !info.dli_fname) return {};
  return {info.dli_fname, static_cast<std::size_t>(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase))};
}

std::vector<std::string> addr2line(const std::string& options, const std::string& file, const std::vector<std::size_t>& offsets) {
  // dladdr gives a program as it was called.
  std::string command = "addr2line " + options + " -e '" + std::regex_replace(file, std::regex("'"), "'\\''") + "'";
  char number[32];
  for (const std::size_t offset : offsets) std::snprintf(number, sizeof number, " 0x%zx", offset), command += number;
  std::vector<std::string> lines;
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen((command + " 2>/dev/null").c_str(), "r"), pclose);
  char* line = nullptr;
  for (std::size_t room = 0; pipe && getline(&line, &room, pipe.get()) > 0;) {
    lines.emplace_back(line);
    lines.back().erase(lines.back().find_last_not_of('\n') + 1);
  }
  std::free(line);
  return lines;
}

// "/a/b/c.cu:12 (discriminator 3)" is c.cu:12.
std::string short_place(const std::string& line) {
  const std::string name = line.substr(line.find_last_of('/') + 1);
  return name.substr(0, name.find(' '));
}

}  // namespace

std::vector<std::string> places_of(const std::vector<const void*>& code) {
  std::map<std::string, std::vector<std::size_t>> by_file;  // places in `code`
  std::vector<std::size_t> offsets;
  for (std::size_t i = 0; i < code.size(); ++i) {
    const CodePlace place = code_place(code[i]);
    by_file[place.file].push_back(i);
    offsets.push_back(place.offset - 1);  // calls are known by where they return to
  }
  std::vector<std::string> places(code.size(), "?");
  constexpr std::size_t kMost = 256;  // of a command
  for (const auto& [file, wanted] : by_file)
    for (std::size_t begin = 0; begin < wanted.size(); begin += kMost) {
      const std::size_t end = std::min(wanted.size(), begin + kMost);
      std::vector<std::size_t> asked;
      for (std::size_t i = begin; i < end; ++i) asked.push_back(offsets[wanted[i]]);
      std::size_t at = begin;
      std::string inner, outer;
      auto take = [&] {
        if (!inner.empty() && at < end) places[wanted[at++]] = outer == inner ? inner : inner + " in " + outer;
        inner.clear();
      };
      // Each address, then its line and those of the functions that it was inlined into.
      for (const std::string& line : addr2line("-a -i", file, asked)) {
        if (line.starts_with("0x")) {
          take();
          continue;
        }
        const std::string place = short_place(line);
        if (place.starts_with("gpu_emulated.h:")) continue;  // models of the device's words
        if (inner.empty()) inner = outer = place;
        // What starts a kernel stands in the emulator.
        else if (place.find(".h:") == place.npos) outer = place;
      }
      take();
    }
  return places;
}

std::string kernel_name(const void* kernel) {
  const CodePlace place = code_place(kernel);
  const std::vector<std::string> lines = addr2line("-f -C", place.file, {place.offset});
  std::string name = lines.empty() ? "?" : lines[0];
  for (const char* drop : {"kava::", "\\(anonymous namespace\\)::", "^void ", "\\(int\\)", "\\(bool\\)"})
    name = std::regex_replace(name, std::regex(drop), "");
  const char* forms[] = {"nt", "nn", "tn"};
  for (int i = 0; i < 3; ++i) name = std::regex_replace(name, std::regex("\\(GemmForm\\)" + std::to_string(i)), forms[i]);
  int depth = 0;  // the parameters follow the template's arguments
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

}  // namespace simt
