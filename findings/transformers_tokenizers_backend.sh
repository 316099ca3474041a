#!/usr/bin/env bash
# A tokenizer folder read and written again by transformers 5, unchanged, can no longer be read by transformers 4.
#
# Versions: transformers 5.24.0 writes, 4.57.6 reads (tokenizers as each requires), Python 3.10 or newer; no torch.
# Behaviour: for a folder of class PreTrainedTokenizerFast, which is what Llama 3 names, save_pretrained of 5.24.0 writes the class
#            TokenizersBackend. 4.57.6 knows no such class and raises ValueError, though tokenizer.json itself is as before. 5.24.0 reads
#            both folders.
# Output seen (the last four lines of this script):
#   4.57.6: given PreTrainedTokenizerFast
#   4.57.6: written by 5.24.0 ValueError
#   5.24.0: given TokenizersBackend
#   5.24.0: written by 5.24.0 TokenizersBackend
# Ends with 1 when one of the lines is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

mkdir given
cat > make.py <<'P'
import json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.save("given/tokenizer.json")
config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
json.dump(config, open("given/tokenizer_config.json", "w"))
AutoTokenizer.from_pretrained("./given").save_pretrained("written")
P
cat > load.py <<'P'
import transformers
from transformers import AutoTokenizer

for folder, said in (("given", "given"), ("written", "written by 5.24.0")):
    try:
        outcome = type(AutoTokenizer.from_pretrained("./" + folder)).__name__
    except ValueError:
        outcome = "ValueError"
    print(f"{transformers.__version__}: {said} {outcome}")
P
for version in 4.57.6 5.24.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
done
env-5.24.0/bin/python make.py 2> errors
for version in 4.57.6 5.24.0; do
  TRANSFORMERS_VERBOSITY=error "env-$version/bin/python" load.py 2>> errors
done > seen
cat seen
cat > expected <<'T'
4.57.6: given PreTrainedTokenizerFast
4.57.6: written by 5.24.0 ValueError
5.24.0: given TokenizersBackend
5.24.0: written by 5.24.0 TokenizersBackend
T
diff expected seen
