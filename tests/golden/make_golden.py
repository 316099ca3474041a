"""Writes the golden files: tiny models, adapters, rows, and for every cases/NAME.toml the reference's result cases/NAME.safetensors.

    python make_golden.py             check the reference against itself, then write everything
    python make_golden.py --check     check only, and compare with what is on the disk
    python make_golden.py --dtype f32 --out DIR     write the plain f32 (or f64) steps of all cases into DIR, unreduced

A case fails to be made when a gradient that must not vanish is zero, or when a selection is so near a tie that f32 might decide otherwise.
"""
import argparse
import json
import pathlib
import sys
import zlib

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import reference_checks
import reference_inputs as inputs
import reference_step as reference

HERE = pathlib.Path(__file__).resolve().parent
WHOLE = 320      # larger floating tensors are stored as dot products
DOTS = 16
LOOSEST_TIE = 1e-5

PROMPT = [7, 8, 9]
EOS = 2
VOCABULARY_USED = 61

MODELS = {
    # Explicit head_dim that is not hidden/heads, two query heads to a group, tied head.
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 61,
              "rms_norm_eps": 1e-5, "rope_theta": 100.0, "rope_scaling": None, "tie_word_embeddings": True},
    # Untied head, one query head to a group, llama3 scaling that scales some frequencies, keeps one and blends two; new spelling.
    "llama_scaled": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 20,
                     "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61,
                     "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                     "rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
                                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    # Biases on q, k, v; all query heads in one group; embedding rows that no token uses.
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 20,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 67, "rms_norm_eps": 1e-6,
              "rope_theta": 1000.0, "tie_word_embeddings": True, "use_sliding_window": False},
    # Norms of q and k; heads that hidden_size does not say; tied head; theta of rope_parameters before the one outside.
    "qwen3": {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 67, "rms_norm_eps": 1e-3, "rope_theta": 7.0,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}, "tie_word_embeddings": True, "use_sliding_window": False,
              "sliding_window": 4, "max_window_layers": 1, "attention_bias": False},
    # Untied head; one query head to a group; theta outside; three layers.
    "qwen3_untied": {"model_type": "qwen3", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
                     "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "rope_theta": 100.0},
    # Saved with its head: names with the prefix. Dropout in the base is left out by model.dropout; a missing key is 0.1 too.
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": 61, "n_inner": None,
             "activation_function": "gelu_new", "layer_norm_epsilon": 1e-3, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    # Saved without its head: bare names, with the masks that old files hold. No dropout, MLP width given, three layers.
    "gpt2_bare": {"model_type": "gpt2", "n_embd": 12, "n_layer": 3, "n_head": 2, "n_positions": 64, "n_ctx": 64, "vocab_size": 61,
                  "n_inner": 20, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.1},
}
COMMON = {"hidden_act": "silu", "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": EOS, "torch_dtype": "float32"}

# Lengths of question, trace (a list: of its steps) and final answer (without prompt and EOS), and of the prompt (None: the row does not say).
ROWS = {
    "rows": [(5, 8, 1, 3), (3, 0, 2, 3), (7, 3, 1, 3), (4, 11, 3, 3), (6, 5, 1, 3)],
    "steps": [(5, [2, 1], 1, 3), (3, [], 2, 3), (7, [3], 1, 3), (4, [2, 4, 3, 2, 5], 3, 3), (6, [5, 1], 1, 3)],
    "without_prompt": [(4, 7, 2, None), (6, 0, 1, None), (3, 5, 1, None)],
    "empty_prompt": [(4, 6, 2, 0), (5, 0, 1, 0), (3, 9, 1, 0)],
    "without_trace": [(4, 0, 1, 3), (6, 0, 2, 3)],
    "near_the_end": [(4, 30, 1, 3), (5, 31, 1, 3), (4, 31, 1, 3)],
    "one_too_long": [(4, 30, 1, 3), (5, 7, 1, 3), (3, 2, 1, 3)],
}


def generator(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def normal(random, *shape, std=1.0, mean=0.0):
    return torch.from_numpy((mean + std * random.standard_normal(shape)).astype(np.float32))


def linear(random, rows, columns):
    return normal(random, rows, columns, std=columns ** -0.5)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def gpt2_weights(config, random):
    hidden = config["n_embd"]
    mlp = config.get("n_inner") or 4 * hidden
    out = {"transformer.wte.weight": normal(random, config["vocab_size"], hidden, std=0.7),
           "transformer.wpe.weight": normal(random, config["n_positions"], hidden, std=0.3)}
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}"
        for path, rows, columns in (("attn.c_attn", hidden, 3 * hidden), ("attn.c_proj", hidden, hidden), ("mlp.c_fc", hidden, mlp),
                                    ("mlp.c_proj", mlp, hidden)):
            out[f"{at}.{path}.weight"] = normal(random, rows, columns, std=1.2 * rows ** -0.5)
            out[f"{at}.{path}.bias"] = normal(random, columns, std=0.3)
        for norm in ("ln_1", "ln_2"):
            out[f"{at}.{norm}.weight"], out[f"{at}.{norm}.bias"] = normal(random, hidden, mean=1.0, std=0.2), normal(random, hidden, std=0.2)
    out["transformer.ln_f.weight"], out["transformer.ln_f.bias"] = normal(random, hidden, mean=0.5, std=0.1), normal(random, hidden, std=0.1)
    return out


def base_weights(name):
    config, random = MODELS[name], generator(name)
    if config["model_type"] == "gpt2":
        return gpt2_weights(config, random)
    hidden, mlp, heads, dim = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"], inputs.head_dim(config)
    widths = {"q_proj": heads * dim, "k_proj": config["num_key_value_heads"] * dim, "v_proj": config["num_key_value_heads"] * dim}
    out = {"model.embed_tokens.weight": normal(random, config["vocab_size"], hidden, std=0.7)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for target, width in widths.items():
            out[f"{at}.self_attn.{target}.weight"] = linear(random, width, hidden) * 1.2
            if config["model_type"] == "qwen3" and target in ("q_proj", "k_proj"):
                out[f"{at}.self_attn.{target[0]}_norm.weight"] = normal(random, dim, mean=1.0, std=0.3)
            if config["model_type"] == "qwen2":
                out[f"{at}.self_attn.{target}.bias"] = normal(random, width, std=0.3)
        out[f"{at}.self_attn.o_proj.weight"] = linear(random, hidden, heads * dim)
        out[f"{at}.mlp.gate_proj.weight"] = linear(random, mlp, hidden)
        out[f"{at}.mlp.up_proj.weight"] = linear(random, mlp, hidden)
        out[f"{at}.mlp.down_proj.weight"] = linear(random, hidden, mlp)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}.{norm}.weight"] = normal(random, hidden, mean=1.0, std=0.2)
    out["model.norm.weight"] = normal(random, hidden, mean=0.5, std=0.1)
    if not config.get("tie_word_embeddings", False):
        out["lm_head.weight"] = linear(random, config["vocab_size"], hidden)
    return out


def write_model(folder, name, weights):
    gpt2 = inputs.is_gpt2(MODELS[name])
    common = {key: value for key, value in COMMON.items() if key not in ("hidden_act", "max_position_embeddings")} if gpt2 else COMMON
    write_json(folder / "config.json", MODELS[name] | common)
    if name == "gpt2_bare":
        weights = {key.removeprefix("transformer."): value for key, value in weights.items()}
        positions = MODELS[name]["n_positions"]
        for layer in range(MODELS[name]["n_layer"]):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, positions, positions, dtype=torch.uint8).tril()
            weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_rows():
    for name, lengths in ROWS.items():
        random, lines = generator(name), []
        for question, trace, answer, prompt in lengths:
            ids = lambda n: [int(i) for i in random.integers(10, VOCABULARY_USED, n)]
            row = {"question": [1] + ids(question - 1), "trace": [ids(n) for n in trace] if isinstance(trace, list) else ids(trace),
                   "answer": ([] if prompt == 0 else PROMPT) + ids(answer) + [EOS]}
            lines.append(json.dumps(row if prompt is None else row | {"prompt": prompt}))
        path = HERE / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def write_adapter(config):
    """The adapter folder a case names, filled for that case's keys. A full set of weights differs from the base's everywhere."""
    folder = pathlib.Path(config["model"]["adapter"])
    name, random = pathlib.Path(config["model"]["path"]).name, generator(folder.name)
    model, lora = MODELS[name], config["lora"]
    folder.mkdir(parents=True, exist_ok=True)
    if config["train"]["trainable"] == "all":
        changed = {key: value + 0.1 * normal(random, *value.shape) for key, value in base_weights(name).items()}
        write_model(folder, name, changed)
    else:
        shapes = {key: value.shape for key, value in base_weights(name).items()}
        matrices = {}
        for path, saved in inputs.lora_names(model, layer_count(model), lora["targets"]):
            out_features, in_features = reversed(shapes[f"{path}.weight"]) if inputs.is_gpt2(model) else shapes[f"{path}.weight"]
            matrices[f"{saved}.lora_A.weight"] = normal(random, lora["rank"], in_features, std=in_features ** -0.5)
            matrices[f"{saved}.lora_B.weight"] = normal(random, out_features, lora["rank"], std=0.2)
        save_file(matrices, folder / "adapter_model.safetensors", {"format": "pt"})
        write_json(folder / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": f"../../models/{name}", "r": lora["rank"],
            "lora_alpha": lora["alpha"], "lora_dropout": 0.0, "target_modules": lora["targets"], "bias": "none",
            "fan_in_fan_out": inputs.is_gpt2(model), "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
            "layers_to_transform": None, "modules_to_save": None, "init_lora_weights": True, "inference_mode": True})
    extras = extra_tensors(config, model, random)
    if extras:
        save_file(extras, folder / "kava.safetensors", {"kava.format": "1"})


def layer_count(model):
    return model["n_layer"] if inputs.is_gpt2(model) else model["num_hidden_layers"]


def extra_tensors(config, model, random):
    hidden = model["n_embd"] if inputs.is_gpt2(model) else model["hidden_size"]
    dim = inputs.head_dim(model)
    out = {}
    for name in inputs.extra_names(config, layer_count(model)):
        if name == "new_tokens.weight":
            out[name] = normal(random, 3, hidden, std=0.7)
        elif name.startswith("kv_projection"):
            out[name] = torch.eye(dim) + normal(random, dim, dim, std=0.3)
        elif name == "latent_projection.norm.weight":
            out[name] = normal(random, hidden, mean=0.8, std=0.2)
        elif name.endswith(".bias"):
            out[name] = normal(random, hidden, std=0.2)
        else:
            out[name] = linear(random, hidden, hidden)
    return out


def signs(count):
    """[DOTS, count] of +1 and -1: the hash of README.md, which a test can repeat in any language."""
    i = np.arange(count, dtype=np.uint64)[None, :] * np.uint64(DOTS) + np.arange(DOTS, dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        x = (i + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(32)
        x *= np.uint64(0xD6E8FEB86659FD93)
        x ^= x >> np.uint64(32)
    return torch.from_numpy(1.0 - 2.0 * (x >> np.uint64(63)).astype(np.float64))


def reduced(name, tensor):
    """(name, tensor) as stored: whole, or as dot products of its elements in row-major order."""
    if not tensor.is_floating_point():
        return name, tensor
    flat = tensor.to(torch.float64).flatten()
    if flat.numel() <= WHOLE:
        return name, tensor.to(torch.float64).contiguous()
    return f"dots.{name}", (signs(flat.numel()) * flat).sum(1)


def must_vanish(config, name):
    if name == "grad.new_tokens.weight":
        return False
    if name.startswith("grad.latent_projection.") and config["method"] == "coconut":
        return inputs.stage_of(config) == 0
    if name.startswith("grad.latent_projection."):
        return config["latent"]["iterations"] == 0
    return name.startswith("grad.kv_projection.") and config["kv"]["weight"] == 0


def check_gradients(case, config, tensors):
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise SystemExit(f"{case}: {name} is not finite")
        if name.startswith("grad.") and must_vanish(config, name) != (not tensor.any()):
            raise SystemExit(f"{case}: {name} is {'not ' if must_vanish(config, name) else ''}zero")


def make_case(toml):
    """(stored f64 tensors, error of the reference's own f32 step per tensor, smallest margin)."""
    config = inputs.load_config(toml)
    rows = inputs.load_rows(config)
    exact, margin = reference.step(reference.Model(config, torch.float64), rows)
    single, _ = reference.step(reference.Model(config, torch.float32), rows)
    check_gradients(toml.stem, config, exact)
    if margin < LOOSEST_TIE:
        raise SystemExit(f"{toml.stem}: a selection within {margin:.1e} of a tie")
    stored, errors = {}, {}
    for name, tensor in exact.items():
        key, value = reduced(name, tensor)
        stored[key] = value
        if tensor.is_floating_point():
            whole = reference_checks.relative_error(single[name], tensor)
            errors[key] = float(f"{max(whole, reference_checks.relative_error(reduced(name, single[name])[1], value)):.2e}")
        elif not torch.equal(single[name], tensor):
            raise SystemExit(f"{toml.stem}: {name} differs between f32 and f64")
    return stored, errors, margin


def compare_with_disk(toml, stored):
    old = load_file(toml.with_suffix(".safetensors"))
    if set(old) != set(stored):
        raise SystemExit(f"{toml.stem}: other tensors than on the disk: {sorted(set(old) ^ set(stored))}")
    for name, value in stored.items():
        if value.shape != old[name].shape or reference_checks.relative_error(value.double(), old[name].double()) > 1e-12:
            raise SystemExit(f"{toml.stem}: {name} differs from the disk")


def write_initial_values():
    """Deterministic starting values (docs/method.md sections 2 and 3), for a test of initialisation."""
    out = {}
    for name in MODELS:
        weights = base_weights(name)
        embedding = weights["transformer.wte.weight" if inputs.is_gpt2(MODELS[name]) else "model.embed_tokens.weight"]
        out[name] = {"new_token_row": inputs.initial_new_tokens(embedding)[0].tolist(),
                     "embedding_rms": inputs.embedding_rms(embedding).item()}
    write_json(HERE / "initial_values.json", out)


def write_inputs(cases):
    for name in MODELS:
        write_model(HERE / "models" / name, name, base_weights(name))
    write_rows()
    written = set()
    for toml in cases:
        config = inputs.load_config(toml)
        if config["model"]["adapter"] not in written:
            write_adapter(config)
            written.add(config["model"]["adapter"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--dtype", choices=("f32", "f64"), default="f64")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = sorted((HERE / "cases").glob("*.toml"))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for toml in cases:
            config = inputs.load_config(toml)
            dtype = {"f32": torch.float32, "f64": torch.float64}[arguments.dtype]
            tensors, _ = reference.step(reference.Model(config, dtype), inputs.load_rows(config))
            save_file({k: v.contiguous() for k, v in tensors.items()}, arguments.out / f"{toml.stem}.safetensors")
        return
    if not arguments.check:
        write_inputs(cases)
        write_initial_values()
    reference_checks.run(HERE)
    errors = {}
    for toml in cases:
        stored, errors[toml.stem], margin = make_case(toml)
        print(f"{toml.stem:28} loss {stored['loss.total'].item():10.6f}  tensors {len(stored):3}  margin {margin:.1e}")
        if arguments.check:
            compare_with_disk(toml, stored)
        else:
            save_file(stored, toml.with_suffix(".safetensors"))
    if not arguments.check:
        (HERE / "f32_errors.json").write_text(json.dumps(errors, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    sys.exit(main())
