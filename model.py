"""A decoder-only transformer, Qwen3 or Llama, and its sampler: token ids go in, token ids come out.

This page knows nothing of stories or rewards. It runs from the network to what reinforcement
learning asks of it:

    the transformer      RMSNorm, rotary positions, grouped-query attention, SwiGLU
    how tokens attend    Packed: whole prompts and completions; Decoding: one new token of each
    sampling             `generate`, and the loop inside it
    log-probabilities    of given completions, with gradients: what the loss is made of
    files                checkpoints, the tokenizer and its chat template

Three decisions shape all of it.

*A prompt is computed once.* GRPO samples a group of completions for each prompt and compares them.
The prompt's keys and values are the same for the whole group, so they are computed once and kept
once, while sampling (Decoding) and in training (Packed), where gradients flow back into the prompt
from all of its completions.

*The sampler's log-probabilities are those of the policy.* They are the log-softmax of the raw
logits, taken before temperature or top-p change anything, and the sampler runs the same modules as
the trainer. The two numbers for one token differ by rounding only: grpo.py logs the largest
difference as `logprob_drift`. So the old policy's log-probabilities can be taken from the rollout
and need no second pass.

*Logits never exist all at once.* With a vocabulary of 151,936 the logits of twenty completions of
1024 tokens take 12 GB, and their gradient as much again. The loss needs one number of each row, so
logits are made for a few rows at a time, forward and backward (ChunkedLogProbs).

The modules have the names that the checkpoints use, so loading compares names and shapes and does
nothing else.
"""

import copy
import hashlib
import json
import math
import os
import re
import shutil
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
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------- the transformer


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know from a checkpoint's config.json."""

    vocab_size: int  # V
    hidden_size: int  # d, the width of the residual stream
    intermediate_size: int  # the width inside the MLP
    num_layers: int
    num_heads: int  # of queries
    num_kv_heads: int  # of keys and values; each serves num_heads / num_kv_heads query heads
    head_dim: int  # not always hidden_size / num_heads
    rope_theta: float  # base of the rotations' wavelengths
    rope_scaling: dict | None  # the settings of Llama 3.1 and later, or None
    norm_eps: float
    tied: bool  # the head reads the embedding's weight
    qk_norm: bool  # Qwen3 normalises each head of the queries and keys
    max_positions: int
    scalar: bool  # one score in place of the vocabulary: the content model of rewards.py
    raw: dict  # the whole file, which is written back on saving


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x / rms(x) * weight over the last dimension, computed in float32 and rounded once.
        """
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Return the angle per position of each pair of dimensions; (head_dim / 2,) in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = 1 / config.rope_theta**exponents
    if config.rope_scaling:
        # Llama 3.1 stretches its context: waves that do not fit into the original context several
        # times are slowed down by `factor`, short waves stay, and those between are blended.
        scaling = config.rope_scaling
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position's angles.

    positions (B, T) -> cos, sin (B, 1, T, head_dim / 2) in float32
    """
    angles = positions[:, None, :, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of dimensions (i, i + head_dim / 2) by its position's angle; x (B, heads, T,
    head_dim).
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


# What an attention layer calls with its queries, keys and values; see "how tokens attend" below.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Grouped-query attention. Which token attends to which is decided by `attend`, not here."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, size = config.hidden_size, config.head_dim
        self.head_dim = size
        self.q_proj = nn.Linear(d, config.num_heads * size, bias=False)
        self.k_proj = nn.Linear(d, config.num_kv_heads * size, bias=False)
        self.v_proj = nn.Linear(d, config.num_kv_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * size, d, bias=False)
        self.q_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(
            1, 2
        )  # (B, heads, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(
            1, 2
        )  # (B, kv_heads, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, heads, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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
        # The folder it was loaded from: on saving, the tokenizer's files are copied from there.
        self.source: Path | None = None
        # Where it computes, if its weights lie elsewhere: grpo.py can keep them in the host's
        # memory.
        self.computes_on: torch.device | None = None
        # Activation checkpointing: keep what enters a block and compute the block again on the way
        # back.
        self.checkpointing = False
        # A plain attribute and no buffer, so that it stays in float32 when the weights are cast.
        self.frequencies = rotary_frequencies(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if config.scalar:
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Let the head read the embedding's weight, where the config says so."""
        if self.config.tied and not self.config.scalar:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.computes_on or self.embed_tokens.weight.device

    def hidden(self, tokens: Tensor, context: "Packed | Decoding") -> Tensor:
        """Return the last hidden states of `tokens`; `context` knows their positions and what they
        attend to.

        (B, T) -> (B, T, d)
        """
        self.frequencies = self.frequencies.to(tokens.device)
        cos, sin = rotary_tables(context.positions, self.frequencies)
        x = self.embed_tokens(tokens)
        for layer, block in enumerate(self.layers):
            inputs = (x, cos, sin, partial(context.attend, layer))
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the next token's logits at every position; (B, T) -> (B, T, V)."""
        packed = Packed(tokens.tolist(), [[] for _ in tokens], tokens.device)
        logits = self.lm_head(self.hidden(packed.tokens, packed))  # (1, B * T, V)
        return logits.view(*tokens.shape, -1)

    def logprobs(self, packed: "Packed", places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of `targets`, each predicted at its place in the row, and the
        entropies there.

        places (n,), targets (n,) -> (n,), (n,)
        """
        hidden = self.hidden(packed.tokens, packed)[0, places]  # (n, d)
        return ChunkedLogProbs.apply(hidden, self.lm_head.weight, targets)


# ------------------------------------------------------------------------------ how tokens attend


class Packed:
    """Prompts and completions in one row without padding: every prompt is followed by its
    completions.

        row        p  p  p | a  a | b  b  b | q  q | c  c    a and b complete p, c completes q
        position   0  1  2   3  4   3  4  5   0  1   2  3    what each would have alone

    A token attends to its prompt and to what precedes it in its own completion (x):

               p  p  p  a  a  b  b  b  q  q  c  c
          p    x  x  x
          a    x  x  x  x  x
          b    x  x  x        x  x  x                            the last token of each is drawn
          c                            x  x  x  x

    `prompts[i]` and `completions[i][g]` are their places in the row, as ranges. With `keep_cache`,
    `cache[layer]` holds the keys and values (1, kv_heads, N, D) of the row, for a Decoding that
    goes on from here.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        device: torch.device,
        keep_cache: bool = False,
    ):
        self.cache: dict[int, tuple[Tensor, Tensor]] | None = {} if keep_cache else None
        self.prompts: list[range] = []
        self.completions: list[list[range]] = []
        self.lengths: list[
            int
        ] = []  # of the segments: the prompts and completions that are not empty
        self.prompt_of: list[
            int | None
        ] = []  # the prompt's segment, for each segment of a completion
        tokens: list[int] = []
        positions: list[int] = []

        def append(ids: Sequence[int], first_position: int, prompt: int | None) -> range:
            if len(ids):
                self.lengths.append(len(ids))
                self.prompt_of.append(prompt)
            tokens.extend(ids)
            positions.extend(range(first_position, first_position + len(ids)))
            return range(len(tokens) - len(ids), len(tokens))

        for prompt, group in zip(prompts, completions, strict=True):
            segment = len(self.lengths) if len(prompt) else None
            self.prompts.append(append(prompt, 0, None))
            self.completions.append([append(ids, len(prompt), segment) for ids in group])
        self.tokens = torch.tensor([tokens], dtype=torch.long, device=device)  # (1, N)
        self.positions = torch.tensor([positions], dtype=torch.long, device=device)  # (1, N)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, heads, N, D), k and v (1, kv_heads, N, D) -> (1, heads, N, D)."""
        if self.cache is not None:
            self.cache[layer] = (k, v)
        segments = list(zip(*(x.split(self.lengths, dim=2) for x in (q, k, v))))
        outputs = []
        for (queries, keys, values), prompt in zip(segments, self.prompt_of):
            if prompt is not None:
                _, prompt_keys, prompt_values = segments[prompt]
                keys = torch.cat((prompt_keys, keys), dim=2)
                values = torch.cat((prompt_values, values), dim=2)
            # The last query sees all keys, the one before it all but the last key, and so on.
            mask = causal_lower_right(queries.shape[2], keys.shape[2])
            grouped = queries.shape[1] != keys.shape[1]
            outputs.append(
                F.scaled_dot_product_attention(
                    queries, keys, values, attn_mask=mask, enable_gqa=grouped
                )
            )
        return torch.cat(outputs, dim=2)


class Decoding:
    """Attention of one new token in each row: to the prompt, which its group shares, and to what
    the row has written.

    Rows stand in a grid of slots, one line for each prompt. Here the second completion of q has
    stopped, its row has left, and its slot is empty; what is computed there is never read:

        keys of the prompts      keys of what was written, by slot
        p  p  p  p               a  a  .  |  b  b  .  |  c  c  .
        q  q  -  -               d  d  .  |           |  e  e  .

    A batched cache would hold and read a prompt's keys once for each completion. Here all queries
    of a group meet them in one product, which is most of what makes sampling fast. When every group
    has an empty slot, or no row is left of a prompt, the grid shrinks. Letters: P prompts, G slots
    each, K kv heads, n = heads / K queries on each, D = head_dim.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompt_lengths: Tensor,
        group_size: int,
        max_new_tokens: int,
        dtype: torch.dtype,
    ):
        """Make room for prompts of these lengths (P,), which `fill` brings, and for the new tokens
        of `group_size` rows each.
        """
        device, layers = prompt_lengths.device, range(config.num_layers)
        P, L = len(prompt_lengths), int(prompt_lengths.max())
        K, D = config.num_kv_heads, config.head_dim
        prompt_shape = (P, K, L, D)
        self.prompt_keys = [torch.zeros(prompt_shape, device=device, dtype=dtype) for _ in layers]
        self.prompt_values = [torch.zeros(prompt_shape, device=device, dtype=dtype) for _ in layers]
        shape = (P, K, group_size, max_new_tokens, D)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.prompt_lengths = prompt_lengths
        beyond = torch.arange(L, device=device) >= prompt_lengths[:, None]  # (P, L)
        bias = torch.zeros(P, 1, 1, L, device=device, dtype=dtype)
        self.bias = bias.masked_fill_(beyond[:, None, None], -math.inf)
        self.length = 0  # tokens that every row has written
        prompt = torch.arange(P, device=device).repeat_interleave(group_size)
        slot = torch.arange(group_size, device=device).repeat(P)
        self._place(prompt, slot, (P, group_size))

    def fill(self, first: int, packed: Packed) -> None:
        """Copy the keys and values of prompts `first`, `first` + 1, ...: a common start, and each
        prompt's rest as its completion.
        """
        start = packed.prompts[0]
        sources, rows = [], []
        for row, rest in enumerate(packed.completions[0], start=first):
            sources += [*start, *rest]
            rows += [row] * (len(start) + len(rest))
        columns = packed.positions[0, sources]
        for layer, (keys, values) in packed.cache.items():
            self.prompt_keys[layer][rows, :, columns] = keys[0, :, sources].transpose(0, 1)
            self.prompt_values[layer][rows, :, columns] = values[0, :, sources].transpose(0, 1)

    def _place(self, prompt: Tensor, slot: Tensor, grid: tuple[int, int]) -> None:
        """Put each row into a slot (rows,) of its prompt (rows,).

        `queries_of` (P, K, G) says whose queries are computed where: the number of row and kv head.
        An empty slot repeats those of the first row.
        """
        self.prompt, self.slot, self.grid = prompt, slot, grid
        row_of_slot = torch.zeros(grid, dtype=torch.long, device=prompt.device)
        row_of_slot[prompt, slot] = torch.arange(len(prompt), device=prompt.device)
        K = self.keys[0].shape[1]
        heads = torch.arange(K, device=prompt.device)[:, None]
        self.queries_of = row_of_slot[:, None, :] * K + heads

    @property
    def positions(self) -> Tensor:
        """Positions (rows, 1) of the tokens to come."""
        return (self.prompt_lengths[self.prompt] + self.length)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (rows, heads, 1, D), k and v (rows, K, 1, D) -> (rows, heads, 1, D)."""
        rows, K, _, D = k.shape
        (P, G), L = self.grid, self.bias.shape[-1]
        keys = self.keys[layer][:, :, :, : self.length + 1]  # (P, K, G, t, D)
        values = self.values[layer][:, :, :, : self.length + 1]
        keys[self.prompt, :, self.slot, -1] = k[:, :, 0]
        values[self.prompt, :, self.slot, -1] = v[:, :, 0]

        q = q.reshape(rows * K, -1, D)[self.queries_of] * D**-0.5  # (P, K, G, n, D)
        to_prompt = q.view(P, K, -1, D) @ self.prompt_keys[layer].mT + self.bias  # (P, K, G * n, L)
        to_written = q @ keys.mT  # (P, K, G, n, t)
        scores = torch.cat((to_prompt.view(P, K, G, -1, L), to_written), dim=-1)
        weights = scores.softmax(dim=-1)
        out = weights[..., :L].reshape(P, K, -1, L) @ self.prompt_values[layer]  # (P, K, G * n, D)
        out = out.view(q.shape) + weights[..., L:] @ values
        return out[self.prompt, :, self.slot].view(rows, -1, 1, D)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (indices, in order), and shrink the grid if a line or a column
        of slots is empty.
        """
        prompt, slot = self.prompt[rows], self.slot[rows]
        prompts, line, counts = prompt.unique(return_inverse=True, return_counts=True)
        grid = (len(prompts), int(counts.max()))
        if grid == self.grid:
            self._place(prompt, slot, grid)
            return
        first_of_line = counts.cumsum(0) - counts
        column = torch.arange(len(rows), device=rows.device) - first_of_line[line]
        self._place(line, column, grid)
        self.prompt_lengths, self.bias = self.prompt_lengths[prompts], self.bias[prompts]
        for layer in range(len(self.keys)):
            for caches in (self.prompt_keys, self.prompt_values):
                caches[layer] = caches[layer][prompts]
            for caches in (self.keys, self.values):
                old = caches[layer]
                new = old.new_empty(grid[0], old.shape[1], grid[1], *old.shape[3:])
                new[line, :, column, : self.length] = old[prompt, :, slot, : self.length]
                caches[layer] = new


# -------------------------------------------------------------------------------------- sampling


class Diverged(ValueError):
    """Logits or weights are not finite: the weights are broken, or training has run away."""


@dataclass
class Completion:
    tokens: list[int]  # what was sampled, the closing stop token included
    logprobs: list[float]  # log-softmax of the raw logits at those tokens
    finished: bool  # ended by a stop token and not by the length limit


SAMPLING_BUDGET = 65536  # tokens in caches at a time


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    group_size: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    token_budget: int = SAMPLING_BUDGET,
) -> list[list[Completion]]:
    """Sample `group_size` completions of each prompt; return a list of P lists of G.

    Temperature 0 is greedy; top_p 1 and top_k 0 are off. The `logprobs` are those of the raw
    logits, whatever these settings are. The random numbers of a completion depend only on the seed,
    its prompt, its place in the group and the position, so its tokens do not depend on what else is
    in the batch, and equal prompts have equal groups.

    At most `token_budget` tokens are held in caches at a time, but at least one prompt's group; see
    `waves`. ValueError: an empty prompt, an id outside the vocabulary, a prompt that leaves no room
    for `max_new_tokens` in the model's context, a setting out of range. Diverged: logits that are
    not finite.
    """
    settings = (group_size, max_new_tokens, temperature, top_p, top_k, stop_ids, seed, token_budget)
    groups = dict(generate_stream(model, prompts, *settings))
    return [copy.deepcopy(groups[tuple(prompt)]) for prompt in prompts]


@torch.inference_mode()
def generate_stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop_ids: Sequence[int],
    seed: int,
    token_budget: int,
) -> Iterator[tuple[tuple[int, ...], list[Completion]]]:
    """Yield each distinct prompt with its group, long prompts first, as soon as it is sampled.

    The settings and errors are those of `generate`.
    """
    sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k)
    check_sampling(group_size=group_size, max_new_tokens=max_new_tokens, seed=seed, **sampling)
    check_prompts(model.config, prompts, max_new_tokens)
    pick = partial(choose, **sampling)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.device)
    places = range(group_size)
    with reordered_weights(model):
        for wave in waves(model.config, prompts, group_size, max_new_tokens, token_budget):
            # Equal prompts have equal keys: a random number depends on them and on nothing else.
            draws = [uniforms(seed, prompt, g, max_new_tokens) for prompt in wave for g in places]
            draws = torch.from_numpy(np.stack(draws)).to(model.device)  # (B, N)
            completions = sample(model, wave, group_size, draws, pick, stops)
            for i, prompt in enumerate(wave):
                yield prompt, completions[i * group_size : (i + 1) * group_size]


def sample(
    model: Transformer,
    prompts: list[tuple[int, ...]],
    group_size: int,
    draws: Tensor,
    pick: Callable[[Tensor, Tensor], Tensor],
    stops: Tensor,
) -> list[Completion]:
    """Sample completions of these prompts together, B = P * G rows at most N tokens long.

    draws (B, N): a random number for each position. pick (rows, V), (rows,) -> (rows,) chooses the
    tokens.
    """
    B, N = draws.shape
    tokens = torch.zeros(B, N, dtype=torch.long, device=draws.device)
    logprobs = torch.zeros(B, N, device=draws.device)
    lengths = torch.full((B,), N, device=draws.device)
    finished = torch.zeros(B, dtype=torch.bool, device=draws.device)

    logits, context = prefill(model, prompts, group_size, N)  # (B, V)
    rows = torch.arange(B, device=draws.device)  # the completions that are still being written
    for t in range(N):
        # 1. Sample a token for every row.
        row_logprobs = logits.float().log_softmax(dim=-1)  # (rows, V)
        chosen = pick(row_logprobs, draws[rows, t])
        tokens[rows, t] = chosen
        logprobs[rows, t] = row_logprobs.gather(1, chosen[:, None])[:, 0]

        # 2. Rows that stopped leave.
        stopped = torch.isin(chosen, stops)
        if stopped.any():
            lengths[rows[stopped]] = t + 1
            finished[rows[stopped]] = True
            stay = (~stopped).nonzero()[:, 0]
            rows, chosen = rows[stay], chosen[stay]
            if len(rows):
                context.keep(stay)
        if t == N - 1 or not len(rows):
            break

        # 3. Feed the tokens back to get the next logits.
        logits = model.lm_head(model.hidden(chosen[:, None], context)[:, -1])
        context.length += 1

    if not logprobs.isfinite().all():
        raise Diverged("logits are not finite: the weights are broken, or training has diverged")
    columns = (tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist())
    return [Completion(ids[:n], values[:n], end) for ids, values, n, end in zip(*columns)]


def uniforms(seed: int, prompt: Sequence[int], place: int, count: int) -> np.ndarray:
    """Draw `count` numbers in [0, 1) for one completion: number t is for position t.

    They are a function of seed, prompt and place in the group. There is no generator whose state
    would have to be saved, so a resumed run, a larger batch or a second process draw the same
    numbers.
    """
    key = hashlib.blake2b(
        np.array([seed, place, *prompt], dtype=np.int64).tobytes(), digest_size=16
    )
    philox = np.random.Philox(key=int.from_bytes(key.digest(), "little"))
    return np.random.Generator(philox).random(count)


def choose(
    logprobs: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int
) -> Tensor:
    """Choose a token for each row, at temperature 0 the likeliest; first top-k, then top-p remove
    tokens.

    logprobs (rows, V) in float32, uniform (rows,) in float64 -> (rows,)
    """
    if temperature == 0:
        return logprobs.argmax(dim=-1)
    probs = (logprobs / temperature).softmax(dim=-1)
    if top_k:
        least = probs.topk(min(top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.masked_fill(probs < least, 0.0)
    if top_p < 1:  # keep the smallest set of tokens whose probabilities reach top_p
        ordered, order = probs.sort(dim=-1, descending=True)
        reached = ordered.double().cumsum(dim=-1)
        dropped = reached - ordered >= top_p * reached[:, -1:]
        probs = probs.scatter(1, order, ordered.masked_fill(dropped, 0.0))
    return inverse_cdf(probs, uniform)


def inverse_cdf(probs: Tensor, uniform: Tensor, block: int = 128) -> Tensor:
    """Return the first id whose cumulative probability exceeds uniform * total; (rows, V), (rows,)
    -> (rows,).

    Cumulative sums must be in float64, or rare tokens are rounded away. One over the whole
    vocabulary would write a float64 table of it for every token, so the search has two levels:
    blocks of ids, then the ids of the block that was hit.
    """
    V = probs.shape[1]
    blocks = F.pad(probs, (0, -V % block)).unflatten(1, (-1, block))  # (rows, V / block, block)
    sums = blocks.sum(dim=2).double()
    edges = sums.cumsum(dim=1)
    target = uniform[:, None] * edges[:, -1:]  # (rows, 1)
    hit = first_above(edges, target)
    before = (edges - sums).gather(1, hit)
    fraction = ((target - before) / sums.gather(1, hit)).clamp(min=0)  # of the block's probability
    inside = blocks.gather(1, hit[:, :, None].expand(-1, 1, block))[:, 0]  # (rows, block)
    edges_inside = inside.double().cumsum(dim=1)
    chosen = hit * block + first_above(edges_inside, fraction * edges_inside[:, -1:])
    return chosen[:, 0].clamp(max=V - 1)


def first_above(edges: Tensor, target: Tensor) -> Tensor:
    """Return the index of the first edge above the target; (rows, n), (rows, 1) -> (rows, 1).

    Rounding must not put a target at the last edge or behind it, where no id has any probability.
    """
    below_last = torch.nextafter(edges[:, -1:], torch.zeros_like(target))
    index = torch.searchsorted(edges, torch.minimum(target, below_last), right=True)
    return index.clamp(max=edges.shape[1] - 1)  # searching for NaN gives an index behind the end


def prefill(
    model: Transformer, prompts: list[tuple[int, ...]], group_size: int, max_new_tokens: int
) -> tuple[Tensor, Decoding]:
    """Run the prompts through the network; return logits (B, V) of all first tokens, and the
    context to go on in.

    Prompts mostly begin with the same system message: in each piece it is computed once. Pieces are
    small, because a CPU is fastest while the activations fit into its caches, and a GPU's memory is
    needed for other things.
    """
    weight = model.embed_tokens.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    context = Decoding(model.config, lengths, group_size, max_new_tokens, weight.dtype)
    start = common_start(prompts)
    last_states = []
    for piece in within_budget(
        range(len(prompts)), lambda i: len(prompts[i]) - start, prefill_tokens(weight.device)
    ):
        rests = [prompts[i][start:] for i in piece]
        packed = Packed([prompts[0][:start]], [rests], weight.device, keep_cache=True)
        hidden = model.hidden(packed.tokens, packed)[0]  # (N, d)
        context.fill(piece[0], packed)
        last_states.append(hidden[[places[-1] for places in packed.completions[0]]])
    logits = model.lm_head(torch.cat(last_states))  # (P, V)
    return logits.repeat_interleave(group_size, dim=0), context


def prefill_tokens(device: torch.device) -> int:
    return 2048 if device.type == "cpu" else 16384


def common_start(prompts: list[tuple[int, ...]]) -> int:
    """Return how many tokens all prompts begin with; 0 where sharing them saves nothing.

    Each prompt keeps at least its last token for itself, because the first logits come from there.
    """
    length = 0
    for ids in zip(*(prompt[:-1] for prompt in prompts)):
        if len(set(ids)) > 1:
            break
        length += 1
    return length if length >= 16 and len(prompts) > 1 else 0


def within_budget(items: Sequence, size: Callable[[object], int], budget: int) -> Iterator[list]:
    """Cut items into batches, in order: as many at a time as keep the sum of their sizes in the
    budget, at least one.
    """
    batch, total = [], 0
    for item in items:
        if batch and total + size(item) > budget:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def waves(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_new_tokens: int,
    token_budget: int,
) -> Iterator[list[tuple[int, ...]]]:
    """Cut the distinct prompts, longest first, into waves that are sampled one after the other.

    A wave holds as many prompts as the budget allows, at least one. Each needs room for its tokens,
    padded to the longest of the wave, and for its whole group; the tables of logits count as if
    they were cached tokens.
    """
    group_tokens = group_size * (max_new_tokens + logits_in_tokens(config))
    wave: list[tuple[int, ...]] = []
    for prompt in sorted(dict.fromkeys(map(tuple, prompts)), key=len, reverse=True):
        if wave and (len(wave) + 1) * (len(wave[0]) + group_tokens) > token_budget:
            yield wave
            wave = []
        wave.append(prompt)
    if wave:
        yield wave


def logits_in_tokens(config: ModelConfig) -> int:
    """Return how many cached tokens take the memory of one row's logits and of the (up to twelve)
    tables made from them.
    """
    numbers_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return 12 * config.vocab_size // numbers_per_token


def is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer))


SAMPLING_RULES = {
    "group_size": (lambda n: is_whole(n) and n >= 1, "a whole number from 1 up"),
    "max_new_tokens": (lambda n: is_whole(n) and n >= 1, "a whole number from 1 up"),
    "temperature": (
        lambda t: t == 0 or 1e-6 <= t < math.inf,
        "0 (greedy), or a number from 1e-6 up",
    ),
    "top_p": (lambda p: 0 < p <= 1, "above 0 and at most 1 (off)"),
    "top_k": (lambda k: is_whole(k) and k >= 0, "a whole number from 0 (off) up"),
    "seed": (lambda s: is_whole(s) and abs(s) < 2**63, "a whole number of 64 bits"),
}


def check_sampling(**settings: float) -> None:
    """ValueError names the setting that is out of range."""
    for name, value in settings.items():
        fits, expected = SAMPLING_RULES[name]
        if not fits(value):
            raise ValueError(f"cannot sample with {name} = {value!r}; expected {expected}")


def check_prompts(config: ModelConfig, prompts: Sequence, max_new_tokens: int) -> None:
    """ValueError names the first prompt that cannot be continued."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: there must be a token to continue")
        check_ids(config, f"prompt {i}", prompt)
        if len(prompt) + max_new_tokens > config.max_positions:
            length = f"{len(prompt)} + {max_new_tokens} positions"
            context = f"the model's context {config.max_positions}"
            raise ValueError(f"prompt {i} with max_new_tokens takes {length}, {context}")


def check_ids(config: ModelConfig, name: str, ids: Sequence[int]) -> None:
    """ValueError: something in `ids`, which are not empty, is not the id of a token."""
    if not all(map(is_whole, ids)) or not 0 <= min(ids) <= max(ids) < config.vocab_size:
        found = f"ids from {min(ids)} to {max(ids)}, the vocabulary {config.vocab_size}"
        raise ValueError(f"{name} has {found}: is it the model's tokenizer?")


@contextmanager
def reordered_weights(model: Transformer) -> Iterator[None]:
    """Inside, a float32 model on a CPU multiplies with copies of its weights in the order in which
    oneDNN reads them.

    A plain product of a handful of rows is several times slower than reading the weights from
    memory; this one is not, and rollouts take about 0.65 of the time. It costs one pass over the
    weights and a second copy of them, so models above REORDER_LIMIT are left alone. The operators
    are what torch.compile itself emits, but private to torch: where they are missing or wrong,
    nothing happens.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weight = model.embed_tokens.weight
    fits = sum(linear.weight.nbytes for linear in linears) <= REORDER_LIMIT
    if (
        weight.device.type != "cpu"
        or weight.dtype != torch.float32
        or not fits
        or not reordering_works()
    ):
        linears = []
    try:
        for linear in linears:
            linear.forward = partial(multiply_reordered, weight=reorder(linear.weight))
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


REORDER_LIMIT = 4 << 30  # bytes


def reorder(weight: Tensor) -> Tensor:
    rows_to_expect = 16
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows_to_expect)


def multiply_reordered(x: Tensor, weight: Tensor) -> Tensor:
    """Return x times the transposed weight, which `reorder` has made; no bias, no activation."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@lru_cache
def reordering_works() -> bool:
    x, weight = torch.linspace(-1, 1, 192).view(3, 64), torch.linspace(1, -1, 8192).view(128, 64)
    try:
        return torch.allclose(
            multiply_reordered(x, reorder(weight)), F.linear(x, weight), atol=1e-4
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


# ----------------------------------------------------------------------------- log-probabilities


def completion_logprobs(
    model: Transformer, prompts: list[list[int]], completions: list[list[list[int]]]
) -> tuple[Tensor, Tensor]:
    """Compute the log-probabilities of given completions: P prompts, and for each a list of token
    lists.

    -> logprobs (B, T), mask (B, T); B completions, the first prompt's first, T the longest length

    They are differentiable, and 0 where the mask is False. ValueError: an empty prompt, another
    number of prompts than of lists, an id outside the vocabulary.
    """
    return logprobs_and_entropy(model, prompts, completions)[:2]


def logprobs_and_entropy(
    model: Transformer, prompts: list[list[int]], completions: list[list[list[int]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what completion_logprobs does, and the entropy before each token, in nats.

    -> logprobs (B, T), mask (B, T), entropies (B, T), the last without gradient
    """
    check_completions(model.config, prompts, completions)
    targets, mask = pad([ids for group in completions for ids in group], model.device)  # (B, T)
    if not prompts:
        return torch.zeros(0, 0), mask, torch.zeros(0, 0)
    # No token follows a completion's last one, so that one need not go through the network.
    inputs = [[ids[:-1] for ids in group] for group in completions]
    packed = Packed(prompts, inputs, model.device)
    # A first token is predicted at the end of its prompt, every other one at the token before it.
    places: list[int] = []
    for p, group in enumerate(completions):
        for g, ids in enumerate(group):
            if len(ids):
                places += [packed.prompts[p][-1], *packed.completions[p][g]]
    places = torch.tensor(places, dtype=torch.long, device=model.device)  # (n,)
    logprobs, entropies = model.logprobs(packed, places, targets[mask])
    return unpack(logprobs, mask), mask, unpack(entropies, mask)


def check_completions(
    config: ModelConfig, prompts: list[list[int]], completions: list[list[list[int]]]
) -> None:
    if len(prompts) != len(completions) or not all(map(len, prompts)):
        given = f"{len(prompts)} prompts and {len(completions)} lists of completions"
        raise ValueError(f"{given}; expected one for each, and no empty prompt")
    for i, (prompt, group) in enumerate(zip(prompts, completions)):
        check_ids(config, f"prompt {i}", prompt)
        for ids in filter(len, group):
            check_ids(config, f"a completion of prompt {i}", ids)


def pad(
    rows: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype = torch.long
) -> tuple[Tensor, Tensor]:
    """Put lists into one tensor, padded on the right; the mask, not the padding's 0, says what
    counts.

    -> values (B, T), mask (B, T)
    """
    width = max(map(len, rows), default=0)
    values = torch.zeros(len(rows), width, dtype=dtype)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(row, dtype=dtype)
        mask[i, : len(row)] = True
    return values.to(device), mask.to(device)


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Put values (n,) where the mask (B, T) is True, and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(
        mask, values
    )


class ChunkedLogProbs(torch.autograd.Function):
    """Compute log softmax(hidden @ weight.T) at the targets, and the entropy, for a few rows at a
    time.

    Forward, each chunk of logits is reduced to two numbers a row and forgotten. Backward, it is
    made again. The gradient of a target's log-probability by its row of logits is

        one-hot(target) - softmax(logits)
    """

    SIZE = 1 << 23  # numbers in one chunk of logits

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (n, d), weight (V, d), targets (n,) -> log-probabilities (n,), entropies (n,)."""
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rows = max(1, ChunkedLogProbs.SIZE // len(weight))
        chosen, entropies = [], []
        for states, ids in zip(hidden.split(ctx.rows), targets.split(ctx.rows)):
            logprobs = at_least_float32(states @ weight.T).log_softmax(dim=1)  # (rows, V)
            chosen.append(logprobs.gather(1, ids[:, None])[:, 0])
            # A probability of 0 has the log-probability -inf, and 0 * -inf would be NaN.
            entropies.append(-logprobs.exp().mul_(logprobs.clamp_(min=-1e4)).sum(dim=1))
            del logprobs  # before the next chunk is made
        entropies = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies)
        return torch.cat(chosen), entropies

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None]:
        """grad (n,) -> the gradients of hidden (n, d) and weight (V, d)."""
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = []
        # The chunks' contributions to the weight are summed in float32 at least.
        grad_weight = at_least_float32(torch.zeros_like(weight))
        chunks = zip(hidden.split(ctx.rows), targets.split(ctx.rows), grad[:, None].split(ctx.rows))
        for states, ids, factor in chunks:
            probs = at_least_float32(states @ weight.T).softmax(dim=1)
            probs.scatter_add_(1, ids[:, None], torch.full_like(factor, -1))  # softmax - one-hot
            grad_logits = probs.mul_(-factor).to(weight.dtype)
            grad_hidden.append(grad_logits @ weight)
            if grad_weight.dtype == weight.dtype:
                grad_weight.addmm_(grad_logits.T, states)  # without a second table of this size
            else:
                grad_weight += grad_logits.T @ states
            del probs, grad_logits
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------- files


# Values of config.json that this forward pass computes; what is not in the file counts as None.
SUPPORTED = {
    "model_type": ("qwen3", "llama"),
    "hidden_act": ("silu", "swish"),
    "tie_word_embeddings": (True, False),
    "use_sliding_window": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None, {}),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "is_causal": (None, True),
    "partial_rotary_factor": (None, 1),
    "rope_type": ("default", "llama3"),
}
# What transformers assumes where config.json is silent.
COMMON = dict(hidden_act="silu", rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False)
QWEN3 = dict(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768)
LLAMA = dict(max_position_embeddings=2048)
SIZES = dict(vocab_size=2**24, hidden_size=2**17, intermediate_size=2**20, num_hidden_layers=1024)
SIZES |= dict(num_attention_heads=2**16, num_key_value_heads=2**16, head_dim=2**16)
SIZES |= dict(max_position_embeddings=2**31)
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def parse_config(raw: dict) -> ModelConfig:
    """Read a Hugging Face config; ValueError names what this forward pass does not compute."""
    given = COMMON | (LLAMA if raw.get("model_type") == "llama" else QWEN3) | raw
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"config has rope settings {rope!r}; expected one object for all layers")
    given |= {"rope_type": rope.get("type", "default")} | rope
    for name, values in SUPPORTED.items():
        if given.get(name) not in values:
            expected = ", ".join(repr(value) for value in values if value is not None)
            value = repr(given.get(name))
            raise ValueError(f"config has {name} = {value}, not supported; expected {expected}")
    layers = given.get("layer_types")
    if layers and layers != ["full_attention"] * len(layers):
        raise ValueError(f"config has layer_types = {layers!r}, not supported")
    check_sizes(given)
    llama3 = given["rope_type"] == "llama3"
    for name in ("rope_theta", "rms_norm_eps", *LLAMA3_ROPE[: 4 * llama3]):
        value = given.get(name)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise ValueError(f"config has {name} = {value!r}; expected a number above 0")
    if llama3 and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ValueError(f"config has {rope!r}; expected high_freq_factor above low_freq_factor")
    if llama3 and raw.get(LLAMA3_ROPE[3], rope[LLAMA3_ROPE[3]]) != rope[LLAMA3_ROPE[3]]:
        raise ValueError(f"config has {rope!r}, and another {LLAMA3_ROPE[3]} beside it")
    return ModelConfig(
        vocab_size=given["vocab_size"],
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        num_layers=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        num_kv_heads=given["num_key_value_heads"],
        head_dim=given["head_dim"],
        rope_theta=float(given["rope_theta"]),
        rope_scaling=rope if llama3 else None,
        norm_eps=given["rms_norm_eps"],
        tied=given["tie_word_embeddings"],
        qk_norm=given["model_type"] == "qwen3",
        max_positions=given["max_position_embeddings"],
        scalar="ForSequenceClassification" in str(given.get("architectures")),
        raw=raw,
    )


def check_sizes(given: dict) -> None:
    """Fill in the sizes that follow from others; ValueError names one that cannot be."""
    heads, width = given.get("num_attention_heads"), given.get("hidden_size")
    given["num_key_value_heads"] = given.get("num_key_value_heads") or heads
    if not given.get("head_dim") and type(heads) is int and type(width) is int:
        given["head_dim"] = width // max(heads, 1)
    for name, limit in SIZES.items():
        value = given.get(name)
        if type(value) is not int or not 0 < value <= limit:
            raise ValueError(
                f"config has {name} = {value!r}; expected a whole number, 1 to {limit}"
            )
    size, kv_heads = given["head_dim"], given["num_key_value_heads"]
    if size % 2 or heads % kv_heads:
        shape = f"{heads} heads of size {size} for {kv_heads} key heads"
        raise ValueError(f"config has {shape}; expected an even size, a multiple of the key heads")


def read_config(path: str | Path, scalar: bool | None = False) -> ModelConfig:
    """Read a checkpoint's config: of a language model, or with `scalar` of one with a scalar head.

    None takes either. ValueError: the other kind, or no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder; expected config.json and weights in it")
    config = parse_config(read_json(folder / "config.json"))
    if scalar not in (config.scalar, None):
        kinds = ("language model", "content model (with a scalar head)")
        raise ValueError(f"{folder} is a {kinds[config.scalar]}; expected a {kinds[scalar]}")
    return config


def load_model(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    scalar: bool | None = False,
) -> Transformer:
    """Load a Hugging Face checkpoint folder, one safetensors file or several; `scalar` as in
    read_config.

    Names and shapes are compared before anything is read. Then each tensor goes from its file to
    the wanted dtype and device by itself, the largest first, so that memory peaks at hardly more
    than the weights. ValueError names what does not fit.
    """
    check_device(device)
    if not dtype.is_floating_point:
        raise ValueError(f"cannot load weights as {dtype}; expected a floating-point dtype")
    folder = Path(path)
    config = read_config(path, scalar)
    with torch.device("meta"):
        model = Transformer(config)
    parameters = dict(model.named_parameters())
    places = find_tensors(folder, dict(model.named_parameters(remove_duplicate=False)), config)
    if config.tied and "lm_head.weight" in places:
        head = read_tensor(*places["lm_head.weight"], device)
        if not torch.equal(head, read_tensor(*places["embed_tokens.weight"], device)):
            unequal = f"{folder}: lm_head.weight differs from the embedding"
            raise ValueError(f"{unequal}, but config.json says tie_word_embeddings")
    weights = {}
    for name in sorted(parameters, key=lambda name: -parameters[name].numel()):
        weights[name] = read_tensor(*places[name], device).to(dtype, copy=True)
    model.load_state_dict(weights, strict=False, assign=True)  # strict would ask for a tied head
    model.tie()
    model.source = folder.resolve()
    return model.requires_grad_(True).eval()


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device} cannot be used here: {reason}") from None


def find_tensors(
    folder: Path, wanted: dict[str, nn.Parameter], config: ModelConfig
) -> dict[str, tuple[Path, str]]:
    """Find each parameter's file and its name there; ValueError names what does not fit."""
    places: dict[str, tuple[Path, str]] = {}
    for file in weight_files(folder):
        with open_weights(file) as weights:
            for key in weights.keys():
                name = key.removeprefix("model.")
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # older checkpoints store rotation tables
                if name not in wanted:
                    kind = config.raw["model_type"]
                    raise ValueError(f"{file}: tensor {key!r} has no place in this {kind} model")
                if name in places:
                    other = places[name][0].name
                    raise ValueError(f"{file}: tensor {key!r} is there twice, also in {other}")
                header = weights.get_slice(key)
                shape, expected = tuple(header.get_shape()), tuple(wanted[name].shape)
                if shape != expected:
                    raise ValueError(f"{file}: {key!r} has shape {shape}, expected {expected}")
                if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    stored = f"{file}: {key!r} is stored as {header.get_dtype()}"
                    raise ValueError(f"{stored}, expected F32, F16 or BF16: is it quantised?")
                places[name] = (file, key)
    optional = {"lm_head.weight"} if config.tied else set()
    missing = sorted(wanted.keys() - places.keys() - optional)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} missing: {', '.join(missing[:3])}")
    return places


SHARD_NAME = re.compile(r"[^/]+\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint; a single one goes before an index, as in transformers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index}: no weight_map")
    for name in shards.values():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ValueError(f"{index}: {name!r} is no name of a safetensors file in this folder")
    return [folder / name for name in sorted(set(shards.values()))]


def open_weights(file: Path, device: str = "cpu") -> safe_open:
    try:
        return safe_open(file, framework="pt", device=str(device))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such weights file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from None


def read_tensor(file: Path, key: str, device: str) -> Tensor:
    """Read one tensor; the file is opened anew for each, because the pages of an open file stay in
    memory.
    """
    with open_weights(file, device) as weights:
        return weights.get_tensor(key)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a checkpoint folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as UTF-8 text: {error}") from None


def read_json(path: Path) -> dict:
    """Read one JSON object from a file; ValueError says which file and why not."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Hand out an empty folder, which takes the place of `target` when the block ends without an
    error.

    Everything in it is flushed to the disk before it is renamed: after a kill or a power cut there
    is the old folder or the new one under this name, and never half of either.
    """
    target = target.resolve()
    temporary = target.with_name(f".{target.name}.new")
    replaced = target.with_name(f".{target.name}.old")
    for leftover in (temporary, replaced):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors makes its files private
            flush(path)
        if target.exists():
            os.rename(target, replaced)
        os.rename(temporary, target)
        flush(target.parent)
    finally:
        if replaced.exists() and not target.exists():  # interrupted between the two
            os.rename(replaced, target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until the disk has what was written to this file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_model(model: Transformer, path: str | Path) -> None:
    """Write a checkpoint folder that other tools load; it replaces an older checkpoint, never
    another folder (ValueError).
    """
    refuse_other_folders(Path(path))
    weights = {name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}
    with new_folder(Path(path)) as folder:
        write_model(model, folder, weights)


def refuse_other_folders(path: Path) -> None:
    """ValueError: `path` holds anything but a checkpoint, which saving there would delete."""
    target = path.resolve()
    if not target.exists():
        return
    content = list(target.iterdir()) if target.is_dir() else [target]
    try:
        has_config = "model_type" in read_json(target / "config.json")
    except ValueError:
        has_config = False
    has_weights = any(file.suffix == ".safetensors" for file in content)
    is_checkpoint = has_config and has_weights and all(file.is_file() for file in content)
    if target == Path.cwd() or content and not is_checkpoint:
        raise ValueError(f"{target} is no checkpoint folder: saving there would delete it")


# Copied unchanged from the folder that a model was loaded from.
CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")
CARRIED += ("merges.txt", "tokenizer.model", "added_tokens.json", "generation_config.json")
CARRIED += ("chat_template.jinja", "chat_template.json")


def write_model(model: Transformer, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the config, these weights (on the host) and the tokenizer's files; ValueError: those
    are gone.
    """
    if model.source and not model.source.is_dir():
        needed = "the tokenizer must be saved with the model that was loaded from there"
        raise ValueError(f"{model.source}: no such folder any more; {needed}")
    for name in CARRIED:
        if model.source and (model.source / name).is_file():
            shutil.copyfile(model.source / name, folder / name)
    heads = ("lm_head.weight", "score.weight")
    named = {name if name in heads else f"model.{name}": weight for name, weight in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    raw = {name: value for name, value in model.config.raw.items() if name != "torch_dtype"}
    config = json.dumps(raw | {"dtype": dtype}, indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- tokenizer and chat


class Tokenizer:
    """A checkpoint's tokenizer, chat template and stop tokens: text goes in, token ids come out,
    and back.
    """

    def __init__(self, path: str | Path):
        folder = Path(path)
        self.backend = load_backend(folder / "tokenizer.json")
        names = ("special_tokens_map", "tokenizer_config", "generation_config", "config")
        files = {name: folder / f"{name}.json" for name in names}
        options = {name: read_json(file) if file.exists() else {} for name, file in files.items()}
        settings = options["special_tokens_map"] | options["tokenizer_config"]
        self.special_tokens = parse_special_tokens(settings)
        self.template = find_template(folder, settings)
        stops = {self.special_tokens.get("eos_token"), "<|im_end|>", "<|eot_id|>", "<|endoftext|>"}
        ids = {self.backend.token_to_id(token) for token in stops if token} - {None}
        for name in ("generation_config", "config"):
            ids |= parse_stop_ids(files[name], options[name].get("eos_token_id"))
        self.stop_ids = tuple(sorted(ids))
        self.max_new_tokens = options["generation_config"].get("max_new_tokens") or 1024
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            given = f"{files['generation_config']}: max_new_tokens is {self.max_new_tokens!r}"
            raise ValueError(f"{given}; expected a whole number above 0")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text, nothing added; unless `special`, the name of a special token is
        plain text.

        ValueError: half of a surrogate pair, which no file in UTF-8 can hold.
        """
        text.encode("utf-8")  # the library's own error is a TypeError about something else
        self.backend.encode_special_tokens = not special
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def completion_text(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Return a completion as a parser should see it.

        Special tokens stay in the text, because some tokenizers declare <think> to be one; only the
        closing stop token goes. Where the prompt ends by opening <think>, the policy goes on behind
        that tag, so it is put back.
        """
        tokens = list(tokens)
        if tokens and tokens[-1] in self.stop_ids:
            tokens.pop()
        end_of_prompt = self.backend.decode(list(prompt[-16:]), skip_special_tokens=False)
        opened = "<think>" if end_of_prompt.rstrip().endswith("<think>") else ""
        return opened + self.backend.decode(tokens, skip_special_tokens=False)

    def chat(self, messages: list[dict[str, str]], thinking: bool = True) -> list[int]:
        """Return the ids of a chat that ends with the generation prompt."""
        return self.encode(self.render(messages, thinking))

    def render(self, messages: list[dict[str, str]], thinking: bool = True) -> str:
        """Return the chat as text by the checkpoint's own template; ValueError: it has none, or it
        fails.
        """
        if not self.template:
            raise ValueError("the checkpoint has no chat template (chat_template.jinja)")
        variables = dict(messages=messages, tools=None, documents=None)
        variables |= dict(add_generation_prompt=True, enable_thinking=thinking)
        try:
            return self.compiled_template.render(self.special_tokens | variables)
        except Exception as error:  # a template is a program: it can fail in any way
            message = " ".join(str(error).split())
            raise ValueError(f"the checkpoint's chat template failed: {message}") from None

    @cached_property
    def compiled_template(self) -> jinja2.Template:
        """Compile the template in a sandbox, with the functions that templates expect to find."""
        extensions = ["jinja2.ext.loopcontrols", GenerationTag]
        options = dict(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment = ImmutableSandboxedEnvironment(**options)
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.template)


def load_backend(file: Path) -> tokenizers.Tokenizer:
    if not file.exists():
        raise ValueError(f"{file}: no such file; expected a checkpoint's tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises a bare Exception, or even a panic
        raise ValueError(f"{file}: not a tokenizer file: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def parse_special_tokens(settings: dict) -> dict[str, str]:
    """Return bos_token and the like, which templates may use; some files store them as objects with
    a "content".
    """
    tokens = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            tokens[name] = value
    return tokens


def find_template(folder: Path, settings: dict) -> str | None:
    """Return the chat template, from a file of its own or from tokenizer_config.json."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several with names
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if not isinstance(template, str | None):
        file, kind = folder / "tokenizer_config.json", type(template).__name__
        raise ValueError(f"{file}: chat_template is {kind}; expected text")
    return template


def parse_stop_ids(file: Path, given: object) -> set[int]:
    """Return eos_token_id as a set: it may be missing, an id, or a list of ids."""
    if given is None:
        return set()
    ids = given if isinstance(given, list) else [given]
    if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
        raise ValueError(
            f"{file}: eos_token_id is {given!r}; expected a token id or a list of them"
        )
    return set(ids)


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Do what templates expect of their filter `tojson`, whose defaults are not those of jinja."""
    options = dict(ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    return json.dumps(x, indent=indent, **options)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %} marks what trainers of other libraries learn; it
    renders as it is.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
