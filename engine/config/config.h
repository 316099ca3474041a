// The configuration of a run: exactly the sections and keys of docs/configuration.md, read from TOML, checked, and written back.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/choice.h"

namespace kava {

KAVA_CHOICE(Method, full_cot, no_cot, icot, coconut, codi, codi_exact, pccot, kava)
KAVA_CHOICE(Init, pretrained, random)
KAVA_CHOICE(BaseDropout, config, off)
KAVA_CHOICE(StorageType, bf16, f32, f64)
KAVA_CHOICE(DataFormat, icot_text, jsonl, gsm8k, gsm_hard, svamp, qa, ids)
KAVA_CHOICE(Trainable, lora, all)
KAVA_CHOICE(Optimizer, adamw)
KAVA_CHOICE(Schedule, cosine, linear, constant)
KAVA_CHOICE(Recompute, none, cheap, block)
KAVA_CHOICE(Commas, keep, remove)
KAVA_CHOICE(Separator, none, eos)
KAVA_CHOICE(Answers, all, digit)
KAVA_CHOICE(NewTokens, trained, frozen)
KAVA_CHOICE(ProjectionInit, embedding_rms, one, torch)
KAVA_CHOICE(Update, replace, residual)
KAVA_CHOICE(Queries, prompt_and_answer, answer)
KAVA_CHOICE(Order, time, score)
KAVA_CHOICE(Short, mask, zero)
KAVA_CHOICE(KvReduction, mean, slot_sum)
KAVA_CHOICE(Std, layer, global, none)
KAVA_CHOICE(Keys, post_rope, pre_rope)
KAVA_CHOICE(CodiStates, blocks, all)
KAVA_CHOICE(CodiToken, prompt, before_answer)
KAVA_CHOICE(CodiTarget, shared, separate)
KAVA_CHOICE(LossMean, batch, forward)
KAVA_CHOICE(ResetOptimizer, epoch, stage, never)
KAVA_CHOICE(BestOf, last, any)
KAVA_CHOICE(Feedback, hidden, none)
KAVA_CHOICE(Side, left, right)
KAVA_CHOICE(DecodePrompt, forced, free)

struct DataFile {
  std::string path;
  std::optional<DataFormat> format;  // absent: recognised from the first row
  bool operator==(const DataFile&) const = default;
};

/// The effective configuration. Paths are absolute or empty. The member initialisers are the defaults.
struct RunConfig {
  Method method = Method::kava;
  int64_t seed = 42;

  struct Model {
    std::string path;
    Init init = Init::pretrained;
    std::string adapter;
    StorageType dtype = StorageType::bf16;
    BaseDropout dropout = BaseDropout::config;  // off: the base's own is left out
    bool operator==(const Model&) const = default;
  } model;

  struct Data {
    std::vector<DataFile> train;
    std::string valid;
    bool drop_last_step = true;
    std::string step_separator;
    std::string answer_prompt = "The answer is:";
    int64_t max_tokens = 512;
    double fraction = 1.0;
    // Text around the parts, tokenised together with the part that it touches.
    std::string question_prefix, question_suffix;
    std::string trace_prefix, trace_suffix;  // before the first kept step, after the last
    std::string step_suffix;
    std::string answer_prefix, answer_suffix;
    Commas answer_commas = Commas::keep;
    Separator separator = Separator::none;  // eos: EOS after the question and after the trace
    Answers answers = Answers::all;         // digit: rows whose answer does not begin with one are dropped
    bool operator==(const Data&) const = default;
  } data;

  struct Train {
    Trainable trainable = Trainable::lora;
    int64_t epochs = 10;
    int64_t max_steps = 0;
    int64_t batch = 128;
    int64_t micro_batch = 0;
    Optimizer optimizer = Optimizer::adamw;
    double lr = 8e-4;
    std::array<double, 2> betas = {0.9, 0.999};
    double eps = 1e-8;
    double weight_decay = 0.1;
    double clip = 2.0;
    Schedule schedule = Schedule::cosine;
    double warmup = 0.03;
    int64_t log_every = 1;
    int64_t valid_every = 0;
    int64_t checkpoint_every = 0;
    int64_t keep_checkpoints = 2;
    Recompute recompute = Recompute::none;
    double max_hours = 0.0;
    int64_t log_grads_every = 0;
    bool operator==(const Train&) const = default;
  } train;

  struct Valid {
    double floor = 0.0;  // strict share below which a validation after the warm-up is warned of
    bool operator==(const Valid&) const = default;
  } valid;

  struct Lora {
    int64_t rank = 128;
    double alpha = 32.0;
    double dropout = 0.1;
    std::vector<std::string> targets = {"q_proj", "k_proj", "v_proj", "o_proj"};  // in the order given; default by architecture
    bool operator==(const Lora&) const = default;
  } lora;

  struct Latent {
    int64_t count = 24;      // M
    int64_t iterations = 3;  // T
    bool projection = true;
    ProjectionInit projection_init = ProjectionInit::embedding_rms;
    Update update = Update::replace;
    std::string token_init;  // the one token whose row the new rows start as; empty: the mean of all rows
    NewTokens tokens = NewTokens::trained;
    bool operator==(const Latent&) const = default;
  } latent;

  struct Rkv {
    Policy policy = Policy::rkv;
    double lambda = 0.1;
    Group group = Group::max_logits;
    Queries queries = Queries::prompt_and_answer;
    Order order = Order::time;
    Short short_ = Short::mask;  // key rkv.short
    bool operator==(const Rkv&) const = default;
  } rkv;

  struct Kv {
    double weight = 1.0;
    KvReduction reduction = KvReduction::mean;
    Distance loss = Distance::smooth_l1;
    Std std = Std::layer;
    Keys keys = Keys::post_rope;
    bool projection = false;
    bool operator==(const Kv&) const = default;
  } kv;

  struct Codi {
    double weight = 10.0;
    Distance loss = Distance::smooth_l1;
    Std std = Std::layer;
    CodiStates states = CodiStates::blocks;
    CodiToken token = CodiToken::prompt;
    int64_t mse_std = 1;
    CodiTarget target = CodiTarget::shared;
    bool operator==(const Codi&) const = default;
  } codi;

  struct Loss {
    double student = 1.0;
    double teacher = 1.0;
    LossMean mean = LossMean::batch;
    bool operator==(const Loss&) const = default;
  } loss;

  /// The curriculum of icot and coconut.
  struct Stages {
    int64_t fixed = -1;
    int64_t first = 0, last = -1;
    int64_t hold = 0;    // epochs at `first` before the schedule runs
    int64_t epochs = 3;  // of a stage (coconut)
    int64_t steps = 0;   // > 0: optimiser steps of a stage (icot: of a removed token) instead
    double mix = 0.0;
    ResetOptimizer reset_optimizer = ResetOptimizer::epoch;
    BestOf best = BestOf::last;
    bool operator==(const Stages&) const = default;
  } stages;

  struct Coconut {
    int64_t thoughts = 2;   // c
    int64_t max_stage = 3;  // K
    bool pad_to_max = true;
    bool markers = true;
    Feedback feedback = Feedback::hidden;
    bool operator==(const Coconut&) const = default;
  } coconut;

  struct Icot {
    double remove_per_epoch = 8.0;
    int64_t remove_all_from = 0;
    double smoothing = 4.0;
    Side side = Side::left;
    bool keep_positions = false;
    bool operator==(const Icot&) const = default;
  } icot;

  struct Decode {
    DecodePrompt prompt = DecodePrompt::forced;
    int64_t max_new_tokens = 0;
    bool operator==(const Decode&) const = default;
  } decode;

  struct Step {
    bool prefix_sharing = true;
    bool prune_latents = true;
    bool operator==(const Step&) const = default;
  } step;

  bool operator==(const RunConfig&) const = default;
};

/// Reads `path` and then the arguments of --set ("a.b=VALUE", in order). Everything wrong is Error(code usage): where is FILE:LINE:COL, or
/// "--set a.b=VALUE". Methods' defaults and fixed keys are applied. Paths become absolute: those of the file from its folder, those of
/// --set from the working directory.
RunConfig load_config(const std::string& path, const std::vector<std::string>& sets = {});

/// The same of RUN/config.toml.
RunConfig load_run_config(const std::string& run_dir, const std::vector<std::string>& sets = {});

/// The configuration of a method in which nothing is given.
RunConfig method_defaults(Method method);

/// Error(code usage) naming `path` when model.path or data.train is missing.
void require_for_training(const RunConfig& config, const std::string& path);

/// The effective configuration as TOML: load_config of it gives an equal RunConfig. Paths are relative to `folder`, or absolute without
/// one. Error(code usage) for a path that is not UTF-8.
std::string to_toml(const RunConfig& config, const std::string& folder = "");

/// What a run that goes on may do with a key: nothing; change it when asked to (--extend); change it; name another place with the same
/// content.
enum class OnResume { fixed, extend, free, content };

/// SHA-256 in hex over the method and the fixed keys that differ from its defaults: a new key changes the hash of no older run.
std::string config_hash(const RunConfig& config);

/// Lines "train.lr: 0.0008 -> 0.001" for those keys of a kind that differ.
std::vector<std::string> config_differences(const RunConfig& a, const RunConfig& b, OnResume kind = OnResume::fixed);

/// A Markdown table of every key with its default and its range, from the same schema (docs/configuration.md holds it).
std::string config_reference();

}  // namespace kava
