"""The model of the reference: transformers' own network on a base with its adapter, and one forward of it that keeps what the step reads.

transformers rounds three places to float32 whatever the dtype (RMSNorm, the rotary angles, the softmax); they are replaced, so that float64
is float64 throughout.
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
        dim = inputs.head_dim(raw)
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
    embeds: torch.Tensor = None                     # [n, C] what was fed
    queries: list = field(default_factory=list)     # [H, n, D] after RoPE
    keys: list = field(default_factory=list)        # [K, n, D] after RoPE
    plain_keys: list = field(default_factory=list)  # [K, n, D] before RoPE
    values: list = field(default_factory=list)      # [K, n, D]
    entered: torch.Tensor = None                    # [n, C] what goes into the first block: embeds, with positions where they are learned

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
        self.raw, self.gpt2 = raw, inputs.is_gpt2(raw)
        self.body = self.net.transformer if self.gpt2 else self.net.model
        self.blocks = self.body.h if self.gpt2 else self.body.layers
        self.net.eval()
        matrices, extras = inputs.load_adapter(config, adapter, raw, self.layers) if adapter else ({}, None)
        full = config["train"]["trainable"] == "all"
        self._load_base(matrices if full and matrices else inputs.load_weights(folder), hf.tie_word_embeddings)
        self.net.to(dtype).requires_grad_(full)
        for module in self.net.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = exact_rms_norm(module)
        if not self.gpt2:
            self.body.rotary_emb = Rotary(raw)
        self.trainable = OrderedDict(self.net.named_parameters()) if full else self._add_lora(matrices, adapter)
        if extras is None:
            extras = self._initial_extras()
        for name in inputs.extra_names(config, self.layers):
            self.trainable[name] = nn.Parameter(extras[name].to(dtype))

    def _load_base(self, weights, tied):
        weights = {name: value for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
        if self.gpt2:
            weights = {name: value for name, value in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
            if not any(name.startswith("transformer.") for name in weights):
                weights = {f"transformer.{name}": value for name, value in weights.items()}
        missing, extra = self.net.load_state_dict(weights, strict=False)
        if extra or set(missing) - ({"lm_head.weight"} if tied else set()):
            raise inputs.Unsupported(f"weights: missing {missing}, extra {extra}")
        self.net.tie_weights()

    def _add_lora(self, matrices, adapter):
        lora, trainable = self.config["lora"], OrderedDict()
        generator = torch.Generator().manual_seed(0)
        for path, name in inputs.lora_names(self.raw, self.layers, lora["targets"]):
            base = self.net.get_submodule(path)
            if not adapter:
                out_features, in_features = reversed(base.weight.shape) if self.gpt2 else base.weight.shape
                bound = 1 / math.sqrt(in_features)
                matrices[f"{name}.lora_A.weight"] = (torch.rand(lora["rank"], in_features, generator=generator) * 2 - 1) * bound
                matrices[f"{name}.lora_B.weight"] = torch.zeros(out_features, lora["rank"])
            a, b = (nn.Parameter(matrices[f"{name}.lora_{x}.weight"].to(self.dtype)) for x in "AB")
            self.net.set_submodule(path, LoraLinear(base, a, b, lora["alpha"] / lora["rank"]))
            trainable[f"{name}.lora_A.weight"], trainable[f"{name}.lora_B.weight"] = a, b
        return trainable

    def _initial_extras(self):
        if self.config["latent"]["projection"] and inputs.has_new_tokens(self.config):
            raise inputs.Unsupported("without an adapter the projection starts from the engine's own random numbers")
        embedding = self.net.get_input_embeddings().weight.detach()
        head_dim = self.attention(self.blocks[0]).head_dim
        extras = {"new_tokens.weight": inputs.initial_new_tokens(embedding)}
        if self.config["latent"]["token_init"] and inputs.has_new_tokens(self.config):
            extras["new_tokens.weight"] = embedding[inputs.start_token(self.config)].repeat(3, 1)
        for layer in range(self.layers):
            for x in "kv":
                extras[f"kv_projection.{layer}.{x}.weight"] = torch.eye(head_dim)
        return extras

    def attention(self, block):
        return block.attn if self.gpt2 else block.self_attn

    def embed(self, ids):
        return F.embedding(torch.tensor(ids, dtype=torch.long), self.net.get_input_embeddings().weight)

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

    def run(self, embeds, past=None, positions=None):
        """Forward of n new rows after the m rows whose keys and values are `past` (a list of (keys, values) over layers)."""
        n = embeds.shape[0]
        m = past[0][0].shape[1] if past else 0
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past or []):
            cache.update(keys[None], values[None], layer)
        mask = torch.full((n, m + n), -math.inf, dtype=self.dtype).triu(m + 1)
        result, handles = Pass(), []
        for layer in self.blocks:
            heads = self.attention(layer).head_dim
            handles.append(layer.register_forward_hook(
                lambda _, __, out: result.hidden.append((out[0] if isinstance(out, tuple) else out)[0])))
            if self.gpt2:
                continue
            # Qwen3 norms its keys by heads; before RoPE means after that.
            source = getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj)
            handles.append(source.register_forward_hook(
                lambda _, __, out, heads=heads: result.plain_keys.append(out[0].reshape(out.shape[1], -1, heads).transpose(0, 1))))
        positions = torch.arange(m, m + n) if positions is None else positions
        out = self.body(inputs_embeds=embeds[None], attention_mask=mask[None, None], past_key_values=cache, use_cache=True,
                             position_ids=positions[None])
        for handle in handles:
            handle.remove()
        result.hidden[-1], result.embeds = out.last_hidden_state[0], embeds
        result.entered = embeds + self.body.wpe(positions) if self.gpt2 else embeds
        for layer in self.blocks:
            for store, tensor in zip((result.queries, result.keys, result.values), self.attention(layer).seen):
                store.append(tensor)
        if self.gpt2:
            result.plain_keys = result.keys
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
