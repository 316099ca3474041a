// The configuration of a run: exactly the sections and keys of docs/configuration.md, read from TOML, checked, and written back.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/choice.h"

namespace kava {

KAVA_CHOICE(Method, full_cot, no_cot, icot, coconut, codi, pccot, kava)
KAVA_CHOICE(Init, pretrained, random)
KAVA_CHOICE(StorageType, bf16, f32, f64)
KAVA_CHOICE(DataFormat, icot_text, jsonl, gsm8k, gsm_hard, svamp, ids)
KAVA_CHOICE(Trainable, lora, all)
KAVA_CHOICE(Optimizer, adamw)
KAVA_CHOICE(Schedule, cosine, linear, constant)
KAVA_CHOICE(Recompute, none, cheap, block)
KAVA_CHOICE(ProjectionInit, embedding_rms, one)
KAVA_CHOICE(Update, replace, residual)
KAVA_CHOICE(Queries, prompt_and_answer, answer)
KAVA_CHOICE(Order, time, score)
KAVA_CHOICE(Short, mask, zero)
KAVA_CHOICE(KvReduction, mean, slot_sum)
KAVA_CHOICE(Std, layer, global, none)
KAVA_CHOICE(Keys, post_rope, pre_rope)

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
    bool operator==(const Train&) const = default;
  } train;

  struct Lora {
    int64_t rank = 128;
    double alpha = 32.0;
    double dropout = 0.1;
    std::vector<std::string> targets = {"q_proj", "k_proj", "v_proj", "o_proj"};  // in the order given
    bool operator==(const Lora&) const = default;
  } lora;

  struct Latent {
    int64_t count = 24;      // M
    int64_t iterations = 3;  // T
    bool projection = true;
    ProjectionInit projection_init = ProjectionInit::embedding_rms;
    Update update = Update::replace;
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
    bool operator==(const Codi&) const = default;
  } codi;

  struct Loss {
    double student = 1.0;
    double teacher = 1.0;
    bool operator==(const Loss&) const = default;
  } loss;

  struct Step {
    bool prefix_sharing = true;
    bool prune_latents = true;
    bool operator==(const Step&) const = default;
  } step;

  bool operator==(const RunConfig&) const = default;
};

/// True for the methods with latents (kava, pccot, codi).
bool has_latents(Method method);
/// True where the sequence Q C prompt A EOS is run (all but no_cot); the student's, all but full_cot.
bool runs_teacher(Method method);
bool runs_student(Method method);

/// Reads `path` and then the arguments of --set ("a.b=VALUE", in order). Everything wrong is Error(code usage): where is FILE:LINE:COL, or
/// "--set a.b=VALUE". Methods' defaults and fixed keys are applied. Relative paths become absolute from the folder of `path`.
RunConfig load_config(const std::string& path, const std::vector<std::string>& sets = {});

/// Error(code usage) naming `path` when model.path or data.train is missing.
void require_for_training(const RunConfig& config, const std::string& path);

/// The effective configuration as TOML: load_config of it gives an equal RunConfig.
std::string to_toml(const RunConfig& config);

/// SHA-256 in hex over the keys on which the arithmetic depends: all but log_every, valid_every, checkpoint_every and keep_checkpoints.
std::string config_hash(const RunConfig& config);

/// Lines "train.lr: 0.0008 -> 0.001" for those keys that differ; empty when a run of `a` may go on with `b`.
std::vector<std::string> config_differences(const RunConfig& a, const RunConfig& b);

/// A Markdown table of every key with its default and its range, from the same schema (docs/configuration.md holds it).
std::string config_reference();

}  // namespace kava
