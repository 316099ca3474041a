"""Decoding one question at a time: `generate` of transformers against kava_eval --batch 1, alternating in one run.

    python torch_generate.py MODEL DATA --bin build/cpu/bin [--questions 12] [--new-tokens 24] [--dtype f32|bf16] [--threads 2] [--rounds 3]

MODEL is a folder of a chain-of-thought model (SmolLM2-135M), DATA a file that kava_eval reads. Both write at most --new-tokens greedily after
the same token ids (kava_inspect tokens), neither is charged for loading. Printed: milliseconds a question and a token, the shortest of the
rounds, the ratio, and how many answers are equal.
"""
import argparse
import json
import os
import subprocess
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("--bin", default="build/cpu/bin")
parser.add_argument("--questions", type=int, default=12)
parser.add_argument("--new-tokens", type=int, default=24)
parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--rounds", type=int, default=3)
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)

import torch  # noqa: E402  (reads OMP_NUM_THREADS)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

torch.set_num_threads(options.threads)
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[options.dtype]).eval()


def kava(folder):
    out = os.path.join(folder, "result.json")
    subprocess.run([os.path.join(options.bin, "kava_eval"), options.model, "--method", "full_cot", "--data", options.data, "--batch", "1",
                    "--limit", str(options.questions), "--max-new-tokens", str(options.new_tokens), "--dtype", options.dtype, "--device", "cpu",
                    "--threads", str(options.threads), "--out", out, "--force"], check=True, stdout=subprocess.DEVNULL)
    with open(out) as file:
        result = json.load(file)["results"][0]
    return result["records"], result["ms_per_question"], sum(r["tokens"] for r in result["records"])


@torch.inference_mode()
def transformers(questions):
    texts, seconds, tokens = [], 0.0, 0
    for question in questions:
        ids = tokenizer(question, return_tensors="pt")
        begin = time.perf_counter()
        out = model.generate(**ids, max_new_tokens=options.new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0)
        seconds += time.perf_counter() - begin
        written = out[0, ids["input_ids"].shape[1]:]
        tokens += len(written)
        texts.append(tokenizer.decode(written, skip_special_tokens=True))
    return texts, 1000 * seconds / len(questions), tokens


with tempfile.TemporaryDirectory() as folder:
    ours, theirs = [], []
    for _ in range(options.rounds):
        records, ms, tokens = kava(folder)
        ours.append((ms, tokens))
        texts, ms, tokens = transformers([r["question"] for r in records])
        theirs.append((ms, tokens))
    count = len(records)
    equal = sum(a == r["output"] for a, r in zip(texts, records))

for name, runs in (("kava_eval", ours), ("generate", theirs)):
    ms, tokens = min(runs)
    print(f"{name:10} {ms:9.1f} ms a question, {ms * count / tokens:7.1f} ms a token, {tokens / count:.1f} tokens a question")
print(f"ratio      {min(theirs)[0] / min(ours)[0]:9.2f}  ({options.dtype}, {options.threads} threads; equal answers: {equal} of {count})")
