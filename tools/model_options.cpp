#include "tools/model_options.h"

#include "engine/cli.h"
#include "engine/error.h"
#include "tools/choice_option.h"

namespace kava {

CLI::Option* add_model_options(CLI::App& app, ModelOptions& options) {
  CLI::Option* model = app.add_option("MODEL", options.model, kModelHelp);
  app.add_option("--method", options.method, "The method that decodes (default: the run's; full_cot for a plain folder)");
  app.add_option("--max-new-tokens", options.max_new_tokens,
                 "Largest number of tokens generated, EOS included (default: the run's decode.max_new_tokens; where that is 0, what the "
                 "longest gold "
                 "answer needs, at least 10; 32 without gold answers; 256 where the prompt is written too)")
      ->check(CLI::Range(1, 65536));
  app.add_option("--stage", options.stage, "coconut: decode with the latents of this stage (default: the run's last)");
  app.add_option("--chat", options.chat,
                 "Ask in the form of a chat: none, llama3, chatml, or auto: as the folder's chat template, where it has a known one")
      ->capture_default_str();
  app.add_option("--dtype", options.dtype, "bf16, f32 or f64 (default: the run's; bf16 for a plain folder)");
  app.add_option("--base", options.base, "The folder of a run's base, where it is not where the run's config.toml says");
  add_device_options(app, options.device);
  return model;
}

namespace {

bool has_chat_template(const std::string& folder) {
  try {
    return !chat_source(folder).empty();
  } catch (const Error&) {
    return false;  // nobody asked for it
  }
}

}  // namespace

void refuse_without_latents(const char* option, Method method, const Recipe& recipe) {
  const bool stages = recipe.rest == Recipe::Rest::steps;
  throw Error(Exit::usage, option, fmt::format("method {} has no latents{}", name_of(method), stages ? " at this stage" : ""),
              stages ? "give a later one with --stage K" : "give a run trained with latents");
}

std::string asked_as(const OpenedModel& opened) {
  if (opened.text.chat.family != ChatFamily::none) return "questions as a chat of form " + name_of(opened.text.chat.family);
  // A model that was trained on chats answers a bare question badly, if at all.
  return opened.plain() && has_chat_template(opened.text.folder) ? "questions as they are (--chat auto asks by the folder's chat template)"
                                                                 : "questions as they are";
}

ChosenModel choose_model(const ModelOptions& options, int device) {
  const auto method = choice_option<Method>("--method", options.method);
  const auto dtype = choice_option<StorageType>("--dtype", options.dtype);
  ChosenModel chosen{make_ops(options.device, device), open_model(options.model, dtype, options.base), {}};
  chosen.choice.method = method, chosen.choice.stage = options.stage;
  require_method(chosen.opened, method);
  require_stage(chosen.opened, method, options.stage);
  TextModel& text = chosen.opened.text;
  if (text.tokenizer) text.chat = chat_form(options.chat, text.folder, *text.tokenizer);
  else if (options.chat != "none") throw Error(Exit::usage, "--chat", "rows of ids are asked as they are", "leave it out");
  if (options.chat == "auto" && text.chat.family == ChatFamily::none)
    print_note(shown_path(text.folder) +
               ": has no chat template, so questions are asked as they are; name a form by --chat llama3 or chatml");
  for (const std::string& note : {chosen.opened.note, chosen.opened.text.note})
    if (!note.empty()) print_note(note);
  return chosen;
}

}  // namespace kava
