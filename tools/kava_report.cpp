// kava_report: one self-contained page of runs and tables. Loads no model.
#include <fmt/core.h>
#include <fmt/ranges.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <optional>

#include "engine/cli.h"
#include "engine/files/files.h"
#include "engine/files/paths.h"
#include "tools/command.h"
#include "tools/report_page.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

struct ReportCommand {
  std::vector<std::string> things;
  std::optional<std::string> probe, out, figure, png;
};

// A run or a table, by what lies in its folder. number: its place, where there are several; a run's is added to `runs` with its folder.
std::string section_of(const std::string& thing, const std::string& number, std::vector<std::pair<std::string, std::string>>& runs) {
  const std::string prefix = number.empty() ? "" : number + "_";
  std::error_code ignored;
  fs::path folder = thing;
  if (folder.filename() == "table.json") folder = folder.has_parent_path() ? folder.parent_path() : ".";
  if (fs::exists(folder / "table.json", ignored)) return report::table_section(folder.string(), prefix);
  if (fs::exists(folder / "config.toml", ignored)) {
    runs.emplace_back(number, folder.string());
    return report::run_section(folder.string(), prefix);
  }
  throw Error(Exit::data, shown_path(thing), "is neither a run nor a table: it holds no config.toml and no table.json",
              "name a folder of kava_train or replicate");
}

std::vector<std::string> figure_names(const std::string& body) {
  std::vector<std::string> names;
  constexpr std::string_view begin = "<figure id=\"";
  for (std::size_t at = 0; (at = body.find(begin, at)) != std::string::npos;) {
    at += begin.size();
    names.push_back(body.substr(at, body.find('"', at) - at));
  }
  return names;
}

std::string only_figure(const std::string& body, const std::string& name) {
  const std::vector<std::string> names = figure_names(body);
  if (std::ranges::find(names, name) == names.end())
    throw Error(Exit::usage, "--figure", "\"" + escaped(name) + "\" is no figure of this page",
                fmt::format("give one of {}", fmt::join(names, ", ")));
  const auto begin = body.find("<figure id=\"" + name + "\"");
  return body.substr(begin, body.find("</figure>", begin) + 9 - begin);
}

// A browser draws the page; there is no other renderer of SVG here.
std::string drawn(const std::string& html) {
  const fs::path folder = fs::temp_directory_path() / fmt::format("kava_report_{}", ::getpid());
  fs::create_directories(folder);
  struct Gone {
    const fs::path& folder;
    ~Gone() {
      std::error_code ignored;
      fs::remove_all(folder, ignored);
    }
  } gone{folder};
  write_file((folder / "page.html").string(), html);
  const std::string picture = (folder / "figure.png").string();
  const std::string command = fmt::format(
      "command -v chromium >/dev/null || exit 127; cd '{0}' && chromium --headless --no-sandbox --disable-gpu --hide-scrollbars "
      "--user-data-dir='{0}/profile' --window-size=1000,700 "
      "--screenshot='{1}' 'file://{0}/page.html' >/dev/null 2>&1",
      folder.string(), picture);
  const int status = std::system(command.c_str());
  if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
    throw Error(Exit::preflight, "--png", "there is no chromium to draw the figure", "install chromium");
  if (!is_there(picture)) throw Error(Exit::preflight, "--png", "chromium drew nothing", "draw the page with another browser");
  return read_file(picture, std::size_t{64} << 20);
}

// A file in a reported folder is what it is read from, but for pages and pictures, by how they begin: this program has left them there.
void require_no_part(const std::string& option, const std::string& out, std::string_view own, const std::vector<std::string>& inputs) {
  std::error_code failed;
  if (!fs::is_regular_file(out, failed)) return;
  std::string begin(own.size(), '\0');
  std::ifstream(out, std::ios::binary).read(begin.data(), static_cast<std::streamsize>(begin.size()));
  if (begin == own) return;
  std::vector<std::string> all = inputs;
  for (const std::string& input : inputs) all.push_back(path_in(input, "eval"));
  require_no_input(option, out, all);
}

int make_report(const ReportCommand& command) {
  if (command.figure.has_value() != command.png.has_value())
    throw Error(Exit::usage, command.figure ? "--figure" : "--png", "needs the other of --figure and --png", "give both");
  if (command.out && command.png)
    throw Error(Exit::usage, "--out", "is of the page, and --png asks for one figure of it alone", "leave one of them out");
  std::vector<std::string> inputs = command.things;
  if (command.probe) inputs.push_back(*command.probe);
  const fs::path first = command.things[0];
  const std::string out = command.out.value_or(((first.filename() == "table.json" ? first.parent_path() : first) / "report.html").string());
  if (command.png) require_no_part("--png", *command.png, "\x89PNG", inputs);
  else require_no_part("--out", out, "<!doctype html>", inputs);
  const bool several = command.things.size() > 1;
  std::string body;
  std::vector<std::pair<std::string, std::string>> runs;
  for (std::size_t i = 0; i < command.things.size(); ++i) body += section_of(command.things[i], several ? std::to_string(i + 1) : "", runs);
  if (runs.size() > 1) body = report::runs_section(runs) + body;
  if (command.probe) body += report::probe_section(*command.probe, "", runs);
  const std::string title = several ? "kava: runs and tables" : "kava: " + report::run_name(command.things[0]);
  if (command.figure) {
    require_writable("--png", *command.png);
    const std::string picture = drawn(report::page(title, only_figure(body, *command.figure)));
    fmt::print("written {}\n", shown_path(*command.png));
    require_printed();
    write_file(*command.png, picture);
    return 0;
  }
  require_writable("--out", out);
  fmt::print("written {}\n", shown_path(out));
  require_printed();
  write_file(out, report::page(title, body));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Makes one self-contained page of runs and tables", "kava_report");
  app.footer(
      "Examples (after tools/quickstart.sh):\n  kava_report runs/quickstart/kava\n"
      "  kava_report runs/quickstart/base runs/quickstart/kava --out runs/both.html");
  ReportCommand command;
  app.add_option("RUN_OR_TABLE", command.things, "Folders of kava_train or replicate")->required();
  app.add_option("--probe", command.probe, "A file of kava_inspect probe");
  app.add_option("--out", command.out, "The page (default: report.html in the first folder)");
  app.add_option("--figure", command.figure, "Draw this figure alone, with --png, by its name, as validation_loss");
  app.add_option("--png", command.png, "The picture to write; needs chromium");
  return command_main(argc, argv, app, [&] { return make_report(command); });
}
