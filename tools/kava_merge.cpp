// kava_merge: base and LoRA as one Hugging Face folder.
#include <fmt/core.h>

#include <cerrno>
#include <filesystem>
#include <optional>

#include "engine/files/files.h"
#include "engine/files/hub.h"
#include "engine/files/parts.h"
#include "engine/files/paths.h"
#include "engine/files/safetensors.h"
#include "models/adapter.h"
#include "models/merge.h"
#include "models/open_model.h"
#include "models/upstream.h"
#include "models/weights.h"
#include "tools/command.h"
#include "tools/device.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

struct MergeCommand {
  std::string adapter, out;
  std::optional<std::string> base, dtype;
  DeviceOptions device;
};

// What lies beside the merged weights and has no place in them.
void print_left_out(const fs::path& adapter) {
  if (is_there(adapter / "kava.safetensors") || UpstreamAdapter::is_at(adapter.string()))
    fmt::print(
        "the rows of bot, eot and latent and the latents' projection are no part of a plain model and were left out: the folder writes\n"
        "its chain of thought\n");
}

[[noreturn]] void refuse_drawn(const std::string& given) {
  throw Error(Exit::data, shown_path(given), "model.init = \"random\" drew the base, which lies in no folder",
              "train such a model with train.trainable = \"all\"");
}

// An adapter of kava's names the base that it was trained on.
void tell_other_base(const std::string& adapter, const std::string& base) {
  const auto base_of = [](const SafetensorsFile& file) -> std::optional<std::string> {
    const auto at = file.metadata().find("kava.base");
    return at == file.metadata().end() ? std::nullopt : std::optional(at->second);
  };
  std::optional<std::string> before = base_of(open_adapter_file(adapter));
  const std::string latents = (fs::path(adapter) / "kava.safetensors").string();
  if (!before && is_there(latents)) before = base_of(SafetensorsFile::open(latents));
  if (!before) return;
  if (before->empty()) refuse_drawn(adapter);
  const ModelConfig shape = ModelConfig::load(base);
  if (*before != digest_of_base(shape, WeightFiles::open(base, shape)))
    print_note(
        fmt::format("{} is not the base that the adapter was trained on, by its config.json or its weights' headers", shown_path(base)));
}

struct Opened {
  MergeInput input;
  fs::path adapter;
  std::shared_ptr<const PathLock> lock;  // keeps a checkpoint from being pruned
};

Opened open_input(const MergeCommand& command) {
  const std::string given = model_folder(command.adapter);
  if (is_there(fs::path(given) / "adapter_config.json")) {
    const std::string base = model_folder(command.base ? *command.base : peft_base(given));
    if (!is_there(base)) throw Error(Exit::data, shown_path(base), "the adapter's base is not there", "name it with --base DIR");
    tell_other_base(given, base);
    return {peft_merge_input(given, base), given, nullptr};
  }
  OpenedModel opened = open_model(given, std::nullopt, command.base);
  const std::string adapter = opened.adapter.string(), base = opened.config.model.path;
  if (opened.plain())
    throw Error(Exit::data, shown_path(given), "is a plain model folder: there is nothing to merge",
                "give a run, a checkpoint or an adapter");
  require_same_base(opened);
  if (opened.config.model.init == Init::random && opened.config.train.trainable == Trainable::lora) refuse_drawn(given);
  fmt::print("{}\n", opened.weights);
  const auto input = [&]() -> MergeInput {
    if (opened.config.train.trainable == Trainable::all) return {base, adapter, "", 1, false};
    const bool of_peft = is_there(opened.adapter / "adapter_config.json");
    return of_peft ? peft_merge_input(adapter, base) : codi_merge_input(adapter, base, opened.config);
  };
  return {input(), adapter, opened.lock};
}

/// The new folder, made and locked: of several that would write it at a time the first one does.
struct NewFolder {
  explicit NewFolder(const std::string& out) : made(out, failed) {
    const std::string where = "--out " + shown_path(out);
    if (!failed) lock.emplace(out, PathLock::Kind::exclusive, false);
    if (lock && lock->error() == EWOULDBLOCK) throw Error(Exit::preflight, where, "another process is writing it", "name a new folder");
    if (lock && lock->error() != 0) failed = {lock->error(), std::generic_category()};
    require_disk(out, failed.value());
    if (failed && !is_there(out))
      throw Error(Exit::preflight, where, "could not make the folder: " + failed.message(), "name another folder");
    const bool empty = !failed && fs::is_empty(out, failed);
    require_disk(out, failed.value());
    if (!empty || failed) throw Error(Exit::usage, where, "is there already", "name a new folder");
  }
  std::error_code failed;
  MadeFolder made;
  std::optional<PathLock> lock;
};

int merge(const MergeCommand& command) {
  if (command.dtype && *command.dtype != "bf16" && *command.dtype != "f32")
    throw Error(Exit::usage, "--dtype", escaped(*command.dtype) + " is none of the types that are written", "give bf16 or f32");
  const DType dtype = command.dtype == "f32" ? DType::f32 : DType::bf16;
  require_outside_checkpoints("--out", command.out);
  const NewFolder place(command.out);
  const Opened opened = open_input(command);
  require_no_input("--out", command.out, {opened.input.base, opened.adapter.string()});
  const std::unique_ptr<Ops> ops = make_cpu_ops(thread_count(command.device));
  FolderWriter out(command.out);
  write_merged(*ops, opened.input, dtype, out);
  print_left_out(opened.adapter);
  fmt::print("written {}\n", shown_path(command.out));
  require_printed();
  out.commit();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Merges an adapter into its base: a Hugging Face folder for other programs", "kava_merge");
  app.footer("Example (after tools/quickstart.sh):\n  kava_merge runs/quickstart/kava --out runs/merged");
  MergeCommand command;
  app.add_option("ADAPTER", command.adapter, "An adapter folder in PEFT's format, a run directory, or a checkpoint in one")->required();
  app.add_option("--out", command.out, "The folder to write, which must be new")->required();
  app.add_option("--base", command.base, "The base's folder, where it is not where the adapter or the run says");
  app.add_option("--dtype", command.dtype, "bf16 or f32 (default: bf16), each value rounded once");
  app.add_option("--threads", command.device.threads, "Threads, 1..4096 (default: all cores that it may use)");
  return command_main(argc, argv, app, [&] { return merge(command); });
}
