#include "tools/model_options.h"

#include <fmt/ranges.h>

#include <cstdio>

namespace kava {

namespace {

// The enumerator of an option's word; nothing where the option is not given.
template <class E>
std::optional<E> choice(const char* option, const std::optional<std::string>& word) {
  if (!word) return std::nullopt;
  const std::optional<E> value = choice_of<E>(*word);
  if (!value)
    throw Error(Exit::usage, option, "\"" + escaped(*word) + "\" is none of its values",
                fmt::format("give {}", fmt::join(names_of(E{}), ", ")));
  return value;
}

}  // namespace

CLI::Option* add_model_options(CLI::App& app, ModelOptions& options) {
  CLI::Option* model = app.add_option("MODEL", options.model, "A Hugging Face folder, a run directory, or a checkpoint in one");
  app.add_option("--method", options.method, "full_cot, no_cot, codi, pccot or kava (default: the run's; full_cot for a plain folder)");
  app.add_option("--max-new-tokens", options.max_new_tokens, "Largest number of tokens generated, EOS included (default: 10; full_cot 256)")
      ->check(CLI::Range(1, 65536));
  app.add_option("--dtype", options.dtype, "bf16, f32 or f64 (default: the run's; bf16 for a plain folder)");
  app.add_option("--base", options.base, "The folder of a run's base, where it is not where the run's config.toml says");
  add_device_options(app, options.device);
  return model;
}

ChosenModel choose_model(const ModelOptions& options) {
  const auto method = choice<Method>("--method", options.method);
  const auto dtype = choice<StorageType>("--dtype", options.dtype);
  ChosenModel chosen{make_ops(options.device), open_model(options.model, dtype, options.base), method};
  require_method(chosen.opened, method);
  if (!chosen.opened.note.empty()) fmt::print(stderr, "{}\n", chosen.opened.note);
  return chosen;
}

}  // namespace kava
