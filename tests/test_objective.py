"""The objective of GRPO as a lesson: five ideas in the order in which a training step uses them.

1. Advantages: a completion is compared with the others of its group.
2. The policy gradient: tokens of good completions become more likely, tokens of bad ones less.
3. The clip: a policy that has already moved far enough gets no further push.
4. The KL: a second force that holds the policy near the reference.
5. The average: how token losses become one number, also when the batch is cut into pieces.

At the end stands one batch that exercises all of it. Expected values are worked out by hand in the
comments. The tests need no model: log-probabilities are simply written down.
"""

import itertools
import math

import pytest
import torch

from grpo import group_advantages, grpo_loss, kl_to_reference

NAN = float("nan")


# --------------------------------------------------------------------------- 1. advantages


def advantages_of(*rewards, **settings):
    """Return the advantages of a single group as a list."""
    return group_advantages(torch.tensor([rewards], dtype=torch.float64), **settings)[0].tolist()


def test_an_advantage_is_the_distance_from_the_groups_mean_in_standard_deviations():
    # Mean 2, deviations -2, 0, 2. Sample variance (4 + 0 + 4) / (3 - 1) = 4, standard deviation 2.
    # (The population's, divided by 3 instead of 2, would be 1.633 and the advantages +-1.225.)
    assert advantages_of(0, 2, 4) == pytest.approx([-1, 0, 1], abs=1e-6)


def test_a_group_is_compared_with_itself_only():
    # The second prompt is easier, all its rewards are higher by 10: its advantages are the same.
    advantages = group_advantages(torch.tensor([[0.0, 2.0, 4.0], [10.0, 12.0, 14.0]]))
    assert advantages.shape == (2, 3)
    assert advantages[1].tolist() == pytest.approx(advantages[0].tolist(), abs=1e-6)


def test_a_constant_added_to_all_rewards_changes_nothing():
    # 0, 1, 3: mean 4/3, deviations -4/3, -1/3, 5/3, variance (16 + 1 + 25) / 9 / 2 = 7/3.
    # float32 holds the shifted rewards exactly, but not their mean: it is computed in float64.
    expected = [-0.872872, -0.218218, 1.091089]
    group = torch.tensor([[0.0, 1.0, 3.0]])
    assert group_advantages(group)[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert group_advantages(group + 2**23)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_eps_stands_beside_the_standard_deviation():
    # Deviations of 2 and a standard deviation of 2: 2 / (2 + 2) = 0.5.
    assert advantages_of(0, 2, 4, eps=2.0) == pytest.approx([-0.5, 0, 0.5])
    # The default is 1e-6 as in verl: 0.002 / (0.002 + 0.000001) = 0.9995. (TRL's 1e-4: 0.9524.)
    assert advantages_of(0, 0.002, 0.004) == pytest.approx([-0.9995, 0, 0.9995], abs=1e-6)


def test_advantages_of_a_group_sum_to_zero():
    # What the better half gains, the worse half loses.
    rewards = torch.rand(50, 5, generator=torch.Generator().manual_seed(0))
    sums = group_advantages(rewards).sum(dim=1)
    assert sums.tolist() == pytest.approx([0] * 50, abs=1e-5)


def test_dr_grpo_leaves_the_division_out():
    # Mean 0.875. Without the division, a group that differs little also counts for little.
    expected = [0.125, -0.875, -0.375, 1.125]
    assert advantages_of(1, 0, 0.5, 2, scale=False) == pytest.approx(expected)


def test_whole_numbers_are_rewards_too():
    # Right and wrong as 1 and 0: mean 1/2, sample standard deviation sqrt(1/2), so +-0.7071.
    advantages = group_advantages(torch.tensor([[0, 1], [1, 1]]))
    assert advantages[0].tolist() == pytest.approx([-0.707106, 0.707106], abs=1e-5)
    assert advantages[1].tolist() == [0, 0]


@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_teach_nothing(scale):
    # In binary, 0.1 summed and divided need not be 0.1 again: the zeros must be exact all the same.
    assert advantages_of(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, scale=scale) == [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_in_the_last_bit_is_rounding(dtype):
    reward = torch.tensor(1.5, dtype=dtype)
    next_number = torch.nextafter(reward, torch.tensor(2.0, dtype=dtype))
    group = torch.stack([reward, reward, reward, reward, next_number])[None]
    assert group.unique().numel() == 2
    assert group_advantages(group).tolist() == [[0, 0, 0, 0, 0]]


def test_the_tail_of_the_length_window_is_no_difference_in_quality():
    """Five right answers, one of them a token longer, are five equally good responses."""

    def window(length):  # the soft length window of the reward, from 32 to 1024 tokens, k = 50
        rise = 50 * (length - 32) / (1024 - 32)
        fall = 50 * (length - 1024) / (1024 - 32)
        return 1 / (1 + math.exp(-rise)) * (1 - 1 / (1 + math.exp(-fall)))

    # window(300) = 1 - exp(-13.508) = 1 - 1.36e-6 and window(301) = 1 - exp(-13.558) = 1 - 1.29e-6:
    # the rewards differ by 1e-7. Divided by its standard deviation, this difference would become
    # (4/5) / (1/sqrt(5)) = 1.789, the largest advantage that a group of five can have.
    rewards = [1.5 * window(length) for length in (300, 300, 300, 300, 301)]
    assert rewards[4] - rewards[0] == pytest.approx(1e-7, rel=0.05)
    assert advantages_of(*rewards) == [0, 0, 0, 0, 0]
    assert advantages_of(*rewards, eps=0.0, min_spread=0.0)[4] == pytest.approx(1.789, abs=1e-3)


def test_min_spread_is_the_smallest_difference_that_counts():
    assert advantages_of(1, 1.0009) == [0, 0]
    # Above 0.001 a group counts in full. Deviations +-0.001, standard deviation 0.001 * sqrt(2):
    # 0.001 / (0.0014142 + 0.000001) = 0.70661.
    assert advantages_of(1, 1.002) == pytest.approx([-0.70661, 0.70661], abs=1e-5)
    assert advantages_of(1, 1.002, min_spread=0.01) == [0, 0]


def test_the_edge_of_flat_does_not_depend_on_rounding():
    for low, dtype in itertools.product((0.0, 0.3, 0.5, 1.0), (torch.float32, torch.float64)):
        rewards = torch.tensor([[low, low + 1e-3], [low, low + 1.1e-3]], dtype=dtype)
        flat, spread = group_advantages(rewards).abs().tolist()
        assert flat == [0, 0] and spread == pytest.approx([0.5**0.5] * 2, rel=0.01)


def test_a_flat_group_leaves_its_neighbours_alone():
    advantages = group_advantages(torch.tensor([[1.5, 1.5, 1.5], [0.0, 2.0, 4.0]]))
    assert advantages[0].tolist() == [0, 0, 0]
    assert advantages[1].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_a_group_of_one_is_refused(shape):
    # Alone, a completion is its own mean: there is nothing to compare it with.
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(shape))


# --------------------------------------------------------------------------- 2. the policy gradient


def on_policy(logprobs, advantages, mask=None, **settings):
    """Compute the loss of the first update after a rollout: the old policy is still the policy."""
    if mask is None:
        mask = torch.ones(logprobs.shape)
    old_logprobs = logprobs.detach()
    return grpo_loss(logprobs, old_logprobs, None, advantages, mask, beta=0.0, **settings)


def test_the_first_update_is_the_plain_policy_gradient():
    """The ratio to the old policy is 1, so nothing is clipped, and the gradient is -A per token."""
    logprobs = torch.tensor([[-0.5, -2.0], [-1.0, -3.0]], requires_grad=True)
    advantages = torch.tensor([2.0, -0.5])
    loss, metrics = on_policy(logprobs, advantages, reduction="dapo", normalizer=1)  # a plain sum
    loss.backward()
    # Every token of a completion carries the advantage of the whole completion.
    assert logprobs.grad.tolist() == [[-2, -2], [0.5, 0.5]]
    assert metrics["clip_fraction"] == 0


def test_a_token_with_a_positive_advantage_becomes_more_likely():
    """The gradient by the logits is -A times that of the log-probability, (one-hot - softmax)."""
    # Two tokens of probability 1/4 and 3/4. The first is sampled, and its advantage is 2.
    logits = torch.tensor([0.0, math.log(3.0)], requires_grad=True)
    logprobs = logits.log_softmax(dim=0)[:1][None]  # (1, 1)
    loss, _ = on_policy(logprobs, torch.tensor([2.0]))
    loss.backward()
    # -2 * (1 - 1/4) and -2 * (0 - 3/4). Descent raises the first logit and lowers the second.
    assert logits.grad.tolist() == pytest.approx([-1.5, 1.5])


def test_a_loss_of_zero_is_no_sign_that_nothing_is_learned():
    # The ratio is 1, so the loss is -mean(A), and advantages sum to 0. The gradient is what counts.
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    loss, _ = on_policy(logprobs, torch.tensor([1.0, -1.0]))
    loss.backward()
    assert loss.item() == 0
    # Each token is one of three in one of two completions: it has 1/6 of its advantage.
    assert logprobs.grad[0].tolist() == pytest.approx([-1 / 6] * 3)
    assert logprobs.grad[1].tolist() == pytest.approx([1 / 6] * 3)


def test_flat_groups_give_no_gradient():
    """Advantages of exactly 0 give a gradient of exactly 0, wherever the policy has moved to."""
    advantages = group_advantages(torch.tensor([[1.5, 1.5], [0.0, 0.0]])).flatten()
    old_logprobs = torch.full((4, 2), -1.0)
    moved = torch.tensor([[0.0, 0.5], [-0.5, 0.1], [1.0, -1.0], [0.3, 0.0]])
    logprobs = (old_logprobs + moved).requires_grad_()
    loss, metrics = grpo_loss(logprobs, old_logprobs, None, advantages, torch.ones(4, 2), beta=0.0)
    loss.backward()
    assert loss.item() == 0
    assert logprobs.grad.abs().max() == 0
    assert metrics["clip_fraction"] == 0


# --------------------------------------------------------------------------- 3. the clip


def one_token(log_ratio, advantage, ref_logprob=None, beta=0.0):
    """Return loss, gradient and clip fraction of one token whose old log-probability was -1."""
    old_logprobs = torch.tensor([[-1.0]])
    logprobs = (old_logprobs + log_ratio).requires_grad_()
    ref_logprobs = None if ref_logprob is None else torch.tensor([[ref_logprob]])
    advantages = torch.tensor([advantage])
    mask = torch.ones(1, 1)
    loss, metrics = grpo_loss(
        logprobs, old_logprobs, ref_logprobs, advantages, mask, clip_eps=0.2, beta=beta
    )
    loss.backward()
    return loss.item(), logprobs.grad.item(), metrics["clip_fraction"]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_between_the_bounds_the_ratio_weighs_the_gradient(advantage):
    # exp(0.1) = 1.105171 lies between 0.8 and 1.2. The derivative of exp(x) is exp(x) itself:
    # loss and gradient are both -ratio * A. The ratio corrects for sampling from the old policy.
    loss, gradient, clipped = one_token(log_ratio=0.1, advantage=advantage)
    assert loss == pytest.approx(-1.105171 * advantage)
    assert gradient == pytest.approx(-1.105171 * advantage)
    assert clipped == 0


# Beyond the bounds there are four cases, two signs of the advantage and two sides: exp(0.5) =
# 1.648721 lies above 1.2, and exp(-0.5) = 0.606531 below 0.8. What is maximised is the smaller of
# ratio * A and clipped ratio * A, the more pessimistic of two estimates.


def test_a_good_token_that_is_already_more_likely_is_left_alone():
    # min(1.648721, 1.2) = 1.2, a constant. The policy has moved in the right direction already, and
    # one sample from the old policy says little about how things are further away.
    loss, gradient, clipped = one_token(log_ratio=0.5, advantage=1.0)
    assert loss == pytest.approx(-1.2)
    assert gradient == 0
    assert clipped == 1


def test_a_good_token_that_became_less_likely_is_pulled_back():
    # min(0.606531, 0.8) = 0.606531. The policy moved in the wrong direction, as updates for other
    # tokens may do, so the gradient must stay. Without the minimum the clip would remove it here.
    loss, gradient, clipped = one_token(log_ratio=-0.5, advantage=1.0)
    assert loss == pytest.approx(-0.606531)
    assert gradient == pytest.approx(-0.606531)
    assert clipped == 0


def test_a_bad_token_that_became_more_likely_is_pushed_down():
    # min(-1.648721, -1.2) = -1.648721. The wrong direction again: the gradient stays, in full size.
    loss, gradient, clipped = one_token(log_ratio=0.5, advantage=-1.0)
    assert loss == pytest.approx(1.648721)
    assert gradient == pytest.approx(1.648721)
    assert clipped == 0


def test_a_bad_token_that_is_already_less_likely_is_left_alone():
    # min(-0.606531, -0.8) = -0.8, a constant. It has been pushed down far enough for one rollout.
    loss, gradient, clipped = one_token(log_ratio=-0.5, advantage=-1.0)
    assert loss == pytest.approx(0.8)
    assert gradient == 0
    assert clipped == 1


def test_the_clip_fraction_counts_the_tokens_that_lost_their_gradient():
    # The four cases above and a token between the bounds: two of five have no gradient. The last
    # place is padding and counts neither as a token nor as a clipped one.
    log_ratios = torch.tensor([[0.5, -0.5, 0.1], [0.5, -0.5, 0.5]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages = torch.tensor([1.0, -1.0])
    _, metrics = grpo_loss(log_ratios - 1, torch.full((2, 3), -1.0), None, advantages, mask, beta=0)
    assert metrics["clip_fraction"] == pytest.approx(2 / 5)
    assert metrics["tokens"] == 5


# --------------------------------------------------------------------------- 4. the KL


def test_k3_is_zero_where_policy_and_reference_agree():
    # exp(0) - 0 - 1 = 0
    same = torch.tensor([[-0.1, -1.0, -7.0]])
    assert kl_to_reference(same, same).tolist() == [[0, 0, 0]]


def test_k3_by_hand():
    # reference - policy = 0.5:   exp(0.5)  - 0.5 - 1 = 1.648721 - 1.5 = 0.148721
    # reference - policy = -0.5:  exp(-0.5) + 0.5 - 1 = 0.606531 - 0.5 = 0.106531
    kl = kl_to_reference(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-0.5, -1.5]]))
    assert kl[0].tolist() == pytest.approx([0.148721, 0.106531], abs=1e-6)


def test_k3_is_never_negative():
    # exp(x) lies above its tangent 1 + x everywhere. (A plain log-ratio is negative half the time.)
    policy = torch.linspace(-8.0, 0.0, 81, dtype=torch.float64)[:, None]  # (81, 1)
    reference = policy.T  # every pair of two log-probabilities
    kl = kl_to_reference(policy.expand(81, 81), reference.expand(81, 81))
    off_diagonal = ~torch.eye(81, dtype=torch.bool)
    assert kl.min() == 0
    assert kl[off_diagonal].min() > 0


def test_the_mean_of_k3_over_the_policys_samples_is_the_kl_divergence():
    # Two tokens; policy 1/2, 1/2 and reference 1/4, 3/4. The divergence itself is
    #   1/2 * log(2) + 1/2 * log(2/3) = 0.346574 - 0.202733 = 0.143841
    # k3 of the tokens is 1/2 - log(1/2) - 1 = 0.193147 and 3/2 - log(3/2) - 1 = 0.094535.
    policy = torch.tensor([[0.5, 0.5]]).log()
    reference = torch.tensor([[0.25, 0.75]]).log()
    kl = kl_to_reference(policy, reference)
    assert kl[0].tolist() == pytest.approx([0.193147, 0.094535], abs=1e-6)
    assert kl.mean().item() == pytest.approx(0.143841, abs=1e-6)


def test_the_kl_pulls_where_the_clip_no_longer_lets_the_reward_push():
    # A good token, already more likely: its surrogate 1.2 is constant. The policy's log-probability
    # is -0.5 and the reference's -1, so reference - policy = -0.5 and k3 = 0.106531.
    # loss = -(1.2 - 0.04 * 0.106531) = -1.195739
    # d k3 / d logp = 1 - exp(-0.5) = 0.393469, times 0.04. It is above 0, so that descent makes the
    # token less likely again.
    loss, gradient, _ = one_token(log_ratio=0.5, advantage=1.0, ref_logprob=-1.0, beta=0.04)
    assert loss == pytest.approx(-1.195739, abs=1e-6)
    assert gradient == pytest.approx(0.04 * 0.393469, abs=1e-7)


def test_a_flat_group_still_feels_the_kl():
    # An advantage of 0 removes the first force and leaves the second, 0.04 * 0.393469 as above.
    loss, gradient, _ = one_token(log_ratio=0.5, advantage=0.0, ref_logprob=-1.0, beta=0.04)
    assert loss == pytest.approx(0.04 * 0.106531, abs=1e-7)
    assert gradient == pytest.approx(0.04 * 0.393469, abs=1e-7)


def test_at_beta_zero_the_kl_is_only_measured():
    # exp(0.5) - 0.5 - 1 = 0.148721 is reported, but does not enter the loss, -min(1, 1).
    logprobs = torch.tensor([[-1.0]])
    reference = torch.tensor([[-0.5]])
    advantages, mask = torch.tensor([1.0]), torch.ones(1, 1)
    loss, metrics = grpo_loss(logprobs, logprobs, reference, advantages, mask, beta=0.0)
    assert loss.item() == -1
    assert metrics["kl"] == pytest.approx(0.148721, abs=1e-6)


# --------------------------------------------------------------------------- 5. the average


@pytest.mark.parametrize(
    "reduction, expected",
    [
        ("grpo", 0.5),  # the mean over each completion, then over completions: (-1 + 2) / 2
        ("dapo", 1.25),  # the mean over all tokens: (-1 + 2 + 2 + 2) / 4
        ("dr_grpo", 0.625),  # the sum over completions x longest possible length: 5 / (2 * 4)
    ],
)
def test_three_ways_to_average(reduction, expected):
    """Weigh a good completion of one token against a bad one of three."""
    # The ratio is 1, so a token's loss is -A: -1 in the first row, and 2, 2, 2 in the second.
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    advantages = torch.tensor([1.0, -2.0])
    loss, _ = on_policy(
        torch.full((2, 3), -1.0), advantages, mask, reduction=reduction, max_length=4
    )
    assert loss.item() == pytest.approx(expected)


# A batch of four completions of 3, 2, 1 and 3 tokens. NaN stands wherever there is no token.
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
OLD = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, NAN], [-1.0, NAN, NAN], [-1.0, -1.0, -1.0]])
POLICY = OLD + torch.tensor(
    [[0.3, -0.3, 0.0], [0.3, -0.3, NAN], [0.1, NAN, NAN], [0.0, 0.25, -0.1]]
)
REFERENCE = OLD + torch.tensor(
    [[0.0, 0.1, -0.1], [0.2, 0.0, NAN], [-0.2, NAN, NAN], [0.0, 0.0, 0.3]]
)
ADVANTAGES = torch.tensor([0.146368, -1.024575, -0.439104, 1.317311])
REDUCTIONS = ["grpo", "dapo", "dr_grpo"]


def loss_and_gradient(rows=slice(0, 4), fill=NAN, **settings):
    """Return the loss of some rows of the batch, with `fill` as padding, and its gradient."""
    padded = MASK == 0
    logprobs = POLICY.masked_fill(padded, fill).requires_grad_()
    loss, _ = grpo_loss(
        logprobs[rows],
        OLD.masked_fill(padded, fill)[rows],
        REFERENCE.masked_fill(padded, fill)[rows],
        ADVANTAGES[rows],
        MASK[rows],
        max_length=3,
        **settings,
    )
    loss.backward()
    return loss.detach(), logprobs.grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("fill", [0.0, 1e4, -1e4, float("inf")])
def test_whatever_stands_in_the_padding_changes_nothing(fill, reduction):
    # Multiplying by a mask of 0 would not do: 0 * NaN is NaN, and so is its gradient.
    loss, gradient = loss_and_gradient(fill=NAN, reduction=reduction)
    other_loss, other_gradient = loss_and_gradient(fill=fill, reduction=reduction)
    assert torch.equal(loss, other_loss) and loss.isfinite()
    assert torch.equal(gradient, other_gradient)
    assert gradient[MASK == 0].tolist() == [0, 0, 0]
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "reduction, whole",
    [
        ("grpo", 4),  # completions of the whole batch
        ("dapo", 9),  # its tokens
        ("dr_grpo", 12),  # its completions times the longest length, 4 * 3
    ],
)
def test_micro_batches_add_up_to_the_whole_batch(reduction, whole):
    """Divide each piece by what the whole batch would be divided by: then pieces can be added."""
    loss, gradient = loss_and_gradient(reduction=reduction)
    first = loss_and_gradient(slice(0, 1), reduction=reduction, normalizer=whole)
    second = loss_and_gradient(slice(1, 4), reduction=reduction, normalizer=whole)
    assert (first[0] + second[0]).item() == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(first[1] + second[1], gradient)


@pytest.mark.parametrize(
    "reduction, expected", [("grpo", -0.5), ("dapo", -1.0), ("dr_grpo", -0.25)]
)
def test_a_row_without_tokens_contributes_nothing(reduction, expected):
    # The other row's two tokens have the loss -1 each. The empty completion still counts as one of
    # two: grpo (-1 + 0) / 2, dapo -2 / 2, dr_grpo -2 / (2 * 4).
    logprobs = torch.tensor([[NAN, NAN], [-1.0, -1.0]])
    mask = torch.tensor([[0, 0], [1, 1]])
    advantages = torch.tensor([5.0, 1.0])
    loss, metrics = on_policy(logprobs, advantages, mask, reduction=reduction, max_length=4)
    assert loss.item() == pytest.approx(expected)
    assert metrics["tokens"] == 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_tokens_has_the_loss_zero(reduction):
    # Of several processes, one may have no completions left: its 0 / 0 must not spoil the gradients
    # that are summed over all.
    logprobs = torch.full((1, 2), NAN, requires_grad=True)
    advantages, mask = torch.zeros(1), torch.zeros(1, 2)
    loss, metrics = on_policy(logprobs, advantages, mask, reduction=reduction, max_length=2)
    loss.backward()
    assert loss.item() == 0
    assert logprobs.grad.tolist() == [[0, 0]]
    assert metrics == {"kl": 0, "clip_fraction": 0, "tokens": 0}


# --------------------------------------------------------------------------- the whole of it
#
# The batch above with everything in it: ratios on both sides of the bounds, both signs of the
# advantage, rows of different lengths. TRL's and verl's loss functions give the same numbers.


def test_reference_case_advantages():
    # Mean 0.875, deviations 0.125, -0.875, -0.375, 1.125. Their squares sum to 2.1875, and the
    # standard deviation is sqrt(2.1875 / 3) = 0.853913. With TRL's eps: 0.125 / 0.854013 = 0.146368
    expected = [0.146368, -1.024575, -0.439104, 1.317311]
    assert advantages_of(1, 0, 0.5, 2, eps=1e-4) == pytest.approx(expected, abs=1e-6)


def test_reference_case_metrics():
    # k3 by row: 0.040818 0.091825 0.004837 | 0.004837 0.049859 | 0.040818 | 0 0.028801 0.091825.
    # They sum to 0.353620, and a ninth of that is 0.039291. The clip acts on exp(0.3) = 1.35 in the
    # first row, exp(-0.3) = 0.74 in the second and exp(0.25) = 1.28 in the last: 3 of 9 tokens.
    _, metrics = grpo_loss(POLICY, OLD, REFERENCE, ADVANTAGES, MASK)
    assert metrics["kl"] == pytest.approx(0.039291, abs=1e-6)
    assert metrics["clip_fraction"] == pytest.approx(3 / 9)
    assert metrics["tokens"] == 9


@pytest.mark.parametrize(
    "reduction, beta, expected",
    [
        ("grpo", 0.0, 0.019951),
        ("grpo", 0.04, 0.021493),
        ("dapo", 0.0, -0.203611),
        ("dapo", 0.04, -0.202040),  # beta adds 0.04 * 0.039291 = 0.001572 to a mean over tokens
    ],
)
def test_reference_case_loss(reduction, beta, expected):
    # Token losses -min(...) at beta 0, with ratios 1.349859 0.740818 1 | 1.349859 0.740818 | ...:
    #   -1.2 * 0.146368   -0.740818 * 0.146368   -0.146368     = -0.175642 -0.108432 -0.146368
    #   1.349859 * 1.024575   0.8 * 1.024575                   =  1.383032  0.819660
    #   1.105171 * 0.439104                                    =  0.485285
    #   -1.317311   -1.2 * 1.317311   -0.904837 * 1.317311     = -1.317311 -1.580773 -1.191952
    # The rows sum to -0.430442, 2.202692, 0.485285, -4.090036. A ninth of it all is -0.203611.
    # Their means are -0.143481, 1.101346, 0.485285, -1.363345, and the mean of these is 0.019951.
    loss, _ = grpo_loss(POLICY, OLD, REFERENCE, ADVANTAGES, MASK, beta=beta, reduction=reduction)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("beta, expected", [(0.0, -0.130415), (0.04, -0.129236)])
def test_reference_case_dr_grpo(beta, expected):
    # The same ratios with advantages that are not divided by the standard deviation, -0.875 for
    # -1.024575 and so on: the sum is -1.832501 * 0.854013 = -1.564980, and a twelfth is -0.130415.
    centred = torch.tensor([0.125, -0.875, -0.375, 1.125])
    loss, _ = grpo_loss(
        POLICY, OLD, REFERENCE, centred, MASK, beta=beta, reduction="dr_grpo", max_length=3
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)


# --------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(ref_logprobs=None), "ref_logprobs"),
        (dict(reduction="mean"), "unknown reduction 'mean'"),
        (dict(reduction="dr_grpo"), "max_length"),
    ],
)
def test_bad_arguments_say_what_to_do(settings, message):
    arguments = dict(
        logprobs=POLICY,
        old_logprobs=OLD,
        ref_logprobs=REFERENCE,
        advantages=ADVANTAGES,
        completion_mask=MASK,
    )
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments | settings)
