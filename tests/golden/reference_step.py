"""One KaVa step in PyTorch, straight from docs/method.md: the independent reference that kava is judged against.

The transformer is transformers' own LlamaForCausalLM or Qwen2ForCausalLM. Every sample runs alone (batch 1, no padding, no packing),
teacher and student apart, nothing pruned and nothing shared but the student's own keys and values of question and bot.
Gradients are torch.autograd's.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import reference_inputs as inputs
from reference_baselines import coconut_latents, run_coconut, run_icot
from reference_model import BOT, EOT, LATENT, Model, Pass, Student, Teacher, join, pairs, student_pairs


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
    current = Pass(done.hidden, done.embeds, done.queries, *([x[:, start:] for x in part] for part in (done.keys, done.plain_keys, done.values)))
    rows = model.project(hidden) + (sources if residual else 0)
    for t in range(1, passes + 1):
        if t > 1:
            update = model.project(hidden) + (sources if residual else 0)
            rows = torch.cat((rows[:1], update))
        current = model.run(rows, prefix)
        fed.append(rows)
        sources, hidden = rows[:-1], current.final[:-1]
    tail = model.run(torch.cat((model.new_token(EOT), model.embed(answer))), join(prefix, pairs(current)))
    tap = [h[row["tap"]] for h in tapped(model.config, tail)] if row["tap"] is not None else None
    return Student(model.logits(tail.final[: len(answer)]), fed, current, tap)


def tapped(config, done):
    """States that L_CODI compares: after the blocks, and before them with codi.states = "all"."""
    return ([done.entered] if config["codi"]["states"] == "all" else []) + done.hidden


def run_no_cot(model, row):
    question, answer = row["question"], row["answer"]
    done = model.run(model.embed(question + answer))
    return Student(model.logits(done.final[len(question) - 1 : -1]), [], None, None)


def run_teacher(model, row):
    question, trace, answer = row["question"], row["trace"], row["answer"]
    done = model.run(model.embed(question + trace + answer))
    tap = None
    if row["tap"] is not None:
        tap = [h[len(question) + len(trace) + row["tap"] - 1].detach() for h in tapped(model.config, done)]
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


def divided_sum(kind, std, student, target, power=1):
    """Sum over layers (first axis) of the losses of all elements, each divided by the deviation of its target (or by its power)."""
    losses = elementwise(kind, student, target).flatten(1).sum(1)
    flat = target.flatten(1)
    if std == "none":
        return losses.sum()
    groups = [(losses.sum(), flat.flatten())] if std == "global" else list(zip(losses, flat))
    total = losses.sum() * 0
    for loss, elements in groups:
        deviation = elements.std(unbiased=True).item() if elements.numel() > 1 else 0.0
        if deviation > 0:
            total = total + loss / deviation**power
    return total


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
        power = config["codi"]["mse_std"] if config["codi"]["loss"] == "mse" else 1
        total = total + divided_sum(config["codi"]["loss"], config["codi"]["std"], student[:, rows], teacher[:, rows], power)
    return total / student.numel()


def cross_entropy(config, parts, logits, labels):
    """One mean over all supervised tokens, or the mean over the forwards of theirs."""
    if config["loss"]["mean"] == "batch":
        return mean_cross_entropy(logits, labels)
    return sum(mean_cross_entropy([logits[s] for s in part], [labels[s] for s in part]) for part in parts) / len(parts)


def mean_cross_entropy(logits, labels):
    """One mean over all supervised tokens."""
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
    out, zero = packed_ids(config, rows), torch.zeros((), dtype=model.dtype)
    losses = dict.fromkeys(("student_ce", "teacher_ce", "kv", "codi"), zero)
    teachers = [run_teacher(model, row) for row in rows] if inputs.runs_teacher(config) else []
    run = {"no_cot": run_no_cot, "icot": run_icot, "coconut": run_coconut}.get(config["method"], run_student)
    students = [run(model, row) for row in rows] if inputs.runs_student(config) else []
    if teachers:
        losses["teacher_ce"] = cross_entropy(config, parts, [t.logits for t in teachers], [row["trace"] + row["answer"] for row in rows])
        out["logits.teacher"] = torch.cat([t.logits for t in teachers])
    if students:
        losses["student_ce"] = cross_entropy(config, parts, [s.logits for s in students], [row["rest"] + row["answer"] for row in rows])
        out["logits.student"] = torch.cat([s.logits for s in students])
    targets, codi_teacher = [], None
    if inputs.has_latents(config):
        own = [student_pairs(model, s) for s in students]
        out["latent.inputs"] = latent_inputs(config, students)
        out["latent.k"], out["latent.v"] = (torch.stack([pair[side] for pair in own], 1) for side in (0, 1))
    if config["method"] == "coconut" and any(row["latents"] for row in rows):
        out.update(coconut_latents(model, rows, students))
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


def packed_ids(config, rows):
    out, staged = {}, config["method"] in ("icot", "coconut")
    for part in ("question", "trace", "answer"):
        source = "rest" if part == "trace" and staged else part
        lengths = torch.tensor([0] + [len(row[source]) for row in rows])
        out[f"ids.{part}"] = torch.tensor([i for row in rows for i in row[source]], dtype=torch.int32)
        out[f"ids.{part}_offsets"] = lengths.cumsum(0).to(torch.int32)
    return out


def step(model, rows):
    """Every tensor of `kava_inspect step`, and the smallest margin of the eviction."""
    out, total, constants = forward(model, rows)
    trained = {name: x for name, x in model.trainable.items() if name != "new_tokens.weight" or model.config["latent"]["tokens"] == "trained"}
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    for (name, parameter), gradient in zip(trained.items(), gradients):
        out[f"grad.{name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    return {name: value.detach().clone() for name, value in out.items()}, min((t.margin for t in constants.targets), default=math.inf)
