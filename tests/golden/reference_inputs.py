"""What the PyTorch reference reads: a configuration, `ids` rows, a model folder and an adapter folder.

Only what the step depends on is read. Anything the reference cannot reproduce (dropout, a random policy, text rows) is refused,
so that a comparison never passes because something was left out on both sides.
"""
import copy
import json
import pathlib
import tomllib

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

DEFAULTS = {
    "method": "kava",
    "seed": 42,
    "model": {"path": "", "init": "pretrained", "adapter": "", "dtype": "bf16", "dropout": "config"},
    "data": {"train": [], "valid": "", "drop_last_step": True, "step_separator": "", "answer_prompt": "The answer is:",
             "max_tokens": 512, "fraction": 1.0},
    "train": {"trainable": "lora", "batch": 128, "micro_batch": 0},
    "lora": {"rank": 128, "alpha": 32.0, "dropout": 0.1, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "latent": {"count": 24, "iterations": 3, "projection": True, "projection_init": "embedding_rms", "update": "replace",
               "token_init": "", "tokens": "trained"},
    "rkv": {"policy": "rkv", "lambda": 0.1, "group": "max_logits", "queries": "prompt_and_answer", "order": "time", "short": "mask"},
    "kv": {"weight": 1.0, "reduction": "mean", "loss": "smooth_l1", "std": "layer", "keys": "post_rope", "projection": False},
    "codi": {"weight": 10.0, "loss": "smooth_l1", "std": "layer", "states": "blocks", "token": "prompt", "mse_std": 1, "target": "shared"},
    "loss": {"student": 1.0, "teacher": 1.0, "mean": "batch"},
    "stages": {"fixed": -1, "first": 0, "last": -1, "mix": 0.0},
    "coconut": {"thoughts": 2, "max_stage": 3, "pad_to_max": True, "markers": True, "feedback": "hidden"},
    "icot": {"remove_all_from": 0, "smoothing": 4.0, "side": "left", "keep_positions": False},
    "step": {"prefix_sharing": True, "prune_latents": True},
}
CHOICES = {
    ("method",): ("kava", "pccot", "codi", "codi_exact", "full_cot", "no_cot", "icot", "coconut"),
    ("train", "trainable"): ("lora", "all"),
    ("latent", "projection_init"): ("embedding_rms", "one", "torch"),
    ("latent", "tokens"): ("trained", "frozen"),
    ("latent", "update"): ("replace", "residual"),
    ("rkv", "policy"): ("rkv", "cosine", "attention", "crop", "uniform"),
    ("rkv", "group"): ("max_logits", "max_prob", "mean_prob"),
    ("rkv", "queries"): ("prompt_and_answer", "answer"),
    ("rkv", "order"): ("time", "score"),
    ("rkv", "short"): ("mask", "zero"),
    ("kv", "reduction"): ("mean", "slot_sum"),
    ("kv", "loss"): ("smooth_l1", "mse", "l1"),
    ("kv", "std"): ("layer", "global", "none"),
    ("kv", "keys"): ("post_rope", "pre_rope"),
    ("codi", "loss"): ("smooth_l1", "mse", "l1"),
    ("codi", "std"): ("layer", "global", "none"),
    ("codi", "states"): ("blocks", "all"),
    ("codi", "token"): ("prompt", "before_answer"),
    ("codi", "mse_std"): (1, 2),
    ("codi", "target"): ("shared", "separate"),
    ("loss", "mean"): ("batch", "forward"),
    ("coconut", "feedback"): ("hidden", "none"),
    ("icot", "side"): ("left", "right"),
}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GPT2_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
GPT2_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
TRAIN_KEYS_NOT_USED = {"epochs", "max_steps", "optimizer", "lr", "betas", "eps", "weight_decay", "clip", "schedule", "warmup",
                       "log_every", "valid_every", "checkpoint_every", "keep_checkpoints", "recompute"}


class Unsupported(Exception):
    """The reference cannot reproduce what is asked for."""


def _merge(config, given, where=""):
    for key, value in given.items():
        if where == "train" and key in TRAIN_KEYS_NOT_USED:
            continue
        if key not in config:
            raise Unsupported(f"unknown key {where + '.' if where else ''}{key}")
        if isinstance(config[key], dict):
            _merge(config[key], value, key)
        else:
            config[key] = value


def load_config(path, sets=()):
    """The effective configuration (docs/configuration.md) with paths made absolute. `sets` are strings a.b=VALUE."""
    path = pathlib.Path(path)
    given = tomllib.loads(path.read_text())
    for item in sets:
        key, text = item.split("=", 1)
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = text
        node = given
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    config = copy.deepcopy(DEFAULTS)
    method = given.get("method", "kava")
    if method in ("codi", "codi_exact"):
        config["latent"]["count"] = 6
    if method == "coconut":
        config["latent"].update(projection=False, token_init="<<")
    if method == "codi_exact":
        config["latent"].update(tokens="frozen", projection_init="torch")
        config["codi"].update(states="all", token="before_answer", mse_std=2, target="separate")
        config["loss"]["mean"] = "forward"
    _merge(config, given)
    if method != "kava":
        config["kv"]["weight"] = 0.0
    if method in ("codi", "codi_exact"):
        config["latent"]["iterations"] = config["latent"]["count"]
    if method in ("full_cot", "no_cot", "icot", "coconut"):
        config["codi"]["weight"] = 0.0
        config["loss"]["student" if method == "full_cot" else "teacher"] = 0.0
    for keys, allowed in CHOICES.items():
        value = config
        for key in keys:
            value = value[key]
        if value not in allowed:
            raise Unsupported(f"{'.'.join(keys)} = {value!r}: the reference knows {allowed}")
    if config["train"]["trainable"] == "lora" and config["lora"]["dropout"] != 0:
        raise Unsupported("lora.dropout must be 0: the reference has no dropout")
    if config["stages"]["mix"] != 0 or (method == "icot" and config["icot"]["smoothing"] != 0):
        raise Unsupported("stages.mix and icot.smoothing draw from the engine's own generator")
    if config["data"]["fraction"] != 1.0 or config["model"]["init"] != "pretrained":
        raise Unsupported("data.fraction and model.init = random depend on the engine's own generator")
    at = path.resolve().parent
    config["model"]["path"] = str(at / config["model"]["path"])
    raw = json.loads((pathlib.Path(config["model"]["path"]) / "config.json").read_text())
    if is_gpt2(raw) and "targets" not in given.get("lora", {}):
        config["lora"]["targets"] = ["c_attn", "c_proj", "c_fc"]
    dropouts = [raw.get(key, 0.1) for key in GPT2_DROPOUTS] if is_gpt2(raw) else [raw.get("attention_dropout", 0)]
    if any(dropouts) and config["model"]["dropout"] != "off":
        raise Unsupported("dropout in the base")
    config["positions"] = raw["n_positions"] if is_gpt2(raw) else None
    if config["model"]["adapter"]:
        config["model"]["adapter"] = str(at / config["model"]["adapter"])
    config["data"]["train"] = [str(at / (f["path"] if isinstance(f, dict) else f)) for f in config["data"]["train"]]
    return config


def is_gpt2(raw):
    return raw["model_type"] == "gpt2"


def head_dim(raw):
    """Width of a head; a Qwen3 that does not give it has 128, whatever its hidden size."""
    if is_gpt2(raw):
        return raw["n_embd"] // raw["n_head"]
    return raw.get("head_dim") or (128 if raw["model_type"] == "qwen3" else raw["hidden_size"] // raw["num_attention_heads"])


def runs_teacher(config):
    return config["method"] not in ("no_cot", "icot", "coconut")


def runs_student(config):
    return config["method"] != "full_cot"


def has_latents(config):
    """Methods whose latents iterate beside a teacher."""
    return config["method"] in ("kava", "pccot", "codi", "codi_exact")


def has_new_tokens(config):
    return has_latents(config) or (config["method"] == "coconut" and config["coconut"]["markers"])


def stage_of(config):
    return config["stages"]["fixed"] if config["stages"]["fixed"] >= 0 else config["stages"]["first"]


def stages_of(config):
    """All stages of a run whose sequences may be the longest; icot only removes more."""
    first = stage_of(config)
    if config["method"] != "coconut" or config["stages"]["fixed"] >= 0:
        return [first]
    last = config["stages"]["last"] if config["stages"]["last"] >= 0 else config["coconut"]["max_stage"] + 1
    return range(first, max(first, last) + 1)


def cut(config, row, stage):
    """(latents, rest of the trace) of a row at a stage; only coconut has latents here."""
    trace, steps = row["trace"], row["steps"]
    if config["method"] == "coconut":
        keys = config["coconut"]
        dropped = min(stage, len(steps)) if stage <= keys["max_stage"] else len(steps)
        replaced = stage if stage <= keys["max_stage"] else keys["max_stage"] if keys["pad_to_max"] else min(keys["max_stage"], len(steps))
        return keys["thoughts"] * replaced, trace[sum(steps[:dropped]):]
    if config["method"] == "icot":
        everything = 0 < config["icot"]["remove_all_from"] <= stage
        removed = len(trace) if everything else min(stage, len(trace))
        return 0, trace[removed:] if config["icot"]["side"] == "left" else trace[: len(trace) - removed]
    return 0, []


def tapped_row(config, row):
    """Tokens of the answer chunk before the row that L_CODI compares. A drawn text row says whether a lone blank follows its prompt."""
    if row.get("prompt") is None:
        return None
    return row["prompt"] + int(config["codi"]["token"] == "before_answer" and row.get("blank", False))


def load_rows(config):
    """The first train.batch rows of the files that are not longer than data.max_tokens: dicts of question, trace, answer, prompt."""
    rows = []
    for file in config["data"]["train"]:
        for line in pathlib.Path(file).read_text(encoding="utf-8-sig").splitlines():
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row.get("question"), list):
                raise Unsupported(f"{file}: only ids rows")
            steps = row["trace"] if row["trace"] and isinstance(row["trace"][0], list) else [row["trace"]] if row["trace"] else []
            rows.append({"question": row["question"], "trace": sum(steps, []), "answer": row["answer"], "prompt": row.get("prompt"),
                         "steps": [len(step) for step in steps], "tap": tapped_row(config, row)})
    needs_prompt = config["codi"]["weight"] > 0 or (config["kv"]["weight"] > 0 and config["rkv"]["queries"] == "answer")
    if needs_prompt and any(row["prompt"] is None for row in rows):
        raise Unsupported("a row without prompt")
    for row in rows:
        row["latents"], row["rest"] = cut(config, row, stage_of(config))
    kept = [row for row in rows if fits(config, row)][: config["train"]["batch"]]
    if not kept:
        raise Unsupported("no row is left")
    return kept


def fits(config, row):
    """Neither over data.max_tokens nor beyond the last position, which positions that icot keeps can pass earlier."""
    tokens = longest(config, row)
    positions = tokens
    if config["method"] == "icot" and config["icot"]["keep_positions"]:
        positions = len(row["question"]) + len(row["trace"]) + len(row["answer"])
    return tokens <= config["data"]["max_tokens"] and (config["positions"] is None or positions <= config["positions"])


def longest(config, row):
    question, trace, answer = len(row["question"]), len(row["trace"]), len(row["answer"])
    lengths = []
    if config["method"] in ("icot", "coconut"):
        cuts = [cut(config, row, stage) for stage in stages_of(config)]
        return question + max((latents + 2 if has_new_tokens(config) else 0) + len(rest) for latents, rest in cuts) + answer
    if runs_teacher(config):
        lengths.append(question + trace + answer)
    if config["method"] == "no_cot":
        lengths.append(question + answer)
    elif runs_student(config):
        lengths.append(question + 1 + config["latent"]["count"] + 1 + answer)
    return max(lengths)


def load_weights(folder):
    """All tensors of a Hugging Face folder, by name."""
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {key: value for name in names for key, value in load_file(folder / name).items()}


def lora_names(raw, layers, targets):
    """(module path inside the network, name in an adapter) of each adapted linear, layer by layer. A target is the end of a path."""
    for layer in range(layers):
        for path in GPT2_LINEARS if is_gpt2(raw) else LINEARS:
            if any(("." + path).endswith("." + target) for target in targets):
                module = f"transformer.h.{layer}.{path}" if is_gpt2(raw) else f"model.layers.{layer}.{path}"
                yield module, f"base_model.model.{module}"


def load_adapter(config, folder, raw, layers):
    """(tensors of the PEFT file or replacing base weights, tensors of kava.safetensors). Names must match exactly."""
    folder = pathlib.Path(folder)
    extras = load_file(folder / "kava.safetensors") if (folder / "kava.safetensors").exists() else {}
    wanted = set(extra_names(config, layers))
    if set(extras) != wanted:
        raise Unsupported(f"{folder}: kava.safetensors has {sorted(set(extras) ^ wanted)} too many or too few")
    if config["train"]["trainable"] == "all":
        return load_weights(folder), extras
    lora = config["lora"]
    saved = json.loads((folder / "adapter_config.json").read_text())
    if (saved["r"], saved["lora_alpha"], set(saved["target_modules"])) != (lora["rank"], lora["alpha"], set(lora["targets"])):
        raise Unsupported(f"{folder}: adapter_config.json contradicts [lora]")
    matrices = load_file(folder / "adapter_model.safetensors")
    wanted = {f"{name}.lora_{x}.weight" for _, name in lora_names(raw, layers, lora["targets"]) for x in "AB"}
    if set(matrices) != wanted:
        raise Unsupported(f"{folder}: adapter_model.safetensors has {sorted(set(matrices) ^ wanted)[:3]} too many or too few")
    return matrices, extras


def extra_names(config, layers):
    """Names of the tensors of kava.safetensors."""
    if not has_new_tokens(config):
        return []
    names = ["new_tokens.weight"]
    if config["latent"]["projection"]:
        names += [f"latent_projection.{part}.{kind}" for part in ("linear1", "linear2", "norm") for kind in ("weight", "bias")]
    if config["kv"]["projection"]:
        names += [f"kv_projection.{layer}.{x}.weight" for layer in range(layers) for x in "kv"]
    return names


def start_token(config):
    """The id of latent.token_init."""
    file = pathlib.Path(config["model"]["path"]) / "tokenizer.json"
    if not file.exists():
        raise Unsupported("without an adapter latent.token_init needs a tokenizer")
    (token,) = Tokenizer.from_file(str(file)).encode(config["latent"]["token_init"], add_special_tokens=False).ids
    return token


def initial_new_tokens(embedding):
    """[3, C]: bot, eot and latent all start as the mean of the base's embedding rows."""
    return embedding.to(torch.float64).mean(0, keepdim=True).repeat(3, 1)


def embedding_rms(embedding):
    """The gain that latent.projection_init = "embedding_rms" puts into the projection's LayerNorm."""
    return embedding.to(torch.float64).pow(2).mean().sqrt()
