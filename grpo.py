"""GRPO: train a language model on the reward of its whole reasoning.

This is the method of Social-R1 (arXiv 2603.09249). [P] marks what the paper or its model card
states, [O] what is our own choice because the public text is silent. One step of training:

    1. roll out    sample G completions of each of P prompts from the policy, the model in training
    2. score       give every completion a reward R                                   (rewards.py)
    3. compare     A_i = (R_i - mean(R)) / (std(R) + eps)          within the group of one prompt
    4. update      for every token of completion i, with ratio = exp(logp - logp_old):

                   surrogate = min( ratio * A_i, clip(ratio, 1 - e, 1 + e) * A_i )
                   KL        = exp(ref - logp) - (ref - logp) - 1
                   loss      = -( surrogate - beta * KL )      mean over tokens, then completions
    5. log

Here logp, logp_old and ref are log-probabilities of one sampled token: under the policy as it is,
under the policy as it was when it sampled the token, and under the reference, the model that GRPO
began with. e = 0.2 is the clip range (`clip_eps` in the code), and eps = 1e-6 changes next to
nothing. A model that cannot produce the form at all first learns it from correct responses, as
supervised learning does (--warm-up).

If you have trained supervised models only, these are the questions that the formulas leave open.

*What is there to learn from, without a right answer to imitate?* The policy writes its own training
data. We want the expected reward, the sum of p(y) R(y) over all completions y, to grow. As grad p =
p * grad log p, its gradient is the sum of p(y) R(y) grad log p(y): the mean of R * grad log p over
completions that the policy samples. So every choice in a completion that earned much becomes more
likely. That is the policy gradient. Any constant may be subtracted from R, because the mean of
grad log p is 0. With the expected reward subtracted, it says how much better than expected a
completion was: that is its advantage A, and what was worse becomes less likely. With A = 1
everywhere it would be supervised learning on the policy's own samples.

*Why do all tokens of a completion have the same A?* A completion is written token by token, so its
log p(y) is the sum of its tokens' logp, and R * grad log p(y) is a sum in which each token has the
same factor. The reward does not say which token earned it. That shows only on average, over many
completions.

*Why a group?* "Better than expected" needs an expectation. Other methods train a second network to
predict the reward. GRPO asks the same question G times and takes the mean reward of the group: what
this policy earns on this problem at present. A hard problem's only right answer stands out, and so
does an easy problem's only mistake. Dividing by the standard deviation brings every problem's
rewards to one scale. (So problems that are nearly solved, or nearly hopeless, count for more than
they would without it. R_i itself is in the mean, too, but that only shortens the step, by the
factor (G - 1) / G.) Where all rewards are practically equal there is nothing to compare, and the
advantages are 0; only the KL still acts.

*Why a ratio?* Sampling is slow, so one rollout may serve several updates, each on its own groups
(--minibatches). From the second update on, the tokens come from a policy that is no longer the one
that is trained. The ratio of the two probabilities corrects for it: its gradient is
ratio * grad logp, and a token that has become twice as likely counts twice, as it would in a fresh
sample. In a rollout's first update, by default the only one for real models, the two policies are
the same: the ratio is 1 but for rounding, and the gradient is the plain policy gradient
A * grad logp. In float32 rounding is about 1e-4 at most. In bfloat16 single tokens are off by .1 to
.5, and beyond .18 they may be clipped before anything was learned (in the log: `logprob_drift`,
`clip_fraction`). GRPO's repeated passes over a rollout are left out here.

*Why the clip, and why the minimum?* The ratio is trustworthy only near 1: a few tokens with a large
ratio would otherwise run the show. So the clip pays nothing for moving a token's probability
further than e = 20% from where it was sampled. The minimum sees to it that this cuts off the
incentive to go further, and never the way back. Between 1 - e and 1 + e both branches are the same;
outside:

                  ratio below 1 - e                     ratio above 1 + e
        A > 0     unclipped: it should become           clipped, gradient 0: it is likelier
                  likelier, so it is pulled back up     already, and more would earn nothing
        A < 0     clipped, gradient 0: it is rarer      unclipped: it should become rarer and
                  already                               is likelier, so it is pushed down in full

Without the minimum, a mistake that has become likely (A < 0, ratio above 1 + e) would sit on the
flat part of the clip, and the rest of this rollout could not correct it.

*Why a KL?* The reward sees only what it was written to see. The penalty for leaving the reference
keeps fluent language, and whatever else nobody rewards, from drifting away. The form above ("k3")
estimates the KL divergence from single samples. It is never negative, because exp(x) lies above its
tangent x + 1. With x = ref - logp, and the mean over what the policy samples:

        estimate          its mean              its gradient                whose mean is
        -x                KL(policy || ref)     grad logp                   0
        exp(x) - x - 1    KL(policy || ref)     (1 - exp(x)) grad logp      grad KL(ref || policy)

The means are equal because exp(x) is q / p, q being the reference's probability, and the mean of
that is the sum of p * q / p = 1. But a loss is differentiated with its samples held fixed. Then -x
does nothing on average but add noise, and k3 acts like the divergence the other way round, which
draws the policy to the reference, too.

*What does the mean over tokens do?* The policy gradient adds up the tokens of a completion. GRPO
divides by their number [P]: every completion has the same say, but each token of a long one has
less, so a long mistake costs less per token than a short one. With `--reduction dapo`
(arXiv 2503.14476) all tokens of an update weigh the same; `dr_grpo` (arXiv 2503.20783) divides by a
constant, and leaves out the division by std(R), too.

*What do micro-batches divide by?* The means above are over all completions of an update. A
micro-batch that divided by its own count would give a completion more say the fewer it holds, so
all divide by the counts of the whole update. Then gradients add up to exactly those of one batch,
in several processes, too.

*What does a completion earn that was cut off at the length limit?* It is parsed and scored, mostly
earns 0 because its answer is missing, and stays in the loss: to run out of length is a mistake like
any other.

*What does the loss say?* Hardly anything. The advantages of a group add up to 0, so with the ratio
at 1 and GRPO's mean the surrogate is 0 however much is learned. Watch the reward and its terms.

The page goes on in this order: the objective, one step, the update, the loop, the warm-up. For the
algorithm alone, stop there; what a run needs around it follows: what it loads and says, settings,
checkpoints, several processes, the plan of its memory, the command line. In one process, which is
enough for a reader, `rank()` is 0 and `world_size()` 1, `summed`, `maximum` and `equally_many`
return what they are given, and `wait_for_all` does nothing; in float32 `full_copy` and
`full_tensor` do nothing either.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from eval import DO_NOT_TRAIN, MEASURES, aligned, contamination_note, digest, evaluate
from eval import normalise, read_all, read_result, report_page, spread_problems, table_rows
from model import REORDER_LIMIT, SAMPLING_BUDGET, TOKENIZER_FILES, Completion, Diverged
from model import ModelConfig, Tokenizer, Transformer, check_device, check_ids
from model import completion_logprobs, generate, load_model, logits_at_once, logits_in_tokens
from model import logprobs_and_entropy, new_folder, open_weights, pad, prefill_tokens
from model import read_config, read_json, weight_files, write_model
from rewards import TERMS, ContentModel, Reward, RewardConfig, curriculum
from rewards import grouped, load_content_model, parse_groups, total_reward
from socialr1 import CAUSES, TINY, TINY_CONTENT, Parser, Problem, Settings, build_messages
from socialr1 import exit_on_error, generate_problems, generate_stories, parse_response
from socialr1 import read_instructions, setting, write_json, write_text

# -------------------------------------------------------------------------------- the objective

REDUCTIONS = ("grpo", "dapo", "dr_grpo")


def group_advantages(rewards: Tensor, scale=True, eps=1e-6, min_spread=1e-3) -> Tensor:
    """Say how much better than its group each completion is: A = (R - mean(R)) / (std(R) + eps).

    rewards (P, G) -> advantages (P, G), computed in float64; std is the sample standard deviation

    A group whose rewards lie within `min_spread` of each other is flat: its advantages are exactly
    0 [O]. Rounding, or a token more or less, is no difference to learn from, and the division would
    blow it up to size 1. `scale=False` leaves the division out (Dr. GRPO).
    ValueError: a group of one, which has nothing to be compared with.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        shape = tuple(rewards.shape)
        raise ValueError(f"expected rewards (P, G) with G of at least 2, got shape {shape}")
    exact = rewards.double()
    advantages = exact - exact.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (exact.std(dim=1, keepdim=True) + eps)
    advantages = advantages.masked_fill(flat_groups(exact, min_spread)[:, None], 0.0)
    return advantages.to(torch.promote_types(rewards.dtype, torch.float32))


def flat_groups(rewards: Tensor, min_spread: float = 1e-3) -> Tensor:
    """Say in which groups the rewards are practically equal; (P, G) -> bool (P,)."""
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)
    return spread <= min_spread * 1.0001  # 0.301 - 0.3 is a little above 1e-3


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy || reference) at each token by exp(x) - x - 1 with x = ref - logp ("k3").

    (B, T), (B, T) -> (B, T), never negative
    """
    x = ref_logprobs - logprobs
    return torch.expm1(x) - x  # expm1(x) is exp(x) - 1, without losing the digits of a small x


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
    """Compute the loss of a batch of completions, and metrics over its tokens.

        ratio = exp(logp - logp_old)
        loss  = -( min( ratio * A, clip(ratio, 1 - e, 1 + e) * A ) - beta * KL )

    log-probabilities and mask (B, T), advantages (B,) -> loss (), {"kl", "clip_fraction", "tokens"}

    `reduction` says how the tokens' losses become one number:
        grpo       mean over the tokens of a completion, then mean over completions [P]
        dapo       mean over all tokens: long completions weigh more
        dr_grpo    sum over tokens / (completions * max_length): no bias towards any length
    `normalizer` replaces the batch's own count when this is a micro-batch: the completions (grpo),
    the tokens (dapo), or completions * max_length (dr_grpo) of the whole update. Padding may hold
    anything, NaN too. A completion without tokens contributes 0. `ref_logprobs` may be None when
    beta is 0. ValueError: an argument is missing or unknown.
    """
    if beta and ref_logprobs is None:
        raise ValueError(f"beta is {beta}: the KL term needs ref_logprobs")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: expected one of {REDUCTIONS}")
    mask = completion_mask.bool()
    counts = mask.sum(dim=1)  # (B,)
    # Padding is replaced and not multiplied by 0: 0 * NaN would be NaN.
    logprobs = torch.where(mask, logprobs, 0.0)
    old_logprobs = torch.where(mask, old_logprobs, 0.0)

    ratio = torch.exp(logprobs - old_logprobs)  # (B, T)
    unclipped = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages[:, None]
    surrogate = torch.minimum(unclipped, clipped)
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = kl_to_reference(logprobs, torch.where(mask, ref_logprobs, 0.0))
    token_loss = torch.where(mask, -(surrogate - beta * kl), 0.0)

    totals = token_loss.sum(dim=1)  # (B,)
    if reduction == "grpo":
        totals = totals / counts.clamp(min=1)
    tokens = int(counts.sum())
    if normalizer is None:
        normalizer = loss_normalizer(len(mask), tokens, reduction, max_length)
    # Padding adds nothing here: its ratio is 1 and its kl 0.
    clip_fraction = float((clipped < unclipped).sum()) / max(tokens, 1)
    mean_kl = float(kl.sum().detach()) / max(tokens, 1)
    metrics = {"kl": mean_kl, "clip_fraction": clip_fraction, "tokens": float(tokens)}
    return totals.sum() / max(normalizer, 1), metrics


def loss_normalizer(completions: float, tokens: float, reduction: str, max_length=None) -> float:
    """Return what the summed loss of so many completions and tokens is divided by."""
    if reduction == "dr_grpo" and max_length is None:
        raise ValueError("reduction 'dr_grpo' divides by a constant length: pass max_length")
    counts = {"grpo": completions, "dapo": tokens, "dr_grpo": completions * (max_length or 0)}
    return counts[reduction]


# ------------------------------------------------------------------------------------- one step
#
# `Run` (below) is what was asked for: `run.config` and `run.reward_config` hold the settings. Three
# forms of one thing: a Completion is what the sampler wrote, `tokens`, their `logprobs` at that
# time, and whether it `finished`; a Response is its text, parsed into `stages` and `answer`; a
# Reward is what that earned, `total` and by term. One of the terms, R_content, is a small model's
# judgement of each stage, and the weight tau of the terms for the reasoning rises during the run.


@dataclass
class Policies:
    """The policy that is trained, the reference it must stay near, and the policy's optimizer."""

    model: Transformer
    reference: Transformer | None  # the model that GRPO began with; None at beta 0
    optimizer: torch.optim.Optimizer


@dataclass
class Training:
    """What a run holds in memory while it trains."""

    problems: list[Problem]
    held_out: dict[str, list[Problem]]  # sets to evaluate on, by name
    tokenizer: Tokenizer
    instructions: str  # the system message
    content_model: ContentModel | None  # computes R_content
    policies: Policies


@dataclass
class Group:
    """A prompt, completions that the policy sampled for it, and their advantages.

    In the warm-up it is a prompt and one correct response, which has no log-probabilities.
    """

    prompt: list[int]
    completions: list[Completion]
    advantages: list[float]


def train_step(training: Training, run: Run, step: int) -> dict:
    """Run one step of GRPO: change the policy's weights, and return the step's line for the log."""
    config, tokenizer, clock = run.config, training.tokenizer, Stopwatch()

    # 1. Roll out: the policy answers every problem of the step G times.
    problems = problems_of_step(training.problems, step, config.prompts, config.seed)
    mine = config.prompts // world_size()  # with several processes each takes its part
    problems = problems[rank() * mine : (rank() + 1) * mine]
    chats = [build_messages(problem, training.instructions) for problem in problems]
    prompts = [tokenizer.chat(messages) for messages in chats]
    sampling = dict(group_size=config.group_size, max_new_tokens=config.max_new_tokens)
    sampling |= dict(stop_ids=tokenizer.stop_ids, seed=config.seed * 1_000_003 + step)
    groups = generate(full_copy(training.policies.model, run), prompts, **sampling)
    clock.lap("rollout")

    # 2. Score: parse each completion, and reward it by its terms and this step's tau.
    responses = parse_groups(problems, prompts, groups, tokenizer)
    contents = [[None] * config.group_size for _ in problems]
    if training.content_model:
        contents = training.content_model.rewards(problems, responses)
    clock.lap("content")
    tau = curriculum(step, config.steps, run.reward_config)
    rewards = reward_groups(problems, groups, responses, contents, tau, run.reward_config)
    totals = [[reward.total for reward in group] for group in rewards]
    totals = torch.tensor(totals, dtype=torch.float64)  # (P, G)
    line = log_line(step, groups, responses, rewards, flat_groups(totals))
    if step == 0:
        tell_first_rollout(line, tokenizer.decode(groups[0][0].tokens, special=True), config)
    clock.lap("score")

    # 3. Compare: what matters is how much better than its group a completion is.
    advantages = group_advantages(totals, scale=config.reduction != "dr_grpo")

    # 4. Update: make the better ones more likely and the worse ones less.
    lr = set_rate(training.policies, config.lr, step, config.warmup_steps)
    rollout = list(map(Group, prompts, groups, advantages.tolist()))
    metrics = update(training.policies, rollout, config)
    clock.lap("update")

    # 5. Log: rewards and their terms, the update, and where the time went.
    speed = line["length"] * line["completions"] / clock.seconds["rollout"]
    return line | metrics | {"lr": lr, "seconds": clock.seconds, "tokens_per_second": speed}


def set_rate(policies: Policies, peak: float, step: int, warmup_steps: int) -> float:
    """Let the learning rate rise to `peak` in the first steps; return that of this step."""
    lr = peak * min(1.0, (step + 1) / max(warmup_steps, 1))
    for parameters in policies.optimizer.param_groups:
        parameters["lr"] = lr
    return lr


class Stopwatch:
    """Measures how long each phase of a step takes."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under this name."""
        self.seconds[name] = time.perf_counter() - self.started - sum(self.seconds.values())


def problems_of_step(problems: list, step: int, count: int, seed: int) -> list:
    """Return the `count` problems of a step: the next ones of a permutation, fresh in every epoch.

    An epoch has whole batches only, so no problem comes twice in a step. The choice depends on seed
    and step only, so a resumed run meets the same problems.
    """
    epoch, batch = divmod(step, len(problems) // count)
    philox = np.random.Philox(key=[seed, epoch])
    order = np.random.Generator(philox).permutation(len(problems))
    return [problems[i] for i in order[batch * count : (batch + 1) * count]]


def reward_groups(problems, groups, responses, contents, tau, config) -> list[list[Reward]]:
    """Compute the Reward of every Completion from its Response and its R_content.

    P problems; groups, responses and contents in P lists of G -> P lists of G
    """
    rewards = []
    for problem, *group in zip(problems, groups, responses, contents):
        rewards.append([])
        for completion, response, content in zip(*group):
            length = len(completion.tokens)
            rewards[-1].append(total_reward(response, problem, length, tau, content, config))
    return rewards


# ----------------------------------------------------------------------------------- the update


def update(policies: Policies, rollout: list[Group], config: GRPOConfig) -> dict[str, float]:
    """Go through the rollout in minibatches of whole groups, with one optimizer step each.

    An update whose loss or gradient is not finite is skipped and counted. Returns metrics of the
    updates that were made: means of the loss and the gradient's norm, weighted by what the loss is
    divided by, means over all tokens of the KL, the clipped and the entropy, and `logprob_drift`.
    """
    updates = []
    for minibatch in minibatches(rollout, config.minibatches):
        sums = accumulate(policies, minibatch, config)
        norm = apply_gradients(policies, sums["loss"], config.max_grad_norm)
        updates.append(sums | {"grad_norm": norm})
    made = [sums for sums in updates if sums["grad_norm"] is not None]
    metrics = dict.fromkeys(("loss", "grad_norm", "kl", "clip_fraction", "entropy"))
    if made:
        columns = {name: [sums[name] for sums in made] for name in made[0]}
        for name in ("loss", "grad_norm"):
            metrics[name] = float(np.average(columns[name], weights=columns["normalizer"]))
        for name in ("kl", "clip_fraction", "entropy"):
            metrics[name] = sum(columns[name]) / max(sum(columns["tokens"]), 1)
    if policies.reference is None:
        metrics["kl"] = None
    # In the first minibatch nothing has been updated yet: sampler and trainer must agree.
    metrics["logprob_drift"] = updates[0]["drift"]
    return metrics | {"skipped": len(updates) - len(made)}


def apply_gradients(policies: Policies, loss: float, max_norm: float) -> float | None:
    """Update the weights, with a gradient scaled down to `max_norm`; return its norm before that.

    If the loss or the norm is not finite the update is skipped, and the result is None.
    """
    norm = float(full_tensor(clip_grad_norm_(policies.model.parameters(), max_norm)))
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        policies.optimizer.step()
    policies.optimizer.zero_grad()
    return norm if finite else None


def accumulate(policies: Policies, minibatch: list[Group], config: GRPOConfig) -> dict[str, float]:
    """Add up the gradients of one update's loss, a micro-batch at a time.

    Returns, of all processes, the loss, sums over the tokens, the normalizer, and the largest
    difference ("drift") between the sampler's log-probabilities and the trainer's.
    """
    lengths = [len(completion.tokens) for group in minibatch for completion in group.completions]
    counts = summed({"completions": len(lengths), "tokens": sum(lengths)})
    reducing = dict(reduction=config.reduction, max_length=config.max_new_tokens)
    normalizer = max(loss_normalizer(**counts, **reducing), 1)
    sums = dict.fromkeys(("loss", "kl", "clip_fraction", "entropy", "tokens"), 0.0)
    drift = 0.0
    for batch in equally_many(micro_batches(minibatch, config.token_budget)):
        prompts = [group.prompt for group in batch]
        ids = [[completion.tokens for completion in group.completions] for group in batch]
        logprobs, mask, entropies = logprobs_and_entropy(policies.model, prompts, ids)  # (b, T)
        sampled = [completion.logprobs for group in batch for completion in group.completions]
        old_logprobs, _ = pad(sampled, mask.device, torch.float32)
        of_batch = [advantage for group in batch for advantage in group.advantages]
        advantages = torch.tensor(of_batch, device=mask.device)  # (b,)
        ref_logprobs = None
        if policies.reference is not None:
            with torch.no_grad():
                ref_logprobs, _ = completion_logprobs(policies.reference, prompts, ids)
        loss, metrics = grpo_loss(
            logprobs,
            old_logprobs,
            ref_logprobs,
            advantages,
            completion_mask=mask,
            clip_eps=config.clip_eps,
            beta=config.beta,
            normalizer=normalizer,
            **reducing,
        )
        loss.backward()
        sums["loss"] += float(loss.detach())
        sums["tokens"] += metrics["tokens"]
        sums["kl"] += metrics["kl"] * metrics["tokens"]
        sums["clip_fraction"] += metrics["clip_fraction"] * metrics["tokens"]
        sums["entropy"] += float(entropies.sum())
        if metrics["tokens"]:
            drift = max(drift, float((logprobs.detach() - old_logprobs).abs().max()))
    return summed(sums) | {"normalizer": normalizer, "drift": maximum(drift)}


def minibatches(rollout: list[Group], number: int) -> Iterator[list[Group]]:
    """Deal the groups of all processes out, in turn; yield this process's part of each deal."""
    first = rank() * len(rollout)  # the place of this process's first group in the step
    for i in range(number):
        yield [group for place, group in enumerate(rollout, first) if place % number == i]


def micro_batches(groups: list[Group], budget: int) -> Iterator[list[Group]]:
    """Cut a minibatch into pieces of at most `budget` tokens, but at least one completion.

    A group may be cut. Its prompt counts once in a piece, because it goes through the network once
    for all of its completions there.
    """
    piece: list[Group] = []
    size = 0
    for group in groups:
        part = None  # of this group, in the present piece
        for completion, advantage in zip(group.completions, group.advantages):
            needed = len(completion.tokens) if part else len(group.prompt + completion.tokens)
            if piece and size + needed > budget:
                yield piece
                piece, size, part = [], 0, None
                needed = len(group.prompt + completion.tokens)
            if part is None:
                part = Group(group.prompt, [], [])
                piece.append(part)
            part.completions.append(completion)
            part.advantages.append(advantage)
            size += needed
    if piece:
        yield piece


# ------------------------------------------------------------------------------------- the loop


def train(run: Run, resume: bool = False) -> None:
    """Train: roll out, score, compare and update, step by step; log, evaluate and save on the way.

    With `resume` it goes on from the newest checkpoint in the run's folder, and arrives where the
    unbroken run would have, bit for bit on a CPU. Under torchrun every process calls this, and the
    first one writes. ValueError: files or settings that do not fit. Diverged: updates, logits or
    weights that are not finite.
    """
    config = run.config
    training, state, checkpoint = prepare(run, resume)
    announce(run, training, checkpoint)
    if not checkpoint:
        evaluate_held_out(training, run, "before")

    def take_step(step: int) -> dict:
        line = train_step(training, run, step)
        finished = step + 1
        if config.eval_every and finished % config.eval_every == 0 and finished < config.steps:
            line |= evaluate_held_out(training, run, "")
        return line

    checkpoint, stopped = run_steps(run, training.policies, state, checkpoint, take_step)
    if stopped:
        tell_how_to_go_on(run.out, checkpoint, config.steps)
        return
    evaluate_held_out(training, run, "after")
    remove_older(run, checkpoint)
    report(run, checkpoint)


def run_steps(
    run: Run, policies: Policies, state: dict, checkpoint: Path | None, take_step: Callable
) -> tuple[Path | None, bool]:
    """Take the steps after a checkpoint; return the last one saved, and whether the run stopped."""
    config, finished = run.config, step_of(checkpoint)
    look = dict(desc=run.out.name, total=config.steps, initial=finished, disable=rank() > 0)
    bar = tqdm(range(finished, config.steps), unit="step", **look)
    skips = 0  # steps in a row in which an update was skipped
    with Interrupt() as interrupt, open_log(run.out, finished) as log:
        for step in bar:
            line = take_step(step)
            finished = step + 1
            print(json.dumps(line), file=log, flush=True)
            skips = skips + 1 if line["skipped"] else 0
            if skips >= config.max_skips:
                raise Diverged(f"step {step}: updates not finite in {skips} steps in a row")
            stopping = maximum(interrupt.asked)
            # While updates are being skipped the weights may be ruined: the last good ones stay.
            if not skips:
                remove_older(run, checkpoint)  # this step went well, so the newest one is sound
                if finished % config.save_every == 0 or finished == config.steps or stopping:
                    checkpoint = save_checkpoint(run, policies, finished, state)
            show(bar, line)  # after saving: the terminal may be gone
            if stopping:
                return checkpoint, True
    if step_of(checkpoint) < finished:  # an update of the last step was skipped
        checkpoint = save_checkpoint(run, policies, finished, state)
    return checkpoint, False


# ----------------------------------------------------------------------------------- the warm-up
#
# A model that never gets the form right earns nothing: all its groups are flat, so that GRPO has
# nothing to learn from. It can be shown correct responses first, as other recipes begin, too [O].

TRACES = 8  # how many one update of the warm-up imitates


def warm_up(
    run: Run, problems: list[Problem], tokenizer: Tokenizer, instructions: str, resume: bool
) -> Path:
    """Teach the policy by imitation; return the folder of the model that GRPO begins from.

    This is a small run of its own in OUT/warm-up, with checkpoints, so that it can be gone on with.
    It imitates the traces of --data, or those of generated stories that GRPO does not ask about.
    ValueError: there are few, or one is too long or no well-formed response with the right letter.
    """
    config = replace(run.config, steps=run.config.warm_up, beta=0.0, keep=1)  # no reference yet
    run = replace(run, config=config, out=run.out / "warm-up")
    traced = [problem for problem in problems if problem.trace]
    if not traced:
        stories = generate_stories(GENERATED + config.steps * TRACES, config.seed)[GENERATED:]
        traced = [replace(story.problem, trace=story.trace) for story in stories]
    if len(traced) < TRACES:
        raise ValueError(f"--warm-up: {len(traced)} rows of --data have a trace; {TRACES} or more")
    state = {"identity": identify(run, traced, {}), "moment": tokenizer.moment}
    checkpoint = find_checkpoint(run, resume and run.out.is_dir(), state["identity"])
    wait_for_all()  # as in prepare
    if checkpoint:
        state = read_json(checkpoint / "state.json")
        tokenizer.moment = state["moment"]
    examples = []
    for problem in traced:
        prompt = tokenizer.chat(build_messages(problem, instructions))
        ids = tokenizer.completion_ids(prompt, problem.trace)
        response = parse_response(problem.trace, problem)
        correct = response.well_formed and response.answer == problem.answer
        if not correct or len(ids) > config.max_new_tokens:
            expected = f"expected a correct response of at most {config.max_new_tokens} tokens"
            raise ValueError(f"problem {problem.id!r} has a trace of {len(ids)}: {expected}")
        examples.append(Group(prompt, [Completion(ids, [], True)], [0.0]))
    if step_of(checkpoint) == config.steps:
        return checkpoint

    policies = load_policies(run, checkpoint)
    run.out.mkdir(exist_ok=True)

    def take_step(step: int) -> dict:
        batch = problems_of_step(examples, step, TRACES, config.seed)
        return imitate(policies, batch[rank() :: world_size()], step, config)

    checkpoint, stopped = run_steps(run, policies, state, checkpoint, take_step)
    if stopped:
        tell_how_to_go_on(run.out.parent, checkpoint, config.steps)
        raise KeyboardInterrupt
    remove_older(run, checkpoint)
    return checkpoint


def imitate(policies: Policies, examples: list[Group], step: int, config: GRPOConfig) -> dict:
    """Make one update that raises the log-probabilities of correct responses; return its log line.

    loss = - mean over all tokens of logp, the cross-entropy
    """
    count = sum(len(example.completions[0].tokens) for example in examples)
    tokens = summed({"tokens": count})["tokens"]
    total = 0.0
    for batch in equally_many(micro_batches(examples, config.token_budget)):
        prompts = [example.prompt for example in batch]
        ids = [[example.completions[0].tokens] for example in batch]
        logprobs, _ = completion_logprobs(policies.model, prompts, ids)  # (b, T), 0 at padding
        loss = -logprobs.sum() / tokens
        loss.backward()
        total += float(loss.detach())
    lr = set_rate(policies, config.warm_up_lr, step, config.warmup_steps)
    loss = summed({"loss": total})["loss"]
    norm = apply_gradients(policies, loss, config.max_grad_norm)
    return {"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "skipped": int(norm is None)}


# -------------------------------------------------------------------------------- around the loop


def prepare(run: Run, resume: bool) -> tuple[Training, dict, Path | None]:
    """Load everything, and make the warm-up. Also return a state and the checkpoint to go on from.

    The state goes into all checkpoints: what identifies the run, and when it began, because some
    chat templates write the date.
    """
    config, model_config = run.config, read_config(run.model)
    problems, held_out = load_problems(run)
    identity = identify(run, problems, held_out)
    checkpoint = find_checkpoint(run, resume, identity)
    tokenizer, instructions = Tokenizer(run.model), read_instructions(run.instructions)
    saved = read_json(checkpoint / "state.json") if checkpoint else {}
    tokenizer.moment = saved.get("moment", maximum(tokenizer.moment))
    prompts = [tokenizer.chat(build_messages(problem, instructions)) for problem in problems]
    for problem, prompt in zip(problems, prompts):
        check_ids(model_config, f"problem {problem.id!r}", prompt, config.max_new_tokens)
    if len(problems) < config.prompts:
        raise ValueError(f"{len(problems)} training problems: lower --prompts {config.prompts}")
    content_model = None
    if run.content:
        content_model = load_content_model(run.content, run.device, getattr(torch, run.dtype))
        for problem in problems:  # a story that is too long says so now, not in mid-run
            content_model.encode(problem.story, problem.question, [])
    wait_for_all()  # all have looked for checkpoints before one process writes
    run.out.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        write_text(run.out / "instructions.txt", instructions)
    start = warm_up(run, problems, tokenizer, instructions, resume) if config.warm_up else run.model
    gc.collect()  # the warm-up's model refers to itself if it is sharded, and would stay in memory
    policies = load_policies(replace(run, model=start), checkpoint)
    training = Training(problems, held_out, tokenizer, instructions, content_model, policies)
    return training, {"identity": identity, "moment": tokenizer.moment}, checkpoint


GENERATED = 4000  # stories to train on, however many steps are made


def load_problems(run: Run) -> tuple[list[Problem], dict[str, list[Problem]]]:
    """Return the training problems, and held-out sets by name.

    Held out are problems of --eval-data, or else of a tenth of the stories of --data, which are not
    trained on, or else of generated stories; --eval-problems at most.
    """
    config = run.config
    if not run.data:
        problems = generate_problems(GENERATED, config.seed)
    else:
        problems = read_all(run.data, run.lang)
        distinct = {(p.story, p.question, p.options): p for p in problems}
        if len(distinct) < len(problems):
            # In one step their completions would be equal: random numbers depend on the prompt.
            tqdm.write(f"{len(problems) - len(distinct)} problems repeat others and are left out")
        problems = list(distinct.values())
    for name in sorted(DO_NOT_TRAIN.keys() & {p.source.partition("/")[0] for p in problems}):
        tqdm.write(f"WARNING: {DO_NOT_TRAIN[name]}. Scores on it mean nothing after this run.")
    if run.eval_data:
        held_out = read_all(run.eval_data, run.lang)
        tqdm.write(contamination_note(problems, held_out))
        return problems, {"held out": spread_problems(held_out, config.eval_problems)}
    if run.data:
        problems, held_out = hold_out_stories(problems, config.eval_problems)
        return problems, {"held out": held_out}
    splits = ("test", "shift") if run.model.resolve() == TINY.resolve() else ("test",)
    return problems, {split: generate_problems(config.eval_problems, 1, split) for split in splits}


def hold_out_stories(problems: list[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """Keep back a tenth of the stories with all of their questions.

    Returns the problems of the other stories, and `count` of those that were kept back.
    """
    by_story = grouped(problems, [normalise(problem.story) for problem in problems])
    tenth = len(by_story) // 10 if count else 0
    kept_back = random.Random("held out").sample(list(by_story), tenth)
    held_out = list(itertools.chain(*map(by_story.pop, kept_back)))
    return list(itertools.chain(*by_story.values())), held_out[:count]


def load_policies(run: Run, checkpoint: Path | None) -> Policies:
    """Load the policy, its reference and the optimizer, in shards where FSDP is at work."""
    sharded = dist.is_initialized()
    device = "cpu" if sharded else run.device
    model = load_model(checkpoint or run.model, device)
    model.source = run.model  # its tokenizer is copied on saving; checkpoints get deleted
    model.checkpointing = run.config.recompute
    reference = None
    if run.config.beta:
        reference = load_model(run.model, device, getattr(torch, run.dtype)).requires_grad_(False)
    if sharded:
        shard(model, run)
        if reference is not None:
            shard(reference, run)
    settings = dict(lr=run.config.lr, weight_decay=run.config.weight_decay, fused=True)
    policies = Policies(model, reference, torch.optim.AdamW(model.parameters(), **settings))
    if checkpoint:
        load_optimizer(checkpoint, policies)
    return policies


def evaluate_held_out(training: Training, run: Run, when: str) -> dict[str, dict]:
    """Sample answers to the held-out problems at temperature 1; only the first process does.

    "before" and "after" the training all problems are asked, and the results go into a file of this
    name. Else a quarter of them is asked, and the main measures are returned, for the log.
    """
    policy, config = full_copy(training.policies.model, run), run.config
    settings = dict(temperature=1.0, max_new_tokens=config.max_new_tokens, seed=config.seed)
    settings |= dict(reward_config=run.reward_config, instructions=training.instructions)
    results, line = {}, {}
    for name, problems in training.held_out.items():
        if problems and rank() == 0:
            asked = problems if when else problems[: max(1, len(problems) // 4)]
            settings["label"] = f"evaluating, {name}"
            result = evaluate(policy, training.tokenizer, asked, training.content_model, **settings)
            results[name] = result
            line[f"eval_{name}"] = {key: result[key] for key in MEASURES}
    if when and rank() == 0:
        write_json(run.out / f"{when}.json", results)
    return line


class Interrupt:
    """Turns Ctrl-C, SIGTERM or SIGHUP into a request to stop after the current step.

    A second Ctrl-C stops at once. SIGTERM is what batch systems send, SIGHUP what a closed terminal
    sends, often twice; under nohup it stays ignored.
    """

    def __enter__(self) -> Interrupt:
        self.asked = False
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heeded = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self.ask) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask(self, number: int, _) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        try:
            tqdm.write("stopping after this step (Ctrl-C again: at once, without a checkpoint)")
        except OSError:  # the terminal is gone
            sys.stdout = sys.stderr = open(os.devnull, "w")


def announce(run: Run, training: Training, checkpoint: Path | None) -> None:
    """Say at the start what is trained on what."""
    parameters = sum(p.numel() for p in training.policies.model.parameters()) / 1e6
    content = run.content or "off (no --content, no weight, or --without); no other weight changes"
    print(f"{parameters:.2f}M parameters, {len(training.problems)} training problems,")
    print(f"{run.config.steps - step_of(checkpoint)} steps to go; R_content: {content}")


def show(bar: tqdm, line: dict) -> None:
    """Put the numbers to watch beside the progress bar."""
    names = "reward fmt out struct content entropy length".split() if "reward" in line else ["loss"]
    bar.set_postfix({name: f"{line[name]:.2f}" for name in names if line.get(name) is not None})


def log_line(step: int, groups: list, responses: list, rewards: list, flat: Tensor) -> dict:
    """Collect means over all completions, in all processes, for a step's line in metrics.jsonl.

    What is not known, such as R_content without a content model, is None. "fault, ..." is the share
    that is not well-formed for this reason. `flat` (P,) says which groups are flat.
    """
    completions = list(itertools.chain(*groups))
    parts = [reward.parts | {"reward": reward.total} for reward in itertools.chain(*rewards)]
    known = [term for term, value in parts[0].items() if value is not None]
    sums = {term: sum(part[term] for part in parts) for term in known}
    sums["length"] = sum(len(completion.tokens) for completion in completions)
    sums["finished"] = sum(completion.finished for completion in completions)
    faults = Counter(r.cause(c.finished) for c, r in zip(completions, itertools.chain(*responses)))
    sums |= {f"fault, {name}": faults[name] for name in CAUSES}
    counts = summed({"flat": int(flat.sum()), "groups": len(groups), "all": len(completions)})
    line = {"step": step, **dict.fromkeys(parts[0])}  # a term that is not known stays None
    line |= {name: value / counts["all"] for name, value in summed(sums).items()}
    return line | {"flat_groups": counts["flat"] / counts["groups"], "completions": counts["all"]}


def tell_first_rollout(line: dict, response: str, config: GRPOConfig) -> None:
    """Tell how the first rollout went; where there is little to learn from, say what helps."""
    faults = {name: line[f"fault, {name}"] for name in CAUSES}
    told = [f"{share:.0%} {name}" for name, share in faults.items() if share]
    told = [f"first rollout: {line['fmt']:.0%} well-formed", *told]
    tqdm.write(f"{', '.join(told)}; {line['flat_groups']:.0%} of the groups without spread")
    said = " ".join(response.split())
    tqdm.write(f"a response: {said[:200]} ... {said[200:][-100:]}")
    if line["fmt"] < 0.2:
        tqdm.write("WARNING: what is not well-formed earns 0: see --warm-up and --instructions")
    if faults["cut off"] > 0.2:
        tqdm.write(f"WARNING: raise --max-new-tokens, which is {config.max_new_tokens}")
    if line["flat_groups"] == 1:
        tqdm.write("WARNING: no spread, nothing to learn: --warm-up, other --data or --group-size")


def open_log(out: Path, first: int) -> TextIO:
    """Open metrics.jsonl to append step `first`.

    Lines of this and later steps, which a killed run has left, are removed, and so are torn ones.
    """
    if rank():
        return open(os.devnull, "w")
    path = out / "metrics.jsonl"
    kept = [line for line in read_log(path) if line["step"] < first]
    write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))
    return open(path, "a", encoding="utf-8")


def read_log(path: Path) -> list[dict]:
    """Read the lines of metrics.jsonl, one for each step; torn ones are left out."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, LookupError):
            line = json.loads(text)
            line["step"] + 0
            lines.append(line)
    return lines


def tell_how_to_go_on(out: Path, checkpoint: Path | None, steps: int) -> None:
    print(f"\nstopped after step {step_of(checkpoint)} of {steps}")
    print(f"go on with the same flags and: --out {out} --resume")


def report(run: Run, checkpoint: Path | None) -> None:
    """Write the run's page, and print what came out, where everything is, and what to do next."""
    if rank():
        return
    files = {when: run.out / f"{when}.json" for when in ("before", "after")}
    before, after = map(read_json, files.values())
    results = {}
    for name in before:
        results |= {f"{name}, before": before[name], f"{name}, after": after[name]}
    sides = {when: read_result(file) for when, file in files.items() if results}
    tables = [table_rows(results, with_intervals=list(results))] if results else []
    charts = curves(read_log(run.out / "metrics.jsonl"), run.config.steps, before, after)
    page = run.out / "report.html"
    write_text(page, report_page(sides, tables, charts, title=f"Run {run.out.resolve().name}"))
    if results:
        print(f"\n{aligned(table_rows(results))}")
    print(f"log, and every response: {run.out}/metrics.jsonl, before.json, after.json")
    told = f" --instructions {run.out}/instructions.txt" if run.instructions else ""
    print(f"model: {checkpoint}\nnext: python eval.py --model {checkpoint}{told}")
    print(f"open {page} to see how it went, and how it reasons before and after")


CHARTS = {"reward": ["reward"], "terms of the reward": TERMS, "KL to the reference": ["kl"]}
CHARTS |= {"entropy in nats": ["entropy"], "tokens in a completion": ["length"]}


def curves(log: list[dict], steps: int, before: dict, after: dict) -> dict[str, dict[str, list]]:
    """Collect what the page draws: charts, their lines by name, and points (steps made, value)."""
    accuracies = {}
    for name in before:
        logged = [(line["step"] + 1, line.get(f"eval_{name}")) for line in log]
        points = [(0, before[name]), *logged, (steps, after[name])]
        accuracies[name] = [(x, result["accuracy"]) for x, result in points if result]
    charts = {"accuracy on held-out problems": accuracies}
    for chart, names in CHARTS.items():
        charts[chart] = {}
        for name in names:
            points = [(line["step"] + 1, line.get(name)) for line in log]
            charts[chart][name] = [(x, value) for x, value in points if value is not None]
    return charts


# -------------------------------------------------------------------------------------- settings


DTYPES = ("float32", "bfloat16")  # weights, gradients and AdamW's states are float32 always


@dataclass(frozen=True)
class GRPOConfig(Settings):
    """Settings of the training; the defaults are the paper's where it states them."""

    steps: int = setting(600, "steps, one rollout each [P]", low=1)
    prompts: int = setting(4, "problems per step (P) [O]; torchrun rounds the default up", low=1)
    group_size: int = setting(5, "completions per problem (G), at least 2 to compare [P]", low=2)
    lr: float = setting(5e-7, "learning rate of AdamW [P]", low=0)
    warmup_steps: int = setting(10, "steps in which a learning rate rises [O]", low=0)
    weight_decay: float = setting(0.0, "of AdamW [O]", low=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm [O]", above=0)
    minibatches: int = setting(1, "updates per rollout [O]", low=1)
    clip_eps: float = setting(0.2, "clip range e of the ratio [O]", low=0)
    beta: float = setting(0.04, "weight of the KL; at 0 there is no reference in memory [P]", low=0)
    reduction: str = setting("grpo", "mean of token losses [P: grpo]", choices=REDUCTIONS)
    max_new_tokens: int = setting(1024, "tokens per completion at most [O]", low=1)
    token_budget: int = setting(8192, "tokens in a micro-batch; less takes less memory", low=1)
    recompute: bool = setting(True, "activation checkpointing: less memory, a third more time")
    eval_problems: int = setting(8, "held-out problems, before and after; 0: none", low=0)
    eval_every: int = setting(100, "steps between short evaluations; 0: never", low=0)
    save_every: int = setting(50, "steps between checkpoints", low=1)
    keep: int = setting(2, "checkpoints that are kept, and one more while steps are made", low=1)
    max_skips: int = setting(3, "steps in a row with a skipped update until the run stops", low=1)
    warm_up: int = setting(0, "updates on correct traces before the first rollout [O]", low=0)
    warm_up_lr: float = setting(1e-4, "learning rate of the warm-up [O]", low=0)
    seed: int = setting(0, "of problems and rollouts", low=0, high=2**31 - 1)

    def __post_init__(self):
        super().__post_init__()
        if self.minibatches > self.prompts:
            raise ValueError(f"--minibatches {self.minibatches} > --prompts {self.prompts}")


PAPER = (GRPOConfig(), RewardConfig())
# For the embedded policy of 0.7M parameters, on a CPU.
tiny = dict(steps=50, prompts=16, group_size=8, lr=3e-4, warmup_steps=5, minibatches=2)
tiny |= dict(max_new_tokens=160, token_budget=16384, recompute=False, eval_problems=400)
tiny |= dict(eval_every=10, save_every=10)
TINY_PRESET = (GRPOConfig(**tiny), RewardConfig(min_length=16, max_length=160))


@dataclass(frozen=True)
class Run(Settings):
    """What a run was asked to do: from where, to where, and with which settings."""

    config: GRPOConfig = PAPER[0]
    reward_config: RewardConfig = PAPER[1]
    model: Path = setting(TINY, "checkpoint folder, Qwen3 or Llama family", kind=Path)
    data: list = setting(None, "training problems; else generated stories", kind=Path, nargs="+")
    eval_data: list = setting(None, "held-out problems; else some of --data", kind=Path, nargs="+")
    lang: str = setting("en", "language of bilingual files", choices=("en", "zh"))
    instructions: Path = setting(None, "file with another system message", kind=Path)
    content: Path = setting(None, "content model; without --model assets/content", kind=Path)
    out: Path = setting(None, "folder for checkpoints and log (runs/DATE-TIME)", kind=Path)
    device: str = setting("cpu", "with --model: cuda, where there is one")
    dtype: str = setting("float32", "of the computation; else bfloat16 on cuda", choices=DTYPES)
    offload: bool = setting(False, "cuda only: keep weights and AdamW's states on the host")


# ----------------------------------------------------------------------------------- checkpoints
#
# OUT/checkpoint-000050 is an ordinary model folder, with optimizer.safetensors and state.json
# beside the weights. It appears complete or not at all (model.new_folder); what a disk or a copy
# has torn since is passed over. Tensors are whole: the number of processes may change.

RESUMABLE = ("keep", "save_every", "eval_every", "max_skips")  # they do not change the result


def identify(run: Run, problems: list[Problem], held_out: dict[str, list[Problem]]) -> dict:
    """Return what must stay the same while a run is interrupted: settings, and what was read."""
    identity = asdict(run.config) | asdict(run.reward_config) | {"dtype": run.dtype}
    identity["instructions"] = digest(read_instructions(run.instructions))
    for name in RESUMABLE:
        del identity[name]
    for kind, asked in ({"training": problems} | held_out).items():
        sources = [problem.source for problem in asked]
        identity[f"order of {kind} problems"] = digest(sources)
        for source, of_source in grouped(asked, sources).items():
            identity[f"{kind} problems of {source}"] = digest(repr(of_source))
    for kind, folder in (("model", run.model), ("content model", run.content or Path("none"))):
        others = [folder / name for name in ("config.json", *TOKENIZER_FILES)]
        for file in filter(Path.is_file, (*weight_files(folder), *others)):
            with open(file, "rb") as content:
                identity[f"{kind}/{file.name}"] = hashlib.file_digest(content, "sha256").hexdigest()
    return identity


def find_checkpoint(run: Run, resume: bool, identity: dict) -> Path | None:
    """Return the newest checkpoint in the run's folder; None: the run begins.

    ValueError: there is a run and nobody asked to go on with it, or it had other settings or files.
    """
    saved = checkpoints(run.out)
    if not resume and (saved or (run.out / "metrics.jsonl").exists()):
        raise ValueError(f"{run.out} holds a run already: --resume it, or choose another --out")
    if resume and not run.out.is_dir():
        raise ValueError(f"{run.out} holds no checkpoint: choose another --out to begin anew")
    if not saved:  # with `resume` the run was stopped before its first checkpoint
        return None
    checkpoint, state = newest_checkpoint(run.out)
    was = state["identity"] if isinstance(state.get("identity"), dict) else {}
    changed = [name for name in was | identity if was.get(name) != identity.get(name)]
    listing = "; ".join(f"{name} was {was.get(name)}, is {identity.get(name)}" for name in changed)
    if changed:
        raise ValueError(f"cannot resume {checkpoint}, not the same run: {listing}")
    return checkpoint


def checkpoints(out: Path) -> list[Path]:
    """List the checkpoints in a run's folder, oldest first, and no folders with other names."""
    named = [path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(filter(Path.is_dir, named), key=step_of)


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def newest_checkpoint(out: Path) -> tuple[Path, dict]:
    """Return the newest checkpoint that can be read, and its state; ValueError: there is none."""
    for path in reversed(checkpoints(out)):
        try:
            open_weights(path / "model.safetensors")
            open_weights(path / "optimizer.safetensors")
            return path, read_json(path / "state.json")
        except ValueError as error:
            tqdm.write(f"WARNING: {error}; looking for the checkpoint before it")
    raise ValueError(f"{out} holds no checkpoint that can be read: choose another --out")


def save_checkpoint(run: Run, policies: Policies, step: int, state: dict) -> Path:
    """Write OUT/checkpoint-STEP, with `state` in state.json; every process must call this.

    Diverged: weights that are not finite. OSError: the disk is full, say; the checkpoint before
    stays.
    """
    target = run.out / f"checkpoint-{step:06d}"
    weights, states = {}, {}
    for name, p in policies.model.named_parameters():
        weights[name] = collect(p.detach())
        for key, value in policies.optimizer.state[p].items():
            states[f"{name}.{key}"] = collect(value)
    if rank():
        return target
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise Diverged(f"step {step}: the weights are not finite, and are not saved")
    try:
        with new_folder(target) as folder:
            write_model(policies.model, folder, weights)
            save_file(states, folder / "optimizer.safetensors")
            write_json(folder / "state.json", state | {"step": step})
    except (OSError, SafetensorError) as error:
        remedy = "the checkpoints before it are whole: make room, then --resume"
        raise OSError(f"{target} could not be saved: {error}; {remedy}") from None
    return target


def remove_older(run: Run, newest: Path | None) -> None:
    """Remove all but `keep` checkpoints up to `newest`; the ones after it are torn, and stay."""
    if newest and rank() == 0:
        saved = [path for path in checkpoints(run.out) if step_of(path) <= step_of(newest)]
        for path in saved[: -run.config.keep]:
            shutil.rmtree(path)


def last_sound(run: Run) -> Path:
    """Return the newest checkpoint from which a step was made without skipping an update.

    If there is none, it is the model that the run began with. An update can ruin the weights and be
    finite itself, so what it led to may be saved already.
    """
    log = read_log(run.out / "metrics.jsonl")
    made = max((line["step"] for line in log if not line.get("skipped")), default=-1)
    return [run.model, *(path for path in checkpoints(run.out) if step_of(path) <= made)][-1]


def load_optimizer(path: Path, policies: Policies) -> None:
    """Read AdamW's states; each process takes its own shards of the tensors."""
    with open_weights(path / "optimizer.safetensors") as tensors:
        for name in tensors.keys():  # none, if no update has been made yet
            name_of_weight, _, key = name.rpartition(".")
            p = policies.model.get_parameter(name_of_weight)
            value = tensors.get_tensor(name)
            if key != "step" and isinstance(p, DTensor):
                mesh, placements = p.device_mesh, p.placements
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            policies.optimizer.state[p][key] = value.to(p.device)


# ----------------------------------------------------------------------------- several processes
#
# Under torchrun there is one process for each GPU, and each answers its part of the prompts. FSDP2
# cuts every weight, its gradient and its AdamW states into one shard per process, and gathers a
# block's weights while it computes. It also computes in bfloat16 over float32 weights, and can keep
# all of that in the host's memory, so it serves a single process, too. Sampling and evaluation talk
# to no other process: they use a full copy of the weights while they run.


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_sharded(run: Run) -> bool:
    """Say whether FSDP is at work: it serves one process, too, to compute in bfloat16."""
    return world_size() > 1 or run.dtype != "float32" or run.offload


def join_processes(device: str) -> None:
    """Meet the other processes that torchrun has started, if any; each has a device of its own."""
    alone = {}
    if "RANK" not in os.environ:
        alone = dict(store=dist.HashStore(), rank=0, world_size=1)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    # A long rollout in another process is no failure, so waiting for a day is fine.
    dist.init_process_group(backend, timeout=timedelta(days=1), **alone)
    if rank():  # only the first process speaks
        sys.stdout = open(os.devnull, "w")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def summed(values: dict[str, float], operation=dist.ReduceOp.SUM) -> dict[str, float]:
    """Combine each of these numbers over all processes; they wait for each other."""
    if world_size() == 1:
        return values
    combined = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(combined, operation)
    return dict(zip(values, combined.tolist()))


def maximum(value: float) -> float:
    """Return the largest of the values that the processes have."""
    return summed({"value": value}, dist.ReduceOp.MAX)["value"]


def wait_for_all() -> None:
    """Return when every process has come here."""
    maximum(0)


def equally_many(batches: Iterator[list[Group]]) -> Iterator[list[Group]]:
    """Yield this process's micro-batches, and then idle ones until every process has had as many.

    All must compute equally often, because each gathers weights from all. An idle batch is a
    completion without tokens, which contributes 0.
    """
    batches = list(batches)
    most = int(maximum(len(batches)))
    yield from batches
    for _ in range(most - len(batches)):
        yield [Group([0], [Completion([], [], False)], [0.0])]


def shard(model: Transformer, run: Run) -> None:
    """Cut a model's weights into shards of all processes, and let it compute in the run's dtype."""
    kind = torch.device(run.device).type
    hosted = run.offload and kind == "cuda"
    dtypes = dict(param_dtype=getattr(torch, run.dtype), reduce_dtype=torch.float32)
    settings = dict(
        mesh=init_device_mesh(kind, (world_size(),)),
        mp_policy=MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if hosted else OffloadPolicy(),
        reshard_after_forward=True,
    )
    for module in (*model.layers, model):
        fully_shard(module, **settings)
        if world_size() > 1:
            # The loss is divided by the whole batch's counts already, so gradients add up. (One
            # process does not divide, and saying so would cost it a copy of the gradients.)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "logprobs")
    model.computes_on = torch.device(run.device)


def full_tensor(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def full_copy(model: Transformer, run: Run) -> Transformer:
    """Gather a copy with all of the weights; every process must call this.

    A model that is not sharded is returned as it is.
    """
    if not isinstance(model.norm.weight, DTensor):
        return model
    with torch.device("meta"):
        copy = Transformer(model.config)
    weights = {}
    for name, p in model.named_parameters():
        weights[name] = full_tensor(p.detach().to(run.device, getattr(torch, run.dtype)))
    copy.load_state_dict(weights, strict=False, assign=True)  # strict would ask for a tied head
    copy.tie()
    copy.source = model.source
    return copy.requires_grad_(False).eval()


def collect(shards: Tensor) -> Tensor | None:
    """Give the first process the full tensor, on the host; all processes call this."""
    tensor = full_tensor(shards)
    return None if rank() else tensor.cpu().contiguous()


# ----------------------------------------------------------------------------------- memory plan


MOMENTS = ("sampling", "loss", "backward begins", "backward ends")  # when memory may be at its peak


def memory_plan(model: ModelConfig, run: Run, prompt_length: int) -> dict[str, tuple[float, ...]]:
    """Estimate the bytes that each item takes in one process at each of MOMENTS [O].

    `prompt_length` is the longest prompt's, and completions are taken as long as they may be.
    Libraries, the content model, and what an allocator loses between tensors come on top.
    """
    config, workers, sharded = run.config, world_size(), is_sharded(run)
    device, size = torch.device(run.device), 2 if run.dtype == "bfloat16" else 4  # bytes a value
    total, block, outside = count_parameters(model)
    d, kv = model.hidden_size, model.num_key_value_heads * model.head_dim
    head = d * model.vocab_size
    G, T = config.group_size, config.max_new_tokens
    prompts = config.prompts // workers
    group = prompt_length + G * T  # tokens

    # Sampling: the caches of one wave, its logits, a piece of the prefill, a copy of the weights.
    wave = SAMPLING_BUDGET // (group + G * logits_in_tokens(model))
    wave = max(1, min(prompts, wave))  # prompts at a time
    cache = 2 * model.num_hidden_layers * kv * size * wave * group
    sampling_logits = 3 * 4 * wave * G * model.vocab_size
    prefill = size * min(prefill_tokens(device), wave * prompt_length)
    prefill *= 2 * model.intermediate_size + 6 * d
    copy = size * total if sharded else 0
    reordered = 4 * (block * model.num_hidden_layers + head)
    if device.type == "cpu" and size == 4 and reordered <= REORDER_LIMIT:
        copy += reordered

    # Training: one micro-batch, and the gradients of those before it.
    tokens = math.ceil(prompts / config.minibatches) * group
    if config.warm_up:
        tokens = max(tokens, TRACES * (prompt_length + T))
    before = 4 * total / workers if tokens > config.token_budget else 0
    tokens = min(tokens, max(config.token_budget, prompt_length + T))
    kept, at_work, at_loss = activations(model, config, tokens, prompt_length, size)
    chunk = min(logits_at_once(device), tokens * G * T // group * model.vocab_size)
    logits = 8 * chunk + (size * chunk if size < 4 else 0)
    gathered, returning = 0, 0
    if sharded:  # one block computes while the next one arrives
        gathered = size * (outside + 2 * block)
        returning = gathered + 4 * (outside + block)
    reference = size * total / workers if config.beta else 0
    return {
        "weights (fp32)": (4 * total / workers,) * 4,
        "AdamW's states (fp32)": (8 * total / workers,) * 4,
        "gradients (fp32)": (0, before + 4 * head, max(before, 4 * head), 4 * total / workers),
        "reference policy": (reference,) * 4,
        "weights to sample with": (copy, 0, 0, 0),
        "KV cache": (cache, 0, 0, 0),
        "weights and gradients gathered": (0, gathered, returning, returning),
        "activations": (prefill, at_loss, kept + at_work, at_work),
        "logits": (sampling_logits, logits, 0, 0),
    }


def count_parameters(model: ModelConfig) -> tuple[int, int, int]:
    """Return how many parameters the model, one block, and all that is outside the blocks have."""
    with torch.device("meta"):
        transformer = Transformer(model)
    total = sum(p.numel() for p in transformer.parameters())
    block = sum(p.numel() for p in transformer.layers[0].parameters())
    return total, block, total - block * model.num_hidden_layers


def activations(
    model: ModelConfig, config: GRPOConfig, tokens: int, prompt_length: int, size: int
) -> tuple[float, float, float]:
    """Return bytes of activations, in a micro-batch of so many tokens.

    -> kept for the backward pass, of a block in its backward pass, when the loss is computed
    """
    d, ffn = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    attention = 2 * kv + prompt_length + config.max_new_tokens  # keys and values together; mask
    norms = 4 * (4 * d + 2 * q)  # in fp32
    in_block = tokens * (size * (4 * ffn + 3 * d + 2 * q + 2 * kv + attention) + norms)
    at_work = in_block + tokens * size * 3 * ffn
    if config.recompute:
        kept = tokens * model.num_hidden_layers * d * size
        return kept, at_work, kept
    kept = (model.num_hidden_layers - 1) * in_block
    return kept, at_work, kept + in_block


def print_plan(run: Run, memory: float) -> None:
    """Print the plan for one process, and whether it fits into so many bytes; reads no weights."""
    config, tokenizer = run.config, Tokenizer(run.model)
    problems, held_out = load_problems(run)
    instructions = read_instructions(run.instructions)
    asked = itertools.chain(problems, *held_out.values())
    lengths = [len(tokenizer.chat(build_messages(problem, instructions))) for problem in asked]
    plan = memory_plan(read_config(run.model), run, max(lengths))
    hosted = {name for name in plan if run.offload and ("(fp32)" in name or "reference" in name)}
    for place, names in (("device", plan.keys() - hosted), ("host", hosted)):
        plan[f"together, on the {place}"] = tuple(map(sum, zip(*(plan[name] for name in names))))
    peak = max(plan["together, on the device"])
    rows = [["GiB", *MOMENTS, "where"]]
    for name, sizes in plan.items():
        place = "host" if name in hosted or name.endswith("host") else "device"
        if any(sizes):
            rows.append([name, *(f"{size / 2**30:.2f}" for size in sizes), place])
    verdict = "fits into" if peak <= 0.95 * memory else "does NOT fit into"
    print(f"{config.prompts} prompts of at most {max(lengths)} tokens, {world_size()} processes:\n")
    print(aligned(rows))
    print(f"\npeak {peak / 2**30:.2f}: {verdict} {memory / 2**30:.1f} GiB, 5% of it spare")


# ---------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Train a language model by GRPO with a reward of its whole reasoning. "
        "Without --model: the embedded tiny policy on generated stories, minutes on a CPU.",
        epilog="Defaults in brackets: without --model | with --model (the paper's).",
    )
    Run.add_flags(parser)
    parser.add_argument("--resume", action="store_true", help="go on from --out's last checkpoint")
    plan = "say what memory the run needs, and whether so many GiB suffice, then stop; "
    plan += "--device cuda can be planned without one, N processes with WORLD_SIZE=N"
    parser.add_argument("--plan", type=float, metavar="GIB", help=plan)
    GRPOConfig.add_flags(parser.add_argument_group("training"), TINY_PRESET[0], PAPER[0])
    RewardConfig.add_flags(parser.add_argument_group("reward"), TINY_PRESET[1], PAPER[1])
    return parser.parse_args()


def make_run(args: argparse.Namespace) -> Run:
    """Turn the flags into a run; ValueError: flags that do not go together."""
    config, reward_config = PAPER if args.model else TINY_PRESET
    if args.resume and not args.out:
        raise ValueError("--resume needs --out: the folder of the run to go on with")
    if args.prompts is None:  # all processes answer equally many
        args.prompts = math.ceil(config.prompts / world_size()) * world_size()
    if args.max_length is None:
        args.max_length = args.max_new_tokens or config.max_new_tokens
    on_gpu = args.model and torch.cuda.is_available()
    args.device = args.device or ("cuda" if on_gpu else "cpu")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if args.dtype is None and args.device.startswith("cuda"):
        args.dtype = "bfloat16"
    content = None if args.model else TINY_CONTENT
    run = Run(config.updated(args), reward_config.updated(args), content=content).updated(args)
    if run.offload and not run.device.startswith("cuda"):
        raise ValueError(f"--offload relieves a GPU's memory; --device {run.device} is the host")
    if run.config.prompts % world_size():
        raise ValueError(f"--prompts {run.config.prompts}: no multiple of {world_size()} processes")
    return replace(run, content=None) if "content" in run.reward_config.off else run


def main() -> None:
    args = parse_arguments()
    run = make_run(args)
    if args.plan is None or not run.device.startswith("cuda"):
        check_device(run.device)
    if args.plan is not None:
        print_plan(run, args.plan * 2**30)
        return
    if is_sharded(run):
        join_processes(run.device)
    if run.out is None:  # the same name in all processes, although their clocks may differ
        now = time.localtime(maximum(time.time()))
        run = replace(run, out=Path("runs") / time.strftime("%Y%m%d-%H%M%S", now))
    print(f"config: {json.dumps(asdict(run), default=str)}")
    try:
        train(run, args.resume)
    except Diverged as error:
        remedy = f"begin a new run with --model {last_sound(run)}, another --out, a lower learning"
        remedy += " rate, no --warm-up from a checkpoint, and all other settings as printed above"
        raise Diverged(f"{error}; {remedy}") from None
    if world_size() > 1:
        wait_for_all()  # the first process is still writing
        sys.stdout.flush()
        os._exit(0)  # gloo's threads sometimes abort a process whose interpreter shuts down
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    exit_on_error(main)
