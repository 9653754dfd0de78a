"""A decoder-only transformer, Qwen3 or Llama, and its sampler: token ids go in, token ids come out.

    the transformer        RMSNorm, rotary positions, grouped-query attention, SwiGLU
    how tokens attend      Packed: whole prompts and completions in one row
    sampling               `generate`, the loop inside it, and its KVCache
    the same, but faster   CUDA graphs, and weights in the order that suits a CPU
    log-probabilities      of given completions, with gradients: what the loss is made of
    files                  configs and weights
    tokenizer and chat     text to ids and back, by the checkpoint's own template

Three decisions shape all of it.

*A prompt is computed once.* GRPO samples a group of completions for each prompt and compares them.
The prompt's keys and values are the same for the whole group. So they are computed once, while
sampling (KVCache) and for the completions of a micro-batch in training (Packed), where gradients
flow back into the prompt from all of them.

*The sampler's log-probabilities are those of the policy.* They are the log-softmax of the raw
logits, taken before temperature or top-p change anything (training uses neither), and the sampler
runs the same modules as the trainer. Its number for a token and the trainer's differ by rounding
only: grpo.py logs the largest difference as `logprob_drift`. So the old policy's log-probabilities
can be taken from the rollout and need no second pass.

*The loss never holds all logits at once.* With a vocabulary of 151,936 the logits of twenty
completions of 1024 tokens take 12 GB, and their gradient as much again. The loss needs one number
for each token, so logits are made for a few tokens at a time, forward and backward
(ChunkedLogProbs).

The modules have the names that the checkpoints use, so loading needs no table of names.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------- the transformer


@dataclass(frozen=True)
class ModelConfig:
    """What is taken from a checkpoint's config.json; all but the last three in the file's names."""

    vocab_size: int  # V
    hidden_size: int  # d, the width of the residual stream
    intermediate_size: int  # the width inside the MLP
    num_hidden_layers: int
    num_attention_heads: int  # of queries
    num_key_value_heads: int  # each serves num_attention_heads / num_key_value_heads query heads
    head_dim: int  # not always hidden_size / num_attention_heads
    max_position_embeddings: int  # tokens in the longest context
    rope_theta: float  # base of the rotations' wavelengths
    rms_norm_eps: float
    tie_word_embeddings: bool  # the head reads the embedding's weight
    rope_scaling: dict | None  # the settings of Llama 3.1 and later, or None
    qk_norm: bool  # Qwen3 normalises each head of the queries and keys
    scalar: bool  # one score in place of the vocabulary, as reward models have
    raw: dict  # the whole file, which is written back on saving


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Return each pair's angle per position; (head_dim / 2,) in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = 1 / config.rope_theta**exponents
    if config.rope_scaling:
        # Llama 3.1 stretches its context: waves that fit into the original one fewer than `low`
        # times are slowed down by `factor`, from `high` times on they stay; between is a blend.
        scaling = config.rope_scaling
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position's angle in each pair; see `rotate`.

    positions (B, T) -> cos, sin (B, 1, T, head_dim) in float32

    Both are repeated for the second member of each pair, and the sine is negated for the first, so
    that `rotate` need not cut its input.
    """
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of dimensions (i, i + head_dim / 2) by the angle of its position.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin). (B, heads, T, head_dim) -> the same
    """
    partners = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos + partners * sin).to(x.dtype)


# What an attention layer calls with its queries, keys and values; see "how tokens attend" below.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Grouped-query attention. Which token attends to which is decided by `attend`, not here."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, size = config.hidden_size, config.head_dim
        self.head_dim = size
        self.q_proj = nn.Linear(d, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, d, bias=False)
        self.q_norm = nn.RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        split = (*x.shape[:2], -1, self.head_dim)  # (B, T, heads, D)
        q = self.q_norm(self.q_proj(x).view(split)).transpose(1, 2)  # (B, heads, T, D)
        k = self.k_norm(self.k_proj(x).view(split)).transpose(1, 2)  # (B, kv_heads, T, D)
        v = self.v_proj(x).view(split).transpose(1, 2)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, heads, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


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
        # A norm is x / sqrt(mean(x^2) + eps) * weight, over the last dimension.
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding, blocks, last norm, and a head: of logits, or of one score (config.scalar)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.scalar:
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        # A plain attribute and no buffer, so that it stays in float32 when the weights are cast,
        # and is there while they are on "meta".
        self.frequencies = rotary_frequencies(config)
        # Activation checkpointing: keep what enters a block, and compute the block again in the
        # backward pass.
        self.checkpointing = False
        # The folder it was loaded from: on saving, the tokenizer's files are copied from there.
        self.source: Path | None = None
        # Where it computes, if its weights lie elsewhere: grpo.py can keep them on the host.
        self.computes_on: torch.device | None = None

    def tie(self) -> None:
        """Let the head read the embedding's weight, where the config says so."""
        if self.config.tie_word_embeddings and not self.config.scalar:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.computes_on or self.embed_tokens.weight.device

    def hidden(self, tokens: Tensor, layout: "Packed | KVCache") -> Tensor:
        """Return what the last norm puts out; (B, T) -> (B, T, d).

        `layout` has the tokens' positions, and the `attend` of every layer.
        """
        self.frequencies = self.frequencies.to(tokens.device)
        cos, sin = rotary_tables(layout.positions, self.frequencies)
        x = self.embed_tokens(tokens)
        for layer, block in enumerate(self.layers):
            inputs = (x, cos, sin, partial(layout.attend, layer))
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
        """Return the log-probability of each target, predicted at its place in the row; entropies.

        places (n,), targets (n,) -> (n,), (n,). (A method, as FSDP gathers weights around methods.)
        """
        hidden = self.hidden(packed.tokens, packed)[0, places]  # (n, d)
        return ChunkedLogProbs.apply(hidden, self.lm_head.weight, targets)


# ------------------------------------------------------------------------------ how tokens attend


Ids = Sequence[int]  # of tokens


class Packed:
    """Whole prompts and completions in one row, without padding.

        row        p  p  p | a  a | b  b  b | q  q | c  c    a and b complete p, c completes q
        position   0  1  2   3  4   3  4  5   0  1   2  3    what each would have alone

    A token attends to its prompt and to its own completion, up to itself (x). Of each prompt and
    completion only the last token's line is shown:

               p  p  p  a  a  b  b  b  q  q  c  c
          p    x  x  x
          a    x  x  x  x  x
          b    x  x  x        x  x  x
          q                            x  x
          c                            x  x  x  x

    `prompts[i]` and `completions[i][g]` are their places in the row, as ranges. `kept` is None, or
    else a dict to which each layer adds the keys and values of the row; `prefill` asks for it.
    """

    def __init__(self, prompts: list[Ids], completions: list[list[Ids]], device: torch.device):
        self.kept: dict[int, Tensor] | None = None
        self.prompts: list[range] = []
        self.completions: list[list[range]] = []
        # Segments are the prompts and completions that are not empty. The keys that a segment sees
        # are those of its prompt, if it has one, and then its own.
        self.lengths: list[int] = []
        self.key_lengths: list[int] = []
        tokens, positions, key_places = [], [], []

        def append(ids: Ids, prompt: range) -> range:
            places = range(len(tokens), len(tokens) + len(ids))
            if len(ids):
                self.lengths.append(len(ids))
                self.key_lengths.append(len(prompt) + len(ids))
                key_places.extend([*prompt, *places])
            tokens.extend(ids)
            positions.extend(range(len(prompt), len(prompt) + len(ids)))
            return places

        for prompt, group in zip(prompts, completions, strict=True):
            places = append(prompt, range(0))
            self.prompts.append(places)
            self.completions.append([append(ids, places) for ids in group])
        self.tokens = torch.tensor([tokens], dtype=torch.long, device=device)  # (1, N)
        self.positions = torch.tensor([positions], dtype=torch.long, device=device)  # (1, N)
        # The places of all segments' keys in the row, one segment after the other.
        self.key_places = torch.tensor(key_places, dtype=torch.long, device=device)
        # Where each segment begins in the row, and where its keys begin among all keys.
        starts = [[0, *itertools.accumulate(n)] for n in (self.lengths, self.key_lengths)]
        self.starts = torch.tensor(starts, dtype=torch.int32, device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, heads, N, D), k and v (1, kv_heads, N, D) -> (1, heads, N, D)."""
        if self.kept is not None:
            self.kept[layer] = torch.cat((k, v)).permute(2, 0, 1, 3)  # (N, 2, kv_heads, D)
        k, v = k.index_select(2, self.key_places), v.index_select(2, self.key_places)
        if has_one_kernel(q):
            return self.attend_at_once(q, k, v)
        keys_and_values = (x.split(self.key_lengths, dim=2) for x in (k, v))
        outputs = []
        for queries, keys, values in zip(q.split(self.lengths, dim=2), *keys_and_values):
            # The last query sees all keys, the one before it all but the last key, and so on.
            mask = causal_lower_right(queries.shape[2], keys.shape[2])
            options = dict(attn_mask=mask, enable_gqa=queries.shape[1] != keys.shape[1])
            outputs.append(F.scaled_dot_product_attention(queries, keys, values, **options))
        return torch.cat(outputs, dim=2)

    def attend_at_once(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Do the same for all segments in one kernel, FlashAttention."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, heads, D)
        starts, key_starts = self.starts
        longest, most_keys = max(self.lengths), max(self.key_lengths)
        # To the left of a query everything is seen, to its right nothing; the last ones align.
        causal = dict(window_size=(-1, 0), enable_gqa=True)
        out = varlen_attn(q, k, v, starts, key_starts, longest, most_keys, **causal)
        return out.transpose(0, 1)[None]


def has_one_kernel(x: Tensor) -> bool:
    """Say whether FlashAttention is used: on a GPU, in bfloat16, for heads of 8, 16, 24, ..."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0


# -------------------------------------------------------------------------------------- sampling


@dataclass
class Completion:
    tokens: list[int]  # what was sampled, the closing stop token included
    logprobs: list[float]  # log-softmax of the raw logits at those tokens
    finished: bool  # ended by a stop token and not by the length limit


SAMPLING_BUDGET = 65536  # tokens at a time; see `waves`


@dataclass(frozen=True)
class Sampling:
    """The settings of `generate`, in this order."""

    group_size: int = 1  # completions of each prompt
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    stop_ids: Ids = ()
    seed: int = 0
    token_budget: int = SAMPLING_BUDGET

    def __post_init__(self) -> None:
        for name, low in dict(group_size=1, max_new_tokens=1, top_k=0, seed=-(2**63)).items():
            value = getattr(self, name)
            if not is_whole(value) or not low <= value < 2**63:
                raise ValueError(f"{name} = {value!r}; expected a whole number from {low} up")
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature!r}; expected 0 (greedy), or 1e-6 up")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p!r}; expected above 0 and at most 1 (off)")


def generate(model: Transformer, prompts: list[Ids], *args, **settings) -> list[list[Completion]]:
    """Sample G completions of each of P prompts; return P lists of G.

    The further arguments are the fields of Sampling, in order or by name. The `logprobs` of a
    completion are those of the raw logits, whatever the settings are. Its random numbers depend on
    the seed, its prompt, its index in the group and the position alone. So the rest of the batch
    changes no more than the rounding of its logits, and equal prompts share a list of completions.

    `token_budget` limits how many prompts are sampled at a time, to one at least; see `waves`.
    ValueError: an empty prompt, an id outside the vocabulary, a prompt that leaves no room for
    `max_new_tokens` in the model's context, a setting out of range. Diverged: logits that are not
    finite.
    """
    groups = dict(generate_stream(model, prompts, *args, **settings))
    return [groups[tuple(prompt)] for prompt in prompts]


@torch.inference_mode()
def generate_stream(model: Transformer, prompts: list[Ids], *args, **settings) -> Iterator[tuple]:
    """Yield each distinct prompt, as a tuple of ids, with the list of its completions.

    The longest prompts come first, in waves: those that are sampled together come together. The
    arguments and errors are those of `generate`. Until it ends, the model must not be trained.
    """
    sampling = Sampling(*args, **settings)
    for i, prompt in enumerate(prompts):
        check_ids(model.config, f"prompt {i}", prompt, sampling.max_new_tokens)
    with reordered_weights(model):
        for wave in waves(model.config, prompts, sampling):
            yield from zip(wave, sample(model, wave, sampling))


def sample(model: Transformer, prompts: list[Ids], sampling: Sampling) -> list[list[Completion]]:
    """Sample G completions of each prompt together: B = P * G rows of up to N tokens each."""
    G, N = sampling.group_size, sampling.max_new_tokens
    B = len(prompts) * G
    device = model.device
    draws = [uniforms(sampling.seed, prompt, i, N) for prompt in prompts for i in range(G)]
    draws = torch.from_numpy(np.stack(draws)).to(device)  # (B, N)
    stops = torch.tensor(list(sampling.stop_ids), dtype=torch.long, device=device)
    tokens = torch.zeros(B, N, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, N, device=device)
    lengths = torch.full((B,), N, device=device)  # N also means: not stopped yet

    logits, cache = prefill(model, prompts, sampling)  # (B, V), the prompts' keys and values
    rows = torch.arange(B, device=device)  # which completion each row of the batch writes
    period = tokens_per_graph(device)

    def next_logits(chosen: Tensor) -> Tensor:
        return model.lm_head(model.hidden(chosen[:, None], cache)[:, -1])  # (rows, V)

    for t in range(N):
        # 1. Sample a token for every row.
        row_logprobs = logits.float().log_softmax(dim=-1)  # (rows, V)
        chosen = choose(row_logprobs, draws[rows, t], sampling)
        tokens[rows, t] = chosen
        logprobs[rows, t] = row_logprobs.gather(1, chosen[:, None])[:, 0]

        # 2. Note which rows stop.
        stop_at = torch.where(torch.isin(chosen, stops), t + 1, N)
        lengths[rows] = torch.minimum(lengths[rows], stop_at)
        going_on = (lengths[rows] == N).nonzero()[:, 0]
        if t == N - 1 or not len(going_on):
            break

        # 3. Feed the new tokens, and only these: the past is in the cache. Rows that have stopped
        # leave every `period` tokens: at once on a CPU, between two graphs on a GPU (`recorded`).
        # What they write until then is cut off.
        cache.begin_step(t)
        if t % period == 0:
            rows, chosen = rows[going_on], chosen[going_on]
            cache.keep(going_on)
            cache.span = min(t + period, N)
            forward = recorded(next_logits, chosen) if period > 1 else next_logits
        logits = forward(chosen)

    if not logprobs.isfinite().all():
        raise Diverged("logits are not finite: the weights are broken, or training has diverged")
    finished = torch.isin(tokens.gather(1, lengths[:, None] - 1)[:, 0], stops)
    columns = (tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist())
    completions = [Completion(ids[:n], values[:n], end) for ids, values, n, end in zip(*columns)]
    return [completions[first : first + G] for first in range(0, B, G)]


class Diverged(ValueError):
    """Logits or weights are not finite: the weights are broken, or training has run away."""


def uniforms(seed: int, prompt: Ids, index: int, count: int) -> np.ndarray:
    """Draw `count` numbers in [0, 1) for one completion: number t is for position t.

    The generator is seeded anew from seed, prompt and index in the group. So there is no state to
    save: a resumed run, a larger batch or a second process draws the same numbers. (And every step
    of training needs another seed.)
    """
    numbers = np.array([seed, index, *prompt], dtype=np.int64)
    key = hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(key, "little"))
    return np.random.Generator(philox).random(count)


def choose(logprobs: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Choose a token for each row: the likeliest at temperature 0, else sample one.

    logprobs (rows, V) in float32, uniform (rows,) in float64 -> (rows,)
    """
    if sampling.temperature == 0:
        return logprobs.argmax(dim=-1)
    probs = (logprobs / sampling.temperature).softmax(dim=-1)
    if sampling.top_k:  # keep the top_k likeliest, and ties with the last of them
        least = probs.topk(min(sampling.top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.masked_fill(probs < least, 0.0)
    if sampling.top_p < 1:  # drop a token if those that are likelier reach top_p without it
        ordered, order = probs.sort(dim=-1, descending=True)
        reached = ordered.double().cumsum(dim=-1)
        dropped = reached - ordered >= sampling.top_p * reached[:, -1:]
        probs = probs.scatter(1, order, ordered.masked_fill(dropped, 0.0))
    return inverse_cdf(probs, uniform)


class KVCache:
    """Keys and values of all past tokens. They never change, so no step computes them again.

    Rows (completions) stand in a grid of slots, one line for each prompt. Here the second
    completion of the second prompt has stopped and left; what is computed in its slot is not read:

        keys of the prompts      keys of what was written, by slot
        x  x  x  x               a  a  .  |  b  b  .  |  c  c  .      (-) padding   (.) not yet
        y  y  -  -               d  d  .  |  *  *  .  |  e  e  .      (*) left over, not read

    An ordinary cache would hold and read a prompt's keys once for each completion. Here they are
    stored once, and one product serves all queries of the group. When every line has an empty slot,
    or a line has no row left, the grid shrinks.

    P prompts of up to L tokens; G slots for N tokens each; K kv heads, each for n query heads of
    size D.
    """

    def __init__(self, model: Transformer, lengths: Tensor, group_size: int, max_new_tokens: int):
        """Make room for prompts of these lengths (P,), and for the new tokens of their groups."""
        device, layers = model.device, range(model.config.num_hidden_layers)
        kind = dict(device=device, dtype=model.embed_tokens.weight.dtype)
        K, D = model.config.num_key_value_heads, model.config.head_dim
        P, L, G, N = len(lengths), int(lengths.max()), group_size, max_new_tokens
        # Of each layer, first keys and then values. What is not written yet has weight 0, but 0
        # times what happens to be in memory can be NaN, so the caches begin as zeros.
        self.prompt_cache = [torch.zeros(2, P, K, L, D, **kind) for _ in layers]
        self.written_cache = [torch.zeros(2, P, K, G, N, D, **kind) for _ in layers]
        self.prompt_lengths, self.longest = lengths, L
        # The step t. A tensor, because a CUDA graph would freeze the value of a number.
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.span = 0  # attention reads so many columns of what was written
        # -inf hides the padding behind a prompt, and the columns that are not written yet.
        unseen = torch.arange(L + N, device=device) >= lengths[:, None]  # (P, L + N)
        self.bias = torch.zeros(P, 1, 1, 1, L + N, **kind)
        self.bias.masked_fill_(unseen[:, None, None, None], -math.inf)
        self.kv_heads = torch.arange(K, device=device)[:, None]
        line = torch.arange(P, device=device).repeat_interleave(G)
        slot = torch.arange(G, device=device).repeat(P)
        self._place(line, slot, (P, G))

    def _place(self, line: Tensor, slot: Tensor, grid: tuple[int, int]) -> None:
        """Put row i into slot slot[i] of line line[i]; an empty slot repeats row 0.

        `queries_of[p, k, g]` says where a slot's queries stand among all of them, (rows * K, n, D).
        """
        self.line, self.slot, self.grid = line, slot, grid
        row_of_slot = torch.zeros(grid, dtype=torch.long, device=line.device)
        row_of_slot[line, slot] = torch.arange(len(line), device=line.device)
        self.row_of_slot = row_of_slot[:, None]  # (P, 1, G)
        self.queries_of = self.row_of_slot * len(self.kv_heads) + self.kv_heads

    def begin_step(self, t: int) -> None:
        """Let the next keys go to column t of what was written, and be seen."""
        self.step.fill_(t)
        self.bias[..., self.longest + t] = 0

    @property
    def positions(self) -> Tensor:
        """Positions (rows, 1) of the tokens that are fed now."""
        return (self.prompt_lengths[self.line] + self.step)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, then let the queries attend to all that are stored.

        q (rows, heads, 1, D), k and v (rows, K, 1, D) -> (rows, heads, 1, D)
        """
        rows, K, _, D = k.shape
        (P, G), L, S = self.grid, self.longest, self.span
        # Indices with slices between them come first in a shape: here (rows, 2, K, D).
        new = torch.cat((k, v), dim=2).transpose(1, 2)
        self.written_cache[layer][:, self.line, :, self.slot, self.step] = new
        prompt_keys, prompt_values = self.prompt_cache[layer]  # (P, K, L, D)
        written_keys, written_values = self.written_cache[layer][..., :S, :]  # (P, K, G, S, D)

        q = q.reshape(rows * K, -1, D)[self.queries_of] * D**-0.5  # (P, K, G, n, D)
        prompt_scores = q.view(P, K, -1, D) @ prompt_keys.mT  # (P, K, G * n, L)
        written_scores = q @ written_keys.mT  # (P, K, G, n, S)
        scores = torch.cat((prompt_scores.view(P, K, G, -1, L), written_scores), dim=-1)
        weights = (scores + self.bias[..., : L + S]).softmax(dim=-1)
        out = weights[..., :L].reshape(P, K, -1, L) @ prompt_values  # (P, K, G * n, D)
        out = out.view(q.shape) + weights[..., L:] @ written_values
        return out[self.line, :, self.slot].view(rows, -1, 1, D)

    def fill(self, first: int, packed: Packed) -> None:
        """Copy the keys and values of prompts `first`, `first` + 1, ... out of one packed row.

        It holds their common start once, and then the rest of each. The start's keys and values go
        to every prompt. `sources` are places in the row, `lines` and `columns` places in the cache.
        """
        start = packed.prompts[0]
        sources, lines = [], []
        for line, rest in enumerate(packed.completions[0], start=first):
            sources += [*start, *rest]
            lines += [line] * (len(start) + len(rest))
        sources, lines = torch.tensor([sources, lines], device=packed.tokens.device)
        columns = packed.positions[0, sources]
        for layer, keys_and_values in packed.kept.items():
            self.prompt_cache[layer][:, lines, :, columns] = keys_and_values[sources]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (ascending indices), in a smaller grid where they leave room."""
        if len(rows) == len(self.line):
            return
        old_line, old_slot = self.line[rows], self.slot[rows]
        _, old_G = self.grid
        lines, line, counts = old_line.unique(return_inverse=True, return_counts=True)
        grid = (len(lines), int(counts.max()))
        if grid == self.grid:
            self._place(old_line, old_slot, grid)
            return
        # The first row of a line goes into slot 0, the next one into slot 1.
        slot = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[line]
        self._place(line, slot, grid)
        self.prompt_lengths, self.bias = self.prompt_lengths[lines], self.bias[lines]
        row, K = self.row_of_slot, len(self.kv_heads)  # where the row of a new slot stood before:
        source = ((old_line[row] * K + self.kv_heads) * old_G + old_slot[row]).flatten()
        for layer, cache in enumerate(self.written_cache):
            self.prompt_cache[layer] = self.prompt_cache[layer][:, lines]
            slots = cache.flatten(1, 3)  # (2, P * K * old_G, N, D)
            # The right side is a copy, so the old slots and the new ones may overlap.
            slots[:, : len(source), : self.span] = slots[:, source, : self.span]
            self.written_cache[layer] = slots[:, : len(source)].unflatten(1, (grid[0], K, grid[1]))


def prefill(model: Transformer, prompts: list[Ids], sampling: Sampling) -> tuple[Tensor, KVCache]:
    """Run whole prompts -> logits (B, V) of the first new tokens, and the cache they have filled.

    Prompts mostly begin with the same system message, which is run once for several of them: packed
    as if that common start were a prompt, and the rest of each prompt a completion of it. Only
    several, because a CPU is fastest while the activations fit into its caches, and a GPU's memory
    is needed for other things.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    cache = KVCache(model, lengths, sampling.group_size, sampling.max_new_tokens)
    start = common_start(prompts)
    rests = [prompt[start:] for prompt in prompts]
    limit = prefill_tokens(model.device)
    last_states, done = [], 0
    for batch in batches(rests, lambda batch: sum(map(len, batch)) <= limit):
        packed = Packed([prompts[0][:start]], [batch], model.device)
        packed.kept = {}
        hidden = model.hidden(packed.tokens, packed)[0]  # (tokens, d); each layer adds to `kept`
        cache.fill(done, packed)
        done += len(batch)
        last = [places[-1] for places in packed.completions[0]]
        last_states.append(hidden[torch.tensor(last, device=model.device)])
    logits = model.lm_head(torch.cat(last_states))  # (P, V)
    return logits.repeat_interleave(sampling.group_size, dim=0), cache


def prefill_tokens(device: torch.device) -> int:
    return 2048 if device.type == "cpu" else 16384


def common_start(prompts: list[Ids]) -> int:
    """Return how many tokens all prompts begin with; 0 if they are few, or there is one prompt.

    Each prompt keeps at least its last token for itself, because the first logits come from there.
    """
    length = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))  # of any lists
    return length if length >= 16 and len(prompts) > 1 else 0


def inverse_cdf(probs: Tensor, uniform: Tensor, block: int = 128) -> Tensor:
    """Sample the first id whose cumulative probability exceeds uniform * total.

    probs (rows, V), uniform (rows,) -> (rows,)

    (torch.multinomial has one generator for a batch; here each row brings its own number.) In
    float32 a long cumulative sum rounds rare tokens away, and in float64 it would be a table twice
    the size of `probs`. So there are two short ones: over blocks of ids, and then over the ids of
    the block that was hit.
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

    A target that was rounded up to the last edge is moved below it: no id comes after that edge.
    """
    below_last = torch.nextafter(edges[:, -1:], torch.zeros_like(target))
    index = torch.searchsorted(edges, torch.minimum(target, below_last), right=True)
    return index.clamp(max=edges.shape[1] - 1)  # searching for NaN gives an index after the end


def waves(config: ModelConfig, prompts: Sequence[Ids], sampling: Sampling) -> Iterator[list[Ids]]:
    """Cut the distinct prompts, longest first, into waves that are sampled one after the other.

    A wave holds as many prompts as the budget allows, at least one. A prompt costs its tokens,
    padded to the longest of the wave, and for each completion `max_new_tokens` and the logits.
    """
    group_tokens = sampling.group_size * (sampling.max_new_tokens + logits_in_tokens(config))
    budget, distinct = sampling.token_budget, dict.fromkeys(map(tuple, prompts))
    longest_first = sorted(distinct, key=len, reverse=True)
    return batches(longest_first, lambda wave: len(wave) * (len(wave[0]) + group_tokens) <= budget)


def batches(items: Sequence, fits: Callable[[list], bool]) -> Iterator[list]:
    """Cut items into batches, in order: as many at a time as fit together, at least one."""
    batch = []
    for item in items:
        if batch and not fits([*batch, item]):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def logits_in_tokens(config: ModelConfig) -> int:
    """Return the memory of a row's logits, in cached tokens; up to 12 tables of logits exist."""
    numbers_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 12 * config.vocab_size // numbers_per_token


def check_ids(config: ModelConfig, name: str, ids: Ids, max_new_tokens: int = 0) -> None:
    """ValueError: there are no ids, one is of no token, or they and the new tokens are too long."""
    if not len(ids):
        raise ValueError(f"{name} is empty: there must be a token to continue")
    if not all(map(is_whole, ids)) or not 0 <= min(ids) <= max(ids) < config.vocab_size:
        range_of_ids = f"ids from {min(ids)} to {max(ids)}, the vocabulary {config.vocab_size}"
        raise ValueError(f"{name} has {range_of_ids}: is it the model's tokenizer?")
    if len(ids) + max_new_tokens > config.max_position_embeddings:
        needed = f"{len(ids)} + {max_new_tokens} (max_new_tokens) positions"
        raise ValueError(f"{name} takes {needed}, the context has {config.max_position_embeddings}")


def is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer))


# ---------------------------------------------------------------------------- the same, but faster


def tokens_per_graph(device: torch.device) -> int:
    """Return for how many tokens the batch keeps its rows; without CUDA graphs 1."""
    return 64 if device.type == "cuda" else 1


def recorded(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function as a CUDA graph, for tensors of the shape of x.

    One step of the 4B model is 1,700 kernels, which keep an H100 busy for 8 ms; but Python needs 24
    ms to launch them one by one. A graph launches all at once: the same kernels on the same memory.
    So while it is in use tensors may change their values, but not their shape or address, and each
    call overwrites the result of the one before. The first call below is one run more, so it must
    do no harm to run the function twice.
    """
    given, graph = x.clone(), torch.cuda.CUDAGraph()
    function(given)  # what a library sets up at its first call cannot be recorded
    # Other threads, such as NCCL's, may go on meanwhile.
    with torch.cuda.device(x.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function(given)

    def replay(x: Tensor) -> Tensor:
        given.copy_(x)
        graph.replay()
        return result

    return replay


REORDER_LIMIT = 4 << 30  # bytes


@contextmanager
def reordered_weights(model: Transformer) -> Iterator[None]:
    """Inside, the linear layers of a float32 model on a CPU use weights stored in oneDNN's order.

    For a handful of rows F.linear takes several times as long as reading the weights from memory;
    this does not, and rollouts take about 0.65 of the time. It costs one pass over the weights and
    a second copy of them, so models above REORDER_LIMIT are left alone. The operators are what
    torch.compile itself emits, but private to torch: where they are missing or wrong, nothing
    happens.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weight = model.embed_tokens.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    size = sum(linear.weight.nbytes for linear in linears)
    if not plain or size > REORDER_LIMIT or not reordering_works():
        linears = []
    try:
        for linear in linears:
            linear.forward = partial(multiply_reordered, weight=reorder(linear.weight))
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)  # for about 16 rows


def multiply_reordered(x: Tensor, weight: Tensor) -> Tensor:
    """Return x times the transposed weight, which `reorder` has made; no bias, no activation."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@lru_cache
def reordering_works() -> bool:
    x, weight = torch.linspace(-1, 1, 192).view(3, 64), torch.linspace(1, -1, 8192).view(128, 64)
    try:
        product = multiply_reordered(x, reorder(weight))
        return torch.allclose(product, F.linear(x, weight), atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return False


# ----------------------------------------------------------------------------- log-probabilities


def completion_logprobs(
    model: Transformer, prompts: list[Ids], completions: list[list[Ids]]
) -> tuple[Tensor, Tensor]:
    """Compute the log-probabilities of given completions; completions[i] are those of prompt i.

    -> logprobs (B, T), mask (B, T); B completions, the first prompt's first, T the longest length

    They are differentiable, and 0 where the mask is False. ValueError: an empty prompt, another
    number of prompts than of lists, an id outside the vocabulary, more ids than the context has.
    """
    return logprobs_and_entropy(model, prompts, completions)[:2]


def logprobs_and_entropy(
    model: Transformer, prompts: list[Ids], completions: list[list[Ids]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what completion_logprobs does, and the entropy of each prediction, in nats.

    -> logprobs (B, T), mask (B, T), entropies (B, T), the last without gradient
    """
    rows = []
    for i, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        rows += group
        check_ids(model.config, f"prompt {i}", prompt)
        for ids in filter(len, group):
            check_ids(model.config, f"a completion of prompt {i}", ids)
    targets, mask = pad(rows, model.device)  # (B, T)
    if not prompts:
        return torch.zeros(0, 0), mask, torch.zeros(0, 0)
    # A completion's last token predicts nothing, so it need not go through the network.
    inputs = [[ids[:-1] for ids in group] for group in completions]
    packed = Packed(prompts, inputs, model.device)
    # A first token is predicted at the end of its prompt, every other one at the token before it.
    places = []
    for p, group in enumerate(completions):
        for g, ids in enumerate(group):
            if len(ids):
                places += [packed.prompts[p][-1], *packed.completions[p][g]]
    places = torch.tensor(places, dtype=torch.long, device=model.device)  # (n,)
    logprobs, entropies = model.logprobs(packed, places, targets[mask])
    return unpack(logprobs, mask), mask, unpack(entropies, mask)


def pad(rows: list[Sequence], device: torch.device, dtype=torch.long) -> tuple[Tensor, Tensor]:
    """Put lists into one tensor, padded with 0 on the right; the mask says what is no padding.

    -> values (B, T), mask (B, T)
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    mask = torch.arange(max(map(len, rows), default=0)) < lengths[:, None]
    values = torch.tensor([*itertools.chain(*rows)], dtype=dtype)
    return unpack(values, mask).to(device), mask.to(device)


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Put values (n,) where the mask (B, T) is True, and 0 elsewhere."""
    padded = torch.zeros(mask.shape, dtype=values.dtype, device=mask.device)
    return padded.masked_scatter(mask, values)


class ChunkedLogProbs(torch.autograd.Function):
    """Compute log softmax(hidden @ weight.T) at the targets, and entropies, a few rows at a time.

    Forward, each chunk of logits is reduced to two numbers a row and forgotten. Backward, it is
    made again. The gradient of a target's log-probability with respect to its row of logits is

        one-hot(target) - softmax(logits)
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (n, d), weight (V, d), targets (n,) -> log-probabilities (n,), entropies (n,)."""
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rows = max(1, logits_at_once(hidden.device) // len(weight))
        chosen, entropies = [], []
        for states, ids in zip(hidden.split(ctx.rows), targets.split(ctx.rows)):
            logprobs = at_least_float32(states @ weight.T).log_softmax(dim=1)  # (rows, V)
            chosen.append(logprobs.gather(1, ids[:, None])[:, 0])
            entropies.append(-logprobs.exp().mul_(logprobs).sum(dim=1))
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
            grad_weight += grad_logits.T @ states
            del probs, grad_logits
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None


def logits_at_once(device: torch.device) -> int:
    """Return how many numbers a chunk of logits may hold: few, for the caches of a CPU.

    Every chunk reads the whole weight, so large ones are faster where there is memory.
    """
    return 1 << 23 if device.type == "cpu" else 1 << 26


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------- files


# Values of config.json that this forward pass computes. What is absent has the defaults below, or
# counts as None.
SUPPORTED = {
    "model_type": ("qwen3", "llama"),
    "hidden_act": ("silu", "swish"),
    "tie_word_embeddings": (True, False),
    "is_causal": (None, True),
    "partial_rotary_factor": (None, 1),
    "rope_type": ("default", "llama3"),
}
ABSENT = ("use_sliding_window", "attention_bias", "mlp_bias", "num_experts", "num_local_experts")
SUPPORTED |= dict.fromkeys((*ABSENT, "quantization_config"), (None, False, {}))
# What transformers assumes where config.json is silent.
COMMON = dict(hidden_act="silu", rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False)
QWEN3 = dict(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768)
LLAMA = dict(max_position_embeddings=2048)
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def parse_config(raw: dict) -> ModelConfig:
    """Read a Hugging Face config; ValueError names what this forward pass does not compute."""
    given = COMMON | (LLAMA if raw.get("model_type") == "llama" else QWEN3) | raw
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"config has rope settings {rope!r}; expected one object for all layers")
    given |= {"rope_type": rope.get("type", "default")} | rope
    for name, values in SUPPORTED.items():
        value = given.get(name)
        if value not in values:
            raise ValueError(f"config has {name} = {value!r}, not supported; expected {values}")
    if set(re.findall(r"\w+", str(given.get("layer_types") or ""))) - {"full_attention"}:
        raise ValueError(f"config has layer_types = {given['layer_types']!r}, not supported")

    width, heads = given.get("hidden_size"), given.get("num_attention_heads")
    given["num_key_value_heads"] = given.get("num_key_value_heads") or heads
    if not given.get("head_dim") and is_whole(width) and is_whole(heads):
        given["head_dim"] = width // max(heads, 1)
    kinds = dict(ModelConfig.__annotations__)
    llama3 = given["rope_type"] == "llama3"
    if llama3:
        kinds |= dict.fromkeys(LLAMA3_ROPE, float)
    for name, kind in kinds.items():
        value = given.get(name)
        if kind in (int, float) and (type(value) not in (int, kind) or not 0 < value < 1e15):
            raise ValueError(f"config has {name} = {value!r}; expected {kind.__name__} above 0")
    size, kv_heads = given["head_dim"], given["num_key_value_heads"]
    if size % 2 or heads % kv_heads:
        raise ValueError(f"config has {heads} heads of size {size} for {kv_heads} key heads")
    if llama3 and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ValueError(f"config has {rope!r}; expected high_freq_factor above low_freq_factor")

    given["rope_scaling"] = rope if llama3 else None
    given["qk_norm"] = given["model_type"] == "qwen3"
    given["scalar"] = "ForSequenceClassification" in str(given.get("architectures"))
    given["raw"] = raw
    return ModelConfig(**{name: given[name] for name in ModelConfig.__annotations__})


def read_config(path: str | Path, scalar: bool | None = False) -> ModelConfig:
    """Read a checkpoint's config: of a language model or, if `scalar`, of one with a scalar head.

    With None it may be either. ValueError: the other kind, or no such folder.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such model folder; expected config.json and weights in it")
    config = parse_config(read_json(Path(path) / "config.json"))
    if scalar not in (config.scalar, None):
        kinds = ("language model", "content model (with a scalar head)")
        raise ValueError(f"{path} is a {kinds[config.scalar]}; expected a {kinds[scalar]}")
    return config


def load_model(path: str | Path, device="cpu", dtype=torch.float32, scalar=False) -> Transformer:
    """Load a checkpoint folder, one safetensors file or several; `scalar` as in read_config.

    Names and shapes are compared before anything is read. Then each tensor goes from its file to
    the wanted dtype and device by itself, the largest first, so that memory peaks at hardly more
    than the weights. ValueError names what does not fit.
    """
    check_device(device)
    config = read_config(path, scalar)
    with torch.device("meta"):
        model = Transformer(config)
    tensors = find_tensors(model, Path(path))
    order = sorted(model.named_parameters(), key=lambda named: -named[1].numel())
    weights = {name: read_tensor(*tensors[name], device).to(dtype, copy=True) for name, _ in order}
    model.load_state_dict(weights, strict=False, assign=True)  # strict would ask for a tied head
    model.tie()
    model.source = Path(path).resolve()
    return model.requires_grad_(True).eval()


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device} cannot be used here: {reason}") from None


def find_tensors(model: Transformer, folder: Path) -> dict[str, tuple[Path, str]]:
    """Find each parameter's file and its name there; ValueError names what does not fit."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied head may be stored
    tensors = {}
    for file in weight_files(folder):
        with open_weights(file) as weights:
            for key in weights.keys():
                name = key.removeprefix("model.")
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # older checkpoints store the frequencies
                if name not in parameters or name in tensors:
                    raise ValueError(f"{file}: no place for {key!r}, or it is there twice")
                header = weights.get_slice(key)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if shape != parameters[name].shape or dtype not in ("F64", "F32", "F16", "BF16"):
                    expected = f"F64, F32, F16 or BF16 of {tuple(parameters[name].shape)}"
                    raise ValueError(f"{file}: {key!r} is {dtype} of {shape}, expected {expected}")
                tensors[name] = (file, key)
    missing = [name for name, _ in model.named_parameters() if name not in tensors]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} missing: {', '.join(missing[:3])}")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint; a single one wins over an index, as in transformers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    shards = read_json(index).get("weight_map")
    names = shards.values() if isinstance(shards, dict) else [shards]
    for name in names:
        if not re.fullmatch(r"[^/]+\.safetensors", str(name)):
            raise ValueError(f"{index}: {name!r} is no name of a safetensors file in this folder")
    return [folder / name for name in sorted(set(names))]


def open_weights(file: Path, device: str = "cpu") -> safe_open:
    try:
        return safe_open(file, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from None


def read_tensor(file: Path, key: str, device: str) -> Tensor:
    """Read one tensor. An open file keeps its pages in memory, so it is opened anew for each."""
    with open_weights(file, device) as weights:
        return weights.get_tensor(key)


def read_text(path: Path, kind: str, parse: Callable[[str], object]) -> object:
    """Read a file and parse its text; ValueError says which file could not be read, and why."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise ValueError(f"{path}: not readable as {kind}: {error}") from None


def read_json(path: Path) -> dict:
    """Read one JSON object from a file; ValueError says which file has none, and why."""
    value = read_text(path, "JSON", json.loads)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Hand out an empty folder, which gets the name `target` when the block ends well.

    Everything in it is flushed to the disk before it is renamed: after a kill or a power cut the
    whole folder is there, or nothing. What has this name already is deleted: callers refuse it
    first, unless it is a torn checkpoint.
    """
    target = target.resolve()
    temporary = target.with_name(f".{target.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors makes its files private
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
        flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until the disk has what was written to this file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_model(model: Transformer, path: str | Path) -> None:
    """Write a checkpoint folder that other tools load; ValueError: something stands there."""
    refuse_existing(Path(path))
    weights = {name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}
    with new_folder(Path(path)) as folder:
        write_model(model, folder, weights)


def refuse_existing(path: Path) -> None:
    """ValueError: there is a file of this name, or a folder with something in it."""
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists already, and nothing is overwritten: choose another name")


# What the tokenizer reads, besides config.json; and all that is copied from a model's folder.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("generation_config.json", "chat_template.jinja")
CARRIED = (*TOKENIZER_FILES, "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
CARRIED += ("chat_template.json",)


def write_model(model: Transformer, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write config, weights and the tokenizer's files; ValueError: those are gone."""
    if model.source and not model.source.is_dir():
        raise ValueError(f"{model.source}: no such folder any more, and the tokenizer was there")
    for name in CARRIED:
        if model.source and (model.source / name).is_file():
            shutil.copyfile(model.source / name, folder / name)
    heads = ("lm_head.weight", "score.weight")
    named = {name if name in heads else f"model.{name}": weight for name, weight in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = model.config.raw | {"dtype": dtype}
    config.pop("torch_dtype", None)  # the older name of "dtype"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- tokenizer and chat


# They end a completion even where the checkpoint does not say so.
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")


class Tokenizer:
    """A checkpoint's tokenizer, chat template and stop tokens.

    `moment`, in seconds since 1970, is when its chats take place, because some templates tell the
    model the date. A resumed run sets it to the moment when it began, so that midnight changes no
    prompt.
    """

    def __init__(self, path: str | Path):
        folder = Path(path)
        self.moment = time.time()
        file = folder / "tokenizer.json"
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no exceptions of its own
            raise ValueError(f"{file}: not a tokenizer file: {error}") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        names = ("special_tokens_map", "tokenizer_config", "generation_config", "config")
        files = {name: folder / f"{name}.json" for name in names}
        options = {name: read_json(file) if file.exists() else {} for name, file in files.items()}
        settings = options["special_tokens_map"] | options["tokenizer_config"]

        self.special_tokens = {}  # bos_token and the like, which templates may use
        for name, value in settings.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                self.special_tokens[name] = text

        self.template = settings.get("chat_template")
        if isinstance(self.template, list):  # several with names
            named = {e.get("name"): e.get("template") for e in self.template if isinstance(e, dict)}
            self.template = named.get("default")
        if (folder / "chat_template.jinja").exists():
            self.template = read_text(folder / "chat_template.jinja", "UTF-8 text", str)

        # Completions stop where any of these says so; eos_token_id is an id, or a list of ids.
        ends = (self.special_tokens.get("eos_token", ""), *ENDS_OF_TURN)
        ids = {self.backend.token_to_id(token) for token in ends}
        for name in ("generation_config", "config"):
            given = options[name].get("eos_token_id")
            listed = given if isinstance(given, list) else [given]
            if given is not None and any(type(i) is not int or i < 0 for i in listed):
                raise ValueError(f"{files[name]}: eos_token_id is {given!r}; expected token ids")
            ids |= set(listed)
        self.stop_ids = tuple(sorted(ids - {None}))
        self.max_new_tokens = options["generation_config"].get("max_new_tokens") or 1024
        if not is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"{folder}: max_new_tokens is {self.max_new_tokens!r}, not above 0")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text; unless `special`, the name of a special token is plain text.

        ValueError: half of a surrogate pair, which no file in UTF-8 can hold.
        """
        text.encode("utf-8")  # the library's own error is a TypeError about something else
        self.backend.encode_special_tokens = not special
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Ids, special: bool = False) -> str:
        """Return the text of ids, without special tokens, or with them if `special`."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def completion_text(self, prompt: Ids, tokens: Ids) -> str:
        """Return a completion as a parser should see it.

        Special tokens stay in the text, because some tokenizers declare <think> to be one; only the
        closing stop token goes. Where the prompt ends by opening <think>, the policy goes on behind
        that tag, so it is put back.
        """
        tokens = list(tokens)
        if tokens and tokens[-1] in self.stop_ids:
            tokens.pop()
        opened = "<think>" if self.opens_think(prompt) else ""
        return opened + self.decode(tokens, special=True)

    def completion_ids(self, prompt: Ids, text: str) -> list[int]:
        """Return the tokens of a text, less a <think> that its prompt opened, and a stop token."""
        if self.opens_think(prompt):
            text = re.sub(r"(?i)^<think>\s*", "", text)
        eos = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        return self.encode(text) + [eos if eos in self.stop_ids else self.stop_ids[0]]

    def opens_think(self, prompt: Ids) -> bool:
        return self.decode(prompt, special=True).rstrip().lower().endswith("<think>")

    def chat(self, messages: list[dict[str, str]], thinking: bool = True) -> list[int]:
        """Return the ids of a chat that ends with the generation prompt."""
        return self.encode(self.render(messages, thinking))

    def render(self, messages: list[dict[str, str]], thinking: bool = True) -> str:
        """Return the chat as text. ValueError: there is no template, or it fails."""
        if not self.template:
            raise ValueError("the checkpoint has no chat template (chat_template.jinja)")
        chat = dict(messages=messages, add_generation_prompt=True, enable_thinking=thinking)
        try:
            return self.compiled_template.render(self.special_tokens | chat)
        except Exception as error:  # a template is a program: it can fail in any way
            message = " ".join(str(error).split())
            raise ValueError(f"the checkpoint's chat template failed: {message}") from None

    @cached_property
    def compiled_template(self) -> jinja2.Template:
        """Compile the template in a sandbox, with what templates expect to find there."""
        extensions = [loopcontrols, GenerationTag]
        blocks = dict(trim_blocks=True, lstrip_blocks=True)
        environment = ImmutableSandboxedEnvironment(extensions=extensions, **blocks)
        environment.filters["tojson"] = to_json
        environment.globals |= dict(tools=None, documents=None, strftime_now=self.strftime)
        environment.globals["raise_exception"] = raise_exception
        # At one `moment` the same chat is always the same prompt: nothing random.
        del environment.filters["random"], environment.globals["lipsum"]
        return environment.from_string(self.template)

    def strftime(self, format: str) -> str:
        """Write the moment, in UTC, since a run may go on in another time zone."""
        return time.strftime(format, time.gmtime(self.moment))


def to_json(value: object, ensure_ascii: bool = False, **options) -> str:
    """Do what templates expect of their filter `tojson`, whose defaults are not those of jinja."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class GenerationTag(Extension):
    """{% generation %} marks what other libraries train on; only its content is rendered."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
