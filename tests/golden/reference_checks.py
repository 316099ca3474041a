"""Checks of the reference against itself and against transformers; run by make_golden.py before it writes anything."""
import copy
import json
import math

import torch
from transformers import AutoModelForCausalLM

import reference_inputs as inputs
import reference_step as reference


def relative_error(value, exact):
    """|value - exact| / |exact| in the root-mean-square norm; the absolute error where exact is zero."""
    difference = (value.to(torch.float64) - exact.to(torch.float64)).norm().item()
    size = exact.to(torch.float64).norm().item()
    return difference / size if size > 0 else difference


def require(name, error, limit):
    print(f"{name:64} {error:.1e} (at most {limit:.0e})")
    if not error <= limit:
        raise SystemExit(f"check failed: {name}")


def check_logits(here):
    """Our use of transformers' modules gives the logits of the untouched model, whole and split over two passes."""
    for folder in sorted((here / "models").iterdir()):
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        config = copy.deepcopy(inputs.DEFAULTS)
        config.update(method="full_cot")
        gpt2 = inputs.is_gpt2(json.loads((folder / "config.json").read_text()))
        config["model"]["path"], config["lora"]["targets"] = str(folder), ["c_attn" if gpt2 else "q_proj"]
        ids = [1] + [(7 * i * i + 11 * i) % 50 + 10 for i in range(39)]
        with torch.no_grad():
            expected = plain(torch.tensor([ids])).logits[0]
            exact = reference.Model(config, torch.float64)
            whole = exact.logits(exact.run(exact.embed(ids)).final)
            head = exact.run(exact.embed(ids[:15]))
            split = exact.run(exact.embed(ids[15:]), reference.pairs(head))
        require(f"{folder.name}: logits equal transformers' in f32", relative_error(whole, expected), 1e-5)
        require(f"{folder.name}: logits in two passes equal those in one", relative_error(exact.logits(split.final), whole[15:]), 1e-12)


def growing_loop(model, row):
    """CODI's loop written apart: the sequence grows by one latent, everything is recomputed, no cache."""
    residual = model.config["latent"]["update"] == "residual"
    embeds = torch.cat((model.embed(row["question"]), model.new_token(reference.BOT)))
    for _ in range(model.config["latent"]["count"]):
        latent = model.project(model.run(embeds).final[-1:])
        previous = model.new_token(reference.BOT) if len(embeds) == len(row["question"]) + 1 else embeds[-1:]
        embeds = torch.cat((embeds, latent + previous if residual else latent))
    return answer_loss(model, row, embeds)


def pause_tokens(model, row):
    count = model.config["latent"]["count"]
    tokens = (model.new_token(reference.BOT), model.new_token(reference.LATENT, count))
    return answer_loss(model, row, torch.cat((model.embed(row["question"]), *tokens)))


def answer_loss(model, row, prefix):
    answer = model.embed(row["answer"])
    hidden = model.run(torch.cat((prefix, model.new_token(reference.EOT), answer))).final[len(prefix) : -1]
    return reference.mean_cross_entropy([model.logits(hidden)], [row["answer"]])


def check_against_loop(here, toml, loop, label):
    config = inputs.load_config(here / "cases" / toml)
    model, rows = reference.Model(config, torch.float64), inputs.load_rows(config)
    values, limit = list(model.trainable.values()), 1e-12
    for row in rows[:2]:
        own = reference.mean_cross_entropy([reference.run_student(model, row).logits], [row["answer"]])
        other = loop(model, row)
        require(f"{toml}: {label}: loss", abs(own.item() - other.item()), limit)
        pair = [torch.autograd.grad(x, values, allow_unused=True, materialize_grads=True) for x in (own, other)]
        require(f"{toml}: {label}: gradients", max(relative_error(a, b) for a, b in zip(*pair)), 1e-10)


def check_first_slots(here):
    """For T < M exactly the first T slots agree with the sequential loop."""
    config = inputs.load_config(here / "cases" / "kava_sequential.toml")
    rows = inputs.load_rows(config)
    shorter = copy.deepcopy(config)
    shorter["latent"]["iterations"] = 2
    last = [reference.run_student(reference.Model(c, torch.float64), rows[0]).inputs[-1].detach() for c in (config, shorter)]
    same = [relative_error(a, b) < 1e-12 for a, b in zip(*last)]
    if same != [True, True] + [False] * (len(same) - 2):
        raise SystemExit(f"check failed: slots that agree with the sequential loop: {same}")
    print(f"slots that agree with the sequential loop at T = 2: {same}")


def check_pruned_rows():
    counts = {(24, 3): 87, (24, 0): 24, (6, 6): 6, (1, 1): 1, (3, 5): 3}
    for (count, passes), expected in counts.items():
        needed = reference.needed_rows(count, passes)
        if len(needed) != expected:
            raise SystemExit(f"check failed: {len(needed)} of {expected} latent rows at M={count}, T={passes}")
        for t, j in needed:
            if passes <= count and not (t - 1 <= j <= count - 1 - (passes - t)):
                raise SystemExit(f"check failed: row {t, j} at M={count}, T={passes}")
    print(f"latent rows of a pruned step: {counts}")


def check_differences(here, toml, entries=3, width=1e-5):
    """Five-point differences of the loss with the constants held, for a few entries of every trainable tensor."""
    config = inputs.load_config(here / "cases" / toml)
    model, rows = reference.Model(config, torch.float64), inputs.load_rows(config)
    _, total, constants = reference.forward(model, rows)
    gradients = torch.autograd.grad(total, list(model.trainable.values()))
    loss = lambda: reference.forward(model, rows, constants)[1].item()
    worst = 0.0
    with torch.no_grad():
        for parameter, gradient in zip(model.trainable.values(), gradients):
            flat, size = parameter.view(-1), gradient.abs().max().item()
            for index in [(k * 7919 + 3) % flat.numel() for k in range(entries)]:
                kept = flat[index].item()
                at = {}
                for offset in (-2, -1, 1, 2):
                    flat[index] = kept + offset * width
                    at[offset] = loss()
                flat[index] = kept
                slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * width)
                worst = max(worst, abs(slope - gradient.flatten()[index].item()) / size)
    require(f"{toml}: gradients equal differences", worst, 1e-6)


def check_against_formulas():
    """std, smooth L1 and selection against PyTorch's own or by hand."""
    random = torch.Generator().manual_seed(1)
    student, target = (torch.randn(3, 4, 5, generator=random, dtype=torch.float64) * 2 for _ in range(2))
    own = reference.divided_sum("smooth_l1", "layer", student, target) / student.numel()
    expected = torch.stack([torch.nn.functional.smooth_l1_loss(s, t) / t.std() for s, t in zip(student, target)]).mean()
    require("smooth L1 by layer equals the mean over layers of loss / std", abs((own - expected).item()), 1e-14)
    constant = torch.ones(1, 4, 5, dtype=torch.float64)
    if reference.divided_sum("mse", "layer", student[:1], constant).item() != 0:
        raise SystemExit("check failed: a zero std must give zero")
    keys, queries = torch.randn(2, 7, 4, generator=random).double(), torch.randn(6, 3, 4, generator=random).double()
    config = copy.deepcopy(inputs.DEFAULTS)
    importance, redundancy, _ = reference.scores(config, keys, queries)
    by_hand = []
    for i in range(7):
        cosines = [torch.dot(keys[1, i], keys[1, j]).item() / keys[1, i].norm().item() / keys[1, j].norm().item() for j in range(7) if j != i]
        by_hand.append(-sum(cosines) / 7)
    by_hand = torch.tensor(by_hand, dtype=torch.float64).softmax(0)
    require("redundancy equals the double loop", relative_error(redundancy[1], by_hand), 1e-7)
    by_hand = torch.zeros(7, dtype=torch.float64)
    for j in range(3):
        logits = [max(torch.dot(queries[h, j], keys[0, i]).item() / 2 for h in range(3)) for i in range(7)]
        total = sum(math.exp(x) for x in logits)
        by_hand += torch.tensor([math.exp(x) / total / 3 for x in logits], dtype=torch.float64)
    require("importance equals the double loop", relative_error(importance[0], by_hand), 1e-12)


def run(here):
    check_against_formulas()
    check_pruned_rows()
    check_logits(here)
    check_against_loop(here, "kava_sequential.toml", growing_loop, "T = M is the growing loop")
    check_against_loop(here, "codi.toml", growing_loop, "T = M is the growing loop")
    check_against_loop(here, "codi_residual.toml", growing_loop, "T = M is the growing loop")
    check_against_loop(here, "kava_pause.toml", pause_tokens, "T = 0 is pause tokens")
    check_first_slots(here)
    for toml in ("kava_defaults.toml", "kava_pre_rope_projected.toml", "qwen2_all.toml", "coconut_projected.toml", "codi_exact.toml", "qwen3_all.toml",
                 "gpt2_all.toml", "gpt2_codi_exact_all.toml"):
        check_differences(here, toml)
