// What is said of a name or word that is another program's.
#include "engine/config/key_help.h"
#include "tests/io/config_rig.h"

using namespace kava;
using namespace kava::test;
using Catch::Matchers::ContainsSubstring;

TEST_CASE("names and words of other programs lead to the key or word of the same meaning") {
  const std::pair<const char*, const char*> names[] = {{"lora.r", "lora.rank"},
                                                       {"r", "lora.rank"},
                                                       {"lora_alpha", "lora.alpha"},
                                                       {"peft.target_modules", "lora.targets"},
                                                       {"learning_rate", "train.lr"},
                                                       {"train.learning_rate", "train.lr"},
                                                       {"optimizer.lr", "train.lr"},
                                                       {"train.gradient_accumulation_steps", "train.micro_batch"},
                                                       {"per_device_train_batch_size", "train.batch"},
                                                       {"batch-size", "train.batch"},
                                                       {"num_train_epochs", "train.epochs"},
                                                       {"warmup_ratio", "train.warmup"},
                                                       {"lr_scheduler.num_warmup_steps", "train.warmup"},
                                                       {"lr_scheduler_type", "train.schedule"},
                                                       {"max_grad_norm", "train.clip"},
                                                       {"adam_beta1", "train.betas"},
                                                       {"bf16", "model.dtype"},
                                                       {"torch_dtype", "model.dtype"},
                                                       {"model_name_or_path", "model.path"},
                                                       {"checkpointer.checkpoint_dir", "model.path"},
                                                       {"max_seq_length", "data.max_tokens"},
                                                       {"tokenizer.max_seq_len", "data.max_tokens"},
                                                       {"gradient_checkpointing", "train.recompute"},
                                                       {"enable_activation_checkpointing", "train.recompute"},
                                                       {"save_total_limit", "train.keep_checkpoints"},
                                                       {"logging_steps", "train.log_every"},
                                                       {"eval_steps", "train.valid_every"},
                                                       {"num_latent", "latent.count"},
                                                       {"weight_decay", "train.weight_decay"},
                                                       {"c_thought", "coconut.thoughts"},
                                                       {"max_latent_stage", "coconut.max_stage"},
                                                       {"pad_latent_to_max", "coconut.pad_to_max"},
                                                       {"epochs_per_stage", "stages.epochs"},
                                                       {"uniform_prob", "stages.mix"},
                                                       {"removal_side", "icot.side"},
                                                       {"keep_position", "icot.keep_positions"},
                                                       {"remove_all_when_remove_beyond", "icot.remove_all_from"},
                                                       {"removal_smoothing_lambda", "icot.smoothing"},
                                                       {"ce_loss_factor", "loss.student"},
                                                       {"ref_loss_factor", "loss.teacher"},
                                                       {"use_prj", "latent.projection"},
                                                       {"num_iterations", "latent.iterations"},
                                                       {"distill_loss_factor", "codi.weight"},
                                                       {"distill_loss_type", "codi.loss"},
                                                       {"distill_loss_div_std", "codi.std"},
                                                       {"kv_loss_weight", "kv.weight"},
                                                       {"data_seed", "seed"},
                                                       {"max_train_samples", "data.fraction"},
                                                       {"max_time", "train.max_hours"},
                                                       {"train_file", "data.train"},
                                                       {"val_file", "data.valid"},
                                                       {"load_model_path", "model.adapter"},
                                                       {"from_scratch", "model.init"},
                                                       {"optim", "train.optimizer"},
                                                       {"adam_epsilon", "train.eps"},
                                                       {"max_train_steps", "train.max_steps"},
                                                       {"save_steps", "train.checkpoint_every"},
                                                       {"full_finetune", "train.trainable"},
                                                       {"lora_dropout", "lora.dropout"},
                                                       {"attn_pdrop", "model.dropout"},
                                                       {"max_gen_len", "decode.max_new_tokens"}};
  const std::string keys = "\n" + key_list();
  CHECK_THAT(keys, ContainsSubstring("; by default of gpt2: c_attn, c_proj, c_fc\n"));
  for (const auto& [name, key] : names) {
    CAPTURE(name);
    CHECK_THAT(refusal("", {std::string(name) + "=1"}), ContainsSubstring(std::string("the nearest valid key is ") + key));
    CHECK_THAT(keys, ContainsSubstring(std::string("\n") + key + " = "));
  }
  check_refused_sets({{"train.report_to=wandb", "leave it out: a run writes metrics.jsonl"},
                      {"output_dir=x", "the option --out does this"},
                      {"quux.frobnicate=1", "kava_train --keys lists all"},  // like nothing
                      {"model.dtype=bfloat16", "give \"bf16\" (one of bf16, f32, f64)"},
                      {"model.dtype=float32", "give \"f32\""},
                      {"train.schedule=cosine_with_warmup", "give \"cosine\""},
                      {"train.optimizer=adamw_torch", "give \"adamw\""},
                      {"train.trainable=full", "give \"all\""},
                      {"method=KaVa", "give \"kava\""},
                      {"method=zzzzzz", "give one of full_cot"}});
  CHECK_THAT(refusal("[peft]\nr = 8\n"), ContainsSubstring("the nearest valid section is [lora]"));
  CHECK_THAT(refusal("[optimizer]\nlr = 1e-3\n"), ContainsSubstring("the nearest valid section is [train]"));
  for (const char* targets : {"lora.targets=all-linear", "lora.targets=[\"all-linear\"]"})
    CHECK_THAT(refusal("", {targets}),
               ContainsSubstring("[\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\", \"gate_proj\", \"up_proj\", \"down_proj\"] for llama") &&
                   ContainsSubstring("[\"c_attn\", \"c_proj\", \"c_fc\"] for gpt2"));
}
