#include "engine/config/method_rules.h"

namespace kava {

namespace {

constexpr bool kDefault = false;

const Rule kRules[] = {
    {Method::full_cot, "data.drop_last_step", "false"},
    {Method::full_cot, "loss.student", "0.0"},
    {Method::full_cot, "kv.weight", "0.0"},
    {Method::full_cot, "codi.weight", "0.0"},
    {Method::no_cot, "loss.teacher", "0.0"},
    {Method::no_cot, "kv.weight", "0.0"},
    {Method::no_cot, "codi.weight", "0.0"},
    {Method::icot, "loss.teacher", "0.0"},
    {Method::icot, "kv.weight", "0.0"},
    {Method::icot, "codi.weight", "0.0"},
    {Method::icot, "data.drop_last_step", "false", kDefault},
    {Method::icot, "data.question_prefix", "\" \"", kDefault},
    {Method::icot, "data.question_suffix", "\" \"", kDefault},
    {Method::icot, "data.trace_prefix", "\" \"", kDefault},
    {Method::icot, "data.trace_suffix", "\" \"", kDefault},
    {Method::icot, "data.step_separator", "\" \"", kDefault},
    {Method::icot, "data.answer_prompt", "\" ####\"", kDefault},
    {Method::icot, "data.answer_prefix", "\" \"", kDefault},
    {Method::icot, "data.answer_suffix", "\" \"", kDefault},
    {Method::icot, "data.answer_commas", "\"remove\"", kDefault},
    {Method::icot, "data.separator", "\"eos\"", kDefault},
    {Method::icot, "stages.reset_optimizer", "\"stage\"", kDefault},
    {Method::icot, "decode.prompt", "\"free\"", kDefault},
    {Method::coconut, "loss.teacher", "0.0"},
    {Method::coconut, "kv.weight", "0.0"},
    {Method::coconut, "codi.weight", "0.0"},
    {Method::coconut, "data.drop_last_step", "false", kDefault},
    {Method::coconut, "data.question_suffix", "\"\\n\"", kDefault},
    {Method::coconut, "data.step_suffix", "\"\\n\"", kDefault},
    {Method::coconut, "data.answer_prompt", "\"###\"", kDefault},
    {Method::coconut, "data.answer_prefix", "\" \"", kDefault},
    {Method::coconut, "latent.projection", "false", kDefault},
    {Method::coconut, "latent.token_init", "\"<<\"", kDefault},
    {Method::coconut, "decode.prompt", "\"free\"", kDefault},
    {Method::codi_exact, "kv.weight", "0.0"},
    {Method::codi_exact, "data.step_separator", "\" \"", kDefault},
    {Method::codi_exact, "data.answer_prefix", "\" \"", kDefault},
    {Method::codi_exact, "data.answers", "\"digit\"", kDefault},
    {Method::codi_exact, "latent.count", "6", kDefault},
    {Method::codi_exact, "latent.tokens", "\"frozen\"", kDefault},
    {Method::codi_exact, "latent.projection_init", "\"torch\"", kDefault},
    {Method::codi_exact, "codi.states", "\"all\"", kDefault},
    {Method::codi_exact, "codi.token", "\"before_answer\"", kDefault},
    {Method::codi_exact, "codi.mse_std", "2", kDefault},
    {Method::codi_exact, "codi.target", "\"separate\"", kDefault},
    {Method::codi_exact, "loss.mean", "\"forward\"", kDefault},
    {Method::codi_exact, "decode.prompt", "\"free\"", kDefault},
    {Method::codi, "kv.weight", "0.0"},
    {Method::codi, "latent.count", "6", kDefault},
    {Method::pccot, "kv.weight", "0.0"},
};

}  // namespace

std::span<const Rule> method_rules() { return kRules; }

}  // namespace kava
