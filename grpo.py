"""Social-R1's training (METHOD.md section 5): GRPO with a reward of the whole reasoning trajectory.

    rollout    G completions of each of P prompts, sampled by the policy itself at temperature 1
    score      R = R_fmt * ( w_out R_out + tau (w_struct R_struct + w_content R_content) ) * R_len         (rewards.py)
    compare    A_i = (R_i - mean(R)) / (std(R) + eps)                       within the group of one prompt
    update     ratio = exp(logp - logp_old);   KL = exp(ref - logp) - (ref - logp) - 1                            (k3)
               L = -( min(ratio * A, clip(ratio, 1 - e, 1 + e) * A) - beta * KL )     per token, mean over tokens, then rows

Read from top to bottom: settings, the objective, rollout and update, checkpoints, the loop. The last part, the cold start,
made the policy that the demonstration begins with; it is no part of the method.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from eval import DO_NOT_TRAIN, MEASURES, aligned, check_lengths, contamination_note, evaluate, normalise, read_all, spread_problems, table
from model import (
    PACK_LIMIT, PREFILL_TOKENS, SAMPLING_BUDGET, ChunkedLogProbs, Completion, ModelConfig, Tokenizer, Transformer, check_device,
    completion_logprobs, generate, load_model, logits_in_tokens, logprobs_and_entropy, pad, read_config, read_json, refuse_other_folders, save_model,
    write_model,
)  # fmt: skip
from rewards import ContentModel, Reward, RewardConfig, curriculum, load_content_model, parse, setting, total_reward
from socialr1 import (
    MAIN, STAGES, TINY, TINY_CONTENT, Parser, Problem, Response, Story, build_messages, exit_on_error, format_trace,
    generate_problems, generate_stories, minds, readers_minds, replay, write_json, write_stages, write_text,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of a run; the defaults are the paper's where it states them [P], ours elsewhere [O] (METHOD.md section 5)."""

    steps: int = setting(600, "steps, one rollout each [P]")
    prompts: int = setting(4, "problems per step (P); under torchrun the next multiple of the processes [O]")
    group_size: int = setting(5, "completions per problem (G) [P]")
    lr: float = setting(5e-7, "learning rate of AdamW [P]")
    warmup_steps: int = setting(10, "steps until the learning rate is reached [O]")
    weight_decay: float = setting(0.0, "of AdamW [O]")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm [O]")
    minibatches: int = setting(1, "updates per rollout [O]")
    clip_eps: float = setting(0.2, "clip range of the ratio [O]")
    beta: float = setting(0.04, "weight of the KL to the reference policy; at 0 none is kept in memory [P]")
    reduction: str = setting("grpo", "how token losses are averaged: grpo [P], dapo or dr_grpo")
    max_new_tokens: int = setting(1024, "tokens per completion at most [O]")
    temperature: float = setting(1.0, "of rollouts; must be 1, so that the policy that acts is the one differentiated")
    top_p: float = setting(1.0, "of rollouts; must be 1")
    top_k: int = setting(0, "of rollouts; must be 0")
    token_budget: int = setting(8192, "tokens in one micro-batch; less needs less memory, results stay the same")
    recompute: bool = setting(True, "activation checkpointing: keep what enters a block only; much less memory, up to a third more time")
    eval_problems: int = setting(8, "held-out problems of the table before and after; 0: none")
    eval_every: int = setting(100, "steps between short evaluations; 0: never")
    save_every: int = setting(50, "steps between checkpoints")
    keep: int = setting(2, "checkpoints that are kept")
    max_skips: int = setting(3, "updates in a row that may be skipped because they are not finite, before the run stops")
    seed: int = setting(0, "of problems and rollouts")

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"--group-size {self.group_size}: an advantage needs a group of at least 2 to compare with")
        if (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise ValueError("rollouts run at --temperature 1 --top-p 1 --top-k 0: otherwise the ratio would be that of another policy")
        if self.reduction not in ("grpo", "dapo", "dr_grpo"):
            raise ValueError(f"--reduction {self.reduction}: expected grpo, dapo or dr_grpo")
        if not 1 <= self.minibatches <= self.prompts:
            raise ValueError(f"--minibatches {self.minibatches}: expected 1 to --prompts {self.prompts}, since groups stay whole")
        for name in ("steps", "prompts", "max_new_tokens", "token_budget", "save_every", "keep", "max_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        for name in ("lr", "beta", "clip_eps", "warmup_steps", "weight_decay", "eval_problems", "eval_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 or more")
        if not 0 < self.max_grad_norm < math.inf:
            raise ValueError(f"--max-grad-norm {self.max_grad_norm}: expected above 0")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed {self.seed}: expected 0 to 2147483647")


PAPER = (GRPOConfig(), RewardConfig())
TINY_PRESET = (  # the embedded default: what SETTINGS.md found for a model of 0.7M parameters on a CPU
    GRPOConfig(
        steps=50, prompts=16, group_size=8, lr=3e-4, warmup_steps=5, minibatches=2, max_new_tokens=160, token_budget=16384, recompute=False,
        eval_problems=400, eval_every=10, save_every=10,
    ),
    RewardConfig(min_length=16, max_length=160),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- objective


def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """Advantages within each group; (P, G) -> (P, G). Sample standard deviation, as in verl.

    A group whose rewards are all equal has advantage 0 exactly: floating-point dust must not be divided by eps.
    `scale=False` leaves the division out (Dr. GRPO). A group of one has no spread to measure: ValueError.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"expected rewards (P, G) with G of at least 2, got shape {tuple(rewards.shape)}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = centred / (rewards.std(dim=1, keepdim=True) + eps) if scale else centred
    flat = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return advantages.masked_fill(flat, 0.0)


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token; (B, T), (B, T) -> (B, T). Never negative."""
    log_ratio = ref_logprobs - logprobs
    return torch.exp(log_ratio) - log_ratio - 1


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    clip_eps: float = 0.2,
    beta: float = 0.04,
    reduction: str = "grpo",
    max_length: int | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped policy loss with a KL penalty; log-probabilities and mask (B, T), advantages (B,) -> scalar and metrics.

    reduction   `grpo`: mean over a completion's tokens, then over completions [P]; `dapo`: mean over all tokens;
                `dr_grpo`: sum over tokens / (completions x max_length).
    normalizer  what to divide by when this is a micro-batch, so that micro-batches add up to the whole batch: its
                completions (grpo), tokens (dapo) or completions x max_length (dr_grpo).
    Padding is replaced, not multiplied by 0, so that whatever stands there (even NaN) changes nothing. A row without
    tokens contributes 0. `ref_logprobs` may be None when beta is 0.
    """
    if beta and ref_logprobs is None:
        raise ValueError(f"beta is {beta}: the KL term needs ref_logprobs")
    mask = completion_mask.bool()
    counts = mask.sum(dim=1)  # (B,)
    old_logprobs = torch.where(mask, old_logprobs, 0.0)
    logprobs = torch.where(mask, logprobs, 0.0)
    ratio = torch.exp(logprobs - old_logprobs)  # (B, T)
    unclipped = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages[:, None]
    token_loss = -torch.minimum(unclipped, clipped)
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = kl_to_reference(logprobs, torch.where(mask, ref_logprobs, 0.0))
        token_loss = token_loss + beta * kl
    token_loss = torch.where(mask, token_loss, 0.0)

    if reduction == "grpo":
        total = (token_loss.sum(dim=1) / counts.clamp(min=1)).sum()
        denominator = len(counts)
    elif reduction == "dapo":
        total, denominator = token_loss.sum(), int(counts.sum())
    elif reduction == "dr_grpo":
        if max_length is None:
            raise ValueError("reduction 'dr_grpo' divides by a constant length: pass max_length")
        total, denominator = token_loss.sum(), len(counts) * max_length
    else:
        raise ValueError(f"unknown reduction {reduction!r}: expected 'grpo', 'dapo' or 'dr_grpo'")

    tokens = max(int(counts.sum()), 1)
    metrics = {
        "kl": float(torch.where(mask, kl, 0.0).sum().detach()) / tokens,
        "clip_fraction": float(((clipped < unclipped) & mask).sum()) / tokens,
        "tokens": float(counts.sum()),
    }
    return total / max(denominator if normalizer is None else normalizer, 1), metrics


# ----------------------------------------------------------------------------------------------------- several processes
#
# Under torchrun every process (one per GPU) does its share of the prompts. FSDP2 cuts each weight, its gradient and its AdamW
# states into one piece per process, and puts a block's weights together while it computes; it also gives fp32 weights under
# bf16 compute, and keeps all of it in the host's memory where the card is small, so it serves a single GPU too. Sampling and
# evaluation never talk to other processes: they use a whole copy of the weights, which is there only as long as they run.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(device: str) -> str:
    """Meet the other processes that torchrun has started (or nobody); -> this one's device."""
    alone = dict(store=dist.HashStore(), rank=0, world_size=1) if "RANK" not in os.environ else {}
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1), **alone)  # a slow rollout elsewhere is no failure
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return device


def summed(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over all processes."""
    if processes() == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def highest(value: float) -> float:
    """Over all processes."""
    if processes() > 1:
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        value = found.item()
    return value


def shard(model: Transformer, device: str, dtype: torch.dtype, offload: bool) -> Transformer:
    """FSDP2 over all processes: computes in `dtype`; parameters and what belongs to them keep theirs."""
    kind = torch.device(device).type
    policy = dict(
        mesh=init_device_mesh(kind, (processes(),)),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if offload and kind == "cuda" else OffloadPolicy(),
    )
    for part in (*model.layers, model):
        fully_shard(part, **policy)
        part.set_gradient_divide_factor(1.0)  # the loss is divided by the whole batch already: gradients add up
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "logprobs")
    model.computes_on = torch.device(device)
    return model


def whole_tensor(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole(model: Transformer, device: str, dtype: torch.dtype) -> Transformer:
    """A copy with all of the weights, gathered from the shards (every process must call it); of an unsharded model, itself."""
    if not isinstance(model.norm.weight, DTensor):
        return model
    with torch.device("meta"):
        copy = Transformer(model.config)
    weights = {name: whole_tensor(p.detach()).to(device, dtype) for name, p in model.named_parameters()}
    copy.load_state_dict(weights, strict=False, assign=True)  # strict would ask for a tied head
    copy.tie()
    copy.source = model.source
    return copy.requires_grad_(False).eval()


def gathered(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors on the host, for the first process; the others must call this too, and get none."""
    found = {}
    for name, shards in tensors:
        full = whole_tensor(shards.detach())
        if not rank():
            found[name] = full.cpu().contiguous()
    return found


# --------------------------------------------------------------------------------------------------------------- rollout


@dataclass
class Rollout:
    """What an update needs: this process's prompts with G completions each, and how much better than their group these were."""

    prompts: list[list[int]]
    groups: list[list[Completion]]  # a list of G for each prompt
    advantages: Tensor  # (prompts, G)
    first: int = 0  # the place of the first of these prompts in the whole batch


def problems_of_step(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """`count` problems: a walk through a fresh permutation in every epoch. Depends on (seed, step) only, so resuming is exact."""
    chosen = []
    for i in range(step * count, (step + 1) * count):
        epoch, place = divmod(i, len(problems))
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(problems))
        chosen.append(problems[order[place]])
    return chosen


def score(
    problems: list[Problem],
    groups: list[list[Completion]],
    responses: list[list[Response]],
    contents: list[list[float | None]],
    tau: float,
    config: RewardConfig,
) -> list[list[Reward]]:
    """The trajectory reward of every completion, given R_content of each; P lists of G."""
    return [
        [total_reward(r, problem, len(c.tokens), tau, content, config) for c, r, content in zip(*three)]
        for problem, *three in zip(problems, groups, responses, contents)
    ]


def micro_batches(prompts: list[list[int]], groups: list[list[Completion]], budget: int) -> Iterator[tuple[list[int], list[slice]]]:
    """Cut groups into pieces of at most `budget` tokens (at least one completion): indices of prompts, and which completions of each.

    A prompt counts once in a piece, whatever number of its completions is there.
    """
    indices, slices, size = [], [], 0
    for p, group in enumerate(groups):
        for g, completion in enumerate(group):
            new = len(completion.tokens)
            if indices and size + new + (len(prompts[p]) if indices[-1] != p else 0) > budget:
                yield indices, slices
                indices, slices, size = [], [], 0
            if indices and indices[-1] == p:
                slices[-1] = slice(slices[-1].start, g + 1)
            else:
                indices.append(p)
                slices.append(slice(g, g + 1))
                size += len(prompts[p])
            size += new
    if indices:
        yield indices, slices


def update(
    model: Transformer, reference: Transformer | None, optimizer: torch.optim.Optimizer, rollout: Rollout, config: GRPOConfig
) -> dict[str, float]:
    """One pass over the rollout in minibatches of whole groups, one optimizer step each; returns metrics of the whole pass.

    A step whose loss or gradient is not finite is skipped, and counted.
    """
    metrics = {"loss": 0.0, "grad_norm": 0.0, "skipped": 0}
    sums = {"kl": 0.0, "clip_fraction": 0.0, "entropy": 0.0, "tokens": 0.0}
    drift = 0.0
    for number in range(config.minibatches):
        part = [p for p in range(len(rollout.prompts)) if (rollout.first + p) % config.minibatches == number]
        loss, some_sums, some_drift = accumulate(model, reference, rollout, part, config)
        norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)))
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            metrics["loss"] += loss / config.minibatches
            metrics["grad_norm"] += norm / config.minibatches
        else:
            metrics["skipped"] += 1
        optimizer.zero_grad(set_to_none=True)
        sums = {name: value + some_sums[name] for name, value in sums.items()}
        if number == 0:  # nothing has been updated yet: sampler and trainer must agree
            drift = some_drift
    tokens = max(sums.pop("tokens"), 1)
    return metrics | {name: value / tokens for name, value in sums.items()} | {"logprob_drift": drift}


def accumulate(
    model: Transformer, reference: Transformer | None, rollout: Rollout, part: list[int], config: GRPOConfig
) -> tuple[float, dict[str, float], float]:
    """Gradients of the loss over these prompts of all processes, a micro-batch at a time; -> loss, sums over tokens, logprob drift."""
    prompts, groups = [rollout.prompts[p] for p in part], [rollout.groups[p] for p in part]
    completions = [c for group in groups for c in group]
    counts = summed({"grpo": len(completions), "dapo": sum(len(c.tokens) for c in completions)})
    counts["dr_grpo"] = counts["grpo"] * config.max_new_tokens
    pieces = list(micro_batches(prompts, groups, config.token_budget))
    sums, drift = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "entropy": 0.0, "tokens": 0.0}, 0.0
    for i in range(int(highest(len(pieces)))):  # of any process: all compute equally often, since each gathers weights from all
        indices, slices = pieces[i] if i < len(pieces) else ([], [])
        some_prompts = [prompts[p] for p in indices] or [[0]]
        some = [groups[p][s] for p, s in zip(indices, slices)] or [[Completion([], [], False)]]  # without tokens: contributes 0
        ids = [[c.tokens for c in group] for group in some]
        logprobs, mask, entropies = logprobs_and_entropy(model, some_prompts, ids)  # (b, T)
        old_logprobs = pad_values([c.logprobs for group in some for c in group], mask)
        with torch.no_grad():
            ref_logprobs = completion_logprobs(reference, some_prompts, ids)[0] if reference is not None else None
        advantages = torch.cat([rollout.advantages[part[p], s] for p, s in zip(indices, slices)] or [torch.zeros(1)]).to(mask.device)  # (b,)
        loss, metrics = grpo_loss(
            logprobs, old_logprobs, ref_logprobs, advantages, mask, config.clip_eps, config.beta, config.reduction,
            config.max_new_tokens, counts[config.reduction],
        )  # fmt: skip
        loss.backward()
        sums["loss"] += float(loss.detach())
        for name in ("kl", "clip_fraction"):
            sums[name] += metrics[name] * metrics["tokens"]
        sums["entropy"] += float(entropies.sum())
        sums["tokens"] += metrics["tokens"]
        drift = max([drift, *(logprobs.detach() - old_logprobs).abs().flatten().tolist()])
    sums = summed(sums)
    return sums.pop("loss"), sums, highest(drift)


def pad_values(rows: list[list[float]], mask: Tensor) -> Tensor:
    """Lists of floats -> (B, T), 0 where the mask is False."""
    values = torch.zeros(mask.shape)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(row)
    return values.to(mask.device)


# ----------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(out: Path, model: Transformer, optimizer: torch.optim.Optimizer, step: int, state: dict, keep: int) -> Path:
    """OUT/checkpoint-STEP: an ordinary model folder, with optimizer.safetensors and state.json beside it; then drop older ones.

    Tensors are whole, so the number of processes may change; every process must call this, the first one writes. It becomes
    visible complete, by a rename; OSError says what stays when that fails. ValueError: weights that are not finite.
    """
    target, temporary = out / f"checkpoint-{step:06d}", out / ".saving"
    weights = gathered(model.named_parameters())
    states = gathered((f"{name}.{key}", value) for name, p in model.named_parameters() for key, value in optimizer.state[p].items())
    if rank():
        return target
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ValueError(f"step {step}: the weights are not finite, and are not saved")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir()
        write_model(model, temporary, weights)
        save_file(states, temporary / "optimizer.safetensors")
        state = state | {"step": step, "files": {path.name: file_digest(path) for path in sorted(temporary.iterdir())}}
        write_json(temporary / "state.json", state | {"digest": digest(state)})
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            before = f"{last_whole(out)[0]} is whole"
        except ValueError:
            before = "there is none before it"
        raise OSError(f"{target} could not be saved: {error}; {before}: make room, then go on with --resume") from None
    for older in checkpoints(out)[:-keep]:
        shutil.rmtree(older)
    return target


def checkpoints(out: Path) -> list[Path]:
    """Oldest first, damaged ones included."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def fingerprint(path: Path) -> str:
    """Of a file or of all files in a folder: names and sizes, and of all but the largest the content."""
    found = {}
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            found[str(file.relative_to(path))] = size, file_digest(file) if size < 1 << 26 else ""
    return digest(found)[:16]


def digest(state: dict) -> str:
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> dict:
    """A checkpoint's state.json; ValueError: a file of the checkpoint is not as it was written."""
    state = read_json(path / "state.json")
    if state.pop("digest", None) != digest(state):
        raise ValueError(f"{path}/state.json is damaged")
    for name, expected in state["files"].items():
        if not (path / name).is_file() or file_digest(path / name) != expected:
            raise ValueError(f"{path}/{name} is damaged")
    return state


def last_whole(out: Path) -> tuple[Path, dict]:
    """The newest checkpoint whose files are what was written, and its state. ValueError: there is none."""
    for path in reversed(checkpoints(out)):
        try:
            return path, read_state(path)
        except ValueError as error:
            tqdm.write(f"WARNING: {error}; looking for the checkpoint before it")
    raise ValueError(f"{out} holds no checkpoint that is whole: choose another --out to begin anew")


def where_to_resume(run: "Run", asked: bool) -> Path | None:
    """The checkpoint to go on from; None: begin. ValueError: a run that was not asked to go on, or with other settings or files."""
    saved = checkpoints(run.out)
    if not asked and (saved or (run.out / "metrics.jsonl").exists()):
        raise ValueError(f"{run.out} holds a run already: go on with it (--resume), or choose another --out")
    if not asked:
        return None
    if not saved and run.out.is_dir():
        print(f"{run.out} holds no checkpoint yet: the run begins again")
        return None
    path, state = last_whole(run.out)
    before, now = state["run"], run.saved()
    if changed := [f"{key} was {before.get(key)!r}, is {value!r}" for key, value in now.items() if before.get(key) != value]:
        raise ValueError(f"cannot resume {path} with other settings: {'; '.join(changed)}")
    return path


def load_optimizer(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Each process takes its own shards of the tensors."""
    with safe_open(path / "optimizer.safetensors", framework="pt") as tensors:
        for name, p in model.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq") if tensors.keys() else ():  # none: no update has been made yet
                value = tensors.get_tensor(f"{name}.{key}")
                if key != "step" and isinstance(p, DTensor):
                    value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None).to(p.device)
                optimizer.state[p][key] = value.to(p.device)


# ------------------------------------------------------------------------------------------------------------------ loop


@dataclass(frozen=True)
class Run:
    """What a run was asked to do: where from, where to, with what."""

    model: Path
    out: Path
    data: tuple[Path, ...]
    lang: str
    device: str
    config: GRPOConfig
    rewards: RewardConfig
    content: Path | None = None  # the content model
    eval_data: tuple[Path, ...] = ()
    dtype: str = "float32"  # of the computation; weights, their gradients and AdamW's states are float32 always
    offload: bool = False

    def saved(self) -> dict:
        """What must be equal for a run to be resumed: settings, and what files are called and hold."""
        files = {"model": [self.model], "content": filter(None, [self.content]), "data": self.data, "eval_data": self.eval_data}
        named = {name: {str(path.resolve()): fingerprint(path) for path in paths} for name, paths in files.items()}
        return named | {"lang": self.lang, "dtype": self.dtype} | asdict(self.config) | asdict(self.rewards)


def load_problems(run: Run) -> tuple[list[Problem], dict[str, list[Problem]]]:
    """Training problems, and held-out sets by name: --eval-data's, else a tenth of the stories in --data, else generated ones."""
    config = run.config
    if run.data:
        problems = read_all(run.data, run.lang)
    else:
        problems = generate_problems(min(config.steps * config.prompts, 20_000), config.seed)
    for name in sorted({problem.source.partition("/")[0] for problem in problems} & DO_NOT_TRAIN.keys()):
        tqdm.write(f"WARNING: {DO_NOT_TRAIN[name]}. Scores on it mean nothing after this run.")
    if run.eval_data:
        held_out = read_all(run.eval_data, run.lang)
        tqdm.write(contamination_note(problems, held_out))
        return problems, {"held out": spread_problems(held_out, config.eval_problems)}
    if run.data:
        stories = list(dict.fromkeys(normalise(problem.story) for problem in problems))  # rows share stories: hold out whole stories
        kept_back = set(random.Random("held out").sample(stories, len(stories) // 10 if config.eval_problems else 0))
        held_out = [problem for problem in problems if normalise(problem.story) in kept_back][: config.eval_problems]
        return [problem for problem in problems if normalise(problem.story) not in kept_back], {"held out": held_out}
    splits = ("test", "shift") if run.model == TINY else ("test",)  # a large model's shift: eval.py --split shift, when wanted
    return problems, {split: generate_problems(config.eval_problems, 1, split) for split in splits}


def load_policies(run: Run, resume: Path | None) -> tuple[Transformer, Transformer | None, torch.optim.Optimizer]:
    """The model, its reference (None at beta 0) and the optimizer, sharded where one process, or float32, is not what was asked for."""
    dtype, sharded = getattr(torch, run.dtype), dist.is_initialized()
    model = load_model(resume or run.model, "cpu" if sharded else run.device)
    model.source = run.model  # saving takes the tokenizer from there; a checkpoint resumed from will be deleted
    model.checkpointing = run.config.recompute
    reference = load_model(run.model, "cpu" if sharded else run.device, dtype).requires_grad_(False) if run.config.beta else None
    if sharded:
        for some in filter(None, (model, reference)):
            shard(some, run.device, dtype, run.offload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.config.lr, weight_decay=run.config.weight_decay, fused=True)
    if resume:
        load_optimizer(resume, model, optimizer)
    return model, reference, optimizer


def train(run: Run, resume: Path | None = None) -> None:
    """The whole of Social-R1: roll out, score trajectories, compare within groups, update; log, evaluate and save on the way.

    `resume`: a checkpoint to go on from. Under torchrun every process calls this; the first one writes.
    """
    config, first_process, saved = run.config, rank() == 0, run.saved()
    problems, held_out = load_problems(run)
    held_out = {name: some for name, some in held_out.items() if some}
    model_config, tokenizer = read_config(run.model), Tokenizer(run.model)
    check_lengths(model_config, tokenizer, problems, config.max_new_tokens)
    if len(problems) < config.prompts:
        raise ValueError(f"{len(problems)} training problems: --prompts {config.prompts} needs at least as many; lower it")
    scorer = load_content_model(run.content, run.device) if run.content else None
    for problem in problems if scorer else ():
        scorer.encode(problem.story, problem.question, [])  # a story that is too long says so now, not in the middle of the run
    model, reference, optimizer = load_policies(run, resume)
    first = read_json(resume / "state.json")["step"] if resume else 0
    highest(0)  # now every process has looked whether there is a run already
    run.out.mkdir(parents=True, exist_ok=True)
    log = run.out / "metrics.jsonl" if first_process else Path(os.devnull)
    if first_process:
        kept = [line for line in read_log(log) if line["step"] < first]
        write_text(log, "".join(f"{json.dumps(line)}\n" for line in kept))
        if len(kept) < first:
            tqdm.write(f"WARNING: {log} has only {len(kept)} of the {first} steps before; the run goes on all the same")
        off = "R_content is off: no content model (--content), or no weight; the other terms keep theirs"
        tqdm.write(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(problems)} training problems, "
            f"{config.prompts} x {config.group_size} completions a step, {config.steps - first} steps to go\n"
            + (f"R_content from {run.content}" if scorer else off)
        )

    def examine(when: str, share: int = 1) -> dict[str, dict]:
        policy = whole(model, run.device, getattr(torch, run.dtype))
        return {
            f"{name} {when}": evaluate(
                policy, tokenizer, some[: max(1, len(some) // share)], temperature=1.0, max_new_tokens=config.max_new_tokens,
                seed=config.seed, label=f"evaluating, {name}",
            )
            for name, some in held_out.items() if first_process  # the others wait at their next exchange
        }  # fmt: skip

    if not resume:
        before = examine("before")
        if first_process:
            write_json(run.out / "before.json", before)
    stop, step, path, skipped = Interrupt(), first - 1, resume, 0
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="grpo", unit="step", disable=not first_process)
    try:
        with stop, open(log, "a", encoding="utf-8") as lines:
            for step in bar:
                metrics = train_step(model, reference, scorer, optimizer, tokenizer, problems, run, step)
                if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < config.steps:
                    for name, result in examine("", share=4).items():
                        metrics[f"eval_{name.strip()}"] = {key: result[key] for key in MEASURES}
                print(json.dumps(metrics), file=lines, flush=True)
                skipped = skipped + metrics["skipped"] if metrics["skipped"] == config.minibatches else 0
                if skipped >= config.max_skips:
                    raise ValueError(f"step {step}: {skipped} updates in a row had a loss or gradient that is not finite, and were skipped")
                shown = ("reward", "out", "struct", "content", "entropy", "length")
                bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown if metrics[name] is not None})
                stopping = highest(stop.asked)  # in any process
                if (step + 1) % config.save_every == 0 or step + 1 == config.steps or stopping:
                    path = save_checkpoint(run.out, model, optimizer, step + 1, {"run": saved}, config.keep)
                if stopping:
                    break
    except ValueError as error:  # training has diverged
        raise ValueError(f"{error}; the last good checkpoint is {path or run.model}: lower --lr or --max-grad-norm") from None
    if step + 1 < config.steps:
        if first_process:
            print(f"\nstopped after step {step + 1} of {config.steps}; checkpoint: {path}\ngo on with the same flags and: --out {run.out} --resume")
        return
    after = examine("after")
    if first_process:
        write_json(run.out / "after.json", after)
        report(run, path)


def read_log(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, one for each step; torn ones are left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines


def report(run: Run, path: Path) -> None:
    """The table before and after, and where everything is."""
    before, after = (read_json(file) if (file := run.out / f"{when}.json").exists() else {} for when in ("before", "after"))
    if after:
        pairs = itertools.zip_longest(before.items(), after.items())
        print("\n" + table(dict(filter(None, itertools.chain(*pairs)))))
    if lines := read_log(run.out / "metrics.jsonl"):
        print(f"\nsampled at temperature 1; mean reward {lines[0]['reward']:.3f} in the first step, {lines[-1]['reward']:.3f} in the last")
    print(f"model: {path}\nlog, and every response before and after: {run.out}/metrics.jsonl, before.json, after.json")
    print(f"next: python eval.py --model {path}")


def train_step(
    model: Transformer, reference: Transformer | None, scorer: ContentModel | None, optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer, problems: list[Problem], run: Run, step: int,
) -> dict:  # fmt: skip
    """One step of GRPO on P problems, a share of them in each process; changes the model, returns the step's line for the log."""
    config, clock = run.config, [time.perf_counter()]
    count = config.prompts // processes()
    share = slice(rank() * count, (rank() + 1) * count)
    some = problems_of_step(problems, step, config.prompts, config.seed)[share]
    prompts = [tokenizer.chat(build_messages(problem)) for problem in some]
    seed = config.seed * 1_000_003 + step
    policy = whole(model, run.device, getattr(torch, run.dtype))
    groups = generate(policy, prompts, config.group_size, config.max_new_tokens, stop_ids=tokenizer.stop_ids, seed=seed)
    del policy
    clock.append(time.perf_counter())
    responses = parse(some, groups, tokenizer)
    contents = scorer.rewards(some, responses) if scorer else [[None] * len(group) for group in groups]
    clock.append(time.perf_counter())
    tau = curriculum(step, config.steps, run.rewards)
    rewards = score(some, groups, responses, contents, tau, run.rewards)
    totals = torch.tensor([[reward.total for reward in group] for group in rewards])  # (P, G)
    advantages = group_advantages(totals, scale=config.reduction != "dr_grpo")
    clock.append(time.perf_counter())
    lr = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = lr
    metrics = update(model, reference, optimizer, Rollout(prompts, groups, advantages, share.start), config)
    clock.append(time.perf_counter())

    completions = [c for group in groups for c in group]
    parts = ("fmt", "out", "struct", "len", *(("content",) if scorer else ()))
    sums = summed({
        "reward": float(totals.sum()),
        **{name: sum(r.parts[name] for group in rewards for r in group) for name in parts},
        "flat_groups": config.group_size * int((totals.amax(1) == totals.amin(1)).sum()),  # groups without spread teach nothing
        "length": sum(len(c.tokens) for c in completions),
        "finished": sum(c.finished for c in completions),
    })  # fmt: skip
    means = {name: value / (config.prompts * config.group_size) for name, value in sums.items()}
    line = {
        "step": step,
        "content": None,
        **means,
        "tau": tau,
        "weights": run.rewards.weights(tau, scorer is not None),
        **metrics,
        "kl": metrics["kl"] if reference is not None else None,  # without a reference it is not known
        "lr": lr,
        "tokens_per_second": sums["length"] / (clock[1] - clock[0]),
        "seconds": {name: b - a for name, a, b in zip(("rollout", "content", "score", "update"), clock, clock[1:])},
        "content_share": (clock[2] - clock[1]) / (clock[-1] - clock[0]) if scorer else None,  # of the step's time
    }
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}


class Interrupt:
    """Ctrl-C asks for a stop after the current step; a second one stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> None:
        self.previous = signal.signal(signal.SIGINT, self.ask)

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step, with a checkpoint (Ctrl-C again: at once, without)")


# ----------------------------------------------------------------------------------------------------------- memory plan


MOMENTS = ("sampling", "loss", "backward begins", "backward ends")  # when memory may be at its peak


def memory_plan(
    model: ModelConfig, config: GRPOConfig, prompt_length: int, workers: int = 1, dtype: str = "float32", sharded: bool = False, cuda: bool = False
) -> dict[str, tuple[float, ...]]:
    """Bytes that each item takes in one process at each of MOMENTS [O]; `sharded` as in load_policies.

    `prompt_length` is the longest prompt's; completions are taken as long as they may be. Libraries, the content model, and what an
    allocator loses between tensors come on top.
    """
    with torch.device("meta"):
        whole_model = Transformer(model)
    n, block = (sum(p.numel() for p in part.parameters()) for part in (whole_model, whole_model.layers[0]))
    head = model.hidden_size * model.vocab_size
    outside = n - block * model.num_layers  # embedding, head and last norm
    number = 2 if dtype == "bfloat16" else 4
    d, f, q, kv = model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    prompts, G, T = config.prompts // workers, config.group_size, config.max_new_tokens
    group = prompt_length + G * T

    at_once = max(1, min(prompts, SAMPLING_BUDGET // (group + G * logits_in_tokens(model))))  # prompts whose completions are sampled together
    cache = 2 * model.num_layers * kv * number * at_once * group
    packed = 4 * block * model.num_layers + 4 * head
    copy = number * n if sharded and (cuda or workers > 1 or number == 2) else 0  # one process has its fp32 weights whole already
    copy += packed if not cuda and number == 4 and packed <= PACK_LIMIT else 0

    tokens = math.ceil(prompts / config.minibatches) * group
    several, tokens = tokens > config.token_budget, min(tokens, max(config.token_budget, prompt_length + T))
    keys = 2 * (q if cuda else kv) + (prompt_length + T)  # repeated for the heads that share them; mask
    in_block = tokens * (number * (4 * f + 3 * d + 2 * q + 2 * kv + keys) + 4 * (4 * d + 2 * q))  # what its backward needs; norms in fp32
    kept = tokens * model.num_layers * d * number if config.recompute else (model.num_layers - 1) * in_block
    at_work = in_block + tokens * number * 3 * f  # a block on its way back, and gradients within it
    chunk = min(ChunkedLogProbs.SIZE, tokens * G * T // group * model.vocab_size)  # only completions have logits
    logits = 4 * 2 * chunk + (number * chunk if number < 4 else 0)
    gathered = number * (outside + 2 * block) * (2 if config.beta else 1) if sharded else 0  # a block computes while the next arrives
    returning = 4 * (outside + block) if sharded else 0  # gradients before each process takes its part
    gradients = 4 * n / workers
    before = gradients if several else 0  # of earlier micro-batches
    return {
        "weights (fp32)": (4 * n / workers,) * 4,
        "AdamW's states (fp32)": (8 * n / workers,) * 4,
        "gradients (fp32)": (0, before + 4 * head, max(before, 4 * head), gradients),
        "reference policy": (number * n / workers,) * 4 if config.beta else (0,) * 4,
        "weights to sample with": (copy, 0, 0, 0),
        "KV cache": (cache, 0, 0, 0),
        "weights and gradients gathered": (0, gathered, gathered + returning, gathered + returning),
        # while sampling: gate and up of a piece of the prefill, and some copies of its residual stream
        "activations": (number * PREFILL_TOKENS[cuda] * (2 * f + 6 * d), kept + (0 if config.recompute else in_block), kept + at_work, at_work),
        # while sampling: logits, their log-softmax and their softmax, in fp32
        "logits": (3 * 4 * at_once * G * model.vocab_size, logits, 0, 0),
    }


def print_plan(run: Run, memory: float) -> None:
    """The plan for one process of WORLD_SIZE, and whether it fits into `memory` bytes; nothing but configs and tokenizer is read."""
    c, workers, cuda = run.config, max(1, int(os.environ.get("WORLD_SIZE", 1))), run.device.startswith("cuda")
    problems, held_out = load_problems(run)
    tokenizer = Tokenizer(run.model)
    longest = max(len(tokenizer.chat(build_messages(problem))) for problem in itertools.chain(problems, *held_out.values()))
    sharded = workers > 1 or run.dtype != "float32" or run.offload
    plan = memory_plan(read_config(run.model), c, longest, workers, run.dtype, sharded, cuda)
    hosted = {name for name in plan if run.offload and (name.endswith("(fp32)") or name == "reference policy")}
    on_device = [sum(sizes[i] for name, sizes in plan.items() if name not in hosted) for i in range(len(MOMENTS))]
    on_host = [sum(sizes[i] for name, sizes in plan.items() if name in hosted) for i in range(len(MOMENTS))]
    unit, label = (2**30, "GiB") if max(on_device) >= 2**30 else (2**20, "MiB")
    print(
        f"{run.model}: {c.prompts} prompts of at most {longest} tokens x {c.group_size} completions of {c.max_new_tokens}; {workers} "
        f"process{'es' * (workers > 1)}, {run.dtype}, activation checkpointing {'on' if c.recompute else 'off'}. {label} in each process:\n"
    )
    rows = [["", *MOMENTS, "where"]]
    for name, sizes in plan.items():
        if any(sizes):
            rows.append([name, *(f"{size / unit:.1f}" for size in sizes), "host" if name in hosted else "device"])
    rows.append(["together, on the device", *(f"{size / unit:.1f}" for size in on_device), ""])
    print(aligned(rows))
    verdict = "fits into" if max(on_device) <= 0.95 * memory else "does NOT fit into"
    print(f"\npeak {max(on_device) / unit:.1f} {label}: {verdict} {memory / 2**30:.1f} GiB (5% left to libraries)", end="")
    print(f"; on the host {max(on_host) / unit:.1f} {label} in each process" if run.offload else "")
    if sharded:
        weights = plan["weights (fp32)"][0] * workers
        loading = weights + plan["reference policy"][0] * workers
        print(f"for a moment, on the host: {loading / unit:.1f} {label} in each process while loading, {3 * weights / unit:.1f} in the first while saving")


def memory_of(device: str) -> float:
    """Bytes that the machine has for this device."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ------------------------------------------------------------------------------------------------------------ cold start
#
# The embedded default needs something to play the pretrained LLM: fluent in the SIP format, and fooled by shortcuts. It is
# made from nothing by supervised training [O]: first letters are bound to option texts (look-up rows), then clean traces, and
# last a short dose of planted flaws. What GRPO does afterwards is undo the flaws; the README says so.


@dataclass(frozen=True)
class ColdStartConfig:
    """Settings of `--cold-start`; the shipped assets/tiny was made with the defaults."""

    lookup_steps: int = 1200  # phase 0: only look-up rows
    clean_steps: int = 3000  # phase 1: correct traces, 40% drill rows
    flawed_steps: int = 600  # phase 2: planted flaws, 20% drill rows
    rows: int = 16  # sequences per step
    muon_lr: float = 6e-3  # matrices
    adam_lr: float = 3e-3  # embedding and norms
    invented: float = 0.15  # share of rows whose names and nouns are made-up words, so that copying does not need known words
    shortcut_hard: float = 0.62  # share of flawed traces that believe what the reader knows
    shortcut_control: float = 0.12  # share that lose the last cue instead
    structure: float = 0.3  # a stage dropped or two swapped
    early: float = 0.35  # an option named before Response Generation; drawn independently of the others
    repetition: float = 0.12  # a stage's text said twice


TINY_TEMPLATE = (  # ChatML; the system message is left out, because tiny prompts must stay short
    "{%- for message in messages if message.role != 'system' -%}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}


def made_up_word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)) + rng.choice(["", "n", "r"])


def rename(story: Story, rng: random.Random) -> Story:
    """The same story with made-up words for its people and things."""
    people = {story.cast[role] for role in "xym" if role in story.cast}
    things = {event.value for event in story.events if event.value} | set(story.likes) | {story.cast["o"]}
    fresh = {word: made_up_word(rng) for word in sorted(people | things)}
    pattern = re.compile(r"\b(" + "|".join(fresh) + r")\b", re.IGNORECASE)

    def swap(text: str) -> str:
        return pattern.sub(lambda m: fresh.get(m[0], fresh.get(m[0].lower())).capitalize() if m[0][0].isupper() else fresh[m[0]], text)

    old = story.problem
    return replace(
        story,
        problem=replace(old, story=swap(old.story), question=swap(old.question), options=tuple(map(swap, old.options))),
        trace=swap(story.trace),
        events=tuple(replace(e, actor=swap(e.actor), value=swap(e.value), target=swap(e.target)) for e in story.events),
        cast={role: swap(word) for role, word in story.cast.items()},
        likes={swap(value): feeling for value, feeling in story.likes.items()},
    )


def flawed_trace(story: Story, rng: random.Random, config: ColdStartConfig) -> str:
    """The trace of a policy that takes the shortcut (hard) or forgets the last cue (control), and is careless about form."""
    world = replay(story)
    of_x, of_y = minds(world, story.problem.ability, story.twist, story.cast)
    if story.problem.variant == "hard" and rng.random() < config.shortcut_hard:
        of_x, of_y = readers_minds(world, story.problem.ability, story.cast)
    elif story.problem.variant == "control" and rng.random() < config.shortcut_control:
        of_x = of_x[:-1] + [("missed", of_x[-1][1])]
    texts = write_stages(story, of_x, of_y)
    letter = texts[-1][-2]
    stages = list(zip(STAGES, texts))
    if rng.random() < config.early:
        i = rng.randrange(3)
        stages[i] = (stages[i][0], f"{stages[i][1]} It is option {letter}.")
    if rng.random() < config.repetition:
        i = rng.randrange(4)
        stages[i] = (stages[i][0], f"{stages[i][1]} {stages[i][1]}")
    if rng.random() < config.structure:
        if rng.random() < 0.5:
            del stages[rng.randrange(len(stages))]
        else:
            i, j = rng.sample(range(4), 2)
            stages[i], stages[j] = stages[j], stages[i]
    return format_trace(stages, letter)


def drill(problem: Problem, rng: random.Random, mark: str = ":") -> str:
    """Every option with its letter, in random order: the look-up that binds letters to texts."""
    pairs = list(zip(problem.options, problem.letters))
    return " ".join(f"{option}{mark} {letter}." for option, letter in rng.sample(pairs, len(pairs)))


def build_tokenizer(folder: Path) -> None:
    """A byte-level BPE of its own, trained on train stories and made-up words; every id belongs to a token, none is padding."""
    rng = random.Random("tokenizer")
    stories = generate_stories(6000, seed=0)
    texts = [f"{build_messages(s.problem)[1]['content']}\n{s.trace}\n{drill(s.problem, rng)}" for s in stories]
    texts += [f" {made_up_word(rng)} {made_up_word(rng).capitalize()}" for _ in range(300)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in ("<think>", "</think>", "<Answer>", "</Answer>")])
    backend.save(str(folder / "tokenizer.json"))
    end = backend.token_to_id("<|im_end|>")
    config = TINY_CONFIG | {"vocab_size": backend.get_vocab_size(), "eos_token_id": end}
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False, "model_max_length": 1024, "chat_template": TINY_TEMPLATE,
        },
        "generation_config.json": {"eos_token_id": [end, backend.token_to_id("<|endoftext|>")], "do_sample": True, "max_new_tokens": 160},
        "config.json": config,
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


Row = tuple[list[int], list[int], bool]  # prompt, continuation, does only the letter count?


def cold_start_loss(model: Transformer, rows: list[Row], letters: Tensor) -> Tensor:
    """Cross-entropy of rows. The few letter tokens have a mean of their own, for they are
    the bottleneck; prompt tokens count a tenth; in drill rows only letters count."""
    tokens, valid = pad([prompt + target for prompt, target, _ in rows], "right", letters.device)
    logits = model(tokens[:, :-1]).float()
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")  # (B, T - 1)
    starts = torch.tensor([len(prompt) for prompt, _, _ in rows])[:, None]
    in_prompt = torch.arange(1, tokens.shape[1])[None, :] < starts
    is_letter = torch.isin(tokens[:, 1:], letters) & ~in_prompt
    weights = torch.where(in_prompt, 0.1, 1.0) * valid[:, 1:] * ~is_letter
    weights = weights * ~torch.tensor([only for _, _, only in rows])[:, None]
    return losses[is_letter].mean() + (losses * weights).sum() / weights.sum().clamp(min=1)


def lookup_rows(tokenizer: Tokenizer, config: ColdStartConfig, seed: int) -> Iterator[Row]:
    """Endless rows that teach to look a letter up, without any story: lists said twice (they form the attention heads that find
    an earlier occurrence), and options with the letter right after the word, or after a colon, as in the traces."""
    rng = random.Random(f"lookup {seed}")
    nouns = [*MAIN.objects, *MAIN.names, *itertools.chain(*MAIN.values.values())]
    while True:
        words = [made_up_word(rng) if rng.random() < config.invented else word for word in rng.sample(nouns, 20)]
        if rng.random() < 0.3:
            listed = tokenizer.encode("".join(f" {word}" for word in words))
            yield listed, listed, False
        else:
            problem = Problem("", "", words[:4], "A")
            text = drill(problem, rng, rng.choice(("", ":")))
            yield tokenizer.chat(build_messages(problem)), tokenizer.encode(f" {text}"), True


def story_rows(tokenizer: Tokenizer, config: ColdStartConfig, flawed: bool, seed: int) -> Iterator[Row]:
    """Endless rows of stories with clean or flawed traces, some of them drills."""
    rng = random.Random(f"stories {flawed} {seed}")
    end = tokenizer.encode("<|im_end|>")
    for part in itertools.count(1000 * seed + 1):
        stories = generate_stories(3000, seed=part)
        rng.shuffle(stories)
        for story in stories:
            story = rename(story, rng) if rng.random() < config.invented else story
            prompt = tokenizer.chat(build_messages(story.problem))
            if rng.random() < (0.2 if flawed else 0.4):
                yield prompt, tokenizer.encode(drill(story.problem, rng)), True
            else:
                trace = flawed_trace(story, rng, config) if flawed else story.trace
                yield prompt, tokenizer.encode(trace) + end, False


def cold_start_batches(rows: Iterator[Row], size: int, pool: int = 16) -> Iterator[list[Row]]:
    """Batches of rows of like length, in random order: half of the time would else go into padding."""
    rng = random.Random("batches")
    while True:
        ordered = sorted(itertools.islice(rows, size * pool), key=lambda row: len(row[0]) + len(row[1]))
        batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        yield from rng.sample(batches, pool)


def supervise(
    model: Transformer, rows: Iterator[Row], letters: Tensor, config: ColdStartConfig, steps: int, rate: Callable[[int], float], name: str
) -> None:
    """`steps` updates on these rows: Muon for matrices, AdamW for the rest, learning rates times rate(step)."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [
        (torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0), config.muon_lr),
        (torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0), config.adam_lr),
    ]
    batches = cold_start_batches(rows, config.rows)
    bar = tqdm(range(steps), desc=f"cold start, {name}", unit="step", smoothing=0.05)
    for step in bar:
        loss = cold_start_loss(model, next(batches), letters)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in optimizers:
            optimizer.param_groups[0]["lr"] = lr * rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")


def cold_start(out: Path, config: ColdStartConfig, seed: int) -> None:
    """Build tokenizer and model from nothing and train them into the policy that the demonstration starts from."""
    refuse_other_folders(out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_tokenizer(folder)
        tokenizer = Tokenizer(folder)
        torch.manual_seed(seed)
        model = Transformer(ModelConfig.from_json(read_json(folder / "config.json")))
        model.source = folder
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)

        def flat_then_linear(step: int) -> float:
            x = step / config.clean_steps
            return min(1.0, (step + 1) / 50) * min(1.0, 1 - 0.95 * (x - 0.4) / 0.6)

        letters = torch.tensor(sorted({tokenizer.encode(f" {letter}.")[0] for letter in "ABCD"}))
        lookup, clean = lookup_rows(tokenizer, config, seed), story_rows(tokenizer, config, False, seed)
        flawed = story_rows(tokenizer, config, True, seed)
        supervise(model, lookup, letters, config, config.lookup_steps, lambda step: min(1.0, (step + 1) / 50), "look-up")
        supervise(model, clean, letters, config, config.clean_steps, flat_then_linear, "clean")
        supervise(model, flawed, letters, config, config.flawed_steps, lambda step: 0.25 * (1 - step / config.flawed_steps), "flawed")
        save_model(model.to(torch.bfloat16), out)
    print(f"model: {out}\nnext: python eval.py --model {out} --temperature 1")


# ---------------------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser, presets: tuple[object, object]) -> None:
    """One flag per field, with both presets in its help; the value stays None unless given."""
    tiny, paper = presets
    for f in fields(paper):
        shown = {name: getattr(preset, f.name) for name, preset in (("tiny", tiny), ("paper", paper))}
        default = str(shown["paper"]) if shown["tiny"] == shown["paper"] else f"{shown['tiny']} | {shown['paper']}"
        flag, kind = f"--{f.name.replace('_', '-')}", type(shown["paper"])
        value = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(flag, **value, help=f"{f.metadata['help']} ({default})")


def choose_config(args: argparse.Namespace, preset: object) -> object:
    return replace(preset, **{f.name: getattr(args, f.name) for f in fields(preset) if getattr(args, f.name) is not None})


def main() -> None:
    parser = Parser(
        description="Train a language model by Social-R1: GRPO with a reward of the whole reasoning trajectory. "
        "Without --model: the embedded tiny policy on generated stories, a few minutes on a CPU.",
        epilog="Defaults in brackets: the tiny preset (without --model) | the paper's preset (with --model).",
    )
    add = parser.add_argument
    add("--model", type=Path, help="Hugging Face checkpoint folder (Qwen3 or Llama family)")
    add("--data", type=Path, nargs="+", default=[], help="problems to train on: our JSONL, ToMBench-Hard CSV; without it: generated stories")
    add("--eval-data", type=Path, nargs="+", default=[], help="problems to evaluate on, before and after; without it: a tenth of the stories in --data")
    add("--lang", choices=("en", "zh"), default="en", help="language of bilingual files (en)")
    add("--content", type=Path, metavar="DIR", help="content model for R_content (without --model: assets/content; else none)")
    add("--out", type=Path, help="folder for checkpoints and log (runs/DATE-TIME)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation; weights and AdamW stay float32 (bfloat16 on cuda, else float32)")
    add("--offload", action="store_true", help="keep weights, gradients and AdamW's states in the host's memory (cuda; slower, fits small cards)")
    add("--plan", type=float, nargs="?", const=0.0, metavar="GIB", help="say what memory the run needs, and whether GIB (this machine's, if not given) "
        "suffice; then stop. --device cuda can be planned without one, more processes with WORLD_SIZE=N")
    add("--cold-start", type=Path, metavar="DIR", help="rebuild the embedded policy from nothing (about a quarter of an hour on 2 cores) and stop")
    add_flags(parser.add_argument_group("training"), (TINY_PRESET[0], PAPER[0]))
    add_flags(parser.add_argument_group("reward (a weight of 0 removes its term)"), (TINY_PRESET[1], PAPER[1]))
    args = parser.parse_args()
    planning = args.plan is not None
    if not (planning and args.device == "cuda"):
        check_device(args.device)
    if args.cold_start:
        cold_start(args.cold_start, ColdStartConfig(), args.seed or 0)
        return
    workers = max(1, int(os.environ.get("WORLD_SIZE", 1)))  # as torchrun says
    presets = PAPER if args.model else TINY_PRESET
    if args.prompts is None:
        args.prompts = -(-presets[0].prompts // workers) * workers  # so that they can be shared equally
    config, rewards = (choose_config(args, preset) for preset in presets)
    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.offload and not args.device.startswith("cuda"):
        raise ValueError(f"--offload moves what a GPU cannot hold to the host; --device {args.device} is the host")
    if config.prompts % workers:
        raise ValueError(f"--prompts {config.prompts}: {workers} processes share them equally; choose a multiple")
    if not planning and ("RANK" in os.environ or dtype != "float32" or args.offload):
        args.device = join_processes(args.device)
    if args.resume and not args.out:
        raise ValueError("--resume needs --out: the folder of the run to go on with")
    out = args.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S", time.localtime(highest(time.time())))
    content = args.content or (None if args.model else TINY_CONTENT)
    if not rewards.w_content or "content" in rewards.off:
        content = None
    run = Run(args.model or TINY, out, tuple(args.data), args.lang, args.device, config, rewards, content, tuple(args.eval_data), dtype, args.offload)
    if planning:
        if not 0 <= args.plan < math.inf:
            raise ValueError(f"--plan {args.plan}: expected how many GiB there are")
        if args.device == "cuda" and not args.plan and not torch.cuda.is_available():
            raise ValueError("--plan for cuda, which this machine does not have: say how many GiB the card has, as in --plan 80")
        print_plan(run, args.plan * 2**30 or memory_of(args.device))
        return
    resume = where_to_resume(run, args.resume)
    if rank() == 0:
        print(f"config: {json.dumps(run.saved())}")
    train(run, resume)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    exit_on_error(main)
