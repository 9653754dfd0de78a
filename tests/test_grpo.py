"""The objective against literals: the reference case of STYLE.md (TRL's and verl's loss functions and plain arithmetic agree on it)."""
import pytest
import torch

from grpo import group_advantages, grpo_loss, kl_to_reference

NAN = float("nan")
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
POLICY = torch.tensor([[0.3, -0.3, 0.0], [0.3, -0.3, NAN], [0.1, NAN, NAN], [0.0, 0.25, -0.1]]) - 1
REFERENCE = torch.tensor([[0.0, 0.1, -0.1], [0.2, 0.0, NAN], [-0.2, NAN, NAN], [0.0, 0.0, 0.3]]) - 1
OLD = torch.full((4, 3), -1.0)
ADVANTAGES = torch.tensor([0.146368, -1.024575, -0.439104, 1.317311])
CENTRED = torch.tensor([0.125, -0.875, -0.375, 1.125])  # rewards 1, 0, 0.5, 2 minus their mean


@pytest.mark.parametrize(
    "reduction, beta, expected",
    [("dapo", 0.0, -0.203611), ("dapo", 0.04, -0.202040), ("grpo", 0.0, 0.019951), ("grpo", 0.04, 0.021493)],
)
def test_reference_case(reduction, beta, expected):
    loss, metrics = grpo_loss(POLICY, OLD, REFERENCE, ADVANTAGES, MASK, beta=beta, reduction=reduction)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert metrics["kl"] == pytest.approx(0.039291, abs=1e-6)
    assert metrics["clip_fraction"] == pytest.approx(3 / 9)


@pytest.mark.parametrize("beta, expected", [(0.0, -0.130415), (0.04, -0.129236)])
def test_reference_case_dr_grpo(beta, expected):
    loss, _ = grpo_loss(POLICY, OLD, REFERENCE, CENTRED, MASK, beta=beta, reduction="dr_grpo", max_length=3)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "advantage, log_ratio, gradient",
    [  # d loss / d logp = -ratio * A where the ratio still counts, 0 where the clip cuts it off
        (1.0, 0.5, 0.0),
        (1.0, -0.5, -0.606531),
        (-1.0, 0.5, 1.648721),
        (-1.0, -0.5, 0.0),
    ],
)
def test_gradient_in_the_four_clip_quadrants(advantage, log_ratio, gradient):
    logprobs = torch.tensor([[log_ratio - 1]], requires_grad=True)
    loss, _ = grpo_loss(logprobs, torch.tensor([[-1.0]]), None, torch.tensor([advantage]), torch.ones(1, 1), beta=0.0)
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("reduction, normalizer", [("grpo", 4), ("dapo", 9), ("dr_grpo", 12)])
def test_micro_batches_add_up(reduction, normalizer):
    def gradient(parts, normalizer=None):
        logprobs = POLICY.clone().requires_grad_()
        for rows in parts:
            loss, _ = grpo_loss(
                logprobs[rows], OLD[rows], REFERENCE[rows], ADVANTAGES[rows], MASK[rows],
                reduction=reduction, max_length=3, normalizer=normalizer,
            )  # fmt: skip
            loss.backward()
        return logprobs.grad

    whole = gradient([slice(0, 4)])
    assert whole.abs().sum() > 0 and not whole.isnan().any()  # NaN in the padding of the inputs changed nothing
    torch.testing.assert_close(gradient([slice(0, 1), slice(1, 4)], normalizer), whole)


def test_a_row_without_tokens_contributes_nothing():
    loss, _ = grpo_loss(POLICY[:2], OLD[:2], None, ADVANTAGES[:2], torch.tensor([[0, 0, 0], [1, 0, 0]]), beta=0.0)
    assert loss.item() == pytest.approx(1.024575 * 1.349859 / 2, abs=1e-5)  # exp(.3) unclipped: the advantage is negative


def test_group_advantages():
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.5, 2.0], [0.1, 0.1, 0.1, 0.1]]))
    torch.testing.assert_close(advantages[0], torch.tensor([0.146385, -1.024693, -0.439154, 1.317462]), atol=2e-6, rtol=0)
    assert advantages[1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(group_advantages(torch.tensor([[1.0, 0.0, 0.5, 2.0]]), scale=False)[0], CENTRED)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(3, 1))


def test_kl_is_k3():
    kl = kl_to_reference(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -0.5]]))
    torch.testing.assert_close(kl, torch.tensor([[0.0, 0.148721]]), atol=1e-6, rtol=0)


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo_loss(POLICY, OLD, None, ADVANTAGES, MASK)
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        grpo_loss(POLICY, OLD, REFERENCE, ADVANTAGES, MASK, reduction="mean")
    with pytest.raises(ValueError, match="max_length"):
        grpo_loss(POLICY, OLD, REFERENCE, ADVANTAGES, MASK, reduction="dr_grpo")
