#!/usr/bin/env bash
# A tokenizer folder whose special_tokens_map.json names a special token more than its tokenizer_config.json does.
#
# Versions: transformers 4.57.6 and 5.24.0 (tokenizers as each requires), Python 3.10 or newer; no torch.
# Behaviour: 4.57.6 takes additional_special_tokens from special_tokens_map.json where tokenizer_config.json has no added_tokens_decoder.
#            5.24.0 takes the list of tokenizer_config.json and never looks at the other file, though it still takes eos_token and the like
#            from there. So one folder decodes to different texts: what 4.57.6 leaves out as special, 5.24.0 prints.
# Output seen (the last two lines of this script):
#   4.57.6: special <eos> <unk> <bot> <eot>; decoded "a b"
#   5.24.0: special <eos> <unk> <bot>; decoded "a b <eot>"
# Ends with 1 when one of the two lines is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

mkdir folder
cat > make.py <<'P'
import json
from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "<bot>": 4, "<eot>": 5}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.save("folder/tokenizer.json")
names = {"eos_token": "<eos>", "unk_token": "<unk>"}
config = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<bot>"]}
json.dump(config, open("folder/tokenizer_config.json", "w"))
json.dump({**names, "additional_special_tokens": ["<bot>", "<eot>"]}, open("folder/special_tokens_map.json", "w"))
P
cat > load.py <<'P'
import transformers
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("./folder")
ids = tokenizer("a <bot> b <eot>")["input_ids"]
print(f'{transformers.__version__}: special {" ".join(tokenizer.all_special_tokens)}; decoded "{tokenizer.decode(ids, skip_special_tokens=True)}"')
P
for version in 4.57.6 5.24.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
done
env-4.57.6/bin/python make.py
for version in 4.57.6 5.24.0; do
  TRANSFORMERS_VERBOSITY=error "env-$version/bin/python" load.py 2> "errors-$version" | tail -n 1
done > seen
cat seen
cat > expected <<'T'
4.57.6: special <eos> <unk> <bot> <eot>; decoded "a b"
5.24.0: special <eos> <unk> <bot>; decoded "a b <eot>"
T
diff expected seen
