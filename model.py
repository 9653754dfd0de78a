"""A decoder-only transformer (Qwen3 and the Llama family), its sampler and its checkpoints; token ids in, token ids out.

Facts of the architecture are in METHOD.md section 7: RMSNorm, rotary positions on halves, grouped-query attention (Qwen3
normalises each query and key head before rotation), SwiGLU, no biases. Module names are those of the checkpoints, so that
loading is a comparison of names and shapes and nothing else. Norms, rotation tables, softmax and log-probabilities are
computed in fp32 whatever the dtype of the weights.
"""
import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs from a checkpoint's config.json; `raw` is that file, written back unchanged on saving."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: dict | None
    norm_eps: float
    tied: bool
    qk_norm: bool
    max_positions: int
    raw: dict

    @staticmethod
    def from_json(raw: dict) -> "ModelConfig":
        """Read a Hugging Face config; what we cannot run exactly is refused by name (ValueError)."""
        kind = raw.get("model_type")
        if kind not in ("qwen3", "llama"):
            raise ValueError(f"model_type {kind!r} is not supported: expected 'qwen3' or 'llama'")
        refused = {
            "use_sliding_window": raw.get("use_sliding_window"),
            "attention_bias": raw.get("attention_bias"),
            "mlp_bias": raw.get("mlp_bias"),
            "quantization_config": raw.get("quantization_config"),
            "hidden_act": raw.get("hidden_act", "silu") != "silu" and raw["hidden_act"],
        }
        for name, value in refused.items():
            if value:
                raise ValueError(f"config has {name} = {value!r}, which this forward pass does not compute")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in needed if not isinstance(raw.get(name), int) or raw[name] < 1]:
            raise ValueError(f"config has no positive whole number for {', '.join(missing)}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"config has rope settings {rope!r}; expected an object")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"rope type {rope_type!r} is not supported: expected 'default' or 'llama3'")
        llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if rope_type == "llama3" and (missing := [name for name in llama3 if name not in rope]):
            raise ValueError(f"rope type 'llama3' needs {', '.join(missing)}")
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            rope_scaling=rope if rope_type == "llama3" else None,
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied=raw.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
            max_positions=raw.get("max_position_embeddings") or 2048,
            raw=raw,
        )


# --------------------------------------------------------------------------------------------------------------- forward


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of dimensions; (head_dim / 2,) in fp32."""
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if config.rope_scaling:  # llama3: long waves are slowed by `factor`, short ones kept, those between blended
        scaling = config.rope_scaling
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2); x (B, heads, T, head_dim), cos and sin (B, 1, T, head_dim / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of every layer, (rows, kv_heads, length, head_dim).

    Without `room` it is functional, and gradients flow through it. With room for so many more positions it grows in place, as
    sampling needs: appending a token to a tensor would copy the whole cache at every step.
    """

    def __init__(self, layers: int, room: int = 0):
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.lengths, self.room = [0] * layers, room

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past, end = self.lengths[layer], self.lengths[layer] + k.shape[2]
        self.lengths[layer] = end
        if self.room:
            self.keys[layer][:, :, past:end], self.values[layer][:, :, past:end] = k, v
        elif past:
            self.keys[layer] = torch.cat((self.keys[layer], k), dim=2)
            self.values[layer] = torch.cat((self.values[layer], v), dim=2)
        else:
            self.keys[layer], self.values[layer] = k, v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor, room: int = 0) -> "KVCache":
        """The cache of these rows, in this order; a row may be taken several times (a group) or not at all (finished)."""

        def take(x: Tensor, length: int) -> Tensor:
            taken = x[:, :, :length].index_select(0, rows)
            return torch.cat((taken, taken.new_empty(*taken.shape[:2], room, taken.shape[3])), dim=2) if room else taken

        chosen = KVCache(len(self.keys), room)
        chosen.lengths = list(self.lengths)
        chosen.keys = [take(k, n) for k, n in zip(self.keys, self.lengths)]
        chosen.values = [take(v, n) for v, n in zip(self.values, self.lengths)]
        return chosen


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        k, v = cache.extend(self.layer, rotate(k, cos, sin), v)
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Path | None = None  # the folder it was loaded from: its tokenizer files go along on saving
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)

    def hidden(self, tokens: Tensor, valid: Tensor, cache: KVCache) -> Tensor:
        """Last hidden states of `tokens` (B, T) that follow what the cache holds; -> (B, T, hidden_size).

        `valid` (B, past + T) is False at padding, past tokens included. Positions count the valid tokens only, so padding
        on the left or between prompt and completion changes nothing.
        """
        past = valid.shape[1] - tokens.shape[1]
        positions = (valid.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]  # (B, T)
        angles = positions[:, None, :, None].float() * self.frequencies.float()  # (B, 1, T, head_dim / 2)
        index = torch.arange(valid.shape[1], device=tokens.device)
        causal = index[None, :] <= index[past:, None]  # (T, past + T)
        itself = index[None, :] == index[past:, None]  # padding attends to itself: a softmax over nothing is NaN
        mask = (causal & valid[:, None, :] | itself)[:, None]  # (B, 1, T, past + T)
        x, cos, sin = self.embed_tokens(tokens), angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., hidden_size)."""
        return F.linear(hidden, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits; (B, T) -> (B, T, V)."""
        valid = torch.ones_like(tokens, dtype=torch.bool)
        return self.head(self.hidden(tokens, valid, KVCache(self.config.num_layers)))


# -------------------------------------------------------------------------------------------------------------- sampling


@dataclass
class Completion:
    tokens: list[int]  # sampled ids, closing stop token included
    logprobs: list[float]  # log-softmax of the raw logits at those ids
    finished: bool  # ended by a stop token, not by the length limit


def pad(rows: list[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens (B, T) and valid (B, T), padded with id 0 on `side`; nothing reads the mask back from the id."""
    width = max(map(len, rows), default=0)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, where], valid[i, where] = torch.tensor(row, dtype=torch.long), True
    return tokens.to(device), valid.to(device)


def uniforms(seed: int, prompt: list[int], place: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that depend on seed, prompt and place in the group only; number t is for position t."""
    key = hashlib.blake2b(np.array([seed, place, *prompt], dtype=np.int64).tobytes(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """One id per row by inverse CDF; logits (B, V) in fp32, uniform (B,) -> (B,). Temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    probs = logits.softmax(dim=-1).double()
    if top_p < 1:  # keep the smallest set of ids that reaches top_p
        ordered, order = probs.sort(dim=-1, descending=True)
        dropped = ordered.cumsum(dim=-1) - ordered >= top_p
        probs = probs.scatter(1, order, ordered.masked_fill(dropped, 0.0))
    edges = probs.cumsum(dim=-1)
    return torch.searchsorted(edges, uniform[:, None] * edges[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    group_size: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
) -> list[list[Completion]]:
    """Sample `group_size` completions of each prompt -> P lists of G. One prefill per prompt; finished rows leave the batch.

    `logprobs` are those of the raw logits, whatever temperature, top_p and top_k did. A completion's random numbers depend
    only on seed, prompt, place in the group and position (METHOD.md section 8).
    """
    if not prompts:
        return []
    if not all(prompts):
        raise ValueError("an empty prompt has no last token to continue: give every prompt at least one token")
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > model.config.max_positions:
        raise ValueError(f"prompt + max_new_tokens is {longest}, the model's context {model.config.max_positions}: shorten one")
    device = model.embed_tokens.weight.device
    tokens, valid = pad(prompts, "left", device)
    cache = KVCache(model.config.num_layers)
    logits = model.head(model.hidden(tokens, valid, cache)[:, -1])  # (P, V)

    live = torch.arange(len(prompts) * group_size, device=device)  # rows still being written, row = prompt * G + place
    cache, valid, logits = cache.select(live // group_size, max_new_tokens), valid[live // group_size], logits[live // group_size]
    rolls = np.stack([uniforms(seed, p, g, max_new_tokens) for p in prompts for g in range(group_size)])
    rolls = torch.from_numpy(rolls).to(device)  # (B, max_new_tokens)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    done = [Completion([], [], False) for _ in range(len(live))]
    for t in range(max_new_tokens):
        logits = logits.float()
        chosen = choose(logits, rolls[live, t], temperature, top_p, top_k)  # (live,)
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
        stopped = torch.isin(chosen, stops)
        for row, token, logprob, stop in zip(live.tolist(), chosen.tolist(), logprobs.tolist(), stopped.tolist()):
            done[row].tokens.append(token)
            done[row].logprobs.append(logprob)
            done[row].finished = stop
        if stopped.any():
            keep = (~stopped).nonzero()[:, 0]
            live, chosen, valid, cache = live[keep], chosen[keep], valid[keep], cache.select(keep, max_new_tokens - t)
        if not len(live) or t == max_new_tokens - 1:
            break
        valid = F.pad(valid, (0, 1), value=True)
        logits = model.head(model.hidden(chosen[:, None], valid, cache)[:, -1])
    return [done[i : i + group_size] for i in range(0, len(done), group_size)]


def completion_logprobs(
    model: Transformer, prompts: list[list[int]], completions: list[list[list[int]]]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given completions; P prompts, P lists of G token lists -> (B, T) and mask (B, T), B = P * G.

    Differentiable. Each prompt goes through the network once and its cache is shared by its group, as in `generate`.
    """
    device = model.embed_tokens.weight.device
    rows = [completion for group in completions for completion in group]
    owner = torch.tensor([p for p, group in enumerate(completions) for _ in group], device=device)  # (B,)
    tokens, valid = pad(prompts, "left", device)
    targets, mask = pad(rows, "right", device)  # (B, T)
    cache = KVCache(model.config.num_layers)
    first = model.hidden(tokens, valid, cache)[:, -1:]  # (P, 1, d) predicts the first sampled token
    inputs = targets[:, :-1]
    whole = torch.cat((valid[owner], mask[:, :-1]), dim=1)
    hidden = first[owner]
    if inputs.shape[1]:
        hidden = torch.cat((hidden, model.hidden(inputs, whole, cache.select(owner))), dim=1)  # (B, T, d)
    logprobs = model.head(hidden[:, : targets.shape[1]]).float().log_softmax(dim=-1)  # (B, T, V)
    return logprobs.gather(2, targets[:, :, None])[:, :, 0], mask


# ----------------------------------------------------------------------------------------------------------- checkpoints


def read_json(path: Path) -> dict:
    """One JSON object from a file; ValueError says which file and why."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a Hugging Face checkpoint folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index}: no weight_map")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} points outside the checkpoint folder")
    return [folder / name for name in names]


def load_model(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """Load a Hugging Face checkpoint folder (single or sharded safetensors); ValueError names what does not fit."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder; expected one with config.json and model.safetensors")
    config = ModelConfig.from_json(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    loaded: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        if not file.exists():
            raise ValueError(f"{file}: no such weights file")
        try:
            weights = safe_open(file, framework="pt", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from None
        with weights:
            for key in weights.keys():
                name = key.removeprefix("model.")
                name = "lm_head.weight" if key == "lm_head.weight" else name
                if name == "lm_head.weight" and config.tied:
                    continue
                if name not in wanted:
                    raise ValueError(f"{file}: tensor {key!r} has no place in a {config.raw['model_type']} model")
                tensor = weights.get_tensor(key)
                if tuple(tensor.shape) != wanted[name]:
                    raise ValueError(f"{file}: {key!r} has shape {tuple(tensor.shape)}, expected {wanted[name]}")
                loaded[name] = tensor.to(dtype)
    if missing := sorted(wanted.keys() - loaded.keys()):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    model.load_state_dict(loaded, strict=True, assign=True)
    model.frequencies = rotary_frequencies(config).to(device)
    model.source = folder
    return model.requires_grad_(True).eval()


def refuse_other_folders(target: Path) -> None:
    """ValueError when `target` exists and is neither empty nor a checkpoint: saving there would delete it."""
    if target.exists() and not (target / "config.json").exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is no checkpoint folder: saving there would delete it; choose another name")


def save_model(model: Transformer, path: str | Path) -> None:
    """Write a checkpoint folder that other tools load; complete under its name or not there at all.

    Replaces an older checkpoint, never another folder (ValueError).
    """
    target = Path(path)
    refuse_other_folders(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for extra in sorted(model.source.iterdir()) if model.source else []:  # tokenizer, chat template, generation config
            if extra.suffix in (".json", ".jinja", ".txt", ".model") and not extra.name.endswith(".index.json"):
                shutil.copyfile(extra, temporary / extra.name)
        state = {
            name if name == "lm_head.weight" else f"model.{name}": p.detach().contiguous().cpu()
            for name, p in model.named_parameters()
        }
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        os.chmod(temporary / "model.safetensors", 0o644)  # the library makes it private
        raw = model.config.raw | {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
        raw.pop("torch_dtype", None)
        (temporary / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        os.chmod(temporary, 0o755)
        replaced = None
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.rename(target, replaced / target.name)
        os.rename(temporary, target)
        if replaced:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------------- tokenizer and chat


class Tokenizer:
    """A checkpoint's tokenizer with its chat template and its stop tokens; text in, token ids out, and back."""

    def __init__(self, path: str | Path):
        folder = Path(path)
        if not (folder / "tokenizer.json").exists():
            raise ValueError(f"{folder / 'tokenizer.json'}: no such file; expected the tokenizer of a Hugging Face checkpoint folder")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{folder / 'tokenizer.json'}: not a tokenizer file: {error}") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        options = {n: read_json(folder / n) if (folder / n).exists() else {} for n in _TOKEN_FILES}
        settings = options["tokenizer_config.json"]
        self.tokens = {  # bos_token and the like, which templates may use; older files store them as objects
            key: value.get("content", "") if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token") and isinstance(value, (str, dict))
        }
        template = folder / "chat_template.jinja"
        self.template = template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template")
        if isinstance(self.template, list):  # several named ones
            self.template = next((t["template"] for t in self.template if t.get("name") == "default"), None)
        stops = {self.backend.token_to_id(token) for token in (self.tokens.get("eos_token"), *_END_OF_TURN) if token}
        for name in ("generation_config.json", "config.json"):
            ids = options[name].get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [ids])
        self.stop_ids = tuple(sorted(i for i in stops if isinstance(i, int)))
        self.max_new_tokens: int = options["generation_config.json"].get("max_new_tokens") or 1024

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens dropped."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if not self.template:
            raise ValueError("the checkpoint has no chat template: expected chat_template.jinja, or one in tokenizer_config.json")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(self.template)

    def render(self, messages: list[dict[str, str]], thinking: bool = True) -> str:
        """The chat as text, by the checkpoint's own template, ending with the generation prompt."""
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=True, enable_thinking=thinking, **self.tokens)
        except ValueError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"the checkpoint's chat template failed: {error}") from None

    def chat(self, messages: list[dict[str, str]], thinking: bool = True) -> list[int]:
        """Ids of a chat, generation prompt included."""
        return self.encode(self.render(messages, thinking))

    def think_prefix(self, thinking: bool = True) -> str:
        """"<think>" where the generation prompt itself opens that tag, so that the parser must be given it back."""
        return "<think>" if self.render([{"role": "user", "content": "?"}], thinking).rstrip().endswith("<think>") else ""


_TOKEN_FILES = ("tokenizer_config.json", "generation_config.json", "config.json")
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")


def _raise(message: str) -> None:
    raise TemplateError(message)
