// kava_train: trains what a configuration says, into a run folder.
#include "tools/command.h"
#include "tools/ranks.h"
#include "tools/train.h"

int main(int argc, char** argv) {
  CLI::App app("Trains a latent-reasoning model from one configuration file", "kava_train");
  app.footer(
      "Examples (after tools/quickstart.sh):\n  kava_train configs/quickstart.toml --set train.lr=1e-3 --set train.max_steps=200 --out "
      "runs/first\n"
      "  kava_train runs/first --resume\n"
      "  kava_train configs/quickstart.toml --plan\n"
      "Keys and their values: kava_train --keys, and docs/configuration.md.");
  kava::TrainCommand command;
  app.add_option("CONFIG", command.config, "The run's configuration (TOML); or the folder of a run, with --resume")->required();
  kava::add_set_option(app, command.sets);
  app.add_option("--out", command.out, "Folder of the run (default: runs/ and the name of CONFIG without its ending)");
  app.add_flag("--resume", command.resume, "Go on from the newest checkpoint in the folder");
  app.add_flag("--extend", command.extend, "Like --resume, and go on with other train.max_steps, train.epochs or train.micro_batch");
  auto* plan = app.add_flag("--plan", command.plan, "Print parameters, memory, FLOPs, steps, disk and time of the run, and end");
  app.add_option("--json", command.plan_options.json, "Also write the plan to this file")->needs(plan);
  app.add_option("--memory", command.plan_options.memory, "Plan for a device of N bytes, N GB or N GiB, which need not be here")
      ->needs(plan);
  app.add_option("--rate", command.plan_options.rate, "TFLOP/s that the run reaches, for its time")->needs(plan);
  app.add_flag("--profile", command.profile, "Time every op: a table at the end, and RUN/log/profile.trace.json for Chrome");
  app.add_flag("--check-ops", command.check_ops,
               "Name the first op of a step that wrote a value that is not finite, where a step is skipped for it");
  kava::add_device_options(app, command.device);
  kava::add_rank_options(app, command.ranks);
  return kava::command_main(argc, argv, app, [&] { return kava::train(command); });
}
