"""The students of coconut and icot: written apart from the Jacobi passes, one sequence that grows and no cache."""
import torch
import torch.nn.functional as F

from reference_model import BOT, EOT, LATENT, Pass, Student, student_pairs


def run_coconut(model, row):
    """One latent after the other on a growing sequence without cache, each fed with the final hidden state before it; then the rest."""
    keys, count = model.config["coconut"], row["latents"]
    embeds = model.embed(row["question"])
    if keys["markers"]:
        embeds = torch.cat((embeds, model.new_token(BOT)))
    start, fed = len(embeds), []
    for _ in range(count):
        if keys["feedback"] == "none":
            latent = model.new_token(LATENT)
        else:
            latent = model.project(model.run(embeds).final[-1:])
            if model.config["latent"]["update"] == "residual":
                latent = latent + embeds[-1:]
        embeds, fed = torch.cat((embeds, latent)), fed + [latent]
    said = row["rest"] + row["answer"]
    if keys["markers"]:
        embeds = torch.cat((embeds, model.new_token(EOT)))
    first = len(embeds) - 1
    done = model.run(torch.cat((embeds, model.embed(said))))
    latents = Pass(*(None,) * 3, *([x[:, start : start + count] for x in part] for part in (done.keys, done.plain_keys, done.values)))
    return Student(model.logits(done.final[first:-1]), fed, latents, None)


def run_icot(model, row):
    question, said = row["question"], row["rest"] + row["answer"]
    positions = torch.arange(len(question) + len(said))
    if model.config["icot"]["keep_positions"]:
        right = model.config["icot"]["side"] == "right"
        gap = len(question) + (len(row["rest"]) if right else 0)  # the first token behind it
        positions[gap - 1 :] += len(row["trace"]) - len(row["rest"])
    done = model.run(model.embed(question + said), positions=positions)
    return Student(model.logits(done.final[len(question) - 1 : -1]), [], None, None)


def coconut_latents(model, rows, students):
    """latent.inputs [T+1, B, N, C]: latent t-1 at [t, b, t-1], or with the learned row all in pass 0; latent.k, latent.v [L, B, K, N, D]."""
    config, most = model.config, max(row["latents"] for row in rows)
    pause = config["coconut"]["feedback"] == "none"
    width = model.net.config.hidden_size
    fed = torch.zeros(1 if pause else most + 1, len(rows), most, width, dtype=model.dtype)
    sides = []
    for b, student in enumerate(students):
        for i, latent in enumerate(student.inputs):
            fed[0 if pause else i + 1, b, i] = latent[0].detach()
        sides.append([F.pad(x, (0, 0, 0, most - x.shape[-2])) for x in student_pairs(model, student)])
    return {"latent.inputs": fed, "latent.k": torch.stack([s[0] for s in sides], 1), "latent.v": torch.stack([s[1] for s in sides], 1)}
