#!/usr/bin/env bash
# A gap or a repeat in position_ids hides the question from all later rows as soon as no cache is used, so under gradient checkpointing too.
#
# Versions: transformers 4.52.4 and 5.24.0 with torch 2.7.1 (its packages for CUDA take 5 GB; no GPU is needed), Python 3.11 to 3.13.
# Behaviour: with attention_mask=None and without a cache, transformers (4.53.3 for Llama, 4.57.6 and 5.24.0 for GPT-2 too) takes every step
#            of position_ids other than 1 for the start of another packed sequence, with eager and sdpa attention alike. Rows behind a gap,
#            as Implicit CoT has where it keeps the positions of removed tokens, and latents that share a position are then cut off from
#            their question: loss and logits are others and the question gets no gradient, without a warning. The same call with a cache
#            (the default), with a mask of ones, or in 4.52.4 attends to the question. Gradient checkpointing turns the cache off, so that
#            it changes what is computed.
# Output seen (the last four lines of this script; each says whether the last row's logits have a gradient at the question):
#   4.52.4, gap: cache True, no cache True, no cache and mask of ones True, checkpointing True
#   4.52.4, repeat: cache True, no cache True, no cache and mask of ones True, checkpointing True
#   5.24.0, gap: cache True, no cache False, no cache and mask of ones True, checkpointing False
#   5.24.0, repeat: cache True, no cache False, no cache and mask of ones True, checkpointing False
# Ends with 1 when one of the lines is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat > attend.py <<'P'
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
calls = {"cache": {}, "no cache": {"use_cache": False}, "no cache and mask of ones": {"use_cache": False, "attention_mask": torch.ones(1, 9)}}
# Four rows of a question, then five others: behind eleven removed tokens, or two latents at the position of the question's end.
positions = {"gap": [0, 1, 2, 3, 15, 16, 17, 18, 19], "repeat": [0, 1, 2, 3, 3, 3, 4, 5, 6]}


def reached(model, ids, **call):
    rows = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits = model(inputs_embeds=rows, position_ids=torch.tensor([ids]), **call).logits
    logits[0, -1].logsumexp(-1).backward()
    return bool((rows.grad[0, :4] != 0).any(-1).all())


for name, ids in positions.items():
    seen = []
    for config, family in ((LlamaConfig(intermediate_size=48, **sizes), LlamaForCausalLM), (GPT2Config(**sizes), GPT2LMHeadModel)):
        for attention in ("eager", "sdpa"):
            torch.manual_seed(1)
            config._attn_implementation = attention
            model = family(config).train()
            outcome = [f"{call} {reached(model, ids, **arguments)}" for call, arguments in calls.items()]
            model.gradient_checkpointing_enable()
            seen.append(", ".join([*outcome, f"checkpointing {reached(model, ids)}"]))
    print(f"{transformers.__version__}, {name}: {' | '.join(sorted(set(seen)))}")
P
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.7.1
for version in 4.52.4 5.24.0; do
  env/bin/pip install --quiet --disable-pip-version-check "transformers==$version"
  CUDA_VISIBLE_DEVICES='' env/bin/python attend.py 2>> errors || { cat errors >&2; exit 1; }
done > seen
cat seen
cat > expected <<'T'
4.52.4, gap: cache True, no cache True, no cache and mask of ones True, checkpointing True
4.52.4, repeat: cache True, no cache True, no cache and mask of ones True, checkpointing True
5.24.0, gap: cache True, no cache False, no cache and mask of ones True, checkpointing False
5.24.0, repeat: cache True, no cache False, no cache and mask of ones True, checkpointing False
T
diff expected seen
