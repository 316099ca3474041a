"""Shows that what the programs of PCCoT, CODI and torchtune write means the same in kava.

    pip install torch==2.7.1 transformers==4.46.3 peft==0.15.2 accelerate==1.7.0 datasets==3.6.0 evaluate==0.4.5 scikit-learn \
                sentencepiece torchtune==0.6.1 torchao==0.11.0
    python upstream_check.py --pccot DIR --codi DIR [--bin DIR] [--keep DIR]

DIR are checkouts of the two repositories (PCCoT at 2e32e3e, CODI at 4fd88d4). On tiny random models with the tokenizer of `kava_data synth`
their own programs train a few steps and write, and so do torchtune's LoRA model and checkpointer. For each folder the logits of the
program's own model, loaded as its own test does, are compared with those of `kava_inspect step`, student's and teacher's; what kava_merge
makes of it with what transformers loads from there. By hand: it takes a minute and a half of one core.

An error may be ten times that of kava in f32 against kava in f64, and 1e-6. Ends with 1 on a difference, with 4 (skipped) where a package
or a checkout is missing.
"""
import argparse
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

SKIPPED = 4
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if len(sys.argv) > 1 and sys.argv[1] == "--run-codi":  # FOLDER of the checkout, ROWS, then the arguments of train.py
    import datasets

    folder, rows = sys.argv[2:4]
    datasets.load_dataset = lambda *_, **__: {"train": [json.loads(line) for line in open(rows)]}
    sys.path.insert(0, folder)
    sys.argv[:] = ["train.py"] + sys.argv[4:]
    runpy.run_path(os.path.join(folder, "train.py"), run_name="__main__")
    sys.exit(0)

try:
    import accelerate  # noqa: F401
    import peft
    import safetensors.torch
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(SKIPPED)

RANK, ALPHA, LATENTS, ITERATIONS = 4, 8, 5, 3
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}


def run(*command, folder=None):
    ended = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{command[0]} {command[1]}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")


def make_base(folder, synth, family, tied):
    """A random model with the tokenizer of the embedded task."""
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(str(synth))
    common = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.2}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                         bos_token_id=tokenizer.eos_token_id, **common)
    else:
        config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                          num_key_value_heads=2, tie_word_embeddings=tied, **common)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((synth / name).read_bytes())


class Folders:
    def __init__(self, root, options):
        self.root, self.bin, self.options = root, options.bin, options
        run(self.bin / "kava_data", "synth", "--out", root / "synth", "--rows", 2000)
        run(self.bin / "kava_data", "convert", root / "synth/valid.txt", root / "all.jsonl")
        rows = [json.loads(line) for line in (root / "all.jsonl").read_text().splitlines()[:24]]
        self.rows = root / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "rows.json").write_text(self.rows.read_text())
        self.codi_rows = root / "codi.jsonl"
        self.codi_rows.write_text("".join(json.dumps({"question": r["question"], "cot": " ".join(r["steps"]), "answer": r["answer"]}) + "\n"
                                          for r in rows))
        self.count = 4

    def step(self, toml, adapter, dtype="f32"):
        out = self.root / "step.safetensors"
        run(self.bin / "kava_inspect", "step", toml, "--adapter", adapter, "--set", f"model.dtype={dtype}", "--out", out, "--threads", 1)
        return safetensors.torch.load_file(out)

    def config(self, name, method, base, family, **latent):
        """A run's folder without its adapter."""
        folder = self.root / name
        folder.mkdir()
        text = (f'method = "{method}"\n[model]\npath = "{base}"\ndtype = "f32"\ndropout = "off"\n[data]\ntrain = ["{self.rows}"]\n'
                f"[train]\nbatch = {self.count}\n[lora]\nrank = {RANK}\nalpha = {ALPHA}\ndropout = 0.0\n"
                f"targets = {json.dumps(TARGETS[family])}\n")
        if latent:
            text += "[latent]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in latent.items())
        (folder / "config.toml").write_text(text)
        return folder

    def pieces(self, step):
        """Question, trace and answer of each sample, as ids."""
        for i in range(self.count):
            yield tuple(step[f"ids.{part}"][slice(*step[f"ids.{part}_offsets"][i:i + 2])].tolist() for part in ("question", "trace", "answer"))


def distance(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def compare(folders, run_folder, adapter, logits):
    """Logits of the program's model, and of the merged folder; `logits(step)` gives those of the former by name."""
    toml = run_folder / "config.toml"
    step, exact = folders.step(toml, adapter), folders.step(toml, adapter, "f64")
    found = []
    for name, expected in logits(step).items():
        error, own = distance(step[f"logits.{name}"], expected), distance(step[f"logits.{name}"], exact[f"logits.{name}"])
        found.append((name, error, 10 * own + 1e-6))
    (run_folder / "adapter").symlink_to(adapter)
    run(folders.bin / "kava_merge", run_folder, "--out", run_folder / "merged", "--dtype", "f32", "--threads", 1)
    merged = AutoModelForCausalLM.from_pretrained(str(run_folder / "merged"), attn_implementation="eager", torch_dtype="auto").eval()
    expected = teacher_logits(folders, step, merged)
    own = distance(step["logits.teacher"], exact["logits.teacher"])
    found.append(("merged", distance(step["logits.teacher"], expected), 10 * own + 1e-6))
    for program in ("kava_eval", "kava_generate"):
        more = ["--data", folders.rows] if program == "kava_eval" else ["1 and 1"]
        run(folders.bin / program, run_folder, *more, "--max-new-tokens", 4, "--threads", 1)
    run(folders.bin / "kava_inspect", "file", run_folder)
    return found


def teacher_logits(folders, step, model, columns=None):
    rows = []
    for question, trace, answer in folders.pieces(step):
        with torch.no_grad():
            logits = model(torch.tensor([question + trace + answer])).logits[0]
        rows.append(logits[len(question) - 1:-1, :columns])
    return torch.cat(rows)


def check_pccot(folders, base, family, projected):
    """Trains by run_ccot.py, which needs no change."""
    name = f"pccot-{base.name}{'-prj' if projected else ''}"
    source, out = folders.options.pccot.resolve(), folders.root / (name + ".out")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": f"pccot-{family}", "use_projection": projected, "num_iterations": ITERATIONS}
    (folders.root / "pccot.json").write_text(json.dumps(config))
    run(sys.executable, "run_ccot.py", "--model_name_or_path", base, "--config_name", folders.root / "pccot.json", "--num_latent_tokens",
        LATENTS, "--train_file", folders.root / "rows.json", "--validation_file", folders.root / "rows.json", "--label_names", "labels",
        "cot_labels", "--remove_unused_columns", "false", "--per_device_train_batch_size", 4, "--block_size", 512, "--attn_implementation",
        "eager", "--learning_rate", "2e-2", "--do_train", "--max_steps", 4, "--report_to", "none", "--use_cpu", "--lora_r", RANK, "--lora_alpha",
        ALPHA, "--lora_target_modules", "-".join(TARGETS[family]), "--lora_modules_to_save", "prj" if projected else "", "--output_dir", out,
        "--cache_dir", folders.root / "cache", folder=source)
    sys.path.insert(0, str(source))
    import models

    arguments = models.PCCoTArguments(**json.loads((out / "pccot_args.json").read_text()))
    tokenizer, config = AutoTokenizer.from_pretrained(str(out)), AutoConfig.from_pretrained(str(out))
    plain = type(config).from_dict(config.to_dict() | {"vocab_size": json.loads((base / "config.json").read_text())["vocab_size"]})
    model = AutoModelForCausalLM.from_pretrained(str(base), config=plain, attn_implementation="eager", torch_dtype=torch.float32)
    vocabulary = plain.vocab_size
    model.resize_token_embeddings(len(tokenizer))
    model = peft.PeftModel.from_pretrained(model, str(out)).eval()
    processor = models.COTDataProcessor(tokenizer=tokenizer, pccot_args=arguments)

    def logits(step):
        student, teacher = [], []
        for line in folders.rows.read_text().splitlines()[:folders.count]:
            row = {key: [value] for key, value in json.loads(line).items()}
            sample = processor.tokenize_function(row)
            sample |= processor.group_texts(sample)
            batch = processor.data_collator([{key: value[0] for key, value in sample.items()}])
            with torch.no_grad():
                of_student, of_teacher = model(**batch).logits
            first = (batch["cot_labels"][0] != -100).nonzero()[0].item()
            student.append(of_student[0, :-1, :vocabulary])
            teacher.append(of_teacher[0, first - 1:-1, :vocabulary])
        return {"student": torch.cat(student), "teacher": torch.cat(teacher)}

    place = folders.config(name, "pccot", base, family, count=LATENTS, iterations=ITERATIONS, projection=projected)
    return compare(folders, place, out, logits)


def check_codi(folders, base, family, safe):
    """Trains by train.py, to which the rows are given in the place of a hub's."""
    name = f"codi-{base.name}"
    source, out = folders.options.codi.resolve(), folders.root / (name + ".out")
    run(sys.executable, pathlib.Path(__file__).resolve(), "--run-codi", source, folders.codi_rows, "--output_dir", out, "--expt_name", "e",
        "--model_name_or_path", base, "--data_name", "icot", "--per_device_train_batch_size", 4, "--num_train_epochs", 1, "--learning_rate",
        "1e-2", "--use_lora", "True", "--lora_r", RANK, "--lora_alpha", ALPHA, "--lora_init", "--save_strategy", "no", "--save_safetensors",
        safe, "--do_train", "--report_to", "none", "--num_latent", LATENTS, "--use_prj", "True", "--prj_dim", 64, "--distill_loss_div_std",
        "True", "--remove_eos", "True", "--bf16", "--use_cpu", folder=source)
    written = next(out.glob("e/*/*/*/*/tokenizer.json")).parent
    sys.path.insert(0, str(source))
    from src.model import CODI, ModelArguments, TrainingArguments

    training = TrainingArguments(output_dir=str(out), bf16=True, use_cpu=True, num_latent=LATENTS, use_prj=True, prj_dim=64, remove_eos=True,
                                 print_loss=False, report_to=[])
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[family])
    model = CODI(ModelArguments(model_name_or_path=str(base), train=False), training, lora)
    file = written / "pytorch_model.bin"
    state = torch.load(file) if file.exists() else safetensors.torch.load_file(written / "model.safetensors")
    model.load_state_dict(state, strict=False)
    model.codi.tie_weights()
    model = model.float().eval()

    def logits(step):
        vocabulary, student = step["logits.student"].shape[1], []
        for question, trace, answer in folders.pieces(step):
            teacher, reply = torch.tensor([question + trace + answer]), torch.tensor([[model.eot_id] + answer])
            position = torch.tensor([2])  # of the distillation, which is not compared
            with torch.no_grad():
                found = model(encoder_input_ids=torch.tensor([question + [model.bot_id]]), decoder_input_ids=reply, labels=reply,
                              ref_input_ids=teacher, ref_labels=teacher, ref_answer_position=position, model_answer_position=position)
            student.append(found["logits"][0, :-1, :vocabulary])
        return {"student": torch.cat(student), "teacher": teacher_logits(folders, step, model.codi, vocabulary)}

    return compare(folders, folders.config(name, "codi_exact", base, family, count=LATENTS), written, logits)


def check_torchtune(folders, base):
    """torchtune's LoRA model and its checkpointer, called as its recipe calls them."""
    from torchtune import training
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules.peft import get_adapter_params, get_adapter_state_dict, get_lora_module_names, set_trainable_params

    config, out = json.loads((base / "config.json").read_text()), folders.root / "torchtune.out"
    checkpointer = training.FullModelHFCheckpointer(str(base), ["model.safetensors"], "LLAMA2", str(out))
    attention = ["q_proj", "k_proj", "v_proj", "output_proj"]
    torch.manual_seed(0)
    model = lora_llama2(attention, True, False, vocab_size=config["vocab_size"], num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64,
                        intermediate_dim=96, max_seq_len=512, norm_eps=config["rms_norm_eps"], lora_rank=RANK, lora_alpha=ALPHA)
    model.load_state_dict(checkpointer.load_checkpoint()[training.MODEL_KEY], strict=False)
    set_trainable_params(model, get_adapter_params(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(3):
        ids = torch.randint(config["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(step))
        torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": get_lora_module_names(attention, True, False), "peft_type": "LORA"}
    checkpointer.save_checkpoint({training.ADAPTER_KEY: get_adapter_state_dict(model.state_dict()), training.ADAPTER_CONFIG: settings}, epoch=0,
                                 intermediate_checkpoint=False, adapter_only=True)

    class Wrapped:
        def __call__(self, ids):
            return type("Output", (), {"logits": model.eval()(ids)})

    place = folders.config("torchtune", "full_cot", base, "llama")
    return compare(folders, place, out / "epoch_0", lambda step: {"teacher": teacher_logits(folders, step, Wrapped())})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parents[2] / "build/cpu/bin")
    parser.add_argument("--pccot", type=pathlib.Path, required=True)
    parser.add_argument("--codi", type=pathlib.Path, required=True)
    parser.add_argument("--keep", type=pathlib.Path, help="write here, and leave it")
    options = parser.parse_args()
    options.bin = options.bin.resolve()
    for folder, file in ((options.pccot, "run_ccot.py"), (options.codi, "train.py")):
        if not (folder / file).exists():
            print(f"skipped: {folder} has no {file}")
            return SKIPPED
    failed = checked = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(options.keep or temporary).resolve()
        root.mkdir(exist_ok=True)
        folders = Folders(root, options)
        bases = {}
        for name, family, tied in (("tiny-llama", "llama", True), ("untied-llama", "llama", False), ("tiny-gpt2", "gpt2", True)):
            bases[name] = root / name
            make_base(bases[name], root / "synth/model", family, tied)
        checks = {"torchtune": lambda: check_torchtune(folders, bases["untied-llama"])}
        for name, base in bases.items():
            family = "gpt2" if "gpt2" in name else "llama"
            for projected in (False, True):
                checks[f"PCCoT, {name}{', projection' if projected else ''}"] = lambda b=base, f=family, p=projected: check_pccot(folders, b, f, p)
            # A tied model cannot be written as safetensors by this program.
            checks[f"CODI, {name}"] = lambda b=base, f=family, s=name == "untied-llama": check_codi(folders, b, f, s)
        for name, check in checks.items():
            for what, error, most in check():
                checked, failed = checked + 1, failed + (not error <= most)
                print(f"{name}: {what} differs by {error:.1e}, may by {most:.1e}{'' if error <= most else ': TOO MUCH'}", flush=True)
    print(f"{checked} comparisons, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
