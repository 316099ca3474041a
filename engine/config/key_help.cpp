#include "engine/config/key_help.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "engine/choice.h"
#include "engine/config/architecture.h"
#include "engine/config/config.h"
#include "engine/config/config_schema.h"
#include "engine/error.h"

namespace kava {

namespace {

using schema::Key;

// A name longer than this is like no key.
constexpr std::size_t kLongestKey = 100;

constexpr const char* kMetrics = "a run writes metrics.jsonl, which tools/export_metrics.py hands on to trackers";
constexpr const char* kForward = "the samples of one forward; train.batch those of one update";
constexpr const char* kSteps = "in steps; 0 is each epoch";
constexpr const char* kAdapted = "the linears by name";

// Names of the Hugging Face Trainer, TRL, PEFT, torchtune, LLaMA-Factory and the code of PCCoT, CODI, Coconut and iCoT, in lower case with
// '_'; the key or option of the same meaning; what is to be known of it. Without a key nothing here has that meaning.
struct Meaning {
  const char* names;
  const char* key;
  const char* note = "";
};

constexpr Meaning kMeanings[] = {
    {"model_name_or_path, model_name, model_id, base_model, base_model_name_or_path, pretrained_model_name_or_path, checkpoint_dir, "
     "checkpointer.checkpoint_dir, tokenizer_name, tokenizer.path",
     "model.path"},
    {"torch_dtype, bf16, fp16, precision, mixed_precision, pure_bf16, half", "model.dtype", "\"bf16\" or \"f32\""},
    {"load_model_path, adapter_path, adapter_name_or_path, restore_from, resume_adapter, peft_model_path", "model.adapter"},
    {"from_scratch, init_from", "model.init", "\"random\" trains from scratch"},
    {"train_file, train_files, train_path, data_path, dataset, dataset_name, dataset.source, train_dataset, icot_train_path, data_files",
     "data.train"},
    {"validation_file, valid_file, val_path, val_file, eval_file, eval_dataset, valid_path, dataset_valid, test_file, dev_file",
     "data.valid"},
    {"max_seq_length, max_seq_len, max_length, model_max_length, cutoff_len, block_size, seq_len, sequence_length, max_token_num, "
     "tokenizer.max_seq_len, max_len_train, truncation",
     "data.max_tokens"},
    {"max_train_samples, max_samples, train_subset, subset", "data.fraction", "a share of the rows"},
    {"num_train_epochs, num_epochs, n_epochs, max_epochs", "train.epochs"},
    {"max_train_steps, max_steps_per_epoch, total_steps, num_steps, num_training_steps, max_iters, iterations", "train.max_steps"},
    {"per_device_train_batch_size, train_batch_size, global_batch_size, batch_size, batch_size_training, total_batch_size, bsz",
     "train.batch", "samples of one update over all devices"},
    {"gradient_accumulation_steps, grad_accum, grad_accumulation_steps, accumulate_grad_batches, accumulate, micro_batch_size, "
     "auto_find_batch_size",
     "train.micro_batch", kForward},
    {"learning_rate, lr, base_lr, max_lr, peak_lr", "train.lr"},
    {"optim, optimizer_type, optimizer_name, optimizer._component_", "train.optimizer"},
    {"lr_scheduler_type, lr_scheduler, scheduler, scheduler_type, lr_schedule, lr_scheduler._component_", "train.schedule"},
    {"warmup_ratio, warmup_steps, num_warmup_steps, warmup_iters, lr_scheduler.num_warmup_steps", "train.warmup",
     "a fraction of the steps"},
    {"wd, decay", "train.weight_decay"},
    {"max_grad_norm, clip_grad_norm, grad_clip, gradient_clipping, gradient_clip_val, max_norm", "train.clip"},
    {"adam_beta1, adam_beta2, beta1, beta2, adam_betas", "train.betas", "both in one list"},
    {"adam_epsilon, adam_eps, epsilon", "train.eps"},
    {"logging_steps, log_every_n_steps, log_interval, logging_strategy", "train.log_every", "in steps"},
    {"eval_steps, eval_strategy, evaluation_strategy, eval_every, eval_interval, val_check_interval, run_val_every_n_steps, do_eval",
     "train.valid_every", kSteps},
    {"save_steps, save_strategy, save_every, save_interval, save_every_n_steps, checkpoint_interval", "train.checkpoint_every", kSteps},
    {"save_total_limit, save_last_n, max_checkpoints", "train.keep_checkpoints"},
    {"gradient_checkpointing, activation_checkpointing, enable_activation_checkpointing, recompute_activations", "train.recompute",
     "\"block\", or the cheaper \"cheap\""},
    {"full_finetune, full_finetuning, finetuning_type, use_peft, use_lora, train_mode, freeze, unfreeze", "train.trainable",
     "\"lora\" or \"all\""},
    {"max_time, time_limit, max_train_time", "train.max_hours"},
    {"r, lora_r, lora_rank, lora_dim", "lora.rank"},
    {"lora_alpha, lora_scaling", "lora.alpha"},
    {"lora_dropout, peft.dropout, dropout", "lora.dropout"},
    {"target_modules, lora_target_modules, lora_target, lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output, exclude_modules",
     "lora.targets", kAdapted},
    {"attn_pdrop, resid_pdrop, embd_pdrop, attention_dropout, hidden_dropout", "model.dropout"},
    {"num_latent, num_latents, num_latent_tokens, n_latents, latent_tokens", "latent.count"},
    {"inf_latent_iterations, num_iterations, jacobi_iterations, n_iterations", "latent.iterations"},
    {"use_prj, prj_dim, prj_no_ln, use_projection", "latent.projection"},
    {"c_thought", "coconut.thoughts"},
    {"max_latent_stage", "coconut.max_stage"},
    {"pad_latent_to_max", "coconut.pad_to_max"},
    {"epochs_per_stage", "stages.epochs"},
    {"uniform_prob", "stages.mix"},
    {"remove_all_when_remove_beyond", "icot.remove_all_from"},
    {"removal_smoothing_lambda", "icot.smoothing"},
    {"removal_side", "icot.side"},
    {"keep_position", "icot.keep_positions"},
    {"distill_loss_factor, distillation_weight, alpha1", "codi.weight"},
    {"distill_loss_type", "codi.loss"},
    {"distill_loss_div_std", "codi.std"},
    {"kv_weight, kv_loss_weight, alpha2", "kv.weight"},
    {"ce_loss_factor", "loss.student"},
    {"ref_loss_factor", "loss.teacher"},
    {"data_seed, random_seed, manual_seed, rng_seed", "seed"},
    {"max_new_tokens, generation_max_length, max_gen_len", "decode.max_new_tokens"},
    {"output_dir, out_dir, save_dir, save_path, run_dir", "--out"},
    {"resume_from_checkpoint, resume", "--resume"},
    {"use_cpu, no_cuda, device, device_map, use_cuda, gpu", "--device"},
    {"num_threads, num_workers, dataloader_num_workers, preprocessing_num_workers, num_proc", "--threads"},
    {"local_rank, ddp_backend", "--local-rank"},
    {"profiler, profile", "--profile"},
    {"report_to, wandb, wandb_project, use_wandb, tensorboard, logging_dir, run_name, metric_logger, project, expt_name, tracker", "",
     kMetrics},
    {"load_best_model_at_end, metric_for_best_model, greater_is_better", "",
     "the checkpoint of the best validation is kept in any case, and evaluated"},
    {"load_in_4bit, load_in_8bit, quantization, quantization_bit, quantization_config, bnb_4bit_compute_dtype", "",
     "weights are bf16, f32 or f64 (model.dtype)"},
    {"modules_to_save, use_rslora, use_dora, bias, rank_pattern, alpha_pattern, init_lora_weights, task_type, layers_to_transform", "",
     "LoRA here is plain: lora.rank, lora.alpha, lora.dropout and lora.targets"},
    {"deepspeed, fsdp, fsdp_config, ddp_find_unused_parameters, torch_compile, compile, attn_implementation, flash_attn, tf32, "
     "trust_remote_code, push_to_hub, hub_model_id, overwrite_output_dir, packing, group_by_length, do_train, dataloader_pin_memory, "
     "use_cache, log_peak_memory_stats",
     "", "nothing here needs it"},
};

// Words of values and names of sections, likewise.
struct WordMeaning {
  const char* names;
  const char* word;
};

constexpr WordMeaning kSections[] = {
    {"optimizer, optim, lr_scheduler, scheduler, training, trainer, training_args, trainingarguments, args", "train"},
    {"peft, peft_config, lora_config, adapter, adapters", "lora"},
    {"dataset, datasets, tokenizer, dataset_valid", "data"},
    {"checkpointer, base, base_model", "model"},
    {"latents, student, projection", "latent"},
    {"eviction, r_kv, compression", "rkv"},
    {"generation, generate, inference", "decode"}};

constexpr WordMeaning kWords[] = {
    {"bfloat16, torch.bfloat16, bf16_mixed, float16, fp16, f16, torch.float16, half, auto", "bf16"},
    {"float32, fp32, torch.float32, float, single", "f32"},
    {"float64, fp64, torch.float64, double", "f64"},
    {"adam, adamw_torch, adamw_hf, adamw_torch_fused, adamw_fused, torch.optim.adamw, adamw_8bit, adamw_bnb_8bit, paged_adamw_8bit, "
     "paged_adamw_32bit, bitsandbytes.optim.pagedadamw",
     "adamw"},
    {"cosine_with_warmup, cosine_with_restarts, cosine_annealing, get_cosine_schedule_with_warmup", "cosine"},
    {"linear_with_warmup, polynomial, get_linear_schedule_with_warmup", "linear"},
    {"constant_with_warmup, none, fixed", "constant"},
    {"full, full_finetune, full_finetuning, everything", "all"},
    {"peft, adapter, adapters, qlora", "lora"},
    {"scratch, from_scratch, none, new", "random"},
    {"checkpoint, weights", "pretrained"},
    {"true, full, on, always", "block"},
    {"selective, partial", "cheap"},
    {"false, off, no", "none"},
    {"cot, sft, full, fullcot", "full_cot"},
    {"no, nocot, direct, answer_only", "no_cot"},
    {"implicit_cot, icot_si, stepwise", "icot"},
    {"cuda:0, gpu", "cuda"},
    {"r_kv, r-kv, rkv_full", "rkv"},
    {"huber, smoothl1, smooth_l1_loss", "smooth_l1"},
    {"l2, mse_loss", "mse"},
    {"mae, l1_loss", "l1"},
    {"text, icot", "icot_text"},
    {"json, json_lines, ndjson", "jsonl"},
};

std::string plain(std::string_view name) {
  std::string out;
  for (const char c : name.substr(0, kLongestKey)) out += c == '-' ? '_' : c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return out.substr(std::min(out.find_first_not_of('_'), out.size()));
}

std::string leaf_of(const std::string& name) { return name.substr(name.rfind('.') + 1); }

bool is_among(const char* names, const std::string& name) {
  const std::vector<std::string> all = split_names(names);
  return std::ranges::find(all, name) != all.end();
}

const Meaning* meaning_of(const std::string& name) {
  const auto at = std::ranges::find_if(kMeanings, [&](const Meaning& m) { return is_among(m.names, name); });
  return at == std::end(kMeanings) ? nullptr : at;
}

std::string told(const Meaning& m) {
  const std::string key = m.key, note = m.note;
  if (key.empty()) return "leave it out: " + note;
  if (key.starts_with('-')) return fmt::format("leave it out: the option {} does this", key);
  return fmt::format("the nearest valid key is {}{}", key, note.empty() ? "" : fmt::format(" ({})", note));
}

// The key of the same last part in another section, else the one of the least distance in letters.
std::pair<std::string, std::size_t> nearest_in_letters(const std::string& name, const std::vector<Key>& keys) {
  const std::string cut = name.substr(0, kLongestKey), leaf = leaf_of(cut);
  std::string best;
  std::size_t least = std::string::npos;
  for (const Key& key : keys) {
    std::size_t distance = edit_distance(cut, key.name);
    if (key.leaf() == leaf || key.name == leaf) distance = std::min<std::size_t>(distance, 1);
    else distance = std::min(distance, edit_distance(leaf, key.leaf()) + 2);
    if (distance < least) least = distance, best = key.name;
  }
  return {best, least};
}

std::string nearest_word(const std::string& word, const std::vector<std::string>& words) {
  const std::string name = plain(word);
  for (const std::string& w : words)
    if (plain(w) == name) return w;
  for (const WordMeaning& m : kWords)
    if (std::ranges::find(words, m.word) != words.end() && is_among(m.names, name)) return m.word;
  std::string best;
  std::size_t least = std::max<std::size_t>(1, name.size() / 3) + 1;
  for (const std::string& w : words)
    if (const std::size_t distance = edit_distance(name, w); distance < least) least = distance, best = w;
  return best;
}

}  // namespace

std::string key_list() {
  RunConfig defaults;
  std::string out;
  for (const Key& key : schema::keys_of(defaults)) {
    out += fmt::format("{:<52}# {}", key.name + " = " + schema::value_text(key), schema::range_text(key));
    for (const Architecture& a : architectures())
      if (key.name == "lora.targets" && a.lora_targets != defaults.lora.targets)
        out += fmt::format("; by default of {}: {}", a.family, fmt::join(a.lora_targets, ", "));
    out += "\n";
  }
  return out;
}

std::string remedy_for_key(const std::string& name) {
  RunConfig defaults;
  const std::vector<Key> keys = schema::keys_of(defaults);
  const std::string asked = plain(name);
  if (const Meaning* m = meaning_of(asked)) return told(*m);
  const auto [nearest, distance] = nearest_in_letters(name, keys);
  if (distance > 1)
    if (const Meaning* m = meaning_of(leaf_of(asked))) return told(*m);
  return fmt::format("the nearest valid key is {}{}", nearest, 2 * distance > name.size() ? ", and kava_train --keys lists all" : "");
}

std::string remedy_for_section(const std::string& name) {
  RunConfig defaults;
  const std::string asked = plain(name);
  for (const WordMeaning& m : kSections)
    if (is_among(m.names, asked)) return fmt::format("the nearest valid section is [{}]", m.word);
  std::string best;
  for (const Key& key : schema::keys_of(defaults))
    if (const std::string section = key.section();
        !section.empty() && (best.empty() || edit_distance(asked, section) < edit_distance(asked, best)))
      best = section;
  return fmt::format("the nearest valid section is [{}]", best);
}

std::string remedy_for_option(const std::string& name, const std::vector<std::string>& options, bool takes_keys) {
  const std::string asked = plain(name);
  if (const Meaning* m = meaning_of(asked); m && std::string_view(m->key).starts_with("-")) {
    if (std::ranges::find(options, m->key) != options.end()) return fmt::format("the nearest option is {}", m->key);
  } else if (m && takes_keys) {
    return *m->key ? fmt::format("write --set {}=VALUE", m->key) : told(*m);
  }
  RunConfig defaults;
  if (takes_keys)
    for (const Key& key : schema::keys_of(defaults))
      if (plain(key.name) == asked || key.leaf() == asked) return fmt::format("write --set {}=VALUE", key.name);
  std::string best;
  std::size_t least = std::max<std::size_t>(1, asked.size() / 3) + 1;
  for (const std::string& option : options)
    if (const std::size_t distance = edit_distance(asked, plain(option)); distance < least) least = distance, best = option;
  for (const std::string& option : options)
    if (best.empty() && plain(option).size() >= 3 && asked.starts_with(plain(option))) best = option;
  return best.empty() ? "" : fmt::format("the nearest option is {}", best);
}

std::string remedy_for_word(const std::string& word, const std::vector<std::string>& words) {
  const std::string nearest = nearest_word(word, words);
  const std::string all = fmt::format("{}", fmt::join(words, ", "));
  if (words.size() == 1) return fmt::format("give \"{}\"", words[0]);
  return nearest.empty() ? "give one of " + all : fmt::format("give \"{}\" (one of {})", nearest, all);
}

std::string remedy_for_target(const std::string& word, const std::vector<std::string>& words) {
  const std::string name = plain(word);
  if (name != "all_linear" && name != "all") return remedy_for_word(word, words);
  // Architectures of the same linears stand together.
  std::vector<std::pair<std::string, std::vector<std::string>>> lists;
  for (const Architecture& a : architectures()) {
    std::vector<std::string> names;
    for (const auto& group : a.maps)
      for (const LinearSpec& map : group)
        if (const std::string last = leaf_of(map.path); std::ranges::find(names, last) == names.end()) names.push_back(last);
    const auto same = std::ranges::find(lists, names, &std::pair<std::string, std::vector<std::string>>::second);
    if (same != lists.end()) same->first += ", " + a.family;
    else lists.emplace_back(a.family, names);
  }
  std::vector<std::string> texts;
  for (const auto& [families, names] : lists) texts.push_back(fmt::format("[\"{}\"] for {}", fmt::join(names, "\", \""), families));
  return fmt::format("name all linears: {}", fmt::join(texts, ", or "));
}

}  // namespace kava
