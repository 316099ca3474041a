"""Shows that an adapter folder loads in the peft package and means there what it means in kava.

    python peft_check.py ADAPTER BASE [--tokens N] [--merged DIR]

Compares the logits of peft's model on random token ids with those of a plain copy of the base whose weights are W + alpha/r B A, turned where
they are stored [in, out]. --merged: a folder that `kava_merge ADAPTER --dtype f32 --out DIR` has written must have the same. Ends with 1 when
they differ by more than f32 rounding explains, or when the adapter changes nothing.
"""
import argparse
import json
import pathlib
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def merged(base, adapter):
    """The base with B A added by hand; every tensor of the adapter must find its place."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    matrices = load_file(adapter / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]
    for name in [name for name in matrices if name.endswith(".lora_A.weight")]:
        a, b = matrices.pop(name), matrices.pop(name.replace("lora_A", "lora_B"))
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        module, update = base.get_submodule(path), scale * (b.float() @ a.float())
        module.weight.data += update.T if isinstance(module, Conv1D) else update  # [in, out]
    if matrices:
        sys.exit(f"error: tensors without a partner: {sorted(matrices)}")
    return base


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=pathlib.Path)
    parser.add_argument("base", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--merged", type=pathlib.Path)
    arguments = parser.parse_args()
    plain = load_base(arguments.base)
    tokens = min(arguments.tokens, plain.config.max_position_embeddings)
    ids = torch.randint(plain.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        unadapted = plain(ids).logits
        expected = merged(plain, arguments.adapter)(ids).logits
        wrapped = PeftModel.from_pretrained(load_base(arguments.base), arguments.adapter)
        found = wrapped(ids).logits
    error = ((found - expected).norm() / expected.norm()).item()
    change = ((expected - unadapted).norm() / unadapted.norm()).item()
    print(f"adapted linears {sum(1 for name, _ in wrapped.named_modules() if name.endswith('.lora_A.default'))}, "
          f"logits differ by {error:.1e} (relative RMS); the adapter changes them by {change:.1e}")
    if arguments.merged:
        with torch.no_grad():
            alone = load_base(arguments.merged)(ids).logits
        worst = ((alone - expected).norm() / expected.norm()).item()
        print(f"the merged folder's logits differ by {worst:.1e}")
        error = max(error, worst)
    return 1 if error > 1e-5 or change == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
