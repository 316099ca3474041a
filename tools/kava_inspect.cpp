// kava_inspect: what is in a file, a step or a tokenizer. Each subcommand is in tools/inspect_NAME.cpp.
#include "tools/command.h"
#include "tools/inspect_doctor.h"
#include "tools/inspect_file.h"
#include "tools/inspect_probe.h"
#include "tools/inspect_step.h"
#include "tools/inspect_tokens.h"

int main(int argc, char** argv) {
  CLI::App app("Checks and lists the files that kava reads and writes", "kava_inspect");
  app.footer("Examples:\n  kava_inspect doctor\n  kava_inspect file runs/quickstart/kava      (after tools/quickstart.sh)");
  app.require_subcommand(1);
  std::function<int()> chosen;
  kava::add_file_command(app, chosen);
  kava::add_step_command(app, chosen);
  kava::add_probe_command(app, chosen);
  kava::add_tokens_command(app, chosen);
  kava::add_doctor_command(app, chosen);
  return kava::command_main(argc, argv, app, [&] { return chosen(); });
}
