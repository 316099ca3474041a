"""One KaVa step in PyTorch, straight from docs/method.md: the independent reference that kava is judged against.

The transformer is transformers' own LlamaForCausalLM or Qwen2ForCausalLM. Every sample runs alone (batch 1, no padding, no packing),
teacher and student apart, nothing pruned and nothing shared but the student's own keys and values of question and bot.
Gradients are torch.autograd's. transformers rounds three places to float32 whatever the dtype (RMSNorm, the rotary angles, the softmax);
they are replaced, so that float64 is float64 throughout.
"""
import json
import math
import pathlib
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import reference_inputs as inputs

BOT, EOT, LATENT = 0, 1, 2


class LoraLinear(nn.Module):
    def __init__(self, base, a, b, scale):
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a, b, scale

    def forward(self, x):
        return self.base(x) + self.scale * ((x @ self.a.T) @ self.b.T)


class Rotary(nn.Module):
    """Angles in f64, cosine and sine rounded to the compute type."""

    def __init__(self, raw):
        super().__init__()
        scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        theta = scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0
        dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        frequencies = [theta ** (-i / dim) for i in range(0, dim, 2)]
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "llama3":
            frequencies = [self.llama3(f, scaling) for f in frequencies]
        elif kind != "default":
            raise inputs.Unsupported(f"rope_type {kind}")
        self.register_buffer("frequencies", torch.tensor(frequencies, dtype=torch.float64), persistent=False)

    @staticmethod
    def llama3(frequency, scaling):
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency

    def forward(self, x, position_ids):
        angles = position_ids[..., None].to(torch.float64) * self.frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


@dataclass
class Pass:
    """What one forward of n rows leaves behind; lists run over layers."""
    hidden: list = field(default_factory=list)      # [n, C] after each block, the last one after the final norm
    queries: list = field(default_factory=list)     # [H, n, D] after RoPE
    keys: list = field(default_factory=list)        # [K, n, D] after RoPE
    plain_keys: list = field(default_factory=list)  # [K, n, D] before RoPE
    values: list = field(default_factory=list)      # [K, n, D]

    @property
    def final(self):
        return self.hidden[-1]


def plain_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention in the dtype of its inputs; leaves queries, keys and values of the new rows with the module."""
    new = query.shape[2]
    module.seen = (query[0], key[0, :, -new:], value[0, :, -new:])
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling + attention_mask
    output = logits.softmax(-1) @ value.repeat_interleave(group, 1)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("plain_attention", plain_attention)


def exact_rms_norm(module):
    def forward(x):
        return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))
    return forward


class Model:
    """A base with its adapter. `trainable` maps names of docs/formats.md section 5 to parameters."""

    def __init__(self, config, dtype, adapter=None):
        folder = pathlib.Path(config["model"]["path"])
        hf = AutoConfig.from_pretrained(folder)
        self.net = AutoModelForCausalLM.from_config(hf, attn_implementation="plain_attention", dtype=torch.float32)
        raw = json.loads((folder / "config.json").read_text())
        self.layers, self.dtype, self.config = hf.num_hidden_layers, dtype, config
        adapter = adapter or config["model"]["adapter"]
        matrices, extras = inputs.load_adapter(config, adapter, self.layers) if adapter else ({}, None)
        full = config["train"]["trainable"] == "all"
        self._load_base(matrices if full and matrices else inputs.load_weights(folder), hf.tie_word_embeddings)
        self.net.to(dtype).requires_grad_(full)
        for module in self.net.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = exact_rms_norm(module)
        self.net.model.rotary_emb = Rotary(raw)
        self.trainable = OrderedDict(self.net.named_parameters()) if full else self._add_lora(matrices, adapter)
        if extras is None:
            extras = self._initial_extras()
        for name in inputs.extra_names(config, self.layers):
            self.trainable[name] = nn.Parameter(extras[name].to(dtype))

    def _load_base(self, weights, tied):
        weights = {name: value for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
        missing, extra = self.net.load_state_dict(weights, strict=False)
        if extra or set(missing) - ({"lm_head.weight"} if tied else set()):
            raise inputs.Unsupported(f"weights: missing {missing}, extra {extra}")
        self.net.tie_weights()

    def _add_lora(self, matrices, adapter):
        lora, trainable = self.config["lora"], OrderedDict()
        generator = torch.Generator().manual_seed(0)
        for path, name in inputs.lora_names(self.layers, lora["targets"]):
            base = self.net.get_submodule(path)
            if not adapter:
                bound = 1 / math.sqrt(base.in_features)
                matrices[f"{name}.lora_A.weight"] = (torch.rand(lora["rank"], base.in_features, generator=generator) * 2 - 1) * bound
                matrices[f"{name}.lora_B.weight"] = torch.zeros(base.out_features, lora["rank"])
            a, b = (nn.Parameter(matrices[f"{name}.lora_{x}.weight"].to(self.dtype)) for x in "AB")
            self.net.set_submodule(path, LoraLinear(base, a, b, lora["alpha"] / lora["rank"]))
            trainable[f"{name}.lora_A.weight"], trainable[f"{name}.lora_B.weight"] = a, b
        return trainable

    def _initial_extras(self):
        if self.config["latent"]["projection"] and inputs.has_latents(self.config):
            raise inputs.Unsupported("without an adapter the projection starts from the engine's own random numbers")
        embedding = self.net.model.embed_tokens.weight.detach()
        head_dim = self.net.model.layers[0].self_attn.head_dim
        extras = {"new_tokens.weight": inputs.initial_new_tokens(embedding).float()}
        for layer in range(self.layers):
            for x in "kv":
                extras[f"kv_projection.{layer}.{x}.weight"] = torch.eye(head_dim)
        return extras

    def embed(self, ids):
        return F.embedding(torch.tensor(ids, dtype=torch.long), self.net.model.embed_tokens.weight)

    def new_token(self, which, count=1):
        return self.trainable["new_tokens.weight"][which : which + 1].expand(count, -1)

    def logits(self, hidden):
        return self.net.lm_head(hidden)

    def project(self, hidden):
        if not self.config["latent"]["projection"]:
            return hidden
        part = lambda name: (self.trainable[f"latent_projection.{name}.weight"], self.trainable[f"latent_projection.{name}.bias"])
        x = F.linear(F.gelu(F.linear(hidden, *part("linear1"))), *part("linear2"))
        return F.layer_norm(x, x.shape[-1:], *part("norm"), eps=1e-5)

    def run(self, embeds, past=None):
        """Forward of n new rows after the m rows whose keys and values are `past` (a list of (keys, values) over layers)."""
        n = embeds.shape[0]
        m = past[0][0].shape[1] if past else 0
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past or []):
            cache.update(keys[None], values[None], layer)
        mask = torch.full((n, m + n), -math.inf, dtype=self.dtype).triu(m + 1)
        result, handles = Pass(), []
        for layer in self.net.model.layers:
            heads = layer.self_attn.head_dim
            handles.append(layer.register_forward_hook(
                lambda _, __, out: result.hidden.append((out[0] if isinstance(out, tuple) else out)[0])))
            handles.append(layer.self_attn.k_proj.register_forward_hook(
                lambda _, __, out, heads=heads: result.plain_keys.append(out[0].unflatten(-1, (-1, heads)).transpose(0, 1))))
        out = self.net.model(inputs_embeds=embeds[None], attention_mask=mask[None, None], past_key_values=cache, use_cache=True,
                             position_ids=torch.arange(m, m + n)[None])
        for handle in handles:
            handle.remove()
        result.hidden[-1] = out.last_hidden_state[0]
        for layer in self.net.model.layers:
            for store, tensor in zip((result.queries, result.keys, result.values), layer.self_attn.seen):
                store.append(tensor)
        return result


def join(*parts):
    """Past of several stretches of rows, each a list of (keys, values) over layers."""
    return [tuple(torch.cat(side, 1) for side in zip(*layer)) for layer in zip(*parts)]


def pairs(done, rows=slice(None)):
    return [(keys[:, rows], values[:, rows]) for keys, values in zip(done.keys, done.values)]


@dataclass
class Student:
    logits: torch.Tensor            # [answer tokens, V]
    inputs: list                    # over passes 0..T: [M, C]
    latents: Pass                   # the M latents of pass T (their rows only)
    tap: list                       # over layers: [C] at the last token before the answer


@dataclass
class Teacher:
    logits: torch.Tensor            # [trace and answer tokens, V]
    done: Pass
    tap: list


def run_student(model, row):
    """Jacobi passes of docs/method.md section 3 in their plain form: every latent in every pass."""
    latent, answer = model.config["latent"], row["answer"]
    count, passes = latent["count"], latent["iterations"]
    residual = latent["update"] == "residual"
    slots = model.new_token(LATENT, count)
    bot = model.new_token(BOT)
    start = len(row["question"]) + 1
    done = model.run(torch.cat((model.embed(row["question"]), bot, slots)))
    prefix = pairs(done, slice(0, start))
    fed, sources, hidden = [slots], torch.cat((bot, slots[:-1])), done.final[start - 1 : -1]
    current = Pass(done.hidden, done.queries, *([x[:, start:] for x in part] for part in (done.keys, done.plain_keys, done.values)))
    rows = model.project(hidden) + (sources if residual else 0)
    for t in range(1, passes + 1):
        if t > 1:
            update = model.project(hidden) + (sources if residual else 0)
            rows = torch.cat((rows[:1], update))
        current = model.run(rows, prefix)
        fed.append(rows)
        sources, hidden = rows[:-1], current.final[:-1]
    tail = model.run(torch.cat((model.new_token(EOT), model.embed(answer))), join(prefix, pairs(current)))
    tap = [h[row["prompt"]] for h in tail.hidden] if row["prompt"] is not None else None
    return Student(model.logits(tail.final[: len(answer)]), fed, current, tap)


def run_no_cot(model, row):
    question, answer = row["question"], row["answer"]
    done = model.run(model.embed(question + answer))
    return Student(model.logits(done.final[len(question) - 1 : -1]), [], None, None)


def run_teacher(model, row):
    question, trace, answer = row["question"], row["trace"], row["answer"]
    done = model.run(model.embed(question + trace + answer))
    tap = None
    if row["prompt"] is not None:
        tap = [h[len(question) + len(trace) + row["prompt"] - 1].detach() for h in done.hidden]
    return Teacher(model.logits(done.final[len(question) - 1 : -1]), done, tap)


def needed_rows(count, passes):
    """(pass, latent) rows that pass T's answer depends on when a latent that is final is not computed again.

    A search over what docs/method.md section 3 says each row reads. Latent j is final from pass j+1 on: its row of any later pass is that row.
    """
    def at(t, j):
        return (min(t, j + 1), j) if t > 0 else (0, j)
    needed, todo = set(), [at(passes, j) for j in range(count)]
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        needed.add(node)
        t, j = node
        todo += [at(t, other) for other in range(j)]
        if t > 0 and j > 0:
            todo.append(at(t - 1, j - 1))
    return needed


def scores(config, keys, queries):
    """(importance, redundancy, score), each [K, n]; keys [K, n, D] and queries [H, a, D] after RoPE."""
    rkv = config["rkv"]
    heads, n, dim = keys.shape
    logits = torch.einsum("kgad,knd->kgan", queries.unflatten(0, (heads, -1)), keys) / math.sqrt(dim)
    if rkv["group"] == "max_logits":
        importance = logits.amax(1).softmax(-1).mean(1)
    elif rkv["group"] == "max_prob":
        importance = logits.softmax(-1).amax(1).mean(1)
    else:
        importance = logits.softmax(-1).mean(1).mean(1)
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = unit @ unit.transpose(1, 2)
    cosine = cosine - torch.diag_embed(torch.diagonal(cosine, dim1=1, dim2=2))
    redundancy = (-cosine.sum(-1) / n).softmax(-1)
    weight = {"cosine": 0.0, "attention": 1.0}.get(rkv["policy"], rkv["lambda"])
    return importance, redundancy, weight * importance + (1 - weight) * redundancy


def select(config, score, count):
    """Indices kept, [min(n, count)], of one head's scores [n]."""
    policy, n = config["rkv"]["policy"], score.shape[0]
    if policy == "crop":
        return list(range(min(n, count)))
    if policy == "uniform":
        return [i * n // count for i in range(count)] if n > count else list(range(n))
    ranked = sorted(range(n), key=lambda i: (-score[i].item(), i))[:count]
    return ranked if config["rkv"]["order"] == "score" else sorted(ranked)


def margin(config, score, count):
    """Smallest gap of scores that decides the selection or its order: how far from a tie the case is."""
    if config["rkv"]["policy"] in ("crop", "uniform"):
        return math.inf
    ranked = score.sort(descending=True).values
    gaps = ranked[:-1] - ranked[1:]
    if config["rkv"]["order"] == "time":
        gaps = gaps[count - 1 : count]
    else:
        gaps = gaps[:count]
    return gaps.min().item() if len(gaps) else math.inf


@dataclass
class Targets:
    """Constants of one sample: the kept pairs, [L, K, M, D], with their validity [M], and what R-KV saw."""
    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor
    kept: torch.Tensor              # [L, K, M]
    importance: torch.Tensor        # [L, K, n]
    redundancy: torch.Tensor
    score: torch.Tensor
    margin: float


@torch.no_grad()
def make_targets(model, row, teacher):
    config, count = model.config, model.config["latent"]["count"]
    begin, end = len(row["question"]), len(row["question"]) + len(row["trace"])
    first = end + (row["prompt"] if config["rkv"]["queries"] == "answer" else 0)
    done, n = teacher.done, end - begin
    heads, _, dim = done.keys[0].shape
    shape = (model.layers, heads, count, dim)
    keys, values = torch.zeros(shape, dtype=model.dtype), torch.zeros(shape, dtype=model.dtype)
    kept = torch.full(shape[:3], -1, dtype=torch.int32)
    seen, smallest = [torch.zeros(model.layers, heads, n, dtype=model.dtype) for _ in range(3)], math.inf
    source = done.keys if config["kv"]["keys"] == "post_rope" else done.plain_keys
    for layer in range(model.layers if n else 0):
        found = scores(config, done.keys[layer][:, begin:end], done.queries[layer][:, first:])
        for store, value in zip(seen, found):
            store[layer] = value
        for head in range(heads):
            chosen = select(config, found[2][head], count)
            smallest = min(smallest, margin(config, found[2][head], count))
            kept[layer, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            keys[layer, head, : len(chosen)] = source[layer][head, begin:end][chosen]
            values[layer, head, : len(chosen)] = done.values[layer][head, begin:end][chosen]
    valid = torch.arange(count) < (count if config["rkv"]["short"] == "zero" else n)
    return Targets(keys, values, valid, kept, *seen, smallest)


def elementwise(kind, student, target):
    difference = student - target
    if kind == "mse":
        return difference * difference
    if kind == "l1":
        return difference.abs()
    size = difference.abs()
    return torch.where(size < 1, 0.5 * size * size, size - 0.5)


def divided_sum(kind, std, student, target):
    """Sum over layers (first axis) of the losses of all elements, each divided by the deviation of its target."""
    losses = elementwise(kind, student, target).flatten(1).sum(1)
    flat = target.flatten(1)
    if std == "none":
        return losses.sum()
    groups = [(losses.sum(), flat.flatten())] if std == "global" else list(zip(losses, flat))
    total = losses.sum() * 0
    for loss, elements in groups:
        deviation = elements.std(unbiased=True).item() if elements.numel() > 1 else 0.0
        if deviation > 0:
            total = total + loss / deviation
    return total


def student_pairs(model, student):
    """[L, K, M, D] keys and values of the latents as they enter L_KV."""
    config, latents = model.config, student.latents
    keys = torch.stack(latents.keys if config["kv"]["keys"] == "post_rope" else latents.plain_keys)
    values = torch.stack(latents.values)
    if config["kv"]["projection"]:
        weight = lambda x: torch.stack([model.trainable[f"kv_projection.{layer}.{x}.weight"] for layer in range(model.layers)])
        keys = torch.einsum("lkmd,led->lkme", keys, weight("k"))
        values = torch.einsum("lkmd,led->lkme", values, weight("v"))
    return keys, values


def forwards(config, count):
    size = config["train"]["micro_batch"] or count
    return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]


def kv_loss(config, parts, own, targets):
    """L_KV over the whole optimiser batch; own = student_pairs of each sample."""
    totals, elements = [0, 0], 0
    for samples in parts:
        at = [(s, m) for s in samples for m in range(len(targets[s].valid)) if targets[s].valid[m]]
        if not at:
            continue
        for side, name in enumerate(("keys", "values")):
            student = torch.stack([own[s][side][:, :, m] for s, m in at], 1)          # [L, valid slots, K, D]
            target = torch.stack([getattr(targets[s], name)[:, :, m] for s, m in at], 1)
            totals[side] = totals[side] + divided_sum(config["kv"]["loss"], config["kv"]["std"], student, target)
        elements += student.numel()
    if not elements:
        return own[0][0].sum() * 0
    loss = 0.5 * (totals[0] / elements + totals[1] / elements)
    layers, heads, _, dim = own[0][0].shape
    return loss * (layers * heads * dim) if config["kv"]["reduction"] == "slot_sum" else loss


def codi_loss(config, parts, student, teacher):
    """L_CODI; student and teacher [L, B, C]."""
    total = 0
    for samples in parts:
        rows = list(samples)
        total = total + divided_sum(config["codi"]["loss"], config["codi"]["std"], student[:, rows], teacher[:, rows])
    return total / student.numel()


def mean_cross_entropy(logits, labels):
    """One mean over all supervised tokens of the batch."""
    rows = torch.cat([x.log_softmax(-1) for x in logits])
    wanted = torch.tensor([i for sample in labels for i in sample], dtype=torch.long)
    return -rows[torch.arange(len(wanted)), wanted].mean()


@dataclass
class Constants:
    """What the step treats as constant, so that finite differences can hold it."""
    targets: list
    codi: torch.Tensor


def forward(model, rows, constants=None):
    """(outputs of docs/formats.md section 6 without gradients, loss, constants)."""
    config = model.config
    parts = forwards(config, len(rows))
    out, zero = packed_ids(rows), torch.zeros((), dtype=model.dtype)
    losses = dict.fromkeys(("student_ce", "teacher_ce", "kv", "codi"), zero)
    teachers = [run_teacher(model, row) for row in rows] if inputs.runs_teacher(config) else []
    run = run_student if inputs.has_latents(config) else run_no_cot
    students = [run(model, row) for row in rows] if inputs.runs_student(config) else []
    if teachers:
        losses["teacher_ce"] = mean_cross_entropy([t.logits for t in teachers], [row["trace"] + row["answer"] for row in rows])
        out["logits.teacher"] = torch.cat([t.logits for t in teachers])
    if students:
        losses["student_ce"] = mean_cross_entropy([s.logits for s in students], [row["answer"] for row in rows])
        out["logits.student"] = torch.cat([s.logits for s in students])
    targets, codi_teacher = [], None
    if inputs.has_latents(config):
        own = [student_pairs(model, s) for s in students]
        out["latent.inputs"] = latent_inputs(config, students)
        out["latent.k"], out["latent.v"] = (torch.stack([pair[side] for pair in own], 1) for side in (0, 1))
    if config["kv"]["weight"] > 0:
        targets = constants.targets if constants else [make_targets(model, row, t) for row, t in zip(rows, teachers)]
        losses["kv"] = kv_loss(config, parts, own, targets)
        out["target.k"] = torch.stack([t.keys for t in targets], 1)
        out["target.v"] = torch.stack([t.values for t in targets], 1)
        out["rkv.kept"] = torch.stack([t.kept for t in targets])
        for name in ("importance", "redundancy", "score"):
            out[f"rkv.{name}"] = torch.cat([getattr(t, name) for t in targets], -1)
    if config["codi"]["weight"] > 0:
        codi_student = torch.stack([torch.stack(s.tap) for s in students], 1)
        codi_teacher = constants.codi if constants else torch.stack([torch.stack(t.tap) for t in teachers], 1).detach()
        losses["codi"] = codi_loss(config, parts, codi_student, codi_teacher)
        out["codi.student"], out["codi.teacher"] = codi_student, codi_teacher
    total = (config["loss"]["student"] * losses["student_ce"] + config["loss"]["teacher"] * losses["teacher_ce"]
             + config["codi"]["weight"] * losses["codi"] + config["kv"]["weight"] * losses["kv"])
    for name, value in {"total": total, **losses}.items():
        out[f"loss.{name}"] = value.reshape(1)
    return {name: value.detach() for name, value in out.items()}, total, Constants(targets, codi_teacher)


def latent_inputs(config, students):
    """[T+1, B, M, C]; with pruning the rows that a pruned step does not compute are zero."""
    fed = torch.stack([torch.stack(s.inputs) for s in students], 1).detach()
    if config["step"]["prune_latents"]:
        latent = config["latent"]
        needed = needed_rows(latent["count"], latent["iterations"])
        for t in range(latent["iterations"] + 1):
            for j in range(latent["count"]):
                if (t, j) not in needed:
                    fed[t, :, j] = 0
    return fed


def packed_ids(rows):
    out = {}
    for part in ("question", "trace", "answer"):
        lengths = torch.tensor([0] + [len(row[part]) for row in rows])
        out[f"ids.{part}"] = torch.tensor([i for row in rows for i in row[part]], dtype=torch.int32)
        out[f"ids.{part}_offsets"] = lengths.cumsum(0).to(torch.int32)
    return out


def step(model, rows):
    """Every tensor of `kava_inspect step`, and the smallest margin of the eviction."""
    out, total, constants = forward(model, rows)
    gradients = torch.autograd.grad(total, list(model.trainable.values()), allow_unused=True)
    for (name, parameter), gradient in zip(model.trainable.items(), gradients):
        out[f"grad.{name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    return {name: value.detach().clone() for name, value in out.items()}, min((t.margin for t in constants.targets), default=math.inf)
