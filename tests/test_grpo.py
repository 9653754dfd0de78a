"""The loop around the objective: batches, whole runs on the embedded model, interruptions, flags."""

import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

import grpo
from grpo import GRPOConfig, Group, Policies, Run, checkpoints, flat_groups, load_problems
from grpo import log_line, micro_batches, minibatches, problems_of_step, train, update
from model import Completion, Tokenizer, generate, load_model, save_model
from rewards import Reward, RewardConfig
from socialr1 import Response, generate_stories
from socialr1 import TINY, TINY_CONTENT, build_messages, generate_problems

CONFIG = GRPOConfig(
    steps=4,
    prompts=2,
    group_size=4,
    lr=1e-3,
    warmup_steps=2,
    minibatches=2,
    max_new_tokens=24,
    token_budget=400,
    eval_problems=0,
    eval_every=0,
    save_every=2,
)


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

    def reward_groups(problems, groups, responses, contents, tau, config):
        parts = {"fmt": 1.0, "out": 0.0, "struct": 0.0, "content": None, "len": 1.0, "tau": tau}
        return [
            [Reward(sum(t % 2 == 0 for t in c.tokens) / len(c.tokens), parts) for c in group]
            for group in groups
        ]

    monkeypatch.setattr(grpo, "reward_groups", reward_groups)


def run_in(folder, model, **changes):
    return Run(replace(CONFIG, **changes), RewardConfig(), model=model, out=folder)


def test_problems_are_walked_through_in_a_fresh_order_each_epoch():
    problems = list(range(10))
    epochs = [
        sum((problems_of_step(problems, step, 5, seed=1) for step in (e, e + 1)), [])
        for e in (0, 2)
    ]
    assert [sorted(epoch) for epoch in epochs] == [problems, problems] and epochs[0] != epochs[1]
    assert problems_of_step(problems, 3, 5, seed=1) == problems_of_step(problems, 3, 5, seed=1)
    # 10 problems are three whole batches of 3; the next epoch leaves out another problem
    for seed in range(20):
        steps = [problems_of_step(problems, step, 3, seed) for step in range(6)]
        assert [len(set(sum(epoch, []))) for epoch in (steps[:3], steps[3:])] == [9, 9]
    left_out = {sum(problems) - sum(sum(steps[i : i + 3], [])) for i in (0, 3)}
    assert len(left_out) == 2


def test_generated_problems_do_not_depend_on_the_steps(monkeypatch):
    monkeypatch.setattr(grpo, "GENERATED", 4000)
    short, long = (
        load_problems(Run(GRPOConfig(steps=steps, eval_problems=0)))[0] for steps in (1, 600)
    )
    assert short == long and len(set(short)) == len(short)


def test_a_problem_that_is_given_twice_counts_once(tmp_path, capsys):
    row = {"story": "s", "question": "q", "options": ["a", "b"], "answer": "A"}
    rows = [row, row | {"story": "t"}, row | {"id": "again"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems, _ = load_problems(Run(GRPOConfig(eval_problems=0), data=[tmp_path / "x.jsonl"]))
    assert [p.story for p in problems] == ["s", "t"]
    assert "1 problems repeat others and are left out" in capsys.readouterr().out


def test_files_give_up_whole_stories_for_evaluation(tmp_path, capsys):
    rows = [
        {"story": f"s{i // 2:c}", "question": f"q{i}", "options": ["a", "b"], "answer": "A"}
        for i in range(2 * 0x4E00, 2 * 0x4E00 + 60)
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    run = replace(run_in(tmp_path, TINY, eval_problems=50), data=(file,))
    problems, held_out = load_problems(run)
    assert (len(problems), len(held_out["held out"])) == (54, 6)  # three of thirty stories
    assert not {p.story for p in problems} & {p.story for p in held_out["held out"]}
    other = tmp_path / "other.jsonl"
    other.write_text(
        "\n".join(json.dumps(row | {"story": row["story"].upper() + "."}) for row in rows[:10])
    )
    problems, held_out = load_problems(
        replace(run, eval_data=(other,), config=replace(run.config, eval_problems=5))
    )
    assert [p.question for p in held_out["held out"]] == [
        row["question"] for row in rows[:10:2]
    ] and len(problems) == 60
    assert (
        "WARNING: 10 of 60 training problems have a story of the evaluation data, as has problems/mine mine:1"
        in capsys.readouterr().out
    )


def test_micro_batches_hold_every_completion_once_and_keep_the_budget():
    a, b, c = (Completion([1] * n, [0.0] * n, True) for n in (5, 20, 5))
    rollout = [
        Group([0] * 10, [a, b, c], [0.1, 0.2, 0.3]),
        Group([0] * 30, [a, b, c], [0.4, 0.5, 0.6]),
    ]
    # 10 + 5 + 20 + 5 = 40 fit into 50, and then 30 + 5, 30 + 20, 30 + 5
    assert list(micro_batches(rollout, 50)) == [
        [rollout[0]],
        [Group([0] * 30, [a], [0.4])],
        [Group([0] * 30, [b], [0.5])],
        [Group([0] * 30, [c], [0.6])],
    ]
    assert list(micro_batches(rollout, 10**6)) == [rollout]
    assert [len(piece[0].completions) for piece in micro_batches(rollout, 1)] == [1] * 6


def test_minibatches_deal_the_groups_out_in_turn():
    assert list(minibatches(["a", "b", "c"], 2)) == [["a", "c"], ["b"]]


FAULTY = (("", "unclosed think block"), ("two answers", ""))


def test_the_log_line_is_a_mean_over_completions():
    groups = [
        [Completion([1, 2], [0.0, 0.0], True), Completion([3], [0.0], False)] for _ in range(2)
    ]
    parts = dict(fmt=1.0, out=1.0, struct=0.5, content=None, len=1.0, new=0.25, tau=0.2)
    rewards = [
        [Reward(1.0, parts), Reward(2.0, parts | {"out": 0.0})],
        [Reward(1.5, parts), Reward(1.5004, parts)],  # as good as equal: flat
    ]
    responses = [[Response("", None, fault=fault) for fault in pair] for pair in FAULTY]
    flat = flat_groups(torch.tensor([[1.0, 2.0], [1.5, 1.5004]], dtype=torch.float64))
    line = log_line(7, groups, responses, rewards, flat)
    assert line.pop("reward") == pytest.approx(6.0004 / 4)
    faults = {name: share for name, share in line.items() if name.startswith("fault") and share}
    assert faults == {"fault, cut off": 0.25, "fault, two answers": 0.25}
    assert {name: value for name, value in line.items() if not name.startswith("fault")} == {
        **dict(step=7, fmt=1.0, out=0.75, struct=0.5, content=None, len=1.0, new=0.25, tau=0.2),
        **dict(flat_groups=0.5, length=1.5, finished=0.5, completions=4),
    }


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_micro_batched_updates_are_those_of_the_full_batch(reduction):
    tokenizer, results = Tokenizer(TINY), []
    for budget in (10**6, 300):
        model, reference = load_model(TINY), load_model(TINY)
        problems = generate_problems(4, seed=0)
        prompts = [tokenizer.chat(build_messages(p)) for p in problems]
        groups = generate(model, prompts, 3, 24, stop_ids=tokenizer.stop_ids)
        advantages = torch.tensor([[1.0, -1.0, 0.5]]).repeat(4, 1)
        rollout = list(map(Group, prompts, groups, advantages.tolist()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = replace(CONFIG, reduction=reduction, token_budget=budget, max_grad_norm=1e9)
        metrics = update(Policies(model, reference, optimizer), rollout, config)
        results.append((metrics, [p.detach().clone() for p in model.parameters()]))
    (whole, updated), (pieces, same) = results
    assert pieces == pytest.approx(whole, rel=1e-4, abs=1e-5)
    for a, b in zip(updated, same):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert not any(
        torch.equal(a, start) for a, start in zip(updated, weights(TINY))
    )  # they did move


def test_a_planted_reward_is_learned(tmp_path, planted, untrained):
    train(run_in(tmp_path, untrained, steps=12, prompts=4, group_size=8, lr=3e-3, save_every=12))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    first, last = (sum(line["reward"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    assert first < 0.6 and last > 0.7, (first, last)
    assert (
        max(line["logprob_drift"] for line in lines) < 1e-4
    )  # the sampler's log-probabilities are the trainer's
    assert all(
        not torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "checkpoint-000012"), weights(untrained))
    )


def weights(path):
    return list(load_model(path).parameters())


def test_transformers_loads_a_trained_checkpoint_that_was_moved(tmp_path, planted, untrained):
    transformers = pytest.importorskip("transformers")
    train(run_in(tmp_path, untrained))
    model = load_model(tmp_path / "checkpoint-000004")
    shutil.move(tmp_path / "checkpoint-000004", tmp_path / "elsewhere")
    tokens = torch.tensor(
        [Tokenizer(tmp_path / "elsewhere").encode("Anna put the ball in the box.")]
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "elsewhere", dtype=torch.float32
    )
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(model(tokens), load_model(untrained)(tokens))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_and_the_resumed_run_is_the_unbroken_one(
    tmp_path, planted, untrained, monkeypatch, capsys, number
):
    long = dict(
        steps=8, save_every=1
    )  # long enough that the checkpoint resumed from is cleared away
    train(run_in(tmp_path / "whole", untrained, **long))
    step = grpo.train_step

    def interrupted(*arguments):
        metrics = step(*arguments)
        if arguments[-1] == 2:
            os.kill(os.getpid(), number)
        return metrics

    monkeypatch.setattr(grpo, "train_step", interrupted)
    train(run_in(tmp_path / "broken", untrained, **long))
    assert "stopped after step 3 of 8" in capsys.readouterr().out
    monkeypatch.setattr(grpo, "train_step", step)
    assert checkpoints(tmp_path / "broken")[-1].name == "checkpoint-000003"
    train(run_in(tmp_path / "broken", untrained, **long), resume=True)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    for line in sum(logs, []):
        del line["seconds"], line["tokens_per_second"]
    assert logs[0] == logs[1]
    whole, broken = (weights(tmp_path / name / "checkpoint-000008") for name in ("whole", "broken"))
    assert all(torch.equal(a, b) for a, b in zip(whole, broken))


def test_only_a_second_ctrl_c_stops_at_once(monkeypatch):
    """A terminal that is closed sends SIGHUP, its shell too; and there is no place to write to."""

    def gone(*_, **__):
        raise OSError(5, "Input/output error")

    before = signal.getsignal(signal.SIGHUP)
    with grpo.Interrupt() as interrupt:
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        monkeypatch.setattr(grpo.tqdm, "write", gone)
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert interrupt.asked and sys.stdout.name == os.devnull
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        with grpo.Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_goes_on_another_day_asks_the_same_questions(tmp_path, untrained, monkeypatch):
    """The template writes the date, as Llama's does."""
    model = shutil.copytree(untrained, tmp_path / "model")
    template = Tokenizer(model).template
    (model / "chat_template.jinja").write_text('{{ strftime_now("%d %b %Y") }} ' + template)
    changes = dict(steps=3, save_every=1, eval_problems=2)
    clock, prompts, real = [1764115200 - 60], [], grpo.generate
    monkeypatch.setattr(time, "time", lambda: clock[0])  # 23:59 UTC on 25 November 2025

    def recorded(model, asked, **settings):
        prompts.append(asked)
        return real(model, asked, **settings)

    monkeypatch.setattr(grpo, "generate", recorded)
    train(run_in(tmp_path / "whole", model, **changes))
    whole = list(prompts)
    assert Tokenizer(model).decode(whole[0][0]).startswith("25 Nov 2025")

    step = grpo.train_step

    def interrupted(*arguments):
        clock[0] += 3600
        if arguments[-1] == 1:
            raise KeyboardInterrupt
        return step(*arguments)

    prompts.clear()
    monkeypatch.setattr(grpo, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run_in(tmp_path / "broken", model, **changes))
    monkeypatch.setattr(grpo, "train_step", step)
    train(run_in(tmp_path / "broken", model, **changes), resume=True)
    assert prompts == whole
    results = [
        json.loads((tmp_path / name / "after.json").read_text())["test"]["responses"]
        for name in ("whole", "broken")
    ]
    assert results[0] == results[1]
    assert Tokenizer(model).render([]).startswith("26 Nov 2025")


def test_settings_that_would_train_something_else_are_refused():
    for changes, message in [
        (dict(group_size=1), "--group-size 1: expected"),
        (dict(reduction="mean"), "--reduction mean: expected"),
        (dict(minibatches=3), "--minibatches 3 > --prompts 2"),
        (dict(steps=0), "--steps 0: expected"),
        (dict(clip_eps=-1.0), "--clip-eps -1.0: expected"),
        (dict(lr=float("nan")), "--lr nan: expected"),
        (dict(max_grad_norm=0.0), "--max-grad-norm 0.0: expected"),
        (dict(beta=float("inf")), "--beta inf: expected"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            replace(CONFIG, **changes)


def test_the_command_line(tmp_path, command):
    rows = [
        {"story": f"s{letter}", "question": "q", "options": ["a", "b"], "answer": "A"}
        for letter in "abcdefghijkl"
    ]
    data, bench = tmp_path / "mine.jsonl", tmp_path / "bench.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    bench.write_text(
        "\n".join(
            json.dumps(
                {
                    "STORY": "s",
                    "故事": "s",
                    "QUESTION": "q",
                    "问题": "q",
                    "OPTION-A": "a",
                    "OPTION-B": "b",
                    "选项A": "a",
                    "选项B": "b",
                    "答案\nANSWER": "A",
                }
            )
            for _ in range(12)
        )
    )
    small = [
        "--steps",
        "1",
        "--prompts",
        "2",
        "--group-size",
        "2",
        "--max-new-tokens",
        "8",
        "--min-length",
        "4",
    ]
    code, out, err = command(
        grpo.main, "--data", str(data), str(bench), "--out", str(tmp_path / "run"), *small
    )
    assert code == 0, err
    assert "12 problems (problems)" in err + out and f"R_content: {TINY_CONTENT}" in err + out
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["tau"] == 1.0 and 0 <= line["content"] <= 1 and line["seconds"]["content"] > 0
    assert "WARNING: ToMBench asks in so many words that its items never be trained on" in err + out
    assert "held out, before" in out and "next: python eval.py --model" in out
    page = tmp_path / "run" / "report.html"
    assert out.splitlines()[-1].startswith(f"open {page} to see")
    assert "<h1>Run run</h1>" in page.read_text() and "<svg" in page.read_text()
    assert page.read_text().count("<details") == 1  # of the held-out problems
    assert (
        json.loads((tmp_path / "run" / "checkpoint-000001" / "state.json").read_text())["identity"][
            "max_length"
        ]
        == 8
    )
    for arguments, message in [
        (("--out", str(tmp_path / "run")), "holds a run already"),
        (("--out", str(tmp_path / "run"), "--resume", *small, "--lr", "1"), "cannot resume"),
        (("--out", str(tmp_path / "none"), "--resume"), "holds no checkpoint"),
        (("--model", str(tmp_path / "none")), "no such model folder"),
        (("--group-size", "1"), "--group-size 1: expected"),
        (("--steps", "many"), "invalid int value"),
        (("--without", "form"), "--without form: expected any of"),
        (("--content", str(TINY)), "is a language model; expected a content model"),
        (("--model", str(TINY_CONTENT)), "expected a language model"),
        (("--w-struct", "nan"), "--w-struct nan: expected"),
        (
            ("--data", str(data), "--out", str(tmp_path / "none"), "--prompts", "200"),
            "lower --prompts 200",
        ),
    ]:
        code, out, err = command(grpo.main, *arguments)
        assert (
            code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
        ), (arguments, err)
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------- the first step, the warm-up


def test_the_first_rollout_says_what_to_do(tmp_path, untrained, capsys):
    """A policy with random weights writes nothing that can be read, up to the limit."""
    train(run_in(tmp_path / "a", untrained, steps=2))
    told = capsys.readouterr().out
    assert told.count("first rollout: 0% well-formed, ") == 1
    assert told.count("cut off") == 1 and told.count("100% of the groups without spread") == 1
    assert told.count("a response: ") == 1
    for flags in ("--warm-up and --instructions", "--max-new-tokens, which is 24", "no spread"):
        assert told.count(flags) == 1
    line = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[1])
    assert line["fault, cut off"] + line["fault, no think block"] == 1
    # nothing to complain about
    train(run_in(tmp_path / "b", TINY, steps=1, max_new_tokens=160, group_size=8, prompts=4))
    told = capsys.readouterr().out
    assert "first rollout: " in told and "WARNING" not in told


def test_a_warm_up_lowers_the_loss_that_torch_computes(tmp_path, untrained):
    """The first loss is the cross entropy of the traces' tokens, and more updates lower it."""
    changes = dict(warm_up=3, warm_up_lr=3e-3, steps=1, save_every=2, token_budget=300)
    changes |= dict(warmup_steps=10, max_new_tokens=160)
    train(run_in(tmp_path, untrained, **changes))
    log = (tmp_path / "warm-up" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    assert [line["lr"] for line in lines] == pytest.approx([3e-4, 6e-4, 9e-4])

    model, tokenizer = load_model(untrained), Tokenizer(untrained)
    stories = generate_stories(grpo.GENERATED + 24, 0)[grpo.GENERATED :]
    order = problems_of_step(stories, 0, 8, 0)
    total = tokens = 0
    for story in order:
        prompt = tokenizer.chat(build_messages(story.problem))
        ids = tokenizer.encode(story.trace) + [tokenizer.backend.token_to_id("<|im_end|>")]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        total += float(
            torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")
        )
        tokens += len(ids)
    assert lines[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert lines[2]["loss"] < lines[1]["loss"] < lines[0]["loss"]
    # GRPO begins from the model of the warm-up, and asks about other stories
    training = {p.story for p in load_problems(run_in(tmp_path, untrained))[0]}
    assert not training & {story.problem.story for story in stories}
    warm = load_model(tmp_path / "warm-up" / "checkpoint-000003")
    assert not torch.equal(warm.norm.weight, model.norm.weight)


def test_a_warm_up_that_was_interrupted_goes_on(tmp_path, untrained, monkeypatch):
    changes = dict(warm_up=4, steps=2, save_every=1, beta=0.04, max_new_tokens=160)
    train(run_in(tmp_path / "whole", untrained, **changes))
    imitate = grpo.imitate

    def interrupted(policies, examples, step, config):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return imitate(policies, examples, step, config)

    monkeypatch.setattr(grpo, "imitate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run_in(tmp_path / "broken", untrained, **changes))
    monkeypatch.setattr(grpo, "imitate", imitate)
    assert [path.name for path in checkpoints(tmp_path / "broken" / "warm-up")][-1:] == [
        "checkpoint-000002"
    ]
    with pytest.raises(ValueError, match="warm-up holds a run already: --resume it"):
        train(run_in(tmp_path / "broken", untrained, **changes))
    train(run_in(tmp_path / "broken", untrained, **changes), resume=True)
    for name in ("checkpoint-000002", "warm-up/checkpoint-000004"):
        whole, broken = (weights(tmp_path / run / name) for run in ("whole", "broken"))
        assert all(torch.equal(a, b) for a, b in zip(whole, broken))
    with pytest.raises(ValueError, match="not the same run: warm_up was 4, is 5"):
        train(run_in(tmp_path / "broken", untrained, **changes | {"warm_up": 5}), resume=True)


def test_traces_of_the_users_own_data(tmp_path, untrained):
    stories = generate_stories(12, 3)
    rows = [asdict(story.problem) | {"trace": story.trace} for story in stories]
    file = tmp_path / "data.jsonl"

    def start(rows, out="run", **changes):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = dict(warm_up=1, steps=1, max_new_tokens=160) | changes
        train(replace(run_in(tmp_path / out, untrained, **changes), data=[file]))

    with pytest.raises(ValueError, match="--warm-up: 4 rows of --data have a trace; 8 or more"):
        start([row | {"trace": row["trace"] * (i < 4)} for i, row in enumerate(rows)])
    with pytest.raises(ValueError, match="problem 'x' has a trace of [0-9]+: expected a correct"):
        start([rows[0] | {"id": "x", "trace": rows[0]["trace"][:-3]}, *rows[1:]])
    with pytest.raises(ValueError, match="expected a correct response of at most 20 tokens"):
        start(rows, max_new_tokens=20)
    assert not (tmp_path / "run" / "warm-up").exists()
    start(rows)
    assert (tmp_path / "run" / "checkpoint-000001").is_dir()
    # data without traces: those of generated stories teach the form
    start([row | {"trace": ""} for row in rows], out="generated")
    warm = tmp_path / "generated" / "warm-up" / "checkpoint-000001"
    assert warm.is_dir() and (tmp_path / "generated" / "checkpoint-000001").is_dir()


def test_a_warm_up_that_goes_on_another_day_and_one_whose_last_update_is_skipped(
    tmp_path, untrained, monkeypatch
):
    model = shutil.copytree(untrained, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        '{{ strftime_now("%j") }} ' + Tokenizer(model).template
    )
    clock, days, imitate = [0.0], set(), grpo.imitate  # day 001
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def interrupted(policies, examples, step, config):
        days.update(Tokenizer(model).decode(example.prompt)[:3] for example in examples)
        if step in (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return imitate(policies, examples, step, config)

    monkeypatch.setattr(grpo, "imitate", interrupted)
    changes = dict(warm_up=3, steps=1, save_every=1, max_new_tokens=160)
    for resume in (False, True):  # in the last update, too
        with pytest.raises(KeyboardInterrupt):
            train(run_in(tmp_path / "run", model, **changes), resume)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        clock[0] += 86400

    def skipped(policies, examples, step, config):
        days.update(Tokenizer(model).decode(example.prompt)[:3] for example in examples)
        return imitate(policies, examples, step, config) | {"skipped": int(step == 3)}

    monkeypatch.setattr(grpo, "imitate", skipped)
    train(run_in(tmp_path / "run", model, **changes), resume=True)
    state = json.loads((tmp_path / "run" / "checkpoint-000001" / "state.json").read_text())
    assert days == {"001"} and state["moment"] == 0.0 and state["step"] == 1
    warm = tmp_path / "run" / "warm-up" / "checkpoint-000003" / "state.json"
    assert json.loads(warm.read_text())["step"] == 3
    # the last update is skipped: what the others made is kept, alone
    train(run_in(tmp_path / "skip", model, **changes | {"warm_up": 4}))
    names = [path.name for path in checkpoints(tmp_path / "skip" / "warm-up")]
    assert names == ["checkpoint-000004"]


def test_other_instructions_are_asked_with_and_kept(tmp_path, monkeypatch, capsys):
    """The tiny template leaves the system message out, so the messages themselves are looked at."""
    (tmp_path / "told.txt").write_text("Answer in two blocks.\n")
    seen, chat = set(), Tokenizer.chat

    def recorded(self, messages, thinking=True):
        seen.update(m["content"] for m in messages if m["role"] == "system")
        return chat(self, messages, thinking)

    monkeypatch.setattr(Tokenizer, "chat", recorded)
    run = run_in(tmp_path / "run", TINY, steps=1, eval_problems=2, warm_up=1, max_new_tokens=160)
    train(replace(run, instructions=tmp_path / "told.txt"))
    assert seen == {"Answer in two blocks."}
    kept = tmp_path / "run" / "instructions.txt"
    assert kept.read_text() == "Answer in two blocks."
    assert f"--instructions {kept}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not the same run: instructions was"):
        train(run, resume=True)


def test_the_page_draws_accuracy_from_before_to_after_and_what_was_logged():
    log = [
        {"step": 0, "reward": 0.5, "kl": None, "eval_test": {"accuracy": 0.25}},
        {"step": 1, "reward": 1.5, "kl": 0.125},
    ]
    charts = grpo.curves(log, 2, {"test": {"accuracy": 0.0}}, {"test": {"accuracy": 1.0}})
    assert charts["accuracy on held-out problems"] == {"test": [(0, 0.0), (1, 0.25), (2, 1.0)]}
    assert charts["reward"] == {"reward": [(1, 0.5), (2, 1.5)]}
    assert charts["KL to the reference"] == {"kl": [(2, 0.125)]}
    assert set(charts["terms of the reward"]) == set(grpo.TERMS)
    assert grpo.curves([], 1, {}, {})["accuracy on held-out problems"] == {}
