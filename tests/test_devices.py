"""No mix of devices: what a step and an evaluation do, on a second device that the CPU pretends.

A tensor `There` says that it is on torch's device "meta"; its numbers are in a tensor of the CPU
that it keeps. `Elsewhere` sees every operator: it computes with the kept tensors, and refuses
operands on two devices as a GPU would. Attention takes the path of a GPU.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import grpo
import model as sampler
from eval import evaluate
from grpo import GRPOConfig, Policies, Run, Training, train_step
from model import Tokenizer, generate, load_model, logprobs_and_entropy
from rewards import ContentModel, RewardConfig
from socialr1 import INSTRUCTIONS, TINY, TINY_CONTENT, build_messages, generate_problems
from test_training import attention_by_definition

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.to.dtype_layout, aten.copy_.default)


class There(torch.Tensor):
    """A tensor on the second device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, kept: torch.Tensor):
        layout = dict(strides=kept.stride(), storage_offset=kept.storage_offset())
        layout |= dict(dtype=kept.dtype, device="meta")
        there = torch.Tensor._make_wrapper_subclass(cls, kept.size(), **layout)
        there.kept = kept
        return there

    def tolist(self):  # torch itself does not call an operator for it
        return self.kept.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


def compute(operator, args, kwargs):
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in operands if isinstance(x, There)]
    here = [x for x in operands if not isinstance(x, There)]
    assert not any(x.device.type == "meta" for x in here), f"{operator}: made behind our back"
    # As on a GPU, a single number may come from the CPU.
    if there and any(x.dim() for x in here) and operator not in COPIES:
        raise RuntimeError(f"{operator}: operands on two devices")
    goes_there = bool(there)
    if operator is aten.copy_.default:
        goes_there = isinstance(args[0], There)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type == "meta"
        kwargs = kwargs | {"device": "cpu"}
    known = {id(x.kept): x for x in there}  # an operator in place returns its operand

    def wrap(x):
        if isinstance(x, torch.Tensor) and goes_there:
            return known[id(x)] if id(x) in known else There(x)
        return x

    args, kwargs = tree_map(lambda x: x.kept if isinstance(x, There) else x, (args, kwargs))
    return tree_map(wrap, operator(*args, **kwargs))


class Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


@pytest.fixture
def elsewhere(monkeypatch):
    """Run a function on the CPU and on the second device; return both results."""
    from_data = torch.tensor  # which makes an empty tensor on "meta"

    def tensor(data, dtype=None, device="cpu"):
        return from_data(data, dtype=dtype).to(device)

    def both(function):
        here = function("cpu")
        monkeypatch.setattr(torch, "tensor", tensor)
        monkeypatch.setattr(sampler, "varlen_attn", attention_by_definition)
        monkeypatch.setattr(sampler, "has_one_kernel", lambda x: x.device.type == "meta")
        eight = lambda device: 1 if device.type == "cpu" else 8  # noqa: E731
        monkeypatch.setattr(sampler, "tokens_per_graph", eight)
        monkeypatch.setattr(sampler, "recorded", lambda function, x: function)
        with Elsewhere():
            return here, function("meta")

    return both


def tokenizer_that_stops_early() -> Tokenizer:
    """Completions end at the first full stop, too, so that they are short and of all lengths."""
    tokenizer = Tokenizer(TINY)
    tokenizer.stop_ids += tuple(tokenizer.encode("."))
    return tokenizer


def load(device, path=TINY, scalar=False):
    model = load_model(path, scalar=scalar).to(device)
    model.tie()
    return model


def test_a_mix_of_devices_is_an_error():
    with Elsewhere():
        there = torch.arange(3, device="meta")
        assert (there + 1).tolist() == [1, 2, 3] and there.to("cpu").device.type == "cpu"
        with pytest.raises(RuntimeError, match="add.Tensor: operands on two devices"):
            there + torch.arange(3)


def test_the_forward_pass_and_the_log_probabilities_with_checkpointing(elsewhere):
    tokenizer = Tokenizer(TINY)
    prompts = [tokenizer.chat(build_messages(problem)) for problem in generate_problems(2, 0)]
    completions = [[[5, 6, 7], [8]], [[9, 10]]]

    def gradients(device):
        model = load(device)
        model.checkpointing = True
        logits = model(torch.tensor(prompts[:1], device=device))
        logprobs, mask, entropies = logprobs_and_entropy(model, prompts, completions)
        (logprobs + entropies).sum().backward()
        return [x.cpu() for x in (logits, logprobs, mask, *(p.grad for p in model.parameters()))]

    for here, there in zip(*elsewhere(gradients)):
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", [100_000, 300])
def test_sampling_with_rows_that_leave_and_waves(elsewhere, budget):
    tokenizer = tokenizer_that_stops_early()
    prompts = [tokenizer.chat(build_messages(problem)) for problem in generate_problems(3, 0)]
    settings = dict(group_size=3, max_new_tokens=24, stop_ids=tokenizer.stop_ids, top_p=0.9)
    here, there = elsewhere(
        lambda device: generate(load(device), prompts, **settings, token_budget=budget)
    )
    lengths = [len(completion.tokens) for group in here for completion in group]
    assert min(lengths) < 18 < max(lengths)
    assert [[c.tokens for c in group] for group in there] == [
        [c.tokens for c in group] for group in here
    ]


def test_a_step_with_reference_and_content_model_and_an_evaluation(elsewhere, monkeypatch):
    def advantages(rewards, scale):  # short completions all earn 0, and would not differ
        return torch.linspace(-1, 1, rewards.numel()).view(rewards.shape)

    monkeypatch.setattr(grpo, "group_advantages", advantages)
    config = dict(prompts=2, group_size=3, max_new_tokens=40, minibatches=2, token_budget=300)
    run = Run(GRPOConfig(**config, steps=2), RewardConfig(min_length=16, max_length=40))
    problems = generate_problems(4, 0)

    def step_and_evaluation(device):
        model, reference = load(device), load(device).requires_grad_(False)
        tokenizer = tokenizer_that_stops_early()
        content = ContentModel(load(device, TINY_CONTENT, True), Tokenizer(TINY_CONTENT))
        policies = Policies(model, reference, torch.optim.AdamW(model.parameters(), lr=1e-4))
        training = Training(problems, {}, tokenizer, INSTRUCTIONS, content, policies)
        lines = [train_step(training, run, step) for step in (0, 1)]
        result = evaluate(model, tokenizer, problems[:2], content, max_new_tokens=20)
        return [*lines, {name: result[name] for name in ("accuracy", "length", "reward")}]

    for here, there in zip(*elsewhere(step_and_evaluation)):
        here, there = ({k: v for k, v in x.items() if "second" not in k} for x in (here, there))
        assert there == pytest.approx(here, abs=1e-3)
        assert here.get("grad_norm", 1) > 0.01 and here["length"] > 5
