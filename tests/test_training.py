"""The training step at scale: packed prompts, chunked log-probabilities, the memory plan, several processes, runs that are killed."""

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

import grpo
import model as sampler
from grpo import (
    GRPOConfig,
    Group,
    Policies,
    Run,
    checkpoints,
    grpo_loss,
    memory_plan,
    newest_checkpoint,
)
from grpo import train, update
from model import ChunkedLogProbs, Completion, Diverged, Transformer, generate
from model import logprobs_and_entropy, parse_config
from rewards import RewardConfig
from socialr1 import TINY, TINY_CONTENT, generate_problems

ROOT = Path(__file__).resolve().parents[1]
RAW = dict(
    model_type="qwen3",
    architectures=["Qwen3ForCausalLM"],
    vocab_size=4000,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=True,
    max_position_embeddings=1024,
)
UNTIMED = ("seconds", "tokens_per_second")


def random_model(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(parse_config(RAW | changes))


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(RAW["vocab_size"]) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_naive_batch(recompute):
    rng = random.Random(1)
    model = random_model(num_hidden_layers=2, tie_word_embeddings=False, vocab_size=4000).double()
    model.checkpointing = recompute
    prompts = [random_ids(rng, n) for n in (40, 7, 23)]
    groups = [
        [random_ids(rng, n) for n in lengths] for lengths in ((30, 1, 17), (5, 64, 2), (11, 12, 13))
    ]
    advantages = torch.tensor([1.0, -1.3, 0.3, 0.8, -0.2, -0.6, 1.1, 0.0, -1.1])

    def loss_of(logprobs, mask):
        noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)) * 0.1
        return grpo_loss(
            logprobs, logprobs.detach() + noise, logprobs.detach() - 2 * noise, advantages, mask
        )[0]

    packed, mask, entropies = logprobs_and_entropy(model, prompts, groups)
    gradients = torch.autograd.grad(loss_of(packed, mask), list(model.parameters()))

    # naive: every completion behind a copy of its prompt, padded on the right, logits of everything
    rows = [(prompt, ids) for prompt, group in zip(prompts, groups) for ids in group]
    tokens = torch.zeros(len(rows), max(len(p) + len(c) for p, c in rows), dtype=torch.long)
    for row, (p, c) in zip(tokens, rows):
        row[: len(p) + len(c)] = torch.tensor(p + c)
    everything = model(tokens).log_softmax(dim=-1)  # (B, L, V)
    plain = torch.zeros(mask.shape, dtype=torch.float64)
    plain_entropies = torch.zeros(mask.shape, dtype=torch.float64)
    for i, (p, c) in enumerate(rows):
        ahead = everything[i, len(p) - 1 : len(p) + len(c) - 1]
        plain[i, : len(c)] = ahead.gather(1, torch.tensor(c)[:, None])[:, 0]
        plain_entropies[i, : len(c)] = -(ahead.exp() * ahead).sum(dim=1).detach()
    torch.testing.assert_close(packed, plain, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(entropies, plain_entropies, atol=1e-9, rtol=1e-9)
    for (name, _), ours, theirs in zip(
        model.named_parameters(),
        gradients,
        torch.autograd.grad(loss_of(plain, mask), list(model.parameters())),
    ):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm(), name


def attention_by_definition(
    q, k, v, starts, key_starts, longest, longest_keys, *, window_size, enable_gqa
):
    """What torch documents of varlen_attn, whose kernel needs a GPU; causal as in FlashAttention."""
    assert window_size == (-1, 0) and enable_gqa and starts.dtype == key_starts.dtype == torch.int32
    starts, key_starts = starts.tolist(), key_starts.tolist()
    outputs = []
    for i in range(len(starts) - 1):
        queries = q[starts[i] : starts[i + 1]]
        keys, values = (x[key_starts[i] : key_starts[i + 1]] for x in (k, v))
        assert len(queries) <= longest and len(keys) <= longest_keys
        keys, values = (
            x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * q.shape[2] ** -0.5
        places = torch.arange(len(keys), device=q.device)
        scores = scores.masked_fill(places > places[-len(queries) :, None], -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=2), values))
    return torch.cat(outputs)


def test_attention_in_one_kernel_is_that_of_the_loop(monkeypatch):
    rng = random.Random(3)
    model = random_model(num_hidden_layers=2).double()
    prompts = [random_ids(rng, n) for n in (12, 1, 5)]
    groups = [[random_ids(rng, n) for n in lengths] for lengths in ((6, 1, 9), (0, 3), (2,))]
    found = []
    for at_once in (False, True):
        if at_once:
            monkeypatch.setattr(sampler, "varlen_attn", attention_by_definition)
            monkeypatch.setattr(sampler, "has_one_kernel", lambda x: True)
        logprobs, mask, _ = logprobs_and_entropy(model, prompts, groups)
        weights = torch.linspace(-1, 1, mask.numel(), dtype=torch.float64).view(mask.shape)
        gradients = torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()))
        found.append((logprobs.detach(), *gradients))
    for loop, kernel in zip(*found):
        torch.testing.assert_close(kernel, loop, atol=1e-10, rtol=1e-10)


def test_chunked_log_probabilities_are_exact(monkeypatch):
    monkeypatch.setattr(sampler, "logits_at_once", lambda device: 30)  # 3 rows at a time
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 5), (10, 5))
    )
    targets = torch.tensor([0, 9, 3, 3, 7, 1, 0])
    chosen, entropies = ChunkedLogProbs.apply(hidden, weight, targets)
    everything = (hidden @ weight.T).log_softmax(dim=1)
    torch.testing.assert_close(chosen, everything[torch.arange(7), targets])
    torch.testing.assert_close(
        entropies, torch.distributions.Categorical(logits=everything).entropy()
    )
    assert torch.autograd.gradcheck(
        lambda h, w: ChunkedLogProbs.apply(h, w, targets)[0], (hidden, weight)
    )
    monkeypatch.setattr(
        sampler, "logits_at_once", lambda device: 1
    )  # less than a row: one row at a time
    torch.testing.assert_close(ChunkedLogProbs.apply(hidden, weight, targets)[0], chosen)


def memory_peak(work) -> int:
    """Bytes of tensors that `work` holds at a time, beyond what is there already."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [
        event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    live = high = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        high = max(high, live)
    return high


def test_the_loss_never_holds_more_logits_than_a_chunk():
    weight = torch.randn(151936, 8, requires_grad=True)

    def peak(count):
        hidden = torch.randn(count, 8, requires_grad=True)
        return memory_peak(
            lambda: ChunkedLogProbs.apply(hidden, weight, torch.arange(count))[0].sum().backward()
        )

    few, more = peak(100), peak(300)
    chunk = 4 * sampler.logits_at_once(weight.device)
    assert chunk < few < 2.5 * chunk + 4 * weight.nbytes
    assert more - few < 2e6  # 1 MB per 100 tokens; their logits alone would take 60 MB each time


@pytest.fixture
def sharded():
    """FSDP with a single process."""
    grpo.join_processes("cpu")
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute, budget", [(True, 8192), (False, 8192), (True, 500)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_plan_foretells_the_peaks(request, recompute, budget, dtype):
    rng, model, reference = random.Random(0), random_model(), random_model().requires_grad_(False)
    if dtype == "bfloat16":
        request.getfixturevalue("sharded")
        for some in (model, reference):
            grpo.shard(some, replace(run_in(Path()), dtype=dtype))
    model.checkpointing = recompute
    config = GRPOConfig(
        prompts=4, group_size=4, max_new_tokens=60, recompute=recompute, token_budget=budget
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    prompts = [random_ids(rng, 100) for _ in range(4)]
    found = []
    sampling = memory_peak(
        lambda: found.append(
            generate(grpo.full_copy(model, replace(run_in(Path()), dtype=dtype)), prompts, 4, 60)
        )
    )
    rollout = list(map(Group, prompts, found[0], torch.randn(4, 4).tolist()))
    update(Policies(model, reference, optimizer), rollout, config)  # AdamW's states come into being
    updating = memory_peak(lambda: update(Policies(model, reference, optimizer), rollout, config))
    held = [
        *model.parameters(),
        *reference.parameters(),
        *(x for states in optimizer.state.values() for x in states.values()),
    ]
    held = sum(x.to_local().nbytes if isinstance(x, DTensor) else x.nbytes for x in held)
    run = replace(run_in(Path()), config=config, dtype=dtype)
    plan = memory_plan(model.config, run, 100)
    moments = [sum(sizes[i] for sizes in plan.values()) for i in range(4)]
    assert moments[0] == pytest.approx(held + sampling, rel=0.15)
    assert max(moments[1:]) == pytest.approx(held + updating, rel=0.15)
    without = memory_plan(model.config, replace(run, config=replace(config, beta=0.0)), 100)
    assert not any(without["reference policy"]) and any(plan["reference policy"])


def test_the_plan_of_a_large_model_loads_nothing(tmp_path, command, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text((TINY / name).read_text())
    large = dict(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    (tmp_path / "config.json").write_text(
        json.dumps(RAW | large | dict(vocab_size=151936, max_position_embeddings=4096))
    )
    flags = ("--model", tmp_path, "--device", "cuda", "--out", tmp_path / "out")
    code, out, err = command(grpo.main, *flags, "--plan", "80")
    assert code == 0 and "fits into 80.0 GiB" in out, err
    assert re.search(r"^weights \(fp32\) +14\.98", out, re.M) and re.search(
        r"^AdamW's states \(fp32\) +29\.97", out, re.M
    )  # 4.02e9 x 4, x 8
    assert "does NOT fit into 24.0 GiB" in command(grpo.main, *flags, "--plan", "24")[1]
    assert "fits into 24.0 GiB" in command(grpo.main, *flags, "--plan", "24", "--offload")[1]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (
        "8 prompts of at most" in command(grpo.main, *flags, "--plan", "80")[1]
    )  # 4 cannot be shared by eight
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert re.search(
        r"^weights \(fp32\) +3\.75", command(grpo.main, *flags, "--plan", "80")[1], re.M
    )
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ whole runs


SMALL = (
    "--steps",
    "6",
    "--prompts",
    "4",
    "--group-size",
    "3",
    "--minibatches",
    "4",
    "--max-new-tokens",
    "130",
    "--token-budget",
    "900",
    "--eval-problems",
    "0",
    "--eval-every",
    "0",
    "--save-every",
    "1",
    "--lr",
    "3e-4",
)


FOLDER = tempfile.TemporaryDirectory()  # removed in the end


@cache
def story_file() -> Path:
    """Forty problems in a file: a run on them begins seconds earlier than one on 4000 of its own."""
    rows = [asdict(problem) for problem in generate_problems(40, 0)]
    file = Path(FOLDER.name) / "stories.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def start(out: Path, *flags: str, processes: int = 1) -> subprocess.Popen:
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launcher, str(ROOT / "grpo.py"), "--out", str(out), *SMALL]
    command += ["--data", str(story_file()), *flags]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output


def log_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in UNTIMED} for line in lines]


def tensors_of(out: Path, step: int = 6) -> dict[str, torch.Tensor]:
    files = [
        out / f"checkpoint-{step:06d}" / name
        for name in ("model.safetensors", "optimizer.safetensors")
    ]
    return {
        f"{file.name}: {key}": value for file in files for key, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finish(start(out))
    assert (
        sum(line["grad_norm"] > 0.01 for line in log_of(out)) >= 5
    )  # there is something to compare
    return out


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, unbroken):
    rng, out, kills = random.Random(), tmp_path / "run", []
    while len(kills) < 4:
        process = start(out, *(["--resume"] if out.is_dir() else []))
        for line in process.stdout:
            if "steps to go" in line:  # everything is loaded; a step takes about half a second
                break
        kills.append(rng.uniform(0, 1.5))
        time.sleep(kills[-1])
        process.kill()
        process.communicate()
    finish(start(out, "--resume"))
    assert log_of(out) == log_of(unbroken), kills
    ours, theirs = tensors_of(out), tensors_of(unbroken)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) for key in theirs
    ), kills


def test_two_processes_are_one(tmp_path, unbroken):
    """With as many minibatches as prompts: in each, one process has nothing to do but to take part in the exchanges."""
    out = tmp_path / "run"
    finish(start(out, "--keep", "6", processes=2))

    def same():
        for ours, theirs in zip(log_of(out), log_of(unbroken), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        ours, theirs = tensors_of(out), tensors_of(unbroken)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            relative = (
                1e-5 if key.startswith("model") else 1e-4
            )  # rounding errors of gradients stand out in AdamW's states
            assert (ours[key] - value).norm() <= relative * value.norm(), key

    same()
    for processes in (1, 2):  # one goes on where two were, and two where one was
        for path in checkpoints(out)[3:]:
            path.rename(out / f"gone-{processes}-{path.name}")
        finish(start(out, "--keep", "6", "--resume", processes=processes))
        same()


def test_bfloat16_computes_over_float32_weights_in_two_processes_that_recompute(tmp_path):
    out = tmp_path / "run"
    finish(start(out, "--dtype", "bfloat16", "--recompute", "--steps", "2", processes=2))
    lines, tensors = log_of(out), tensors_of(out, 2)
    assert all(
        1e-3 < line["logprob_drift"] < 0.5 for line in lines
    )  # sampler and trainer both compute in bf16; in fp32 it is below 1e-4
    assert all(value.dtype == torch.float32 for value in tensors.values())
    moved = tensors["model.safetensors: model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(
        moved, moved.bfloat16().float()
    )  # updates much smaller than bf16's grid are kept


CONFIG = GRPOConfig(
    steps=4,
    prompts=2,
    group_size=4,
    lr=1e-3,
    warmup_steps=2,
    max_new_tokens=24,
    eval_problems=0,
    eval_every=0,
    save_every=1,
    recompute=False,
)


def run_in(folder: Path, **changes) -> Run:
    return Run(replace(CONFIG, **changes), RewardConfig(), out=folder)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_torn_checkpoint_is_noticed_and_the_one_before_it_used(tmp_path, capsys, name):
    train(run_in(tmp_path))
    # the last two are kept
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-000003",
        "checkpoint-000004",
    ]
    assert newest_checkpoint(tmp_path)[1]["step"] == 4
    file = checkpoints(tmp_path)[1] / name
    file.write_bytes(file.read_bytes()[:-10])
    path, state = newest_checkpoint(tmp_path)
    assert (path.name, state["step"]) == ("checkpoint-000003", 3)
    assert f"WARNING: {file}: not " in "".join(capsys.readouterr())
    torn = path / name
    torn.write_bytes(torn.read_bytes()[:-10])
    with pytest.raises(ValueError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path)


def test_only_checkpoints_of_the_run_are_resumed_from_and_removed(tmp_path, capsys):
    (tmp_path / "checkpoint-best").mkdir(parents=True)
    (tmp_path / "checkpoint-000003-mine").mkdir()
    (tmp_path / ".checkpoint-000003.new").mkdir()
    (tmp_path / ".checkpoint-000003.new" / "model.safetensors").write_text(
        "of a run that was killed"
    )
    train(run_in(tmp_path))
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {
        "checkpoint-best",
        "checkpoint-000003-mine",
        "checkpoint-000003",
        "checkpoint-000004",
    }
    (
        tmp_path / "checkpoint-000004" / "state.json"
    ).unlink()  # as a kill while it was being removed may leave it
    assert newest_checkpoint(tmp_path)[
        0
    ].name == "checkpoint-000003" and "checkpoint-000004/state.json" in "".join(capsys.readouterr())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, command):
    with pytest.raises(Diverged, match="step 1: the weights are not finite, and are not saved"):
        train(run_in(tmp_path / "a", lr=1e38, warmup_steps=0, steps=3))
    assert not checkpoints(tmp_path / "a")
    flags = ("--steps", "3", "--lr", "1e38", "--warmup-steps", "0", "--prompts", "2")
    flags += ("--group-size", "4", "--max-new-tokens", "24", "--eval-problems", "0")
    code, _, err = command(grpo.main, *flags, "--save-every", "1", "--out", tmp_path / "b")
    assert (
        code == 2 and "not finite" in err and f"begin a new run with --model {TINY}, another" in err
    )


def test_changed_files_are_noticed_on_resume(tmp_path, command):
    rows = [
        {"story": f"s{i}", "question": "q", "options": ["a", "b"], "answer": "AB"[i % 2]}
        for i in range(4)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--steps",
        "1",
        "--prompts",
        "2",
        "--group-size",
        "2",
        "--max-new-tokens",
        "9",
        "--min-length",
        "4",
        "--eval-problems",
        "0",
    )
    assert command(grpo.main, *flags)[0] == 0
    code, _, err = command(grpo.main, *flags)
    assert code == 2 and "holds a run already" in err
    assert command(grpo.main, *flags, "--resume")[0] == 0
    # the same rows elsewhere are the same data
    data = data.rename((tmp_path / "moved").mkdir() or tmp_path / "moved" / data.name)
    flags = ("--data", data, *flags[2:])
    assert command(grpo.main, *flags, "--resume")[0] == 0
    data.write_text(data.read_text().replace('"A"', '"B"', 1))
    code, _, err = command(grpo.main, *flags, "--resume")
    assert (
        code == 2
        and "cannot resume" in err
        and "not the same run: training problems of problems/data was " in err
        and err.count("\n") == 1
    )


def test_a_run_goes_on_only_with_the_model_and_the_content_model_it_had(tmp_path):
    for name in ("x", "y"):  # two folders of the same name
        shutil.copytree(TINY if name == "x" else TINY_CONTENT, tmp_path / name / "m")
    run = replace(run_in(tmp_path / "run", steps=2), model=tmp_path / "x" / "m")
    with_content = replace(run, content=tmp_path / "y" / "m")
    train(with_content)
    with pytest.raises(ValueError, match="not the same run: content model/model.safetensors was"):
        train(run, resume=True)
    train(with_content, resume=True)
    weights = load_file(tmp_path / "x" / "m" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "x" / "m" / "model.safetensors")
    with pytest.raises(ValueError, match="not the same run: model/model.safetensors was"):
        train(with_content, resume=True)


def test_a_torn_log_is_mended(tmp_path):
    train(run_in(tmp_path, steps=2))
    log, lines = tmp_path / "metrics.jsonl", log_of(tmp_path)
    log.write_text(log.read_text().splitlines()[0] + '\n{"step": 1, "rew')
    train(run_in(tmp_path, steps=2), resume=True)
    assert log_of(tmp_path) == lines[:1]
    log.write_text(
        "torn\n" + "".join(json.dumps({"step": step}) + "\n" for step in (0, 3, 1, 7))
    )  # a gap costs nothing but itself
    assert [line["step"] for line in grpo.read_log(log)] == [0, 3, 1, 7]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """A limit on the size of files stands in for the full disk: writing fails in the middle of one."""
    step, limits = grpo.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*arguments):
        metrics = step(*arguments)
        if arguments[-1] == 2:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (4 << 20, limits[1])
            )  # the weights fit, AdamW's states do not
        return metrics

    monkeypatch.setattr(grpo, "train_step", fill)
    try:
        with pytest.raises(
            OSError,
            match=r"checkpoint-000003 could not be saved: .*the checkpoints before it are whole: make room",
        ):
            train(run_in(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [
        "checkpoint-000001",
        "checkpoint-000002",
    ] or sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "checkpoint-000001",
        "checkpoint-000002",
    ]
    monkeypatch.setattr(grpo, "train_step", step)
    path, state = newest_checkpoint(tmp_path)
    assert state["step"] == 2
    train(run_in(tmp_path), resume=True)
    assert newest_checkpoint(tmp_path)[1]["step"] == 4


def test_an_update_that_is_not_finite_is_skipped_and_some_in_a_row_stop_the_run(
    tmp_path, monkeypatch
):
    broken = set()
    real = grpo.group_advantages

    def advantages(rewards, scale=True):
        return real(rewards, scale) + (float("nan") if len(seen) in broken else 0.1)

    seen, step = [], grpo.train_step

    def count(*arguments):
        metrics = step(*arguments)
        seen.append(metrics)
        return metrics

    monkeypatch.setattr(grpo, "group_advantages", advantages)
    monkeypatch.setattr(grpo, "train_step", count)
    broken.add(1)
    train(run_in(tmp_path / "one", keep=4))
    assert [line["skipped"] for line in seen] == [0, 1, 0, 0]
    # while an update is skipped nothing is saved, and nothing cleared away
    assert [path.name for path in checkpoints(tmp_path / "one")] == [
        f"checkpoint-00000{i}" for i in (1, 3, 4)
    ]
    assert seen[1]["loss"] is None and seen[0]["loss"] is not None
    states = [tensors_of(tmp_path / "one", step) for step in (1, 3)]
    assert not all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    seen.clear()
    broken |= {2, 3}
    with pytest.raises(
        Diverged,
        match=r"step 3: updates not finite in 3 steps in a row",
    ):
        train(run_in(tmp_path / "three"))
    assert [path.name for path in checkpoints(tmp_path / "three")] == ["checkpoint-000001"]


@pytest.mark.parametrize("keep", [1, 2])
def test_an_update_that_ruins_the_weights_ruins_no_checkpoint_from_before(
    tmp_path, command, monkeypatch, keep
):
    """Step 2 makes the weights huge, but finite; they are saved, and no step can be made from them."""
    step = grpo.train_step

    def ruin(training, run, number):
        metrics = step(training, run, number)
        if number == 2:
            with torch.no_grad():
                for p in training.policies.model.parameters():
                    p *= 1e20
        return metrics

    monkeypatch.setattr(grpo, "train_step", ruin)
    flags = (
        "--steps 9 --prompts 2 --group-size 4 --max-new-tokens 40 --eval-problems 0 --save-every 1"
    )
    flags = (*flags.split(), "--keep", keep)
    code, _, err = command(grpo.main, *flags, "--out", tmp_path / "run")
    assert code == 2 and f"begin a new run with --model {tmp_path}/run/checkpoint-000002," in err
    saved = [path.name for path in checkpoints(tmp_path / "run")]
    assert saved == ["checkpoint-000001", "checkpoint-000002", "checkpoint-000003"][-keep - 1 :]
    # the advice works
    monkeypatch.setattr(grpo, "train_step", step)
    flags += ("--min-length", "16", "--lr", "1e-4", "--steps", "1", "--out", tmp_path / "new")
    assert command(grpo.main, "--model", tmp_path / "run" / "checkpoint-000002", *flags)[0] == 0


def test_what_no_loader_reads_may_change_while_a_run_is_interrupted(tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    run = replace(run_in(tmp_path / "run", steps=1), model=model)
    train(run)
    (model / "merges.txt").write_text("read by other tools")
    (model / ".git").mkdir()
    (model / "NOTES.txt").write_text("mine")
    train(replace(run, config=replace(run.config, keep=5)), resume=True)
    (model / "chat_template.jinja").write_text("{{ messages[1].content }}")
    with pytest.raises(ValueError, match="not the same run: model/chat_template.jinja was"):
        train(run, resume=True)


def test_the_order_of_the_data_is_part_of_a_run(tmp_path):
    for name, stories in (("d1/x", "ab"), ("d1/y", "cd"), ("d2/x", "ef")):
        rows = [dict(story=s, question="q", options=["a", "b"], answer="A") for s in stories]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [tmp_path / f"{name}.jsonl" for name in ("d1/x", "d1/y", "d2/x")]
    run = replace(run_in(tmp_path / "run", steps=1), data=files)
    train(run)
    train(run, resume=True)
    with pytest.raises(ValueError, match="not the same run: order of training problems was"):
        train(replace(run, data=[files[0], files[2], files[1]]), resume=True)


def test_a_last_update_that_is_skipped_leaves_the_model_that_was_evaluated(tmp_path, monkeypatch):
    real, calls = grpo.group_advantages, []

    def advantages(rewards, scale=True):
        calls.append(rewards)
        return real(rewards, scale) + (float("nan") if len(calls) == 3 else 0.1)

    monkeypatch.setattr(grpo, "group_advantages", advantages)
    train(run_in(tmp_path, steps=3))
    line = log_of(tmp_path)[-1]
    assert line["skipped"] == 1 and line["loss"] is line["kl"] is line["entropy"] is None
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-000002",
        "checkpoint-000003",
    ]
    two, three = tensors_of(tmp_path, 2), tensors_of(tmp_path, 3)
    assert all(torch.equal(two[key], three[key]) for key in two)


def test_settings_reach_the_update(tmp_path):
    """Warm-up, clipping of ratios and of gradients, no reference at beta 0, activation checkpointing."""
    policies = grpo.load_policies(run_in(tmp_path, beta=0.0, recompute=True), None)
    assert policies.reference is None and policies.model.checkpointing
    for name, changes in (("plain", {}), ("more", dict(max_grad_norm=1e-3))):
        train(
            run_in(
                tmp_path / name,
                minibatches=2,
                warmup_steps=4,
                max_new_tokens=130,
                group_size=6,
                keep=4,
                **changes,
            )
        )
    lines, clipped = log_of(tmp_path / "plain"), log_of(tmp_path / "more")
    assert [line["lr"] for line in lines] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert all(0 < line["logprob_drift"] < 1e-4 for line in lines)
    assert (
        max(line["clip_fraction"] for line in lines) > 0
    )  # the second minibatch meets a policy that the first one has changed
    squares = [
        sum(
            float(value.sum())
            for key, value in tensors_of(tmp_path / name, 1).items()
            if key.endswith("exp_avg_sq")
        )
        for name in ("plain", "more")
    ]  # .001 of the squared norms of the first step's two gradients
    assert clipped[0]["grad_norm"] > 1e-2 and squares[1] <= 2.1 * 0.001 * 1e-3**2 < squares[0]


def test_metrics_are_means_over_all_minibatches_and_micro_batches():
    rng, results = random.Random(0), []
    groups = [
        [Completion(random_ids(rng, n), [-8.2] * n, True) for n in lengths]
        for lengths in ((5, 9), (2, 7), (4, 4), (8, 1))
    ]
    rollout = [Group(random_ids(rng, 9), group, [1.0, -1.0]) for group in groups]
    for minibatches, budget in ((1, 10_000), (4, 10_000), (1, 20)):
        model = random_model(num_hidden_layers=1, tie_word_embeddings=False)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.0
        )  # the policy stays: minibatches must find the same
        config = GRPOConfig(minibatches=minibatches, token_budget=budget)
        results.append(
            update(Policies(model, random_model(num_hidden_layers=1), optimizer), rollout, config)
        )
    for name in ("kl", "entropy", "clip_fraction"):
        values = [result[name] for result in results]
        assert values[0] > 0.01 and values == pytest.approx([values[0]] * 3, rel=1e-4), name
    assert [result["loss"] for result in results] == pytest.approx(
        [results[0]["loss"]] * 3, abs=1e-5
    )


@pytest.mark.parametrize(
    "reduction, mean",
    [
        ("grpo", -(2 * 2 + 2 * 6 + 2 * 1) / 6),  # three groups of two: -2, -6 in one, -1 alone
        ("dapo", -(30 * 4 + 5 * 1) / 35),  # by tokens
    ],
)
def test_the_logged_loss_is_weighted_by_what_each_loss_was_divided_by(monkeypatch, reduction, mean):
    """Two updates with losses -4, of 4 completions with 30 tokens, and -1, of 2 with 5."""
    given = [
        dict(loss=-4.0, kl=0.0, clip_fraction=0.0, entropy=0.0, tokens=30.0),
        dict(loss=-1.0, kl=0.0, clip_fraction=0.0, entropy=0.0, tokens=5.0),
    ]
    lengths = [[[7, 8], [7, 8]], [[2, 3]]]
    model = random_model(num_hidden_layers=1)
    rollout = [
        Group([1, 2], [Completion([3] * n, [-8.0] * n, True) for n in pair], [1.0, -1.0])
        for pair in (lengths[0][0], lengths[1][0], lengths[0][1])
    ]
    monkeypatch.setattr(grpo, "micro_batches", lambda *_: iter(()))
    monkeypatch.setattr(grpo, "equally_many", lambda batches: iter(()))
    monkeypatch.setattr(
        grpo, "summed", lambda values, *_: given.pop(0) if "loss" in values else values
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = GRPOConfig(minibatches=2, reduction=reduction)
    assert update(Policies(model, None, optimizer), rollout, config)["loss"] == pytest.approx(mean)


def test_other_processes_may_have_more_micro_batches(monkeypatch):
    """Then this one computes along, for nothing: its gradients stay what they are."""
    rng, results = random.Random(0), []
    completions = [Completion(random_ids(rng, 5), [-8.0] * 5, True) for _ in range(3)]
    rollout = [Group(random_ids(rng, 9), completions, [1.0, -1.0, 0.0])]
    for more in (0, 2):
        model = random_model(num_hidden_layers=1)
        calls = []
        monkeypatch.setattr(grpo, "maximum", lambda value: value + more)
        monkeypatch.setattr(
            grpo,
            "logprobs_and_entropy",
            lambda *args: calls.append(args) or logprobs_and_entropy(*args),
        )
        grpo.accumulate(Policies(model, model, None), rollout, GRPOConfig(token_budget=10_000))
        results.append([p.grad for p in model.parameters()])
        assert len(calls) == 1 + more
    assert all(torch.equal(a, b) for a, b in zip(*results))
