"""Text rows to ids, written from docs/baselines.md section 1 with the tokenizers package; drawn text for it.

A row is {"question", "steps", "answer"} of text. The parts are stripped, get their affixes, are tokenised apart and put together.
"""
import json
import pathlib

from tokenizers import Tokenizer

METHOD_TEXT = {
    "icot": {"drop_last_step": False, "question_prefix": " ", "question_suffix": " ", "trace_prefix": " ", "trace_suffix": " ",
             "step_separator": " ", "answer_prompt": " ####", "answer_prefix": " ", "answer_suffix": " ", "answer_commas": "remove",
             "separator": "eos"},
    "coconut": {"drop_last_step": False, "question_suffix": "\n", "step_suffix": "\n", "answer_prompt": "###", "answer_prefix": " "},
    "codi_exact": {"step_separator": " ", "answer_prefix": " ", "answers": "digit"},
    "full_cot": {"drop_last_step": False},
}
DEFAULT_TEXT = {"drop_last_step": True, "question_prefix": "", "question_suffix": "", "trace_prefix": "", "trace_suffix": "",
                "step_separator": "", "step_suffix": "", "answer_prompt": "The answer is:", "answer_prefix": "", "answer_suffix": "",
                "answer_commas": "keep", "separator": "none", "answers": "all"}


def text_keys(method, given):
    return DEFAULT_TEXT | METHOD_TEXT.get(method, {}) | given


class Text:
    """A tokenizer folder as the engine reads it: text is text, also where it spells a special token."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.files = [file for file in folder.iterdir() if file.name.startswith(("tokenizer", "special_tokens", "added_tokens"))]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True
        self.bos = self.tokenizer.encode("").ids
        self.size = self.tokenizer.get_vocab_size()
        self.eos = self.end_of_sequence(folder)  # None: config.json says it

    def end_of_sequence(self, folder):
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = json.loads((folder / name).read_text()).get("eos_token") if (folder / name).exists() else None
            if token:
                return self.tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)
        return None

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def sample(self, keys, row, config_eos):
        """The row of form `ids`, and the row that codi.token = "before_answer" distils as `tap`; nothing where data.answers drops it."""
        eos = config_eos if self.eos is None else self.eos
        answer, steps = row["answer"], row["steps"][:-1] if keys["drop_last_step"] else row["steps"]
        if keys["answer_commas"] == "remove":
            answer = answer.replace(",", "")
        if keys["answers"] == "digit" and not answer[0].isdigit():
            return None
        end = [eos] if keys["separator"] == "eos" else []
        question = self.bos + self.ids(keys["question_prefix"] + row["question"] + keys["question_suffix"]) + end
        trace = [self.ids((keys["step_separator"] if i else keys["trace_prefix"]) + step + keys["step_suffix"]
                          + (keys["trace_suffix"] if i == len(steps) - 1 else "")) for i, step in enumerate(steps)]
        prompt = end + self.ids(keys["answer_prompt"])
        said = self.ids(keys["answer_prefix"] + answer + keys["answer_suffix"])
        blank = bool(said) and not self.tokenizer.decode(said[:1]).strip()
        return {"question": question, "trace": trace, "answer": prompt + said + [eos], "prompt": len(prompt), "blank": blank}


WORDS = ("Tom has 12 apples", "How many?", "3,5 of them", "café", "東京", "naïve", "a  b", "It costs $4.50", "the", "15%", "<|endoftext|>", "x")


def draw_text(draw):
    """Rows as JSONL holds them: no outer white space, no empty part."""
    rows = []
    for row in range(draw.of(1, 5)):
        steps = []
        for _ in range(draw.of(0 if row else 2, 4)):  # text without any trace is refused where a loss needs one
            a, b = draw.of(1, 40), draw.of(1, 40)
            steps.append(draw.one(f"<<{a}+{b}={a + b}>>", f"<<{a}*{b}={a * b}>>", f"{a} and {b} are {a + b}."))
        question = " ".join(draw.one(*WORDS) for _ in range(draw.of(1, 4)))
        rows.append({"question": question, "steps": steps, "answer": draw.one(str(draw.of(0, 99)), f"{draw.of(1, 9)},000", "-3", "0.5", ".5")})
    return rows


def draw_text_keys(draw, method):
    """Keys of [data] that differ from a method's, most often none."""
    keys = {}
    for name in ("question_prefix", "question_suffix", "trace_prefix", "trace_suffix", "step_separator", "step_suffix", "answer_prefix",
                 "answer_suffix"):
        if draw.maybe(0.15):
            keys[name] = draw.one("", " ", "\n", " ", "Q: ", ".\n")
    if draw.maybe(0.3):
        keys["answer_prompt"] = draw.one("The answer is:", "###", " ####", "")
    if method != "full_cot" and draw.maybe(0.2):
        keys["drop_last_step"] = draw.maybe()
    if draw.maybe(0.2):
        keys["separator"] = draw.one("none", "eos")
    if draw.maybe(0.2):
        keys["answer_commas"] = draw.one("keep", "remove")
    if draw.maybe(0.2):
        keys["answers"] = draw.one("all", "digit")
    return keys
