"""A decoder-only transformer (Qwen3 and the Llama family), its sampler and its checkpoints; token ids in, token ids out.

Facts of the architecture are in METHOD.md section 7: RMSNorm, rotary positions on halves, grouped-query attention (Qwen3
normalises each query and key head before rotation), SwiGLU, no biases. Module names are those of the checkpoints, so that
loading is a comparison of names and shapes and nothing else. Norms, rotation tables, softmax and log-probabilities are
computed in fp32 whatever the dtype of the weights.
"""
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache, partial
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs from a checkpoint's config.json."""

    vocab_size: int
    hidden_size: int  # of the residual stream
    intermediate_size: int  # of the MLP
    num_layers: int
    num_heads: int  # of queries
    num_kv_heads: int  # of keys and values; each serves num_heads / num_kv_heads queries
    head_dim: int  # not always hidden_size / num_heads
    rope_theta: float  # base of the rotation's wavelengths
    rope_scaling: dict | None  # llama3's settings, else None
    norm_eps: float
    tied: bool  # the head is the embedding
    qk_norm: bool  # Qwen3: queries and keys are normalised per head
    max_positions: int
    scalar: bool  # a sequence classifier with one score in place of the vocabulary: rewards.py's content model
    raw: dict  # the whole file; saving writes it back, with the dtype of the weights

    @staticmethod
    def from_json(raw: dict) -> "ModelConfig":
        """Read a Hugging Face config; what we cannot run exactly is refused by name (ValueError)."""
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in _DEFAULTS:
            raise ValueError(f"model_type {kind!r} is not supported: expected 'qwen3' or 'llama'")
        given = _DEFAULTS[kind] | raw
        rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"config has rope settings {rope!r}; expected one object for all layers")
        layers = given.get("layer_types") or []
        rotated = rope.get("partial_rotary_factor", given.get("partial_rotary_factor"))
        refused = {
            "use_sliding_window": given.get("use_sliding_window"),
            "layer_types": [layer for layer in (layers if isinstance(layers, list) else [layers]) if layer != "full_attention"],
            "attention_bias": given.get("attention_bias"),
            "mlp_bias": given.get("mlp_bias"),
            "quantization_config": given.get("quantization_config"),
            "num_experts": given.get("num_experts") or given.get("num_local_experts"),
            "hidden_act": given["hidden_act"] not in ("silu", "swish") and (given["hidden_act"] or "null"),
            "is_causal": given.get("is_causal") not in (True, None) and "false",
            "partial_rotary_factor": rotated not in (1, None) and rotated,
            "tie_word_embeddings": given["tie_word_embeddings"] not in (True, False) and given["tie_word_embeddings"],
        }
        for name, value in refused.items():
            if value:
                raise ValueError(f"config has {name} = {value!r}, which this forward pass does not compute")

        heads = given.get("num_attention_heads")
        given["num_key_value_heads"] = given.get("num_key_value_heads") or heads
        for name in _SIZES:
            if type(given.get(name)) is not int or not 0 < given[name] < 2**31:
                raise ValueError(f"config has {name} = {given.get(name)!r}; expected a positive whole number")
        if given["num_hidden_layers"] > 1024 or given["hidden_size"] * max(given["vocab_size"], given["intermediate_size"]) > 2**40:
            sizes = ", ".join(f"{name} = {given[name]}" for name in _SIZES[:4])
            raise ValueError(f"config has {sizes}: is the file damaged? expected at most 1024 layers, and matrices of at most 2**40 numbers")
        head_dim = given.get("head_dim") or given["hidden_size"] // heads
        if type(head_dim) is not int or not 2 <= head_dim <= 2**16 or head_dim % 2 or heads % given["num_key_value_heads"]:
            raise ValueError(
                f"config has {heads} heads of size {head_dim!r} for {given['num_key_value_heads']} key heads; "
                "expected an even size and a multiple of the key heads"
            )

        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"rope type {rope_type!r} is not supported: expected 'default' or 'llama3'")
        theta = rope.get("rope_theta") or given["rope_theta"]
        numbers = {"rope_theta": theta, "rms_norm_eps": given["rms_norm_eps"]}
        if rope_type == "llama3":
            numbers |= {name: rope.get(name) for name in _LLAMA3}
        for name, value in numbers.items():
            if type(value) not in (int, float) or not 0 < value < 1e30:
                raise ValueError(f"config has {name} = {value!r}; expected a number above 0")
        if rope_type == "llama3":
            low, high, context = (rope[name] for name in _LLAMA3[1:])
            if low >= high or given.get("original_max_position_embeddings", context) != context:
                raise ValueError(
                    f"config has rope settings {rope!r}; expected high_freq_factor above low_freq_factor, and one original context"
                )
        return ModelConfig(
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_layers=given["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=given["num_key_value_heads"],
            head_dim=head_dim,
            rope_theta=float(theta),
            rope_scaling=rope if rope_type == "llama3" else None,
            norm_eps=given["rms_norm_eps"],
            tied=bool(given["tie_word_embeddings"]),
            qk_norm=kind == "qwen3",
            max_positions=given["max_position_embeddings"],
            scalar="ForSequenceClassification" in str(given.get("architectures")),
            raw=raw,
        )


_COMMON = dict(hidden_act="silu", rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=False)
_DEFAULTS = {  # by model_type: what transformers assumes where config.json is silent
    "qwen3": _COMMON | dict(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768),
    "llama": _COMMON | dict(max_position_embeddings=2048),
}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


# --------------------------------------------------------------------------------------------------------------- forward


class Linear(nn.Module):
    """x (..., inputs) -> (..., outputs), without bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=0.02))
        self.packed: Tensor | None = None  # for sampling on a CPU, see packed_weights

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self)[0]


def project(x: Tensor, *layers: Linear) -> Sequence[Tensor]:
    """One x through several layers: a single product where their weights are packed, one below the other, in the first."""
    if torch.compiler.is_compiling() or layers[0].packed is None:
        return [F.linear(x, layer.weight) for layer in layers]
    y = torch.ops.mkldnn._linear_pointwise(x, layers[0].packed, None, "none", [], "")
    return y.split([len(layer.weight) for layer in layers], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight over the last dimension; any shape (..., size)."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of dimensions; (head_dim / 2,) in fp32."""
    frequencies = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim)
    if config.rope_scaling:  # llama3: long waves are slowed by `factor`, short ones kept, those between blended
        scaling = config.rope_scaling
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles in fp32, the first half of sin negated; (B, T) -> (B, 1, T, head_dim) each."""
    angles = positions[:, None, :, None] * frequencies  # (B, 1, T, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (a, b) = (x_i, x_{i + head_dim / 2}) to (a cos - b sin, b cos + a sin); x (B, heads, T, head_dim)."""
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class Sequences:
    """Attention within a padded batch, and the keys and values that it leaves for whatever follows.

    `valid` (B, T) is False at padding. Row i may continue row `owner[i]` of an earlier batch, `prompts`, which several rows can
    share: that prompt goes through the network once, and gradients flow back into it from all of them. Positions count valid
    tokens only, so padding on the left, or between prompt and completion, changes nothing.
    """

    def __init__(self, valid: Tensor, prompts: "Sequences | None" = None, owner: Tensor | None = None):
        self.valid, self.prompts, self.owner = valid, prompts, owner
        whole = torch.cat((prompts.valid[owner], valid), dim=1) if prompts else valid  # (B, past + T)
        past = whole.shape[1] - valid.shape[1]
        self.positions = (whole.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]  # (B, T)
        index = torch.arange(whole.shape[1], device=valid.device)
        causal = index[None, :] <= index[past:, None]  # (T, past + T)
        itself = index[None, :] == index[past:, None]  # padding attends to itself: a softmax over nothing is NaN
        self.mask = (causal & whole[:, None, :] | itself)[:, None]  # (B, 1, T, past + T)
        if not past and (valid[:, :-1] | ~valid[:, 1:]).all():  # nothing, or padding on the right, which nobody before it sees:
            self.mask = None  # plain causal attention has faster kernels
        self.keys: dict[int, Tensor] = {}  # by layer: (B, kv_heads, T, head_dim)
        self.values: dict[int, Tensor] = {}

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of everything so far, what is continued included: (B, kv_heads, past + T, head_dim)."""
        own = self.keys[layer], self.values[layer]
        if not self.prompts:
            return own
        earlier = self.prompts.keys[layer][self.owner], self.prompts.values[layer][self.owner]
        return torch.cat((earlier[0], own[0]), dim=2), torch.cat((earlier[1], own[1]), dim=2)

    @torch.compiler.disable  # bookkeeping; what surrounds it may be compiled
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, T, head_dim), keys and values (B, kv_heads, T, head_dim) -> (B, heads, T, head_dim)."""
        self.keys[layer], self.values[layer] = k, v
        k, v = self.cache(layer)
        if self.mask is not None and not q.is_cpu:  # a GPU's fast kernels take a mask or shared keys, not both
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        shared = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None, enable_gqa=shared)


class Packed:
    """Prompts and their completions in one row without padding, [p1 | c11 | c12 | p2 | c21 ...], for training.

    A token sees its prompt and what precedes it in its own completion, at the positions it would have alone. So a prompt goes
    through the network once however many completions it has, and gradients flow back into it from all of them.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], device: torch.device):
        self.groups = [len(group) for group in completions]
        parts = [(ids, first) for p, group in zip(prompts, completions) for ids, first in ((p, 0), *((ids, len(p)) for ids in group))]
        self.lengths = [len(ids) for ids, _ in parts]  # of p1, c11, c12, p2, ...
        self.tokens = torch.tensor([[token for ids, _ in parts for token in ids]], dtype=torch.long, device=device)  # (1, N)
        self.positions = torch.tensor([[i for ids, first in parts for i in range(first, first + len(ids))]], device=device)

    @torch.compiler.disable  # bookkeeping; what surrounds it may be compiled
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(1, heads, N, head_dim), keys and values (1, kv_heads, N, head_dim) -> (1, heads, N, head_dim)."""
        if not q.is_cpu:  # a GPU's fast kernels take a mask or shared keys, not both
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        attention = partial(F.scaled_dot_product_attention, enable_gqa=q.shape[1] != k.shape[1])
        parts, pieces = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v))), []
        for count in self.groups:
            own_q, prompt_k, prompt_v = next(parts)
            pieces.append(attention(own_q, prompt_k, prompt_v, is_causal=True))
            for own_q, own_k, own_v in itertools.islice(parts, count):
                mask = torch.ones(own_q.shape[2], prompt_k.shape[2] + own_k.shape[2], dtype=torch.bool, device=q.device).tril(prompt_k.shape[2])
                keys, values = torch.cat((prompt_k, own_k), dim=2), torch.cat((prompt_v, own_v), dim=2)
                pieces.append(attention(own_q, keys, values, attn_mask=mask))
        return torch.cat(pieces, dim=2)


class Decoding:
    """Attention of one new token per completion: to its prompt, held once for the whole group, and to its own tokens so far.

    Where a batched cache would hold, and read, a prompt's keys once per completion, here all queries that attend to a prompt meet
    its keys in one product. For that they stand on a grid of seats, prompts x kv heads x places in the group; in each seat the
    n = heads / kv_heads queries that share one kv head. Rows that are done leave their seats empty, until every group has a place
    less, or a prompt none left: then the grid shrinks.
    """

    def __init__(self, config: ModelConfig, lengths: Tensor, group_size: int, room: int, dtype: torch.dtype):
        """For prompts of these `lengths` (P,), whose keys and values `take` brings, and `room` new tokens of each completion."""
        P, L, device, self.kv_heads = len(lengths), int(lengths.max()), lengths.device, config.num_kv_heads
        self.lengths, self.places, self.length = lengths, group_size, 0
        self.owner = torch.arange(P, device=device).repeat_interleave(group_size)  # (B,) the prompt of each row, in order
        layers, heads, size = range(config.num_layers), config.num_kv_heads, config.head_dim
        self.prompt_keys, self.prompt_values = ([torch.zeros(P, heads, L, size, device=device, dtype=dtype) for _ in layers] for _ in "kv")
        own = (P * heads * group_size, room, size)  # (seats, room, head_dim)
        self.keys, self.values = ([torch.empty(own, device=device, dtype=dtype) for _ in layers] for _ in "kv")
        padding = torch.arange(L, device=device) >= lengths[:, None]
        self.bias = torch.zeros(P, heads, 1, L, device=device, dtype=dtype).masked_fill_(padding[:, None, None], -math.inf)
        self._seat(torch.arange(group_size, device=device).repeat(P))

    def take(self, start: int, prompts: Sequences) -> None:
        """Keys and values of the prompts from number `start` on."""
        for layer in range(len(self.keys)):
            for cache, new in zip((self.prompt_keys[layer], self.prompt_values[layer]), prompts.cache(layer)):
                cache[start : start + len(new), :, : new.shape[2]] = new

    def _seat(self, place: Tensor) -> None:
        """Put rows into these places (B,) of their groups: `seats` of every (row, kv head), and for every seat one that `sits` there."""
        heads = torch.arange(self.kv_heads, device=place.device)
        self.place = place
        self.seats = ((self.owner[:, None] * self.kv_heads + heads) * self.places + place[:, None]).flatten()  # (B * K,)
        self.sits = self.seats.new_zeros(len(self.lengths) * self.kv_heads * self.places)  # in an empty one the first, for nothing
        self.sits[self.seats] = torch.arange(len(self.seats), device=place.device)

    @property
    def positions(self) -> Tensor:
        return (self.lengths[self.owner] + self.length)[:, None]  # (B, 1)

    @torch.compiler.disable  # bookkeeping; what surrounds it may be compiled
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, 1, head_dim), keys and values (B, K, 1, head_dim) -> (B, heads, 1, head_dim)."""
        (B, K, _, D), seats, now = k.shape, len(self.sits), self.length + 1
        keys, values, L = self.keys[layer][:, :now], self.values[layer][:, :now], self.bias.shape[3]  # (seats, now, D)
        prompt_keys, prompt_values = self.prompt_keys[layer].flatten(0, 1), self.prompt_values[layer].flatten(0, 1)  # (P * K, L, D)

        def of_groups(x: Tensor) -> Tensor:
            """(seats, n, m) -> (P * K, places * n, m): one below the other what meets the same prompt."""
            return x.view(len(prompt_keys), -1, x.shape[2])

        keys[:, -1].index_copy_(0, self.seats, k.reshape(B * K, D))
        values[:, -1].index_copy_(0, self.seats, v.reshape(B * K, D))
        q = (q.reshape(B * K, -1).index_select(0, self.sits) * D**-0.5).view(seats, -1, D)  # (seats, n, D)
        to_prompt = torch.baddbmm(self.bias.flatten(0, 1), of_groups(q), prompt_keys.transpose(1, 2)).view(seats, -1, L)
        scores = torch.cat((to_prompt, torch.bmm(q, keys.transpose(1, 2))), dim=2)  # (seats, n, L + now)
        weights = scores.softmax(dim=2, dtype=torch.float32).to(v.dtype)
        out = torch.bmm(of_groups(weights)[:, :, :L], prompt_values).view(seats, -1, D)
        out.baddbmm_(weights[:, :, L:], values)
        return out.view(seats, -1).index_select(0, self.seats).view(B, -1, 1, D)

    def drop(self, done: Tensor) -> Tensor:
        """Forget the rows where `done` (B,); -> the old indices of those that stay, in order."""
        stay = (~done).nonzero()[:, 0]
        seats = self.seats.view(len(done), -1)[stay].flatten()
        prompts, owner, counts = self.owner[stay].unique(return_inverse=True, return_counts=True)
        places = int(counts.max()) if len(stay) else 0
        if (len(prompts), places) == (len(self.lengths), self.places):
            self.owner = owner
            self._seat(self.place[stay])
            return stay
        self.lengths, self.bias, self.owner, self.places = self.lengths[prompts], self.bias[prompts], owner, places
        self._seat(torch.arange(len(stay), device=done.device) - (counts.cumsum(0) - counts)[owner])  # the first ones of its group
        before = seats[self.sits]  # the seat in which the new one's keys and values are
        for layer in range(len(self.keys)):
            for caches in (self.prompt_keys, self.prompt_values):
                caches[layer] = caches[layer][prompts]
            for caches in (self.keys, self.values):
                old, caches[layer] = caches[layer], caches[layer].new_empty(len(before), *caches[layer].shape[1:])
                caches[layer][:, : self.length] = old[before, : self.length]
        return stay


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values of one layer -> what is attended to, see Sequences


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x.shape  # (B, T, hidden_size)
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, heads or kv_heads, T, head_dim)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, heads, T, head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Path | None = None  # the folder it was loaded from: its tokenizer files go along on saving
        self.computes_on: torch.device | None = None  # where its weights are not: FSDP can keep them in the host's memory
        self.checkpointing = False  # in training: keep each block's input only, and compute the block again on the way back
        self.frequencies = rotary_frequencies(config)  # no buffer: it stays in fp32 when the model is cast
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if config.scalar:
            self.score = Linear(config.hidden_size, 1)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie()

    @property
    def device(self) -> torch.device:
        return self.computes_on or self.embed_tokens.weight.device

    def tie(self) -> None:
        """Let the head read the embedding's weight, where the config says so."""
        if self.config.tied and not self.config.scalar:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(self, tokens: Tensor, context: Sequences | Packed | Decoding) -> Tensor:
        """Last hidden states of `tokens` (B, T), placed and attended to as `context` says; -> (B, T, hidden_size)."""
        self.frequencies = self.frequencies.to(tokens.device)  # once
        cos, sin = rotary_tables(context.positions, self.frequencies)
        x = self.embed_tokens(tokens)
        for layer, block in enumerate(self.layers):
            inputs = x, cos, sin, partial(context.attend, layer)
            x = checkpoint(block, *inputs, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else block(*inputs)
        return self.norm(x)

    def logprobs(self, context: Packed, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) of `targets` (n,), each predicted at one of `places` (n,) in the row, and the entropies (n,) there."""
        hidden = self.hidden(context.tokens, context)[0, places]  # (n, d)
        return ChunkedLogProbs.apply(hidden, self.lm_head.weight, targets)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits; (B, T) -> (B, T, V)."""
        return self.lm_head(self.hidden(tokens, Sequences(torch.ones_like(tokens, dtype=torch.bool))))


# -------------------------------------------------------------------------------------------------------------- sampling


@dataclass
class Completion:
    tokens: list[int]  # sampled ids, closing stop token included
    logprobs: list[float]  # log-softmax of the raw logits at those ids
    finished: bool  # ended by a stop token, not by the length limit


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens (B, T) and valid (B, T), padded with id 0 on `side`; nothing reads the mask back from the id."""
    width = max(map(len, rows), default=0)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, where], valid[i, where] = torch.tensor(row, dtype=torch.long), True
    return tokens.to(device), valid.to(device)


def uniforms(seed: int, prompt: Sequence[int], place: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that depend on seed, prompt and place in the group only; number t is for position t."""
    key = hashlib.blake2b(np.array([seed, place, *prompt], dtype=np.int64).tobytes(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)


def choose(log_probs: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """One id per row by inverse CDF; log-softmax (B, V) in fp32, uniform (B,) in fp64 -> (B,). Temperature 0 is greedy."""
    if temperature == 0:
        return log_probs.argmax(dim=-1)
    probs = (log_probs / temperature).softmax(dim=-1)  # at temperature 1 the same as exp, in a faster kernel
    if top_k:
        probs = probs.masked_fill(probs < probs.topk(min(top_k, probs.shape[-1])).values[:, -1:], 0.0)
    if top_p < 1:  # keep the smallest set of ids that reaches top_p
        ordered, order = probs.sort(dim=-1, descending=True)
        reached = ordered.double().cumsum(dim=-1)
        dropped = reached - ordered >= top_p * reached[:, -1:]
        probs = probs.scatter(1, order, ordered.masked_fill(dropped, 0.0))
    return inverse_cdf(probs, uniform)


def inverse_cdf(probs: Tensor, uniform: Tensor, block: int = 128) -> Tensor:
    """The first id whose cumulative probability exceeds uniform * total; (B, V), (B,) in fp64 -> (B,).

    In two levels, over blocks of ids and then inside the block that was hit: cumulative sums must be in fp64, or rare tokens are
    rounded away, and one over the whole vocabulary would write an fp64 table of it at every step.
    """
    V = probs.shape[1]
    if V % block:
        probs = F.pad(probs, (0, -V % block))
    blocks = probs.unflatten(1, (-1, block))  # (B, V / block, block)
    sums = blocks.sum(dim=2).double()
    edges = sums.cumsum(dim=1)
    target = uniform[:, None] * edges[:, -1:]  # (B, 1)
    hit = _first_above(edges, target)
    share = (target - (edges - sums).gather(1, hit)) / sums.gather(1, hit)  # of the block's mass, below the target
    inside = blocks.gather(1, hit[:, :, None].expand(-1, 1, block))[:, 0].double().cumsum(dim=1)  # (B, block)
    chosen = hit * block + _first_above(inside, share.clamp(min=0) * inside[:, -1:])
    return chosen[:, 0].clamp(max=V - 1)


def _first_above(edges: Tensor, target: Tensor) -> Tensor:
    """Index of the first edge above the target, which rounding must not put at or behind the last edge; some index for NaN."""
    below_last = torch.nextafter(edges[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(edges, torch.minimum(target, below_last), right=True).clamp(max=edges.shape[1] - 1)


@contextmanager
def packed_weights(model: Transformer) -> Iterator[None]:
    """Inside, the weights of a float32 model on a CPU also stand in the order in which oneDNN multiplies them with few rows.

    A plain product of a handful of rows is several times slower than reading the weights from memory; this one is not (measured
    by tests/bench.py). Packing costs about one pass over the weights and a second copy of them, so models above PACK_LIMIT
    are left alone. The operators are private to torch, what torch.compile itself emits: where they are missing or wrong, nothing
    happens.
    """
    weight = model.embed_tokens.weight
    together = [[model.lm_head]]
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        together += [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    size = sum(layer.weight.nbytes for layers in together for layer in layers)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or size > PACK_LIMIT or not _packing_works():
        together = []
    try:
        for layers in together:
            layers[0].packed = _pack(torch.cat([layer.weight for layer in layers]) if layers[1:] else layers[0].weight)
        yield
    finally:
        for layers in together:
            layers[0].packed = None


PACK_LIMIT = 4 << 30  # bytes


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)  # 16: about how many rows to expect


@lru_cache
def _packing_works() -> bool:
    try:
        with torch.random.fork_rng(devices=[]):  # a caller's random numbers stay the same
            x, layer = torch.randn(3, 64), Linear(64, 128)
        plain = layer(x)
        layer.packed = _pack(layer.weight)
        return torch.allclose(layer(x), plain, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):
        return False


SAMPLING_BUDGET = 65536  # tokens in caches at a time


def waves(
    prompts: Sequence[Sequence[int]], group_size: int, max_new_tokens: int, token_budget: int
) -> Iterator[list[tuple[int, ...]]]:
    """The distinct prompts, longest first; at a time as many as keep padded prompts and full completions in the budget, at least one."""
    wave: list[tuple[int, ...]] = []
    for prompt in sorted(dict.fromkeys(map(tuple, prompts)), key=len, reverse=True):
        if wave and (len(wave) + 1) * (len(wave[0]) + group_size * max_new_tokens) > token_budget:
            yield wave
            wave = []
        wave.append(prompt)
    if wave:
        yield wave


def logits_in_tokens(config: ModelConfig) -> int:
    """As many cached tokens take the memory of one row's logits and of the (up to twelve) tables that choosing makes of them."""
    return 12 * config.vocab_size // (2 * config.num_layers * config.num_kv_heads * config.head_dim)


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    group_size: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    token_budget: int = SAMPLING_BUDGET,
) -> list[list[Completion]]:
    """Sample `group_size` completions of each prompt -> P lists of G, as in METHOD.md section 8.

    `logprobs` are those of the raw logits, whatever temperature, top_p (in (0, 1]) and top_k (0: off) did; temperature 0 is
    greedy. A completion's random numbers depend only on seed, prompt, place in the group and position, so equal prompts have equal
    groups and are computed once. At most `token_budget` tokens are held in caches at a time (one prompt's group at least), of
    2 * layers * kv_heads * head_dim numbers each; the tables of logits count as if they were tokens. ValueError: an empty prompt,
    an id outside the vocabulary, a prompt that leaves no room for `max_new_tokens` in the model's context, settings out of range, logits that are not finite.
    """
    _check_settings(group_size, max_new_tokens, temperature, top_p, top_k, seed)
    _check_prompts(model.config, prompts, max_new_tokens)
    groups: dict[tuple[int, ...], list[Completion]] = {}
    with packed_weights(model):
        for wave in waves(prompts, group_size, max_new_tokens + logits_in_tokens(model.config), token_budget):
            rolls = np.stack([uniforms(seed, prompt, g, max_new_tokens) for prompt in wave for g in range(group_size)])
            groups |= zip(wave, _sample(model, wave, group_size, rolls, (temperature, top_p, top_k), stop_ids))
    return [[Completion(c.tokens[:], c.logprobs[:], c.finished) for c in groups[tuple(prompt)]] for prompt in prompts]


def _check_settings(group_size: int, max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int) -> None:
    for name, value, fits, expected in (
        ("group_size", group_size, _whole(group_size) and group_size >= 1, "a whole number from 1 up"),
        ("max_new_tokens", max_new_tokens, _whole(max_new_tokens) and max_new_tokens >= 1, "a whole number from 1 up"),
        ("temperature", temperature, temperature == 0 or 1e-6 <= temperature < math.inf, "0 (greedy), or a number from 1e-6 up"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
        ("top_k", top_k, _whole(top_k) and top_k >= 0, "a whole number from 0 (off) up"),
        ("seed", seed, _whole(seed) and abs(seed) < 2**63, "a whole number of 64 bits"),
    ):
        if not fits:
            raise ValueError(f"cannot sample with {name} = {value!r}; expected {expected}")


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer))


def _check_ids(config: ModelConfig, name: str, ids: Sequence[int]) -> None:
    if not all(map(_whole, ids)) or not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise ValueError(f"{name} has ids from {min(ids)} to {max(ids)}, the vocabulary {config.vocab_size}: is it the model's tokenizer?")


def _check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty, there is no last token to continue: give every prompt at least one token")
        _check_ids(config, f"prompt {i}", prompt)
        if len(prompt) + max_new_tokens > config.max_positions:
            raise ValueError(
                f"prompt {i} with max_new_tokens takes {len(prompt)} + {max_new_tokens} positions, the model's context {config.max_positions}: "
                "shorten one"
            )


def _sample(
    model: Transformer,
    prompts: list[tuple[int, ...]],
    group_size: int,
    rolls: np.ndarray,
    settings: tuple[float, float, int],
    stop_ids: tuple[int, ...],
) -> list[list[Completion]]:
    """One wave. rolls (B, N): the random number of each position of each completion; N is the length limit."""
    device = model.embed_tokens.weight.device
    B, N = rolls.shape
    rolls, stops = torch.from_numpy(rolls).to(device), torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    logits, context = _prefill(model, prompts, group_size, N)
    live = torch.arange(B, device=device)  # which completion each row is writing
    sampled, logprobs = torch.zeros(B, N, dtype=torch.long, device=device), torch.zeros(B, N, device=device)
    lengths, finished = torch.full((B,), N, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(N):
        log_probs = logits.float().log_softmax(dim=-1)
        chosen = choose(log_probs, rolls[live, t], *settings)  # (live,)
        sampled[live, t], logprobs[live, t] = chosen, log_probs.gather(1, chosen[:, None])[:, 0]
        stopped = torch.isin(chosen, stops)
        if stopped.any():
            lengths[live[stopped]], finished[live[stopped]] = t + 1, True
            order = context.drop(stopped)
            live, chosen = live[order], chosen[order]
        if not len(live) or t == N - 1:
            break
        logits = model.lm_head(model.hidden(chosen[:, None], context)[:, -1])
        context.length += 1
    if not logprobs.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are broken, or training has diverged")
    done = [
        Completion(ids[:n], values[:n], end)
        for ids, values, n, end in zip(sampled.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist())
    ]
    return [done[i : i + group_size] for i in range(0, B, group_size)]


def _prefill(model: Transformer, prompts: list[tuple[int, ...]], group_size: int, room: int) -> tuple[Tensor, Decoding]:
    """Logits of every completion's first token (B, V), and the context to continue in.

    What all prompts begin with (a system message, mostly) goes through the network once; the rest in pieces of few tokens, between
    which no prompt waits for a much longer one.
    """
    weight = model.embed_tokens.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    context = Decoding(model.config, lengths, group_size, room, weight.dtype)
    start = _common_start(prompts)
    shared = None
    if start:
        shared = Sequences(torch.ones(1, start, dtype=torch.bool, device=weight.device))
        model.hidden(torch.tensor([prompts[0][:start]], device=weight.device), shared)
    last = []  # hidden state of each prompt's last token
    for piece in waves([prompt[start:] for prompt in prompts], 0, 0, PREFILL_TOKENS[weight.device.type != "cpu"]):
        tokens, valid = pad(piece, "right", weight.device)
        sequences = Sequences(valid, shared, torch.zeros_like(valid[:, 0], dtype=torch.long))
        hidden = model.hidden(tokens, sequences)  # (rows, T, d)
        context.take(len(last), sequences)
        last += hidden[torch.arange(len(piece)), valid.sum(dim=1) - 1]
    return model.lm_head(torch.stack(last)).repeat_interleave(group_size, dim=0), context


PREFILL_TOKENS = (1024, 16384)  # in one piece, on a CPU (whose caches hold little more) and elsewhere


def _common_start(prompts: list[tuple[int, ...]]) -> int:
    """Number of tokens that all prompts begin with; 0 where that saves nothing. Everyone keeps a last token of their own."""
    shortest = min(map(len, prompts)) - 1
    start = next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)
    return start if start >= 16 and len(prompts) > 1 else 0


def completion_logprobs(
    model: Transformer, prompts: list[list[int]], completions: list[list[list[int]]]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given completions; P prompts, a list of completions for each -> (B, T) and mask (B, T), B rows in all.

    Differentiable; 0 where the mask is False. Each prompt goes through the network once, and logits never exist all at once.
    ValueError: an empty prompt, not a list for each, an id outside the vocabulary.
    """
    return logprobs_and_entropy(model, prompts, completions)[:2]


def logprobs_and_entropy(
    model: Transformer, prompts: list[list[int]], completions: list[list[list[int]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """What completion_logprobs returns, and the policy's entropy (B, T) before each token, without gradient; in nats."""
    if len(prompts) != len(completions) or not all(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} lists of completions; expected one for each, and no empty prompt")
    for i, ids in enumerate(itertools.chain(prompts, *completions)):
        if ids:
            _check_ids(model.config, f"prompt {i}" if i < len(prompts) else f"completion {i - len(prompts)}", ids)
    device = model.device
    if not prompts:
        return torch.zeros(0, 0, device=device), torch.zeros(0, 0, dtype=torch.bool, device=device), torch.zeros(0, 0, device=device)
    context = Packed(prompts, [[ids[:-1] for ids in group] for group in completions], device)  # no token follows the last
    places, start = [], 0  # a completion's first token is predicted at the end of its prompt, the others at the token before them
    for prompt, group in zip(prompts, completions):
        start += len(prompt)
        last = start - 1
        for ids in filter(None, group):
            places += [last, *range(start, start + len(ids) - 1)]
            start += len(ids) - 1
    targets, mask = pad([ids for group in completions for ids in group], "right", device)  # (B, T)
    logprobs, entropies = model.logprobs(context, torch.tensor(places, dtype=torch.long, device=device), targets[mask])
    logprobs, entropies = (torch.zeros(mask.shape, dtype=x.dtype, device=device).masked_scatter(mask, x) for x in (logprobs, entropies))
    return logprobs, mask, entropies


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden weight^T) at the targets, and the entropy, for a few rows at a time, forward and backward.

    The logits of 20 completions of 1024 tokens over a vocabulary of 151,936 would take 12 GB, and their gradient as much again.
    """

    SIZE = 1 << 23  # numbers in one chunk of logits

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d), (V, d), (n,) -> (n,), (n,)."""
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rows = max(1, ChunkedLogProbs.SIZE // len(weight))
        chosen, entropies = [], []
        for some, ids in zip(hidden.split(ctx.rows), targets.split(ctx.rows)):
            logprobs = at_least_float32(some @ weight.T).log_softmax(dim=1)  # (rows, V)
            chosen.append(logprobs.gather(1, ids[:, None])[:, 0])
            entropies.append(-logprobs.exp().mul_(logprobs.clamp_(min=-1e4)).sum(dim=1))  # 0 * -inf would be NaN
            del logprobs  # before the next ones are made
        chosen, entropies = torch.cat(chosen), torch.cat(entropies)
        ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None]:
        """Of a target's log-probability by the logits: one-hot - softmax."""
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = [], torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for some, ids, factor in zip(*(x.split(ctx.rows) for x in (hidden, targets, grad[:, None]))):
            probs = at_least_float32(some @ weight.T).softmax(dim=1)
            probs.scatter_add_(1, ids[:, None], torch.full_like(factor, -1))
            grad_logits = probs.mul_(-factor).to(weight.dtype)
            grad_hidden.append(grad_logits @ weight)
            if grad_weight.dtype == weight.dtype:
                grad_weight.addmm_(grad_logits.T, some)
            else:
                grad_weight += grad_logits.T @ some  # chunks of bf16 are summed in fp32
            del probs, grad_logits
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------------------------------------- checkpoints


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} cannot be used here: {str(error).splitlines()[0]}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a Hugging Face checkpoint folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as UTF-8 text: {error}") from None


def read_json(path: Path) -> dict:
    """One JSON object from a file; ValueError says which file and why."""
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, or a number of thousands of digits
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():  # one file goes before an index, as in transformers
        return [folder / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index}: no weight_map")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: shard {name!r} is no name of a safetensors file in the checkpoint folder")
    return [folder / name for name in sorted(set(shards.values()))]


def read_config(path: str | Path, scalar: bool | None = False) -> ModelConfig:
    """Of a checkpoint folder: a language model's, unless `scalar` asks for one with a scalar head (True) or takes either (None)."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder; expected one with config.json and model.safetensors")
    config = ModelConfig.from_json(read_json(folder / "config.json"))
    if scalar not in (config.scalar, None):
        kinds = "language model", "content model (with a scalar head)"
        raise ValueError(f"{folder} is a {kinds[config.scalar]}; expected a {kinds[scalar]}")
    return config


def load_model(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, scalar: bool | None = False
) -> Transformer:
    """Load a Hugging Face checkpoint folder (single or sharded safetensors); ValueError names what does not fit.

    `scalar` as in read_config. Names and shapes are compared before anything is read; then each tensor goes from its file into the wanted dtype and device by
    itself, the largest first, so that memory peaks at hardly more than the weights.
    """
    check_device(device)
    if not dtype.is_floating_point:
        raise ValueError(f"cannot load weights as {dtype}; expected a floating-point dtype")
    folder, config = Path(path), read_config(path, scalar)
    with torch.device("meta"):
        model = Transformer(config)
    places = _find_tensors(folder, dict(model.named_parameters(remove_duplicate=False)), config)
    if config.tied and (stored := places.pop("lm_head.weight", None)):
        if not torch.equal(_read_tensor(*stored, device), _read_tensor(*places["embed_tokens.weight"], device)):
            raise ValueError(f"{stored[0]}: lm_head.weight differs from the embedding, but config.json says tie_word_embeddings")

    parameters = dict(model.named_parameters())
    largest_first = sorted(parameters, key=lambda name: -parameters[name].numel())
    loaded = {name: _read_tensor(*places[name], device).to(dtype, copy=True) for name in largest_first}
    model.load_state_dict(loaded, strict=False, assign=True)  # strict would ask for a tied head
    model.tie()
    model.source = folder.resolve()
    return model.requires_grad_(True).eval()


def _find_tensors(folder: Path, wanted: dict[str, nn.Parameter], config: ModelConfig) -> dict[str, tuple[Path, str]]:
    """Where each parameter is: its file and its name there. Reads headers only; ValueError names what does not fit."""
    places: dict[str, tuple[Path, str]] = {}
    for file in _weight_files(folder):
        with _open_weights(file) as weights:
            for key in weights.keys():
                name, header = key.removeprefix("model."), weights.get_slice(key)
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # older checkpoints store rotation tables
                if name not in wanted:
                    raise ValueError(f"{file}: tensor {key!r} has no place in a {config.raw['model_type']} model of this config")
                if name in places:
                    raise ValueError(f"{file}: tensor {key!r} is there twice, also in {places[name][0].name}")
                shape, expected = tuple(header.get_shape()), tuple(wanted[name].shape)
                if shape != expected:
                    raise ValueError(f"{file}: {key!r} has shape {shape}, expected {expected}")
                if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{file}: {key!r} is stored as {header.get_dtype()}, expected F32, F16 or BF16: is the model quantised?")
                places[name] = file, key
    missing = wanted.keys() - places.keys() - ({"lm_head.weight"} if config.tied else set())
    if missing:
        raise ValueError(f"{folder}: {len(missing)} missing: {', '.join(sorted(missing)[:3])}{', ...' if len(missing) > 3 else ''}")
    return places


def _open_weights(file: Path, device: str = "cpu") -> safe_open:
    try:
        return safe_open(file, framework="pt", device=str(device))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such weights file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from None


def _read_tensor(file: Path, key: str, device: str) -> Tensor:
    with _open_weights(file, device) as weights:  # anew for each tensor: an open file's pages stay in memory
        return weights.get_tensor(key)


def refuse_other_folders(target: Path) -> None:
    """ValueError when `target` holds anything but a checkpoint, or is the working directory: saving there would delete it."""
    if not target.exists():
        return
    content = list(target.iterdir()) if target.is_dir() else [target]
    try:
        is_checkpoint = "model_type" in read_json(target / "config.json") and any(path.suffix == ".safetensors" for path in content)
    except ValueError:
        is_checkpoint = False
    if content and not is_checkpoint or any(path.is_dir() for path in content) or target.resolve() == Path.cwd():
        raise ValueError(f"{target} is no checkpoint folder: saving there would delete it; choose another name")


def save_model(model: Transformer, path: str | Path) -> None:
    """Write a checkpoint folder that other tools load; complete under its name or not there at all.

    Replaces an older checkpoint, never another folder (ValueError).
    """
    target = Path(path).resolve()
    refuse_other_folders(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    replaced = temporary.with_name(f"{temporary.name}-old")
    try:
        write_model(model, temporary, {name: p.detach().contiguous().cpu() for name, p in model.named_parameters()})
        os.chmod(temporary, 0o755)
        if target.exists():
            os.rename(target, replaced)
        os.rename(temporary, target)
    finally:
        if replaced.exists() and not target.exists():  # interrupted between the two
            os.rename(replaced, target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_model(model: Transformer, folder: Path, weights: dict[str, Tensor]) -> None:
    """Config, these weights (on the host), and the files of the tokenizer, into a folder that is there. ValueError: these are gone."""
    if model.source and not model.source.is_dir():
        raise ValueError(f"{model.source}: no such folder any more; the model was loaded from there, and its tokenizer must be saved with it")
    for name in _CARRIED if model.source else ():
        if (model.source / name).is_file():
            shutil.copyfile(model.source / name, folder / name)
    state = {name if name in ("lm_head.weight", "score.weight") else f"model.{name}": weight for name, weight in weights.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)  # the library makes it private
    dtype = next(iter(weights.values())).dtype
    raw = model.config.raw | {"dtype": str(dtype).removeprefix("torch.")}
    raw.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


_CARRIED = (  # goes along unchanged on saving
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- tokenizer and chat


class Tokenizer:
    """A checkpoint's tokenizer with its chat template and its stop tokens; text in, token ids out, and back."""

    def __init__(self, path: str | Path):
        folder = Path(path)
        if not (folder / "tokenizer.json").exists():
            raise ValueError(f"{folder / 'tokenizer.json'}: no such file; expected the tokenizer of a Hugging Face checkpoint folder")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises a bare Exception, or a panic, which is not even that
            raise ValueError(f"{folder / 'tokenizer.json'}: not a tokenizer file: {error}") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        options = {name: read_json(folder / name) if (folder / name).exists() else {} for name in _TOKEN_FILES}
        settings = options["special_tokens_map.json"] | options["tokenizer_config.json"]
        self.special_tokens = {  # bos_token and the like, which templates may use; older files store them as objects
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token") and (isinstance(value, str) or isinstance(value, dict) and isinstance(value.get("content"), str))
        }
        self.template = self._find_template(folder, settings)
        self.stop_ids = tuple(sorted(self._find_stops(folder, options)))
        self.max_new_tokens = options["generation_config.json"].get("max_new_tokens") or 1024
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ValueError(f"{folder / 'generation_config.json'}: max_new_tokens is {self.max_new_tokens!r}; expected a whole number above 0")

    @staticmethod
    def _find_template(folder: Path, settings: dict) -> str | None:
        if (folder / "chat_template.jinja").exists():
            return _read_text(folder / "chat_template.jinja")
        template = settings.get("chat_template")
        if isinstance(template, list):  # several named ones
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is {type(template).__name__}; expected text")
        return template

    def _find_stops(self, folder: Path, options: dict[str, dict]) -> set[int]:
        """The ids of eos_token, of the usual ends of a turn, and of eos_token_id in both configs."""
        names = (self.special_tokens.get("eos_token"), *_END_OF_TURN)
        stops = {i for name in names if name and (i := self.backend.token_to_id(name)) is not None}
        for file in ("generation_config.json", "config.json"):
            given = options[file].get("eos_token_id")
            ids = given if isinstance(given, list) else [] if given is None else [given]
            if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
                raise ValueError(f"{folder / file}: eos_token_id is {given!r}; expected a token id or a list of them")
            stops.update(ids)
        return stops

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text, nothing added. Unless `special`, the name of a special token is text like any other.

        ValueError: half of a surrogate pair, which no file in UTF-8 can hold.
        """
        text.encode("utf-8")  # the library's own error is a TypeError about something else
        self.backend.encode_special_tokens = not special
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens dropped."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(self.template)

    def render(self, messages: list[dict[str, str]], thinking: bool = True) -> str:
        """The chat as text, by the checkpoint's own template, ending with the generation prompt."""
        if not self.template:
            raise ValueError("the checkpoint has no chat template: expected chat_template.jinja, or one in tokenizer_config.json")
        variables = dict(messages=messages, tools=None, documents=None, add_generation_prompt=True, enable_thinking=thinking)
        try:
            return self._compiled.render(self.special_tokens | variables)
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"the checkpoint's chat template failed: {' '.join(str(error).split())}") from None

    def chat(self, messages: list[dict[str, str]], thinking: bool = True) -> list[int]:
        """Ids of a chat, generation prompt included."""
        return self.encode(self.render(messages, thinking))

    def think_prefix(self, thinking: bool = True) -> str:
        """"<think>" where the generation prompt itself opens that tag, so that the parser must be given it back."""
        return "<think>" if self.render([{"role": "user", "content": "?"}], thinking).rstrip().endswith("<think>") else ""


_TOKEN_FILES = ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json", "config.json")
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:  # as templates call it
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks text that trainers of other libraries learn; it renders as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)
