#!/usr/bin/env python3
"""Writes tokenizer_golden.json: ids and decoded texts of the Hugging Face `tokenizers` library, for tests/io/test_tokenizer.cpp.

usage: make_tokenizer_golden.py SHARED_DATA > tokenizer_golden.json

Holds the ids of nasty texts written here, and SHA-256 digests of the ids over the real data sets, so that neither a tokenizer nor a data
set is shipped. A digest covers, for each line of a data file in order (read as bytes, split at LF, empty ones left out), the ids in
decimal, each followed by a space, then LF.
"""
import hashlib
import json
import pathlib
import sys

import tokenizers

TEXTS = [
    "", " ", "\n", "\t\r\n \n", "hello", "Hello, world!", "He said: 'I'LL do it', they've been; don't", "it\u2019s it'\u017f it'S",
    "1234567890 3.14 1,000 x2y3", "<<600*30/100=180>> <<180+60=240>> #### 360", "The answer is:", "  leading", "trailing   ",
    "a" * 70, "ab" * 45, " " * 40 + "x", "9" * 25, "\n" * 9 + "  \n  x", "caf\u00e9 cafe\u0301 \u1e69 s\u0323\u0307 s\u0307\u0323",
    "\u212b \u2126 \u0344 \u0958 \u1100\u1161\u11a8 \uac00\u11a8 \uac00\u11a7", "\u6f22\u5b57\u304b\u306a\u30ab\u30ca\ud55c\uae00",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1e6\U0001f1fa \u263a\ufe0f", "a\u180eb \u180e\u180e",
    "\ufeffbom \u200b\u200c\u200d\u2060 \u00a0nbsp\u3000wide\u2028\u2029\u0085nel", "\u0000nul\u0000", "\u0001\u0004\u0006\u0013\u001d\u007f",
    "\u0663\u0664 \u0969\u096a \u2167 \u00b2\u00bd \u2460 \U0001d7ce \U00011de0", "\u0301\u0301x \u093c \u0334\u0301a",
    "\u0378\uffff\U0010ffff\ue000\U000e0001\U000e0100", "\U00031350\U0002ebf0\u1c89 \U00010d4a \u0897 \U000105c0", "\u07fd\u0334x \u1abf\u0301 \U00011935\U00011930",
    "<|endoftext|> <|im_start|>user<|im_end|> <|eot_id|><|begin_of_text|>", "<|im_end|", "<tool_call>x</tool_call>", "x <|fim_prefix|><|fim_pre",
    "\u00df \u1e9e \u0130\u0131 \ufb05", "$%^&*()_+-=[]{}|;:,./<>?`~\\\"'", "\u2014\u2013\u2026\u201c\u201d\u00ab\u00bb\u20ac\u00a3", "\U00020000\U0001f600\u0e01\u0e33",
]

FILES = ["gsm8k_aug/train.txt", "gsm8k_aug/valid.txt", "gsm8k_aug/test.txt", "gsm8k_nl/train.txt", "gsm8k_nl/valid.txt", "gsm8k_nl/test.txt",
         "gsm8k_equations/train.txt", "gsm8k/train.jsonl", "gsm8k/test.jsonl", "gsm_hard/gsmhardv2.jsonl", "svamp/SVAMP.json"]


def digest(tokenizer, lines):
    h = hashlib.sha256()
    for encoding in tokenizer.encode_batch(lines, add_special_tokens=False):
        h.update(("".join(f"{i} " for i in encoding.ids) + "\n").encode())
    return h.hexdigest()


def main():
    data = pathlib.Path(sys.argv[1])
    golden = {"tokenizers": tokenizers.__version__, "texts": TEXTS, "models": {}}
    for folder in sorted((data / "tokenizers").iterdir()):
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        encoded = [e.ids for e in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
        tokenizer.encode_special_tokens = True
        golden["models"][folder.name] = {
            "sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
            "size": tokenizer.get_vocab_size(True),
            "with_special": encoded,
            "plain": [e.ids for e in tokenizer.encode_batch(TEXTS, add_special_tokens=False)],
            "decoded": tokenizer.decode_batch(encoded, skip_special_tokens=False),
            "decoded_without_special": tokenizer.decode_batch(encoded, skip_special_tokens=True),
            "files": {f: digest(tokenizer, [line.decode() for line in (data / f).read_bytes().split(b"\n") if line]) for f in FILES},
        }
    json.dump(golden, sys.stdout, ensure_ascii=True, separators=(",", ":"))
    print()


if __name__ == "__main__":
    main()
