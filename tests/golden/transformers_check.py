"""Shows that folders mean the same in the transformers package and in kava.

    python transformers_check.py [--bin DIR]

* Tokenizer folders of tokenizer_folders.py: equal ids and BOS, or refused with the exit code of bad data where the case says so.
* Bases whose config.json names another type than F32, trained with train.trainable = "all": the written folder has every tokenizer file of
  the base, transformers loads it in the type of its weights, and its logits are those of kava.
* Models in forms that transformers reads without writing them (FORMS): equal logits.
* Adapters whose adapter_config.json says with other keys what it could leave out (ADAPTERS): the logits of PEFT's model.

Ends with 1 on a difference, with 4 (skipped) where a package or a program is missing.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from tokenizer_folders import CASES, TEXTS, START_END, added, tokenizer

GOLDEN = pathlib.Path(__file__).resolve().parent
SKIPPED = 4
EXIT_DATA = 4

try:
    import transformers
    from transformers import AutoTokenizer
except ImportError as missing:
    print(f"skipped: {missing}; pip install transformers torch, or name another interpreter in KAVA_PYTHON")
    sys.exit(SKIPPED)
transformers.logging.set_verbosity_error()


def run(program, *arguments, **options):
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, **options)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def kava_ids(binaries, folder, texts):
    """Ids of the texts, or the message of the refusal."""
    ended = run(binaries / "kava_inspect", "tokens", folder, "--json", input="".join(json.dumps(text) + "\n" for text in texts))
    if ended.returncode == EXIT_DATA:
        return ended.stderr.strip()
    if ended.returncode:
        raise RuntimeError(f"exit code {ended.returncode}: {ended.stderr}")
    return [[int(i) for i in line.split()] for line in ended.stdout.split("\n")[:-1]]


def first_ids(binaries, folder):
    """What kava puts before the question "Hi", and the end of sequence."""
    import safetensors.numpy

    toml = f'method = "no_cot"\n[data]\ntrain = ["rows.jsonl"]\n[model]\npath = "{folder}"\ninit = "random"\n'
    write(folder.parent, {"rows.jsonl": '{"question": "Hi", "steps": [], "answer": "7"}\n', "run.toml": toml})
    ended = run(binaries / "kava_inspect", "step", folder.parent / "run.toml", "--out", folder.parent / "step.safetensors", "--threads", 1)
    if ended.returncode:
        return ended.stderr.strip()
    step = safetensors.numpy.load_file(folder.parent / "step.safetensors")
    return step["ids.question"].tolist(), int(step["ids.answer"][-1])


SHAPE = {"model_type": "llama", "vocab_size": 6000, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2, "eos_token_id": 7}


def check_tokenizer(binaries, folder, files, refused):
    """What is wrong, or nothing."""
    write(folder, files | {"config.json": SHAPE})
    found = kava_ids(binaries, folder, TEXTS)
    if refused:
        return None if isinstance(found, str) else "was not refused"
    library = AutoTokenizer.from_pretrained(str(folder))
    expected = [library(text, add_special_tokens=False).input_ids for text in TEXTS]
    if found != expected:
        return f"ids differ: {found} and {expected} of the library"
    end = library.eos_token_id if library.eos_token_id is not None else SHAPE["eos_token_id"]
    begun, wanted = first_ids(binaries, folder), (library("Hi").input_ids, end)
    return None if begun == wanted else f"question and end of sequence are {begun}, {wanted} of the library"


def base_files():
    tokens = START_END + [added(262, "<x>", False)]
    return {"tokenizer.json": tokenizer(tokens),
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
            "special_tokens_map.json": {"eos_token": "</s>"}, "added_tokens.json": {"<x>": 262},
            "vocab.json": {"a": 0}, "merges.txt": "#version: 0.2\n",
            "generation_config.json": {"eos_token_id": 261}, "chat_template.jinja": "{{ messages }}",
            "additional_chat_templates/tool.jinja": "{{ tools }}"}


def compare_logits(binaries, root, folder, adapter=None):
    """Logits of the first rows of root/run.toml by both; what is wrong, or nothing."""
    import safetensors.numpy
    import torch

    ended = run(binaries / "kava_inspect", "step", root / "run.toml", "--set", "model.init=pretrained", "--set", f"model.path={folder}",
                *(["--adapter", adapter] if adapter else []), "--out", root / "step.safetensors", "--threads", 1)
    if ended.returncode:
        return ended.stderr
    step = safetensors.numpy.load_file(root / "step.safetensors")
    options = {} if int(transformers.__version__.split(".")[0]) >= 5 else {"torch_dtype": "auto"}
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager", **options).eval()
    if model.dtype != torch.float32:
        return f"transformers loads {model.dtype}"
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    rows = []
    for sample in range(4):
        question, trace, answer = (step[f"ids.{part}"][slice(*step[f"ids.{part}_offsets"][sample:sample + 2])].tolist()
                                   for part in ("question", "trace", "answer"))
        with torch.no_grad():
            logits = model(torch.tensor([question + trace + answer])).logits[0]
        rows.append(logits[len(question) - 1:-1])
    expected = torch.cat(rows)
    error = ((torch.tensor(step["logits.teacher"]) - expected).norm() / expected.norm()).item()
    # Sums of at most 24 products in another order, in 2 layers.
    return None if error < 1e-5 else f"logits differ by {error:.1e} (relative RMS)"


def headless(name):
    return name.removeprefix("model.")


def head_alone(name):
    return "lm_head.weight" if name == "model.embed_tokens.weight" else name


# Folders in other forms than those that transformers writes: family, changes of config.json, another name for each tensor.
FORMS = {
    "swish": ("llama", {"hidden_act": "swish"}, str),
    "linear positions by 1": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, str),
    "saved without its head": ("llama", {"architectures": ["LlamaModel"]}, headless),
    "the architecture without a head": ("llama", {"architectures": ["LlamaModel"]}, str),
    "the tied head alone": ("llama", {}, head_alone),
    "a Qwen2 saved without its head": ("qwen2", {"architectures": ["Qwen2Model"]}, headless),
    "a window in which no layer slides": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, str),
    "dropout, which only training has": ("llama", {"attention_dropout": 0.5}, str),
    "dropout of a Qwen2": ("qwen2", {"attention_dropout": 0.5}, str),
    "swish of a Qwen2": ("qwen2", {"hidden_act": "swish"}, str),
    "swish of a Qwen3": ("qwen3", {"hidden_act": "swish"}, str),
    "linear positions by 1 of a Qwen2": ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, str),
    "the architecture of a Qwen2 without a head": ("qwen2", {"architectures": ["Qwen2Model"]}, str),
    "a Qwen3 saved without its head": ("qwen3", {"architectures": ["Qwen3Model"]}, headless),
    "metadata that is null": ("llama", {}, str, lambda header: header | {"__metadata__": None}),
}

# Changes of adapter_config.json that change no adapter.
ADAPTERS = {
    "modules excluded that are none": {"exclude_modules": ["lm_head", "up_proj"]},
    "targets as a pattern": {"target_modules": r"model\.layers\.\d+\.self_attn\.[qkvo]_proj"},
    "every layer by its number": {"layers_to_transform": [1, 0]},
    "a rank that is r": {"rank_pattern": {"q_proj": 2}},
    "an alpha that is lora_alpha": {"alpha_pattern": {".*v_proj": 3}},
}


def change_header(path, change):
    """Writes a safetensors file's header anew."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8:end]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def write_run(root, method_keys=""):
    write(root, {"run.toml": f'method = "full_cot"\n[model]\npath = "base"\ndtype = "f32"\ndropout = "off"\n[data]\n'
                             f'train = ["{GOLDEN}/data/rows.jsonl"]\n[train]\nbatch = 4\n[lora]\ndropout = 0.0\n{method_keys}'})


def check_adapter(binaries, root, family, changes):
    """A tiny adapter with another adapter_config.json; what is wrong, or nothing."""
    source, adapter = GOLDEN / "adapters" / family, root / "adapter"
    write(adapter, {"adapter_config.json": json.loads((source / "adapter_config.json").read_text()) | changes})
    (adapter / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    write_run(root, "rank = 2\nalpha = 3.0\n")
    return compare_logits(binaries, root, GOLDEN / "models" / family, adapter)


def check_form(binaries, root, family, changes, renamed, change=None):
    """A tiny model in another form; what is wrong, or nothing."""
    import safetensors.numpy

    source = GOLDEN / "models" / family
    write(root / "base", {"config.json": json.loads((source / "config.json").read_text()) | changes})
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    safetensors.numpy.save_file({renamed(name): t for name, t in tensors.items()}, root / "base" / "model.safetensors", {"format": "pt"})
    if change:
        change_header(root / "base" / "model.safetensors", change)
    write_run(root)
    return compare_logits(binaries, root, root / "base")


def check_written(binaries, root, family, keys):
    """Trains a tiny base that config.json says to be of another type; what is wrong with the written folder, or nothing."""
    config = json.loads((GOLDEN / "models" / family / "config.json").read_text())
    config |= {"vocab_size": 280, "eos_token_id": 261, "bos_token_id": 260}
    config.pop("torch_dtype", None)
    files = base_files()
    write(root / "base", files | {"config.json": config | keys})
    rows = (f'{{"question": "{n} and {n}", "steps": ["{n}+{n}", "x"], "answer": "{2 * n}"}}\n' for n in range(8))
    write(root, {"rows.jsonl": "".join(rows),
                 "run.toml": 'method = "full_cot"\n[model]\npath = "base"\ninit = "random"\ndtype = "f32"\n[data]\ntrain = ["rows.jsonl"]\n'
                             '[train]\ntrainable = "all"\nbatch = 4\nmax_steps = 3\nlr = 0.05\n'})
    ended = run(binaries / "kava_train", root / "run.toml", "--out", root / "run", "--threads", 1)
    if ended.returncode:
        return ended.stderr
    written = root / "run" / "adapter"
    for name, content in files.items():
        if not (written / name).exists() or (written / name).read_bytes() != (root / "base" / name).read_bytes():
            return f"{name} was not copied"
    return compare_logits(binaries, root, written)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=GOLDEN.parents[1] / "build/cpu/bin")
    binaries = parser.parse_args().bin
    failed = checked = 0
    with tempfile.TemporaryDirectory() as root:
        for name, (files, refused) in CASES.items():
            wrong = check_tokenizer(binaries, pathlib.Path(root) / str(checked) / "m", files, refused)
            checked, failed = checked + 1, failed + bool(wrong)
            if wrong:
                print(f"{name}: {wrong}")
    try:
        import torch  # noqa: F401
    except ImportError as missing:
        print(f"the logits of written folders were not compared: {missing}")
    else:
        for family, keys in (("llama", {"dtype": "bfloat16"}), ("llama_scaled", {"torch_dtype": "float16"}),
                             ("qwen2", {"dtype": "bfloat16", "torch_dtype": "bfloat16"}), ("qwen2", {})):
            with tempfile.TemporaryDirectory() as root:
                wrong = check_written(binaries, pathlib.Path(root), family, keys)
            checked, failed = checked + 1, failed + bool(wrong)
            if wrong:
                print(f"folder written from {family} with {keys}: {wrong}")
        for name, form in FORMS.items():
            with tempfile.TemporaryDirectory() as root:
                wrong = check_form(binaries, pathlib.Path(root), *form)
            checked, failed = checked + 1, failed + bool(wrong)
            if wrong:
                print(f"{name}: {wrong}")
        try:
            import peft  # noqa: F401
        except ImportError as missing:
            print(f"adapters were not compared: {missing}")
        else:
            for family in ("llama", "qwen2", "qwen3"):
                for name, changes in ADAPTERS.items():
                    with tempfile.TemporaryDirectory() as root:
                        wrong = check_adapter(binaries, pathlib.Path(root), family, changes)
                    checked, failed = checked + 1, failed + bool(wrong)
                    if wrong:
                        print(f"{family}, {name}: {wrong}")
    print(f"{checked} checks with transformers {transformers.__version__}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
