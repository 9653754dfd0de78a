"""GRPO with a trajectory reward (METHOD.md section 5). So far: the objective. The loop around it follows with the model.

    A_i    = (R_i - mean(R)) / (std(R) + eps)                       one group: G completions of one prompt
    ratio  = exp(logp - logp_old)
    L      = -( min(ratio * A, clip(ratio, 1 - e, 1 + e) * A) - beta * KL )      per token
    KL     = exp(ref - logp) - (ref - logp) - 1                                  k3
"""
import torch
from torch import Tensor


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
