"""What a GPU makes of all this: equal numbers, memory beside the plan, and speed.

    python tests/gpu.py             on one card of 80 GB, in at most ten minutes
    python tests/gpu.py PART ...    some of the parts
    python tests/gpu.py --small     a dry run with narrow matrices, on any machine

    equal     assets/tiny on the card and on the CPU: logits, tokens, log-probabilities, gradients
    runs      grpo.py in float32, in bfloat16 and with --offload, each resumed; rewards.py; eval.py
    decode    Qwen3-4B, random weights: milliseconds and kernels a token, beside transformers
    loss      a micro-batch forward and backward: new lengths, the same again, attention segment
              by segment, chunks of logits of other sizes
    step      whole steps at the default settings: seconds, memory beside the plan, drift
    offload   the same with --offload and short completions

Each part is a process of its own with a time limit, so that one which fails or hangs leaves the
others alone. What must hold is asserted; the exit code is 1 where something does not.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
import model as sampler  # noqa: E402
from grpo import GRPOConfig, Run, Training, join_processes, load_policies  # noqa: E402
from grpo import memory_plan, train_step  # noqa: E402
from model import Tokenizer, Transformer, generate, load_model  # noqa: E402
from model import logprobs_and_entropy, parse_config, write_model  # noqa: E402
from socialr1 import INSTRUCTIONS, TINY, build_messages, generate_problems  # noqa: E402

SMALL = "--small" in sys.argv
CUDA = torch.cuda.is_available()
DEVICE = "cuda:0" if CUDA else "cpu"
GIB = 2**30
BANDWIDTH = 3.35e12  # bytes a second from an H100's memory
RAW = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_act="silu")
RAW |= dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36)
RAW |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=1e6)
RAW |= dict(rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=40960)
if SMALL:
    RAW |= dict(vocab_size=2000, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    RAW |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
NEW = 48 if SMALL else 1024  # tokens in a completion
WORK = Path(tempfile.gettempdir()) / f"socialr1-gpu{'-small' * SMALL}"


def say(**facts) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}
    print("   ", json.dumps(rounded), flush=True)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(function: Callable, *arguments) -> tuple[object, float]:
    wait()
    start = time.perf_counter()
    result = function(*arguments)
    wait()
    return result, time.perf_counter() - start


def forget_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def peak() -> float | None:
    """The most GiB that tensors took on the card; None without one."""
    return torch.cuda.max_memory_allocated() / GIB if CUDA else None


def random_policy() -> Transformer:
    """Qwen3-4B with random weights, in seconds, on the card."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(parse_config(RAW))
    weights = {}
    for name, p in model.named_parameters():
        weights[name] = torch.ones(p.shape, device=DEVICE, dtype=torch.bfloat16)
        if p.dim() > 1:
            weights[name].normal_(std=0.02)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(True).eval()


def checkpoint_folder() -> Path:
    """A folder with these weights and the tokenizer of assets/tiny, whose ids are all below 1100."""
    folder = WORK / "model"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = random_policy()
        model.source = TINY
        write_model(model, folder, {n: p.detach().cpu() for n, p in model.named_parameters()})
    return folder


def prompts_of(count: int) -> list[list[int]]:
    tokenizer = Tokenizer(TINY)
    chats = [build_messages(problem) for problem in generate_problems(count, 0)]
    return [(tokenizer.chat(messages) * 3)[:231] for messages in chats]


@contextmanager
def without_graphs() -> Iterator[None]:
    recorded, sampler.recorded = sampler.recorded, lambda function, x: function
    yield
    sampler.recorded = recorded


def stops_every(tokens: int) -> tuple[int, ...]:
    """Ids at which a policy of random weights stops after about so many tokens."""
    return tuple(range(0, RAW["vocab_size"], tokens))


# ------------------------------------------------------------------------------------- the parts


def equal() -> None:
    prompts = prompts_of(4)
    completions = [
        [[(7 * i + j) % 900 for i in range(n)] for j, n in enumerate((30, 1, 17))] for _ in prompts
    ]
    for dtype, near in ((torch.float32, 1e-3), (torch.bfloat16, 0.2)):
        sides = []
        for device in ("cpu", DEVICE):
            model = load_model(TINY, device, dtype)
            logits = model(torch.tensor(prompts[:1], device=device)).float().cpu().detach()
            settings = dict(temperature=0, stop_ids=range(0, model.config.vocab_size, 40))
            greedy = generate(model, prompts, 2, 150, **settings)
            with without_graphs():
                assert generate(model, prompts, 2, 150, **settings) == greedy
            model.checkpointing = True
            logprobs, _, _ = logprobs_and_entropy(model, prompts, completions)
            logprobs.sum().backward()
            gradient = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])
            tokens = [completion.tokens for group in greedy for completion in group]
            sides.append((logits, tokens, logprobs.cpu().detach(), gradient))
        (logits, tokens, logprobs, gradient), there = sides
        same = sum(a == b for a, b in zip(tokens, there[1])) / len(tokens)
        facts = dict(
            logits=float((logits - there[0]).abs().max() / logits.abs().max()),
            logprobs=float((logprobs - there[2]).abs().max()),
            gradient=float((gradient - there[3]).norm() / gradient.norm()),
        )
        say(dtype=str(dtype), greedy_equal=same, **facts)
        assert facts["logits"] < near and facts["gradient"] < near and facts["logprobs"] < 2 * near
        assert dtype != torch.float32 or same >= 0.9  # a tie may fall the other way


def runs() -> None:
    out = WORK / "runs"
    shutil.rmtree(out, ignore_errors=True)

    def call(script: str, *flags: object) -> float:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        captured = dict(cwd=ROOT, capture_output=True, text=True)
        done, seconds = timed(lambda: subprocess.run(command, **captured))
        assert done.returncode == 0, f"{script}: {done.stderr[-2000:]}"
        return seconds

    common = "--steps 2 --save-every 1 --prompts 4 --group-size 4 --eval-problems 4 --eval-every 0"
    common = [*common.split(), "--recompute", "--token-budget", 1500, "--device", DEVICE]
    kinds = {"float32": ["--dtype", "float32"], "bfloat16": ["--dtype", "bfloat16"]}
    if CUDA:
        kinds["offload"] = ["--offload"]
    logs = {}

    def read_log(kind: str) -> list[dict]:
        return [json.loads(line) for line in open(out / kind / "metrics.jsonl")]

    for kind, flags in kinds.items():
        flags = [*common, *flags, "--out", out / kind]
        seconds = call("grpo.py", *flags)
        logs[kind] = read_log(kind)
        shutil.rmtree(out / kind / "checkpoint-000002")
        call("grpo.py", *flags, "--resume")
        names = ("loss", "grad_norm", "logprob_drift", "skipped")
        say(run=kind, seconds=seconds, **{name: logs[kind][0][name] for name in names})
        moved = abs(read_log(kind)[1]["loss"] - logs[kind][1]["loss"])
        assert moved < (1e-5 if kind == "float32" else 5e-3), (kind, moved)
    assert logs["float32"][0]["logprob_drift"] < 1e-3
    assert logs["bfloat16"][0]["logprob_drift"] < 0.5
    if CUDA:
        assert abs(logs["offload"][0]["loss"] - logs["bfloat16"][0]["loss"]) < 5e-3
    call("assets/make_pairs.py", "--count", 60, "--out", out / "pairs")
    pairs = ("--pairs", out / "pairs" / "train.jsonl")
    seconds = call("rewards.py", *pairs, "--device", DEVICE, "--out", out / "content")
    say(run="rewards.py", seconds=seconds)
    flags = ("--device", DEVICE, "--content", out / "content", "--json", out / "e.json")
    say(run="eval.py", seconds=call("eval.py", "--limit", 40, "--samples", 2, *flags))


def decode() -> None:
    model, prompts = random_policy(), prompts_of(4)
    generate(model, prompts, 5, 16)  # warm up
    short = timed(lambda: generate(model, prompts, 5, 16))[1]
    forget_peak()
    ours = timed(lambda: generate(model, prompts, 5, NEW))[1]
    per_token = (ours - short) / (NEW - 16)
    weights = sum(p.nbytes for p in model.parameters())
    facts = dict(ms_per_token=1e3 * per_token, tokens_per_second=20 / per_token)
    say(**facts, ms_to_read_the_weights=1e3 * weights / BANDWIDTH, peak_GiB=peak())
    if CUDA:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            generate(model, prompts, 5, 24)
        kernels = [e for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
        busy = sum(event.device_time for event in kernels) / 1e3
        say(kernels_per_token=len(kernels) / 24, card_busy_ms_per_token=busy / 24)
    stops = stops_every(max(NEW // 2, 1))
    spread, seconds = timed(lambda: generate(model, prompts, 5, NEW, stop_ids=stops))
    lengths = sorted(len(c.tokens) for group in spread for c in group)
    say(spread_lengths=f"{lengths[0]} to {lengths[-1]}", seconds=seconds)
    assert SMALL or per_token < 0.015
    theirs = transformers_generate(prompts, NEW // 4)
    if theirs:
        ours = timed(lambda: generate(model, prompts, 5, NEW // 4))[1]
        say(tokens=NEW // 4, transformers_seconds=theirs, ours_seconds=ours, ratio=theirs / ours)


def transformers_generate(prompts: list[list[int]], new: int) -> float | None:
    """Seconds that transformers takes for the same: bfloat16, static cache; None without it."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        print("    transformers is not installed: no comparison")
        return None
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = Qwen3ForCausalLM(Qwen3Config(**RAW)).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.tensor(prompts, device=DEVICE).repeat_interleave(5, dim=0)
    settings = dict(do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None)
    settings |= dict(cache_implementation="static", attention_mask=torch.ones_like(ids))

    def call() -> None:
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, **settings)

    call()  # compiles, if it does
    return timed(call)[1]


def loss() -> None:
    model, prompts = random_policy(), prompts_of(2)
    model.checkpointing = True

    def once(seed: int) -> None:
        model.zero_grad()
        lengths = [[NEW - 7 * i - 31 * seed % 40 for i in range(5)]]
        lengths += [[NEW - 11 * i - 17 * seed % 40 for i in range(2)]]
        rows = [[[(13 * i + n) % 900 for i in range(n)] for n in group] for group in lengths]
        logprobs_and_entropy(model, prompts, rows)[0].sum().backward()

    def measure(label: str, seed: int) -> tuple[float, float]:
        forget_peak()
        new, again = timed(once, seed)[1], timed(once, seed)[1]
        say(what=label, new_lengths=new, same_again=again, peak_GiB=peak())
        return new, again

    once(0)
    new, again = measure("as it is", 1)
    assert SMALL or new < 1.5 * again  # plans that are built for every shape would show
    one_kernel, chunk = sampler.has_one_kernel, sampler.logits_at_once
    sampler.has_one_kernel = lambda x: False
    measure("attention in a loop", 2)
    sampler.has_one_kernel = one_kernel
    for bits in (23, 25, 26, 27):
        sampler.logits_at_once = lambda device: 1 << bits
        measure(f"chunks of 2^{bits} logits", 3)
    sampler.logits_at_once = chunk


def steps(offload: bool, count: int, new: int) -> None:
    folder = checkpoint_folder()
    budget = dict(token_budget=300) if SMALL else {}
    config = GRPOConfig(max_new_tokens=new, eval_problems=0, steps=count, **budget)
    run = Run(config, model=folder, device=DEVICE, dtype="bfloat16", offload=offload and CUDA)
    run = replace(run, reward_config=replace(run.reward_config, max_length=max(new, 33)))
    join_processes(run.device)
    policies, seconds = timed(load_policies, run, None)
    tokenizer, problems = Tokenizer(folder), generate_problems(64, 0)
    tokenizer.stop_ids = stops_every(max(new // 2, 1))  # completions of all lengths
    generator = torch.Generator().manual_seed(0)

    def random_advantages(rewards: torch.Tensor, scale: bool = True) -> torch.Tensor:
        return torch.randn(rewards.shape, generator=generator)

    grpo.group_advantages = random_advantages  # random tokens earn nothing: all groups are flat
    training = Training(problems, {}, tokenizer, INSTRUCTIONS, None, policies)
    longest = max(len(tokenizer.chat(build_messages(problem))) for problem in problems)
    plan = memory_plan(policies.model.config, run, longest)
    hosted = {name for name in plan if run.offload and ("(fp32)" in name or "reference" in name)}
    on_card = [sizes for name, sizes in plan.items() if name not in hosted]
    planned = max(map(sum, zip(*on_card))) / GIB
    say(seconds_to_load=seconds, planned_peak_GiB=planned, prompt_tokens=longest)
    for step in range(count):
        forget_peak()
        line = train_step(training, run, step)
        facts = {name: line[name] for name in ("kl", "clip_fraction", "grad_norm", "length")}
        say(step=step, **line["seconds"], drift=line["logprob_drift"], **facts, peak_GiB=peak())
        assert not line["skipped"] and line["logprob_drift"] < 1
        assert not CUDA or SMALL or peak() < 1.1 * planned
    if CUDA:
        stats = torch.cuda.memory_stats()
        reserved = torch.cuda.max_memory_reserved() / GIB
        say(reserved_GiB=reserved, retries=stats["num_alloc_retries"], out=stats["num_ooms"])


def step() -> None:
    steps(offload=False, count=3, new=NEW)


def offload() -> None:
    steps(offload=True, count=1, new=max(NEW // 8, 16))


PARTS = {"equal": equal, "runs": runs, "decode": decode, "loss": loss}
PARTS |= {"step": step, "offload": offload}
# Seconds: ten minutes together.
LIMITS = {"equal": 25, "runs": 170, "decode": 130, "loss": 35, "step": 90, "offload": 150}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; else all")
    parser.add_argument("--small", action="store_true", help="narrow matrices, on any machine")
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.here:
        PARTS[args.here]()
        return
    unknown = set(args.parts) - set(PARTS)
    if unknown or not (CUDA or SMALL):
        parser.error(f"no part {unknown}" if unknown else "there is no GPU here; see --small")
    card = torch.cuda.get_device_name() if CUDA else "no GPU, a dry run on the CPU"
    print(f"{card}; torch {torch.__version__}; random weights")
    failed = []
    for part in args.parts or PARTS:
        print(f"{part}:", flush=True)
        start = time.time()
        command = [sys.executable, __file__, "--here", part, *["--small"] * SMALL]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(timeout=None if SMALL else LIMITS[part])
        except BaseException as error:  # out of time, or Ctrl-C: its own processes go, too
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        verdict = {0: "ok", None: "FAILED: out of time"}.get(process.returncode, "FAILED")
        if verdict != "ok":
            failed.append(part)
        print(f"    {verdict}, {time.time() - start:.0f} s", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
