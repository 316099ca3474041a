"""Small tokenizer folders whose files disagree or name tokens that tokenizer.json lacks, for transformers_check.py.

CASES[name] = (files, refused): `files` maps file names to JSON, and kava must give the ids of the library unless `refused`, where the
files contradict each other or versions of the library differ.
"""

TEXTS = ["Hi", "<s>a</s>", "a <x> b", "<y>ab<x>", "ab cab", "e\u0301x", "\u00e9x", "one two onex", " <s> x <s> ", "<e><p><b><u>", "zz <x>"]

CASES = {}


def symbols():
    """GPT-2's printable character of each byte."""
    rest = 0x100
    out = []
    for byte in range(256):
        printable = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
        out.append(chr(byte) if printable else chr(rest))
        rest += not printable
    return out


def tokenizer(added, nfc=False, extra_vocabulary=()):
    vocabulary = {symbol: byte for byte, symbol in enumerate(symbols())}
    vocabulary |= {"ab": 256, "abc": 257, "aa": 258, "aaaa": 259} | dict(extra_vocabulary)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"} if nfc else None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], ["ab", "c"], ["a", "a"], ["aa", "aa"]]}}


def entry(content, special=True, **flags):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special} | flags


def added(id, content, special=True, **flags):
    return {"id": id} | entry(content, special, **flags)


def typed(content, **flags):
    return {"__type": "AddedToken"} | {k: v for k, v in (entry(content) | flags).items() if k != "special"}


def untyped(content, **flags):
    return {k: v for k, v in (entry(content) | flags).items() if k != "special"}


START_END = [added(260, "<s>"), added(261, "</s>")]


def case(name, tokens=None, refused=False, map=None, file=None, nfc=False, vocabulary=(), template=None, **config):
    files = {"tokenizer.json": tokenizer(START_END if tokens is None else tokens, nfc, vocabulary),
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"} | config}
    if template:
        one, text = {"SpecialToken": {"id": template, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        files["tokenizer.json"]["post_processor"] = {"type": "TemplateProcessing", "single": [one, text], "pair": [one, text, text],
                                                     "special_tokens": {template: {"id": template, "ids": [260], "tokens": [template]}}}
    if map is not None:
        files["special_tokens_map.json"] = map
    if file is not None:
        files["added_tokens.json"] = file
    CASES[name] = (files, refused)


def decoder(name, entries, **rest):
    case("decoder " + name, added_tokens_decoder=entries, **rest)


case("plain", bos_token="<s>", eos_token="</s>")
case("bos flag without template", bos_token="<s>", add_bos_token=True, add_eos_token=True, eos_token="</s>")
case("template", template="<s>")
case("bos flag off against the template", template="<s>", bos_token="<s>", add_bos_token=False)
case("eos flag with the template", template="<s>", bos_token="</s>", eos_token="</s>", add_bos_token=True, add_eos_token=True)

decoder("names one more", {"260": entry("<s>"), "262": entry("<x>", False)}, eos_token="</s>")
decoder("names a special one more", {"262": entry("<x>")})
decoder("unsorted", {"263": entry("<y>"), "262": entry("<x>")})
decoder("with a gap", {"265": entry("<x>")}, refused=True)
decoder("gives another id", {"262": entry("<s>")}, refused=True)
decoder("takes an added token's id", {"260": entry("<x>")}, refused=True)
decoder("takes a vocabulary's id", {"256": entry("<x>")}, refused=True)
decoder("adds a token of the vocabulary", {"256": entry("ab", False)})
decoder("gives a token of the vocabulary another id", {"262": entry("ab", False)}, refused=True)
decoder("with content alone", {"262": {"content": "<x>"}})
decoder("with content and special alone", {"262": {"content": "<x>", "special": True}})
decoder("normalized by default", {"262": {"content": "e\u0301"}}, nfc=True)
decoder("not normalized", {"262": entry("e\u0301", False)}, nfc=True)
decoder("changes special to off", {"260": entry("<s>", False)})
decoder("changes special to on", {"260": entry("<s>")}, tokens=[added(260, "<s>", False), added(261, "</s>")])
decoder("changes lstrip", {"260": entry("<s>", lstrip=True)})
decoder("changes rstrip", {"260": entry("<s>", False, rstrip=True)}, tokens=[added(260, "<s>", False)])
decoder("changes single_word", {"260": entry("one", False, single_word=True)}, tokens=[added(260, "one", False)])
decoder("changes normalized", {"260": entry("e\u0301", False, normalized=True)}, tokens=[added(260, "e\u0301", False)], nfc=True)
decoder("empty, and a map", {}, map={"eos_token": "<s>"}, eos_token="</s>")
decoder("and an added_tokens.json that is not read", {"262": entry("<x>")}, file={"<y>": 263})
decoder("and a map that is not read", {"262": entry("<x>")}, eos_token="</s>",
        map={"eos_token": "<s>", "additional_special_tokens": ["<y>"]})
decoder("twice the same", {"262": entry("<x>"), "263": entry("<x>")}, refused=True)
decoder("empty content", {"262": entry("")})
decoder("a string", {"262": "<x>"}, refused=True)
decoder("a key that is no number", {"x": entry("<x>")}, refused=True)

case("added_tokens.json", file={"<x>": 262})
case("added_tokens.json of two", file={"<y>": 263, "<x>": 262})
case("added_tokens.json says the same", file={"<s>": 260, "</s>": 261})
case("added_tokens.json with a gap", file={"<x>": 270}, refused=True)
case("added_tokens.json gives another id", file={"<s>": 262}, refused=True)
case("added_tokens.json gives a lower id", file={"<s>": 100}, refused=True)
case("added_tokens.json takes an added token's id", file={"<x>": 260}, refused=True)
case("added_tokens.json takes a vocabulary's id", file={"<x>": 100}, refused=True)
case("added_tokens.json of the vocabulary", file={"ab": 256})
case("added_tokens.json normalized", file={"e\u0301": 262}, nfc=True)
case("added_tokens.json named as special", file={"e\u0301": 262}, nfc=True, additional_special_tokens=["e\u0301"])
case("added_tokens.json named as eos", file={"<x>": 262}, eos_token="<x>")
case("added_tokens.json with null", file={"<x>": None}, refused=True)
case("added_tokens.json with a string", file={"<x>": "262"}, refused=True)
case("added_tokens.json in a hole", tokens=[], file={"<x>": 261}, vocabulary={"zz": 5000})
case("added_tokens.json behind an added token in a hole", tokens=[added(261, "<s>")], file={"<x>": 262}, vocabulary={"zz": 5000})
HOLE = {"tokens": [added(261, "<s>"), added(5000, "zz", False)], "vocabulary": {"zz": 5000}}
case("added_tokens.json behind the largest id", file={"<x>": 5001}, **HOLE)
case("added_tokens.json before the largest id", file={"<x>": 262}, refused=True, **HOLE)
case("added_tokens.json and new special tokens", tokens=[added(260, "<s>")], file={"<x>": 261}, eos_token="<e>", pad_token="<p>")

case("the map wins", eos_token="</s>", map={"eos_token": "<s>"})
case("the map wins with an object", eos_token="</s>", map={"eos_token": untyped("<s>")})
case("null in the configuration", eos_token=None, map={"eos_token": "</s>"})
case("a typed object", eos_token=typed("</s>"))
case("the map names a new token", map={"eos_token": "<e>"})
case("the map names a new token by an object", map={"pad_token": untyped("<x>", lstrip=True)})
case("new special tokens", eos_token="<e>", pad_token="<p>", bos_token="<b>", unk_token="<u>")
case("a new special token twice", eos_token="<e>", pad_token="<e>")
case("a pad token whose name the map takes away", pad_token="<p>", map={"pad_token": None})
case("a token of the vocabulary is special", pad_token="ab")
case("an added token becomes special", tokens=[added(260, "<s>", False), added(261, "</s>", False)], eos_token="</s>")
case("a list of additional tokens", additional_special_tokens=["<x>", "<y>"], eos_token="<e>")
case("a list of typed objects", additional_special_tokens=[typed("<x>", lstrip=True)])
case("a list that is null", additional_special_tokens=None)
case("a list in the map", map={"additional_special_tokens": ["<x>", "<y>"]})
case("equal lists", additional_special_tokens=["<x>"], map={"additional_special_tokens": ["<x>"]})
case("two lists", additional_special_tokens=["<x>"], map={"additional_special_tokens": ["<y>", "<x>"]}, refused=True)
case("extra tokens by name", extra_special_tokens={"image_token": "<x>"})
case("no extra tokens", extra_special_tokens={})
case("a token under a key of its own", image_token="<x>", refused=True)
case("a known token under a key of its own", image_token="<s>")
