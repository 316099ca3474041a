"""The rival of `kava_bench`: the same KaVa step with PyTorch, transformers and PEFT, timed on the CPU or a GPU.

    python torch_reference.py [--device cpu] [--shape smollm2|llama1b] [--threads 2] [--batch 32] [--steps 2] [--packed] [--lengths FILE]
                              [--dtype bf16|f32]

The step: SmolLM2-135M's or Llama-3.2-1B's shape with random weights, method kava with its defaults, LoRA r 128 on q, k, v, o with dropout 0.1, forward,
backward, clipping, AdamW. Weights and activations are in --dtype throughout: no autocast, which would only cost the rival time.
* As upstream writes it (default): samples padded to the longest of the batch, teacher and student apart, the question once in each,
  every latent in every pass, logits at every position of the teacher's and of the answer's pass (none in the latent passes).
* --packed: no padding but in attention, whose samples are one masked call, logits on supervised rows alone, some rows at a time and again
  in backward. The stronger form.

Row lengths. With h(n): x = (n + 1) * 0x9E3779B97F4A7C15; x ^= x >> 32; x *= 0xD6E8FEB86659FD93; x ^= x >> 32 (unsigned 64-bit) and
u_k = h(4 (s + 20480) + k) >> 48 of sample s = 0, 1, ..., integer arithmetic throughout:
    question = 20 + (26 u_0 >> 16) + (54 u_1^3 >> 48)                          mean 45.6, BOS included (44.6 at batch 32)
    steps    = (u_2 >= 6554) + (u_2 >= 36045) + (u_2 >= 55706) + (u_2 >= 62259)
    trace    = 0 if steps is 0, else 8 steps - 1 + (3 (u_3 & 255) >> 8)          mean 12.6, 0 for a tenth of the rows
    answer   = 6 + (u_3 < 19661)                                                prompt of 4, answer of 1 or 2, EOS: mean 6.3
Token i of the whole batch (questions, traces and answers in sample order) is 3 + h(2^32 + i) mod (V - 3); only its cost matters.
--lengths reads a JSON list of [question, trace, answer] instead.
"""
import argparse
import json
import math
import statistics
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "vocab_size": 49152, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "max_position_embeddings": 8192}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
LATENTS, PASSES, PROMPT = 24, 3, 4
LAMBDA, KV_WEIGHT, CODI_WEIGHT = 0.1, 1.0, 10.0
CHUNK = 1024              # rows of logits at a time in the packed form
FIRST_SAMPLE = 20480      # where the first 32 and the first 128 rows have the means of real data
MASK64 = (1 << 64) - 1


class Remembered:
    """What depends on the rows alone: made in the first step, which is not timed, and taken again in the same order in the others."""

    def __init__(self):
        self.made, self.at = [], 0

    def __call__(self, make):
        if self.at == len(self.made):
            self.made.append(make())
        self.at += 1
        return self.made[self.at - 1]


once = Remembered()


def hashed(n):
    x = (n + 1) * 0x9E3779B97F4A7C15 & MASK64
    x ^= x >> 32
    x = x * 0xD6E8FEB86659FD93 & MASK64
    return x ^ (x >> 32)


def row_lengths(count):
    rows = []
    for s in range(FIRST_SAMPLE, FIRST_SAMPLE + count):
        u = [hashed(4 * s + k) >> 48 for k in range(4)]
        question = 20 + (26 * u[0] >> 16) + (54 * u[1] ** 3 >> 48)
        steps = sum(u[2] >= limit for limit in (6554, 36045, 55706, 62259))
        trace = 8 * steps - 1 + (3 * (u[3] & 255) >> 8) if steps else 0
        rows.append((question, trace, 6 + (u[3] < 19661)))
    return rows


def rows_of(lengths):
    vocabulary, at, rows = SHAPE["vocab_size"], 1 << 32, []
    for sample in lengths:
        parts = []
        for length in sample:
            parts.append([3 + hashed(at + i) % (vocabulary - 3) for i in range(length)])
            at += length
        rows.append(SimpleNamespace(question=parts[0], trace=parts[1], answer=parts[2]))
    return rows


class Network(nn.Module):
    def __init__(self, dtype, attention):
        super().__init__()
        base = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE, initializer_range=SHAPE["hidden_size"] ** -0.5),
                                             attn_implementation=attention, dtype=dtype)
        lora = LoraConfig(r=128, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        self.peft = get_peft_model(base, lora, autocast_adapter_dtype=False)
        self.causal = base
        hidden = SHAPE["hidden_size"]
        self.new_tokens = nn.Parameter(base.model.embed_tokens.weight.mean(0, keepdim=True).repeat(3, 1))
        self.project = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
        with torch.no_grad():
            self.project[3].weight.fill_(base.model.embed_tokens.weight.float().pow(2).mean().sqrt())
        self.to(dtype)

    def embed(self, ids):
        """Ids from V on are bot, eot and latent."""
        vocabulary = SHAPE["vocab_size"]
        known = F.embedding(ids.clamp(max=vocabulary - 1), self.causal.model.embed_tokens.weight)
        return torch.where((ids >= vocabulary)[:, None], F.embedding((ids - vocabulary).clamp(min=0), self.new_tokens), known)


class Padded:
    """Passes as [B, S] with a padding mask; the question is padded on the left, everything else on the right."""
    attention = "seen_sdpa"

    def __init__(self, network):
        self.network = network

    def run(self, embeds, lengths, past=None, left=False):
        """embeds [sum of lengths, C] packed in sample order. Returns packed tensors, and `padded` for the logits."""
        size, count = max(lengths), len(lengths)

        def places():
            index = torch.cat([torch.arange(n) + b * size + (size - n if left else 0) for b, n in enumerate(lengths)])
            mask = torch.zeros(count * size, dtype=torch.long).index_fill(0, index, 1).view(count, size)
            before = past.mask if past else torch.zeros(count, 0, dtype=torch.long)
            return index, (before.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0), torch.cat((before, mask), 1)

        index, positions, mask = once(places)
        cache = DynamicCache()
        for layer, pair in enumerate(past.pairs if past else []):
            cache.update(*pair, layer)
        rows = torch.zeros(count * size, embeds.shape[1], dtype=embeds.dtype).index_copy(0, index, embeds).view(count, size, -1)
        out = self.network.causal.model(inputs_embeds=rows, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                        use_cache=True, output_hidden_states=True)
        seen = [layer.self_attn.seen for layer in self.network.causal.model.layers]
        flat = lambda x: x[:, :, -size:].transpose(0, 1).flatten(1, 2)[:, index]
        return SimpleNamespace(hidden=[h.flatten(0, 1)[index] for h in out.hidden_states[1:]], padded=out.last_hidden_state, index=index,
                               queries=[flat(q) for q, _, _ in seen], keys=[flat(k) for _, k, _ in seen],
                               values=[flat(v) for _, _, v in seen],
                               past=SimpleNamespace(pairs=[(k, v) for _, k, v in seen], mask=mask))

    def prefix(self, done, dropped):
        """The past without the last `dropped` rows of every sample."""
        return SimpleNamespace(pairs=[(k[:, :, :-dropped], v[:, :, :-dropped]) for k, v in done.past.pairs], mask=done.past.mask[:, :-dropped])

    def cross_entropy(self, done, rows, labels):
        """Logits at every position, the mean over those that have a label."""
        count = done.padded.shape[0] * done.padded.shape[1]
        wanted = once(lambda: torch.full((count,), -100).index_copy(0, done.index[rows], labels))
        return F.cross_entropy(self.network.causal.lm_head(done.padded).flatten(0, 1).float(), wanted)


class Packed:
    """Passes as [1, R]; rows are padded to samples where attention needs them so."""
    attention = "by_sample"

    def __init__(self, network):
        self.network = network

    def run(self, embeds, lengths, past=None, left=False):
        layers = self.network.causal.model.layers

        def places():
            seen, before = (past.lengths, past.rows) if past else ([0] * len(lengths), [torch.empty(0, dtype=torch.long)] * len(lengths))
            positions = torch.cat([torch.arange(m, m + n) for m, n in zip(seen, lengths)])
            # A sample's keys: those of the past, by their rows there, then its own, which follow the past's.
            first = past.pairs[0][0].shape[1] if past else 0
            keys = [torch.cat((rows, torch.arange(n) + first + at)) for rows, n, at in zip(before, lengths, starts_of(lengths))]
            key_counts = [len(rows) for rows in keys]
            query_rows, query_valid = grid(starts_of(lengths), lengths)
            last = torch.tensor(key_counts)[:, None] - torch.tensor(lengths)[:, None] + torch.arange(query_rows.shape[1])     # [B, Q]
            place = torch.arange(max(key_counts))
            mask = (place <= last[..., None]) & (place < torch.tensor(key_counts)[:, None, None])
            key_valid = place < torch.tensor(key_counts)[:, None]
            segments = SimpleNamespace(query_rows=query_rows[query_valid], query_places=query_valid.flatten().nonzero()[:, 0],
                                       key_rows=torch.cat(keys), key_places=key_valid.flatten().nonzero()[:, 0], mask=mask[:, None])
            return positions, keys, key_counts, segments

        positions, keys, key_counts, segments = once(places)
        for number, layer in enumerate(layers):
            layer.self_attn.segments = (segments, past.pairs[number] if past else None)
        out = self.network.causal.model(inputs_embeds=embeds[None], attention_mask=torch.zeros(1, 1, 1, 1), position_ids=positions[None],
                                        use_cache=False, output_hidden_states=True)
        made = [layer.self_attn.seen for layer in layers]
        return SimpleNamespace(hidden=[h[0] for h in out.hidden_states[1:]],
                               queries=[q for q, _, _, _ in made], keys=[k for _, k, _, _ in made], values=[v for _, _, v, _ in made],
                               past=SimpleNamespace(pairs=[p for _, _, _, p in made], rows=keys, lengths=key_counts))

    def prefix(self, done, dropped):
        past = done.past
        return SimpleNamespace(pairs=past.pairs, rows=once(lambda: [rows[:-dropped] for rows in past.rows]), lengths=[n - dropped for n in past.lengths])

    def cross_entropy(self, done, rows, labels):
        head = self.network.causal.lm_head
        summed = lambda hidden, wanted: F.cross_entropy(head(hidden).float(), wanted, reduction="sum")
        pieces = zip(done.hidden[-1][rows].split(CHUNK), labels.split(CHUNK))
        return sum(checkpoint(summed, hidden, wanted, use_reentrant=False) for hidden, wanted in pieces) / len(labels)


def seen_sdpa(module, query, key, value, attention_mask, **kwargs):
    module.seen = (query, key, value)
    # Padding on the left sees no key, of which some kernels for GPUs make NaN.
    if attention_mask is not None:
        attention_mask = attention_mask | ~attention_mask.any(-1, keepdim=True)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def by_sample(module, query, key, value, attention_mask, scaling=None, **kwargs):
    segments, past = module.segments
    query, key, value = query[0], key[0], value[0]                                           # [H, R, D]
    keys, values = (torch.cat((past[0], key), 1), torch.cat((past[1], value), 1)) if past else (key, value)
    # Zeros are the padding: of a row that stood for all of it, the gradient would be a sum over all of it, one after the other on a GPU.
    def batched(x, rows, places, longest):                                                   # [B, H, longest, D]
        samples = segments.mask.shape[0]
        grid = x.new_zeros(x.shape[0], samples * longest, x.shape[2]).index_copy(1, places, x.index_select(1, rows))
        return grid.unflatten(1, (samples, longest)).transpose(0, 1)
    # On a GPU the fused kernels that take a mask want as many heads of keys as of queries, with which transformers calls them too.
    heads = query.shape[0] // keys.shape[0] if query.is_cuda else 1
    queries, longest = segments.mask.shape[2:]
    of_heads = lambda x: batched(x, segments.key_rows, segments.key_places, longest).repeat_interleave(heads, 1)
    out = F.scaled_dot_product_attention(batched(query, segments.query_rows, segments.query_places, queries), of_heads(keys),
                                         of_heads(values), attn_mask=segments.mask, scale=scaling, enable_gqa=not query.is_cuda)
    module.seen = (query, key, value, (keys, values))
    return out.transpose(1, 2).flatten(0, 1)[segments.query_places][None], None


ALL_ATTENTION_FUNCTIONS.register("seen_sdpa", seen_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register("seen_sdpa", sdpa_mask)
ALL_ATTENTION_FUNCTIONS.register("by_sample", by_sample)


def grid(starts, lengths, least=0):
    """([B, n] row indices, [B, n] validity) of a stretch of packed rows of each sample."""
    size = max(max(lengths), least)
    offsets = torch.arange(size)
    valid = offsets < torch.tensor(lengths)[:, None]
    return torch.where(valid, torch.tensor(starts)[:, None] + offsets, 0), valid


@torch.no_grad()
def evict(keys, queries, trace, answer):
    """Kept positions of one layer, [K, B, M] in the padded trace, chronological; empty slots are past `valid`."""
    (trace_rows, trace_valid), (answer_rows, answer_valid) = trace, answer
    k, q = keys[:, trace_rows].float(), queries[:, answer_rows].float().unflatten(0, (keys.shape[0], -1))
    logits = torch.einsum("kgbad,kbnd->kgban", q, k).amax(1) / math.sqrt(k.shape[-1])
    closed = ~trace_valid[None, :, None]
    importance = logits.masked_fill(closed, -1e30).softmax(-1)
    importance = (importance * answer_valid[None, :, :, None]).sum(2) / answer_valid.sum(1)[None, :, None]
    unit = k / (k.norm(dim=-1, keepdim=True) + 1e-8) * trace_valid[None, :, :, None]
    cosine = torch.einsum("kbnd,kbd->kbn", unit, unit.sum(2)) - unit.pow(2).sum(-1)
    redundancy = -cosine / trace_valid.sum(1).clamp(min=1)[None, :, None]
    redundancy = redundancy.masked_fill(~trace_valid, -1e30).softmax(-1)
    score = (LAMBDA * importance + (1 - LAMBDA) * redundancy).masked_fill(~trace_valid, -1)
    kept = score.topk(LATENTS, -1).indices
    kept = torch.where(trace_valid.expand_as(score).gather(-1, kept), kept, trace_valid.shape[1])
    return kept.sort(-1).values.clamp(max=trace_valid.shape[1] - 1)


def kv_loss(teacher, latents, trace, answer, counts):
    """Smooth L1 over valid slots, each layer divided by the deviation of its target."""
    slots = once(lambda: (torch.arange(LATENTS) < torch.tensor(counts)[:, None]).flatten().nonzero()[:, 0])
    total = 0
    for layer, keys in enumerate(teacher.keys):
        kept = evict(keys, teacher.queries[layer], trace, answer)
        rows = trace[0].expand(kept.shape[0], -1, -1).gather(-1, kept)
        for target, student in ((keys, latents.keys[layer]), (teacher.values[layer], latents.values[layer])):
            wanted = target.detach().gather(1, rows.flatten(1)[:, slots, None].expand(-1, -1, target.shape[-1])).float()
            own = student[:, slots].float()
            total = total + F.smooth_l1_loss(own, wanted) / wanted.std()
    return total / (2 * len(teacher.keys))


def codi_loss(teacher, teacher_rows, student, student_rows):
    total = 0
    for own, wanted in zip(student.hidden, teacher.hidden):
        wanted = wanted[teacher_rows].detach().float()
        total = total + F.smooth_l1_loss(own[student_rows].float(), wanted) / wanted.std()
    return total / len(teacher.hidden)


def starts_of(lengths):
    return [sum(lengths[:b]) for b in range(len(lengths))]


def losses(runner, rows):
    network, vocabulary = runner.network, SHAPE["vocab_size"]
    bot, eot, latent = vocabulary, vocabulary + 1, vocabulary + 2
    ids = lambda lists: once(lambda: torch.tensor([i for one in lists for i in one]))
    once.at = 0
    questions, traces, answers = ([len(getattr(r, part)) for r in rows] for part in ("question", "trace", "answer"))

    whole = [r.question + r.trace + r.answer for r in rows]
    at = starts_of([len(w) for w in whole])
    teacher = runner.run(network.embed(ids(whole)), [len(w) for w in whole])
    predicting = once(lambda: torch.cat([torch.arange(a + q - 1, a + len(w) - 1) for a, q, w in zip(at, questions, whole)]))
    teacher_ce = runner.cross_entropy(teacher, predicting, ids([r.trace + r.answer for r in rows]))

    first = [r.question + [bot] + [latent] * LATENTS for r in rows]
    done = runner.run(network.embed(ids(first)), [len(f) for f in first], left=True)
    prefix = runner.prefix(done, LATENTS)
    ends = [a + len(f) for a, f in zip(starts_of([len(f) for f in first]), first)]
    sources = once(lambda: torch.stack([torch.arange(end - LATENTS - 1, end - 1) for end in ends]))
    fed = network.project(done.hidden[-1][sources])                                          # [B, M, C]
    for t in range(PASSES):
        done = runner.run(fed.flatten(0, 1), [LATENTS] * len(rows), prefix)
        if t + 1 < PASSES:
            fed = torch.cat((fed[:, :1], network.project(done.hidden[-1].unflatten(0, (len(rows), LATENTS))[:, :-1])), 1)
    last = [[eot] + r.answer for r in rows]
    student = runner.run(network.embed(ids(last)), [len(x) for x in last], done.past)
    begin = starts_of([len(x) for x in last])
    predicting = once(lambda: torch.cat([torch.arange(b, b + n) for b, n in zip(begin, answers)]))
    student_ce = runner.cross_entropy(student, predicting, ids([r.answer for r in rows]))

    trace_at = [a + q for a, q in zip(at, questions)]
    answer_at = [a + n for a, n in zip(trace_at, traces)]
    kv = kv_loss(teacher, done, once(lambda: grid(trace_at, traces, LATENTS)), once(lambda: grid(answer_at, answers)), traces)
    codi = codi_loss(teacher, once(lambda: torch.tensor(answer_at) + PROMPT - 1), student, once(lambda: torch.tensor(begin) + PROMPT))
    return {"student_ce": student_ce, "teacher_ce": teacher_ce, "kv": kv, "codi": codi}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", choices=("smollm2", "llama1b"), default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one that is not")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--lengths", help="JSON list of [question, trace, answer]")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    torch.manual_seed(42)
    if arguments.shape == "llama1b":
        SHAPE.update(LLAMA_1B)
    synchronize = torch.cuda.synchronize if arguments.device.startswith("cuda") else lambda: None
    lengths = json.load(open(arguments.lengths)) if arguments.lengths else row_lengths(arguments.batch)
    rows = rows_of(lengths[: arguments.batch])
    form = Packed if arguments.packed else Padded
    network = Network({"bf16": torch.bfloat16, "f32": torch.float32}[arguments.dtype], form.attention)
    network.train()
    runner, trainable = form(network), [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=8e-4, weight_decay=0.1, fused=True)
    print(f"{form.__name__.lower()}, {arguments.dtype}, {arguments.threads} threads, {len(rows)} samples, "
          f"{sum(p.numel() for p in trainable) / 1e6:.2f} M trainable, mean lengths "
          + " ".join(f"{sum(x) / len(rows):.1f}" for x in zip(*lengths[: len(rows)])))
    seconds, step = [], 0
    while step <= arguments.steps:
        begin, processor, fits = time.perf_counter(), time.process_time(), True
        try:
            parts = losses(runner, rows)
            loss = parts["student_ce"] + parts["teacher_ce"] + KV_WEIGHT * parts["kv"] + CODI_WEIGHT * parts["codi"]
            loss.backward()
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            fits = False
        if not fits:  # here nothing holds what the attempt left any more
            rows, loss, parts, seconds, step = rows[: len(rows) // 2], None, None, [], 0
            once.made = []
            optimizer.zero_grad()
            for layer in network.causal.model.layers:
                layer.self_attn.seen = layer.self_attn.segments = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            print(f"{form.__name__.lower()}, out of memory: on with {len(rows)} samples, of a smaller batch", flush=True)
            continue
        torch.nn.utils.clip_grad_norm_(trainable, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - begin)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()}: " + ", ".join(f"{name} {value.item()}" for name, value in parts.items()))
        print(f"step {step}{' (warm-up)' if step == 0 else ''}: {seconds[-1]:.4f} s ({time.process_time() - processor:.2f} s of processor time), loss {loss.item():.4f}, "
              + ", ".join(f"{name} {value.item():.4f}" for name, value in parts.items()), flush=True)
        step += 1
    if seconds[1:]:
        median = statistics.median(seconds[1:])
        print(f"{median:.4f} s/step, {len(rows) / median:.3f} samples/s")
    if arguments.device.startswith("cuda"):
        print(f"{torch.cuda.max_memory_allocated()} bytes at most in tensors, {torch.cuda.max_memory_reserved()} bytes reserved")


if __name__ == "__main__":
    main()
