#!/usr/bin/env bash
# Under transformers 5 PEFT loads an adapter with tied embeddings wrongly when it is not the first one on its base.
#
# Versions: peft 0.21.2 with transformers 4.57.6 and 5.24.0 and torch 2.7.1 (its packages for CUDA take 5 GB; no GPU is needed),
#           Python 3.11 to 3.13.
# Behaviour: with modules_to_save=["embed_tokens"] and ensure_weight_tying=True, as for new tokens of a tied model (Llama 3.2 1B, Qwen2.5
#            0.5B), an adapter trains embedding and head as one. Two such adapters on one base, to compare two checkpoints, work with
#            4.57.6. With 5.24.0 the second one's head is the base's: load_adapter passes over the stored lm_head.weight, and what it warns
#            of, that the model has no tied modules, is not so. Its logits are not those that it has alone. A second adapter that is added
#            to be trained leaves the head out as well. peft 0.18.1 to 0.21.0 do the same.
# Output seen (the last two lines of this script):
#   4.57.6: logits as alone: first True, second True; head tied: first True, second True
#   5.24.0: logits as alone: first True, second False; head tied: first True, second False
# Ends with 1 when one of the two lines is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat > load.py <<'P'
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(1)
LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=40,
                             initializer_range=0.3, tie_word_embeddings=True)).save_pretrained("base")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15)[None]).logits


alone = {}
for name in ("first", "second"):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("./base"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(name)
    alone[name] = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("./base"), "./" + name))
    assert torch.equal(alone[name], logits(model))

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("./base"), "./first", adapter_name="first")
model.load_adapter("./second", adapter_name="second")
same, tied = [], []
for name in ("first", "second"):
    model.set_adapter(name)
    same.append(f"{name} {torch.equal(logits(model), alone[name])}")
    tied.append(f"{name} {torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)}")
print(f"{transformers.__version__}: logits as alone: {', '.join(same)}; head tied: {', '.join(tied)}")
P
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.7.1
for version in 4.57.6 5.24.0; do
  env/bin/pip install --quiet --disable-pip-version-check "transformers==$version" peft==0.21.2
  CUDA_VISIBLE_DEVICES='' env/bin/python load.py 2>> errors || { cat errors >&2; exit 1; }
done > seen
cat seen
cat > expected <<'T'
4.57.6: logits as alone: first True, second True; head tied: first True, second True
5.24.0: logits as alone: first True, second False; head tied: first True, second False
T
diff expected seen
