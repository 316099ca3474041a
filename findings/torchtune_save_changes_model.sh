#!/usr/bin/env bash
# Saving a checkpoint changes the model that torchtune's LoRA recipe goes on to train on a CPU.
#
# Versions: torchtune 0.6.1 with torchao 0.11.0 and torch 2.7.1 (its packages for CUDA take 5 GB; no GPU is needed), Python 3.9 to 3.13.
# Behaviour: unless save_adapter_weights_only is set, save_checkpoint of lora_finetune_single_device hands the model's state, moved by .cpu(),
#            to get_merged_lora_ckpt, which adds B A to the weights in place, as its documentation says. On device=cpu .cpu() copies nothing,
#            so that the model's own weights get the product while its LoRA stays: from there on it counts twice, and once more with every
#            epoch.
# Output seen (the last two lines of this script):
#   save_adapter_weights_only=True: the model's logits stay
#   save_adapter_weights_only=False: the model's logits change
# Ends with 1 when one of the lines is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat > save.py <<'P'
import importlib.util
import os

import torch
import torchtune
from torchtune.models.llama2 import lora_llama2

file = os.path.join(os.path.dirname(os.path.dirname(torchtune.__file__)), "recipes", "lora_finetune_single_device.py")
spec = importlib.util.spec_from_file_location("lora_finetune_single_device", file)
recipes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipes)


class Checkpointer:
    def save_checkpoint(self, *_, **__):
        pass


for adapter_only in (True, False):
    torch.manual_seed(1)
    recipe = object.__new__(recipes.LoRAFinetuneRecipeSingleDevice)
    recipe._model = lora_llama2(["q_proj", "v_proj"], vocab_size=32, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=16, max_seq_len=16,
                                intermediate_dim=16, lora_rank=4, lora_alpha=8)
    for name, parameter in recipe._model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    recipe.total_epochs, recipe._save_adapter_weights_only, recipe._checkpointer = 1, adapter_only, Checkpointer()
    recipe._lora_rank, recipe._lora_alpha, recipe._lora_attn_modules = 4, 8, ["q_proj", "v_proj"]
    recipe._apply_lora_to_mlp = recipe._apply_lora_to_output = False
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = recipe._model(ids)
        recipe.save_checkpoint(epoch=0)
        same = torch.equal(before, recipe._model(ids))
    print(f"save_adapter_weights_only={adapter_only}: the model's logits {'stay' if same else 'change'}")
P
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.7.1 torchao==0.11.0 torchtune==0.6.1
CUDA_VISIBLE_DEVICES='' env/bin/python save.py 2> errors > seen || { cat errors >&2; exit 1; }
cat seen
cat > expected <<'T'
save_adapter_weights_only=True: the model's logits stay
save_adapter_weights_only=False: the model's logits change
T
diff expected seen
