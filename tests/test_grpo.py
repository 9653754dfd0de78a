"""The objective against literals (the reference case of STYLE.md, on which TRL's and verl's loss functions and plain arithmetic
agree), and the loop around it on the embedded model."""
import json
import os
import random
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch

import grpo
from eval import measure, summarise
from grpo import (
    ColdStartConfig,
    GRPOConfig,
    Rollout,
    Run,
    checkpoints,
    cold_start,
    flawed_trace,
    group_advantages,
    grpo_loss,
    kl_to_reference,
    load_problems,
    micro_batches,
    problems_of_step,
    train,
    update,
)
from model import Completion, Tokenizer, generate, load_model, save_model
from rewards import Reward, RewardConfig
from socialr1 import TINY, TINY_CONTENT, build_messages, generate_problems, generate_stories

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

# ------------------------------------------------------------------------------------------------------------ the loop

CONFIG = GRPOConfig(
    steps=4, prompts=2, group_size=4, lr=1e-3, warmup_steps=2, minibatches=2, max_new_tokens=24, token_budget=400, eval_problems=0,
    eval_every=0, save_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The embedded model's folder with random weights: a policy with room to move in any direction."""
    torch.manual_seed(0)
    model = load_model(TINY)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    save_model(model, tmp_path_factory.mktemp("untrained") / "model")
    return tmp_path_factory.getbasetemp() / "untrained0" / "model"


@pytest.fixture
def planted(monkeypatch):
    """A reward that any policy can earn: the share of sampled ids that are even."""

    def score(problems, groups, responses, contents, tau, config):
        parts = {"fmt": 1.0, "out": 0.0, "struct": 0.0, "content": None, "len": 1.0, "tau": tau}
        return [[Reward(sum(t % 2 == 0 for t in c.tokens) / len(c.tokens), parts) for c in group] for group in groups]

    monkeypatch.setattr(grpo, "score", score)


def run_in(folder, model, **changes):
    return Run(model, folder, (), "en", "cpu", replace(CONFIG, **changes), RewardConfig())


def test_problems_are_walked_through_in_a_fresh_order_each_epoch():
    problems = list(range(10))
    epochs = [sum((problems_of_step(problems, step, 5, seed=1) for step in (e, e + 1)), []) for e in (0, 2)]
    assert [sorted(epoch) for epoch in epochs] == [problems, problems] and epochs[0] != epochs[1]
    assert problems_of_step(problems, 3, 5, seed=1) == problems_of_step(problems, 3, 5, seed=1)
    assert len(problems_of_step(problems, 0, 25, seed=1)) == 25  # more than there are: they come again


def test_files_give_up_whole_stories_for_evaluation(tmp_path, capsys):
    rows = [{"story": f"s{i // 2:c}", "question": f"q{i}", "options": ["a", "b"], "answer": "A"} for i in range(2 * 0x4E00, 2 * 0x4E00 + 60)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    run = replace(run_in(tmp_path, TINY, eval_problems=50), data=(file,))
    problems, held_out = load_problems(run)
    assert (len(problems), len(held_out["held out"])) == (54, 6)  # three of thirty stories
    assert not {p.story for p in problems} & {p.story for p in held_out["held out"]}
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps(row | {"story": row["story"].upper() + "."}) for row in rows[:10]))
    problems, held_out = load_problems(replace(run, eval_data=(other,), config=replace(run.config, eval_problems=5)))
    assert [p.question for p in held_out["held out"]] == [row["question"] for row in rows[:10:2]] and len(problems) == 60
    assert "WARNING: 10 of 60 training problems have a story that stands in the evaluation data: problems/mine mine:1, " in capsys.readouterr().out


def test_micro_batches_hold_every_completion_once_and_keep_the_budget():
    prompts = [[0] * 10, [0] * 30]
    groups = [[Completion([1] * n, [0.0] * n, True) for n in (5, 20, 5)] for _ in prompts]
    pieces = list(micro_batches(prompts, groups, budget=50))  # 10 + 5 + 20 + 5, then 30 + 5, 30 + 20, 30 + 5
    assert pieces == [([0], [slice(0, 3)]), ([1], [slice(0, 1)]), ([1], [slice(1, 2)]), ([1], [slice(2, 3)])]
    assert list(micro_batches(prompts, groups, budget=10**6)) == [([0, 1], [slice(0, 3), slice(0, 3)])]


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_micro_batched_updates_are_those_of_the_full_batch(reduction):
    tokenizer, results = Tokenizer(TINY), []
    for budget in (10**6, 300):
        model, reference = load_model(TINY), load_model(TINY)
        problems = generate_problems(4, seed=0)
        prompts = [tokenizer.chat(build_messages(p)) for p in problems]
        groups = generate(model, prompts, 3, 24, stop_ids=tokenizer.stop_ids)
        advantages = torch.tensor([[1.0, -1.0, 0.5]]).repeat(4, 1)
        rollout = Rollout(prompts, groups, advantages)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = replace(CONFIG, reduction=reduction, token_budget=budget, max_grad_norm=1e9)
        metrics = update(model, reference, optimizer, rollout, config)
        results.append((metrics, [p.detach().clone() for p in model.parameters()]))
    (whole, updated), (pieces, same) = results
    assert pieces == pytest.approx(whole, rel=1e-4, abs=1e-5)
    for a, b in zip(updated, same):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert not any(torch.equal(a, start) for a, start in zip(updated, weights(TINY)))  # they did move


def test_a_planted_reward_is_learned(tmp_path, planted, untrained):
    train(run_in(tmp_path, untrained, steps=12, prompts=4, group_size=8, lr=3e-3, save_every=12))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    first, last = (sum(line["reward"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    assert first < 0.6 and last > 0.7, (first, last)
    assert max(line["logprob_drift"] for line in lines) < 1e-4  # the sampler's log-probabilities are the trainer's
    assert all(not torch.equal(a, b) for a, b in zip(weights(tmp_path / "checkpoint-000012"), weights(untrained)))


def weights(path):
    return list(load_model(path).parameters())


def test_transformers_loads_a_trained_checkpoint_that_was_moved(tmp_path, planted, untrained):
    transformers = pytest.importorskip("transformers")
    train(run_in(tmp_path, untrained))
    model = load_model(tmp_path / "checkpoint-000004")
    shutil.move(tmp_path / "checkpoint-000004", tmp_path / "elsewhere")
    tokens = torch.tensor([Tokenizer(tmp_path / "elsewhere").encode("Anna put the ball in the box.")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere", dtype=torch.float32)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(model(tokens), load_model(untrained)(tokens))


def test_ctrl_c_leaves_a_checkpoint_and_the_resumed_run_is_the_unbroken_one(tmp_path, planted, untrained, monkeypatch, capsys):
    long = dict(steps=8, save_every=1)  # long enough that the checkpoint resumed from is cleared away
    train(run_in(tmp_path / "whole", untrained, **long))
    step = grpo.train_step

    def interrupted(*arguments):
        metrics = step(*arguments)
        if arguments[-1] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(grpo, "train_step", interrupted)
    train(run_in(tmp_path / "broken", untrained, **long))
    assert "stopped after step 3 of 8" in capsys.readouterr().out
    monkeypatch.setattr(grpo, "train_step", step)
    (last,) = [path for path in checkpoints(tmp_path / "broken") if path.name == "checkpoint-000003"]
    train(run_in(tmp_path / "broken", untrained, **long), resume=last)
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "broken")]
    for line in sum(logs, []):
        del line["seconds"], line["tokens_per_second"], line["content_share"]
    assert logs[0] == logs[1]
    whole, broken = (weights(tmp_path / name / "checkpoint-000008") for name in ("whole", "broken"))
    assert all(torch.equal(a, b) for a, b in zip(whole, broken))


def test_settings_that_would_train_something_else_are_refused():
    for changes, message in [
        (dict(group_size=1), "--group-size 1: an advantage needs a group of at least 2"),
        (dict(temperature=0.7), "--temperature 1 --top-p 1 --top-k 0"),
        (dict(top_k=5), "--temperature 1 --top-p 1 --top-k 0"),
        (dict(reduction="mean"), "expected grpo, dapo or dr_grpo"),
        (dict(minibatches=3), "--minibatches 3: expected 1 to --prompts 2"),
        (dict(steps=0), "--steps 0: expected at least 1"),
        (dict(clip_eps=-1.0), "--clip-eps -1.0: expected 0 or more"),
        (dict(lr=float("nan")), "--lr nan: expected 0 or more"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            replace(CONFIG, **changes)


def test_the_command_line(tmp_path, command):
    rows = [{"story": f"s{letter}", "question": "q", "options": ["a", "b"], "answer": "A"} for letter in "abcdefghijkl"]
    data, bench = tmp_path / "mine.jsonl", tmp_path / "bench.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    bench.write_text("\n".join(json.dumps({"STORY": "s", "故事": "s", "QUESTION": "q", "问题": "q", "OPTION-A": "a", "OPTION-B": "b", "选项A": "a", "选项B": "b", "答案\nANSWER": "A"}) for _ in range(12)))  # fmt: skip
    small = ["--steps", "1", "--prompts", "2", "--group-size", "2", "--max-new-tokens", "8"]
    code, out, err = command(grpo.main, "--data", str(data), str(bench), "--out", str(tmp_path / "run"), *small)
    assert code == 0, err
    assert "12 problems (problems)" in err + out and f"R_content from {TINY_CONTENT}" in err + out
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["weights"] == {"out": 1.0, "struct": 0.5, "content": 0.5} and 0 <= line["content"] <= 1 and 0 < line["content_share"] < 1
    assert "WARNING: ToMBench asks in so many words that its items never be trained on" in err + out
    assert "held out before" in out and "next: python eval.py --model" in out
    for arguments, message in [
        (("--out", str(tmp_path / "run")), "holds a run already"),
        (("--out", str(tmp_path / "run"), "--resume", *small, "--lr", "1"), "cannot resume"),
        (("--out", str(tmp_path / "none"), "--resume"), "holds no checkpoint"),
        (("--model", str(tmp_path / "none")), "no such model folder"),
        (("--group-size", "1"), "at least 2"),
        (("--steps", "many"), "invalid int value"),
        (("--without", "form"), "--without form: expected any of"),
        (("--content", str(TINY)), "is a language model; expected a content model"),
        (("--model", str(TINY_CONTENT)), "expected a language model"),
        (("--w-struct", "nan"), "must be finite"),
        (("--cold-start", str(tmp_path)), "no checkpoint folder"),
        (("--data", str(data), "--out", str(tmp_path / "none"), "--prompts", "200"), "lower it"),
    ]:
        code, out, err = command(grpo.main, *arguments)
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, (arguments, err)
    assert not (tmp_path / "none").exists()


def test_the_cold_start_runs_from_nothing(tmp_path):
    cold_start(tmp_path / "tiny", ColdStartConfig(lookup_steps=1, clean_steps=1, flawed_steps=1, rows=2), seed=0)
    model, tokenizer = load_model(tmp_path / "tiny"), Tokenizer(tmp_path / "tiny")
    assert model.config.vocab_size == tokenizer.backend.get_vocab_size() == model.embed_tokens.weight.shape[0]
    text = "Ünïcode 漢字 <think> Anna </think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_flawed_traces_have_flaws_in_the_planted_shares():
    config, rng = ColdStartConfig(), random.Random(0)
    stories = generate_stories(1200, seed=9)
    records = [measure(s.problem, flawed_trace(s, rng, config), 0) for s in stories]
    result = summarise(records)
    assert result["parse_rate"] == 1.0
    assert result["hard"] == pytest.approx(1 - 0.62, abs=0.06) and result["control"] == pytest.approx(1 - 0.12, abs=0.06)
    assert result["stage_order"] == pytest.approx(1 - 0.3, abs=0.05)
    assert result["option_early"] == pytest.approx(0.35, abs=0.06)
