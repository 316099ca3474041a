#!/usr/bin/env python3
"""Writes chat_golden.json: what transformers' apply_chat_template makes of one user message, with the generation prompt.

make_chat_golden.py FOLDER...   tokenizer folders whose tokenizer_config.json has a chat_template (transformers 5.24.0 wrote the file here)
The date that llama3's template asks for is given, as its own fallback says it. chatml_plain, chatml_bos and smollm2 are written out below.
"""
import json
import pathlib
import sys

from transformers import AutoTokenizer, PreTrainedTokenizerFast

QUESTIONS = ["What is 2+2?", "Tom has 3 apples,\nthen buys 4. How many?", "  Preis: 5 \u20ac \u00b7 2 =  "]
CHATML = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}" \
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SMOLLM2 = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" \
          "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n'" \
          " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def rendered(tokenizer, template, tokenize):
    out = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question.strip()}]
        made = tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True, tokenize=tokenize,
                                             date_string="26 Jul 2024")
        out.append(list(made["input_ids"]) if tokenize and not isinstance(made, list) else made)
    return out


cases = []
first = None
for folder in map(pathlib.Path, sys.argv[1:]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = first or tokenizer
    template = tokenizer.chat_template
    cases.append({"name": folder.name, "template": template, "texts": rendered(tokenizer, template, False),
                  "ids": rendered(tokenizer, template, True)})
for name, template in (("chatml_plain", CHATML), ("chatml_bos", "{{bos_token}}" + CHATML), ("smollm2", SMOLLM2)):
    cases.append({"name": name, "template": template, "texts": rendered(first, template, False)})
path = pathlib.Path(__file__).parent / "chat_golden.json"
path.write_text(json.dumps({"questions": QUESTIONS, "bos": first.bos_token, "cases": cases}, indent=1, ensure_ascii=True) + "\n")
print(path, len(cases), "cases")
