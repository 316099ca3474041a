"""Draws tiny models, adapters, rows and configurations at random and compares `kava_inspect step` with the reference on each.

    python draw_cases.py [--bin DIR] [--count N] [--seed S] [--only FAMILY|METHOD]... [--device cpu|cuda] [--dtype f64|f32]
                         [--tokenizer FOLDER] [--keep DIR]

What the golden cases hold one by one is here in any mixture: four families with every form of their keys, eight methods with every switch
that the reference knows, LoRA and all weights, forwards of any size, rows that are dropped; with --tokenizer, text rows with its ids. Case i
of a seed is the same whatever else is drawn. A difference is printed with the case's configuration, which --keep leaves on the disk. Ends
with 1 on a difference or where nothing was compared, with 4 (skipped) where a package or the program is missing.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

SKIPPED = 4
EXIT_DATA = 4
GOLDEN = pathlib.Path(__file__).resolve().parent

try:
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    import compare_step
    import make_golden
    import reference_inputs as inputs
    import reference_step as reference
    from reference_text import Text, draw_text, draw_text_keys, text_keys
except ImportError as missing:
    print(f"skipped: {missing}; pip install transformers torch safetensors, or name another interpreter in KAVA_PYTHON")
    sys.exit(SKIPPED)

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
METHODS = inputs.CHOICES["method",]
# Scores nearer than this may be ordered otherwise in f32.
NEAR_TIE = {"f64": 1e-9, "f32": 1e-4}


class Draw:
    """One case's random numbers."""

    def __init__(self, seed, case):
        self.random = np.random.default_rng((seed, case))

    def one(self, *values):
        return values[int(self.random.integers(len(values)))]

    def of(self, low, high):
        """A whole number, both ends included."""
        return int(self.random.integers(low, high + 1))

    def maybe(self, share=0.5):
        return bool(self.random.random() < share)

    def some(self, values):
        """A subset that is not empty."""
        chosen = [v for v in values if self.maybe()]
        return chosen or [self.one(*values)]


def draw_rope(draw, config):
    theta = draw.one(10.0, 100.0, 10000.0)
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": draw.one(16, 64)}
    form = draw.of(0, 5)
    if form == 0:
        config["rope_theta"] = theta
    elif form == 1:
        config |= {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    elif form == 2:
        config |= {"rope_theta": theta, "rope_scaling": {"rope_type": "llama3", **scaled}}
    elif form == 3:
        config["rope_parameters"] = {"rope_type": "llama3", "rope_theta": theta, **scaled}
    elif form == 4:
        config |= {"rope_theta": theta, "rope_scaling": None}
    # Form 5 names nothing: 10000.


def draw_rotary_model(draw, family):
    kv_heads, group = draw.of(1, 3), draw.of(1, 3)
    heads, dim = kv_heads * group, draw.one(*[2 * draw.of(1, 5)] * 6, 16, 32, 64)
    config = {"model_type": family, "num_hidden_layers": draw.of(1, 3), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "intermediate_size": draw.of(3, 30), "vocab_size": draw.of(50, 80), "hidden_size": heads * dim}
    if family == "qwen3":
        config |= {"hidden_size": draw.of(5, 24), "head_dim": dim}
    if family == "llama" and draw.maybe():
        config |= {"hidden_size": heads * draw.of(2, 6), "head_dim": dim}  # transformers asks for a multiple here
    if family == "qwen3" and draw.maybe(0.1):
        config.pop("head_dim")  # 128
    if draw.maybe():
        config["tie_word_embeddings"] = draw.maybe(0.6)
    if draw.maybe(0.8):
        config["rms_norm_eps"] = draw.one(1e-6, 1e-5, 1e-3, 0.1)
    if family != "llama" and draw.maybe():
        config |= {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1}
    if family == "qwen3" and draw.maybe(0.3):
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    draw_rope(draw, config)
    return config


def draw_gpt2(draw):
    heads = draw.of(1, 4)
    config = {"model_type": "gpt2", "n_head": heads, "n_embd": heads * draw.of(1, 7), "n_layer": draw.of(1, 3), "n_positions": draw.of(24, 60),
              "vocab_size": draw.of(50, 80), "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if config["n_embd"] < 4:
        config["n_embd"] *= 4
    if draw.maybe():
        config["n_inner"] = draw.one(None, draw.of(3, 30))
    if draw.maybe():
        config["activation_function"] = draw.one("gelu_new", "gelu_pytorch_tanh")
    if draw.maybe(0.7):
        config["layer_norm_epsilon"] = draw.one(1e-5, 1e-3, 0.1)
    if draw.maybe(0.3):
        config["tie_word_embeddings"] = True
    if draw.maybe(0.4):
        config |= {"resid_pdrop": 0.1, "summary_first_dropout": 0.1}
        config.pop("attn_pdrop")
    return config


def draw_keys(draw, method, family):
    """The sections that say what the step computes."""
    count = draw.one(*[draw.of(1, 7)] * 9, 24)
    keys = {"latent": {"count": count, "projection": draw.maybe(), "update": draw.one("replace", "replace", "residual"),
                       "tokens": draw.one("trained", "trained", "frozen")},
            "step": {"prefix_sharing": draw.maybe(0.7), "prune_latents": draw.maybe(0.7)},
            "loss": {"mean": draw.one("batch", "batch", "forward")}}
    if method in ("kava", "pccot"):
        keys["latent"]["iterations"] = draw.of(0, min(count, 6) + 1)
    if method not in ("icot", "coconut", "no_cot"):
        keys["loss"]["teacher"] = draw.one(1.0, 0.5, 0.0)
    if method != "full_cot":
        keys["loss"]["student"] = draw.one(1.0, 1.0, 0.7)
    if method == "kava":
        keys["rkv"] = {name: draw.one(*inputs.CHOICES["rkv", name]) for name in ("policy", "group", "queries", "order", "short")}
        keys["rkv"]["lambda"] = draw.one(0.0, 0.1, 0.6, 1.0)
        keys["kv"] = {name: draw.one(*inputs.CHOICES["kv", name]) for name in ("reduction", "loss", "std", "keys")}
        keys["kv"] |= {"weight": draw.one(0.0, 1.0, 1.0, 2.5), "projection": draw.maybe(0.4)}
    if inputs.has_latents({"method": method}):
        keys["codi"] = {name: draw.one(*inputs.CHOICES["codi", name]) for name in ("loss", "std", "states", "token", "mse_std", "target")}
        keys["codi"]["weight"] = draw.one(0.0, 1.0, 10.0)
        if method != "kava" and draw.maybe(0.2):
            keys["kv"] = {"keys": draw.one("post_rope", "pre_rope"), "projection": draw.maybe()}
    if method == "coconut":
        thoughts, markers = draw.of(0, 3), draw.maybe(0.85)
        keys["coconut"] = {"thoughts": thoughts if markers else 0, "max_stage": draw.of(0, 4), "pad_to_max": draw.maybe(), "markers": markers,
                           "feedback": draw.one("hidden", "hidden", "hidden", "none")}
        last = keys["coconut"]["max_stage"] + 1
        first = draw.of(0, last)
        keys["stages"] = draw.one({"fixed": draw.of(0, last)}, {"first": first, "last": draw.one(-1, draw.of(first, last))})
    if method == "icot":
        keys["icot"] = {"smoothing": 0.0, "side": draw.one("left", "right"), "keep_positions": draw.maybe(),
                        "remove_all_from": draw.one(0, 0, 3, 9)}
        keys["stages"] = {draw.one("fixed", "fixed", "first"): draw.of(0, 16)}
    return keys


def draw_config(draw, method, family):
    keys = {"method": method, **draw_keys(draw, method, family)}
    batch = draw.of(1, 6)
    keys["train"] = {"trainable": draw.one("lora", "lora", "all"), "batch": batch, "micro_batch": draw.one(0, 0, draw.of(1, batch)),
                     "recompute": draw.one("none", "none", "cheap", "block")}
    linears = ["c_attn", "c_proj", "c_fc", "attn.c_proj", "mlp.c_proj"] if family == "gpt2" else [p.split(".")[1] for p in inputs.LINEARS]
    if keys["train"]["trainable"] == "lora":
        keys["lora"] = {"rank": draw.of(1, 5), "alpha": draw.one(1.0, 3.0, 16.0), "dropout": 0.0, "targets": draw.some(linears)}
        if family == "gpt2" and draw.maybe():
            keys["lora"].pop("targets")
    keys["data"] = {"train": ["rows.jsonl"], "max_tokens": draw.one(512, 512, 512, 26)}
    return keys


def draw_rows(draw, vocabulary, config):
    needs_prompt = config["method"] in ("kava", "pccot", "codi", "codi_exact")
    rows, ids = [], lambda n: [draw.of(3, vocabulary - 1) for _ in range(n)]
    for _ in range(draw.of(1, 7)):
        trace = [ids(draw.of(1, 5)) for _ in range(draw.of(0, 4))]
        answer, prompt = draw.of(1, 4), draw.one(0, 1, 3)
        row = {"question": ids(draw.of(1, 9)), "trace": trace if draw.maybe(0.6) else sum(trace, []), "answer": ids(prompt + answer - 1) + [2]}
        if answer == 1 and prompt and draw.maybe():
            prompt -= 1
        if needs_prompt or draw.maybe():
            row["prompt"] = min(prompt, len(row["answer"]) - 1)
        rows.append(row)
    return rows


def toml_text(config):
    value = lambda x: json.dumps(x)
    head = [f"{key} = {value(x)}" for key, x in config.items() if not isinstance(x, dict)]
    for name, section in config.items():
        if isinstance(section, dict):
            head += [f"\n[{name}]"] + [f"{key} = {value(x)}" for key, x in section.items()]
    return "\n".join(head) + "\n"


def changed_form(draw, folder, raw):
    """The weights as other folders hold them: in 16 bits, shards, a head that the base is tied to, GPT-2 without its prefix and with its masks."""
    weights = load_file(folder / "model.safetensors")
    if draw.maybe(0.3):
        weights = {name: x.to(draw.one(torch.bfloat16, torch.float16)) for name, x in weights.items()}
    gpt2 = inputs.is_gpt2(raw)
    tied = raw.get("tie_word_embeddings", gpt2)
    if tied and draw.maybe(0.3):
        weights["lm_head.weight"] = weights["transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"].clone()
    elif gpt2 and draw.maybe():
        weights = {name.removeprefix("transformer."): x for name, x in weights.items()}
        for layer in range(raw["n_layer"]):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, raw["n_positions"], raw["n_positions"], dtype=torch.uint8).tril()
    if not draw.maybe(0.2):
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: x for name, x in weights.items() if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def write_text(draw, folder, raw, config, text):
    """Text rows beside the ids rows that the reference makes of them, and what both read."""
    given = draw_text_keys(draw, config["method"])
    rows = draw_text(draw)
    keys = text_keys(config["method"], given)
    samples = [s for s in (text.sample(keys, row, make_golden.EOS) for row in rows) if s]
    (folder / "ids.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["data"] |= given | {"max_tokens": draw.one(512, 60)}
    reference_config = config | {"data": {"train": ["ids.jsonl"], "max_tokens": config["data"]["max_tokens"]}}
    (folder / "reference.toml").write_text(toml_text(reference_config))


def write_case(draw, folder, case, dtype, only, text):
    """Writes the case; its family and method, or nothing where it is not asked for."""
    family, method = draw.one(*FAMILIES), draw.one(*METHODS)
    if only and not {family, method} & set(only):
        return None
    raw = draw_gpt2(draw) if family == "gpt2" else draw_rotary_model(draw, family)
    if text:
        raw["vocab_size"] = text.size + draw.of(0, 9)
        raw["n_positions" if family == "gpt2" else "max_position_embeddings"] = draw.one(80, 160)
    # The errors of so narrow a model's tensors hang together, and are as lucky as those of one element.
    if dtype == "f32" and (raw["n_embd"] if family == "gpt2" else raw["hidden_size"]) < FEW:
        return None
    config = draw_config(draw, method, family)
    model, adapter = f"model_{case}", f"adapter_{case}"
    make_golden.MODELS[model] = raw
    make_golden.write_model(folder / model, model, make_golden.base_weights(model))
    changed_form(draw, folder / model, raw)
    config["model"] = {"path": model, "dtype": dtype} | ({"dropout": "off"} if family == "gpt2" else {})
    with_adapter = config["train"]["trainable"] == "lora" or config["latent"]["projection"] or (method == "coconut" and not text) or draw.maybe()
    if with_adapter:
        config["model"]["adapter"] = adapter
    if text:
        for file in text.files:
            (folder / model / file.name).write_bytes(file.read_bytes())
        write_text(draw, folder, raw, config, text)
    else:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in draw_rows(draw, raw["vocab_size"], config)))
        (folder / "reference.toml").write_text(toml_text(config))
    (folder / "case.toml").write_text(toml_text(config))
    if with_adapter:
        make_golden.write_adapter(inputs.load_config(folder / "reference.toml"))
    return f"{family} {method}"


def fed_by_both(config, found, exact):
    """latent.inputs of an unpruned coconut step may hold the passes between, which the reference does not run."""
    if config["method"] == "coconut" and not config["step"]["prune_latents"] and "latent.inputs" in found:
        found["latent.inputs"] = torch.where(exact["latent.inputs"] == 0, 0, found["latent.inputs"])


# Two errors of n independent elements differ more than tenfold in 6 % of cases for n = 1, in 0.04 % for n = 4, hardly ever for n = 8.
FEW = 8


def no_luck(limits, exact):
    """A gradient of few elements may be nearly exact in the reference's own f32 step by chance: it alone is held to the median bound."""
    usual = np.median([limit for name, limit in limits.items() if name.startswith("grad.")] or [0.0])
    return {name: max(limit, usual) if name.startswith("grad.") and exact[name].numel() < FEW else limit for name, limit in limits.items()}


def compare(folder, binary, device, dtype, threads):
    """(what is wrong or "", worst share of a bound, or None near a tie)."""
    config = inputs.load_config(folder / "reference.toml")
    command = [str(binary), "step", "case.toml", "--out", "step.safetensors", "--threads", str(threads), "--device", device]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    try:
        rows = inputs.load_rows(config)
    except inputs.Unsupported as problem:
        return ("" if ended.returncode == EXIT_DATA else f"exit code {ended.returncode} where {problem}: {ended.stderr}"), 0.0
    if ended.returncode:
        return f"exit code {ended.returncode}: {ended.stderr}", 0.0
    exact, limits, margin = compare_step.bounds(config, rows, config["model"]["adapter"], dtype)
    if margin < NEAR_TIE[dtype]:
        return "", None
    if dtype == "f32":
        limits = no_luck(limits, exact)
    found = load_file(folder / "step.safetensors")
    fed_by_both(config, found, exact)
    verdicts = sorted(compare_step.judge(found, exact, limits), reverse=True)
    return "\n".join(f"  {name}: {text}" for ratio, name, text in verdicts[:6] if ratio > 1), verdicts[0][0]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=GOLDEN.parents[1] / "build/cpu/bin")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", choices=FAMILIES + METHODS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("f64", "f32"), default="f64")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="folder whose tokenizer the models have; rows are text then")
    parser.add_argument("--keep", type=pathlib.Path, help="folder that the cases that differ are left in")
    return parser.parse_args()


def main():
    arguments = parse()
    binary = arguments.bin.resolve() / "kava_inspect"
    if not binary.exists():
        print(f"skipped: no {binary}")
        return SKIPPED
    torch.set_num_threads(1)
    text = Text(arguments.tokenizer) if arguments.tokenizer else None
    ran = failed = ties = 0
    worst = 0.0
    for case in range(arguments.first, arguments.first + arguments.count):
        with tempfile.TemporaryDirectory() as root:
            folder = pathlib.Path(root)
            what = write_case(Draw(arguments.seed, case), folder, case, arguments.dtype, arguments.only, text)
            if not what:
                continue
            wrong, share = compare(folder, binary, arguments.device, arguments.dtype, 1 + case % 3)
            if share is None:
                ties += 1
                continue
            ran, failed, worst = ran + 1, failed + bool(wrong), max(worst, share)
            if wrong:
                print(f"case {case} ({what}) differs:\n{wrong}", flush=True)
                if arguments.keep:
                    folder.rename(arguments.keep / f"case_{case}")
                    folder.mkdir()
    print(f"{ran} drawn cases in {arguments.dtype} on {arguments.device}, {failed} differ, {ties} near a tie and not compared; the worst at {worst:.2g} of its bound")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
