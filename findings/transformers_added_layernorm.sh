#!/usr/bin/env bash
# A LayerNorm that a subclass of LlamaForCausalLM adds holds whatever lay in memory after from_pretrained.
#
# Versions: transformers 4.50.3, 4.53.3 and 4.54.1 with torch 2.7.1 (its packages for CUDA take 5 GB; no GPU is needed), Python 3.9 to 3.13.
# Behaviour: of a class that adds an MLP with a LayerNorm to the model, as methods with a projection of latents do, the checkpoint of the
#            plain model has no such weights, and from_pretrained says that it initialises them. Linear weights it does; weight and bias of
#            the LayerNorm stay as they were allocated in 4.53.3 (and in 4.51.3 and 4.52.4), whose _init_weights of Llama knows no LayerNorm
#            and whose model is built without values. 4.50.3 and 4.54.1 give ones and zeros, as torch's own constructor does.
# Output seen (the last three lines of this script):
#   4.50.3: weight ones True, bias zeros True
#   4.53.3: weight ones False, bias zeros False
#   4.54.1: weight ones True, bias zeros True
# Ends with 1 when one of the lines is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat > load.py <<'P'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM


class Projecting(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.project = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))


config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=64)
LlamaForCausalLM(config).save_pretrained("plain")
# Memory of the size of the LayerNorm's tensors that holds sevens and is given back.
used = [torch.full((64,), 7.0) for _ in range(2000)]
del used
norm = Projecting.from_pretrained("./plain").project[1]
print(f"{transformers.__version__}: weight ones {bool((norm.weight == 1).all())}, bias zeros {bool((norm.bias == 0).all())}")
P
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.7.1
for version in 4.50.3 4.53.3 4.54.1; do
  env/bin/pip install --quiet --disable-pip-version-check "transformers==$version"
  CUDA_VISIBLE_DEVICES='' env/bin/python load.py 2>> errors || { cat errors >&2; exit 1; }
done > seen
cat seen
cat > expected <<'T'
4.50.3: weight ones True, bias zeros True
4.53.3: weight ones False, bias zeros False
4.54.1: weight ones True, bias zeros True
T
diff expected seen
