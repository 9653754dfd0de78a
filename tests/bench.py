"""Measure speed and memory beside what one would use instead, and print the ratios.

    python tests/bench.py rollout|load|step [--model DIR] [--repeats 5] [--threads 2]
    python tests/bench.py eval --model DIR --data tombench/data [--items 200] [--new 128]

rollout   Sample 5 completions of at most 128 tokens for each of 4 prompts of 256 tokens, at
          temperature 1, with `generate` and with the `generate` of transformers.
load      Read the checkpoint into float32, with `load_model` and with transformers.
step      Do a whole step of GRPO on such a rollout in float32: sampling, reference (beta 0.04) and
          an update with AdamW; with and without activation checkpointing, which is on by default,
          in one piece and in micro-batches. The other side is TRL's GRPOTrainer.
eval      Answer the items of a benchmark greedily, with `evaluate` and with the `generate` of
          transformers, in batches of 16 that are sorted by length and padded on the left.

The other side is installed beside the project's requirements, in an environment of its own:
transformers, and trl for `step`. Without --model, the model is a Qwen3 with random weights: width
512, 8 layers, vocabulary 32000, 42M parameters. Both sides run in one call; they take turns where
one process can hold both. Times are medians, and memory is the peak of a process of its own.
"""

import argparse
import ast
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model as ours  # noqa: E402
from eval import evaluate, read_benchmark, spread_problems  # noqa: E402
from grpo import Group, GRPOConfig, Run, group_advantages, load_policies, update  # noqa: E402
from rewards import RewardConfig  # noqa: E402
from socialr1 import build_messages  # noqa: E402

P, G, PROMPT, NEW = 4, 5, 256, 128
RAW = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
# glibc keeps freed blocks of a few MiB, and memory grows by the holes between them. With this
# variable in its environment it gives them back.
LEAN = "MALLOC_MMAP_THRESHOLD_=4194304"


def write_random_model(folder: Path, **changes) -> None:
    torch.manual_seed(0)
    ours.save_model(ours.Transformer(ours.parse_config(RAW | changes)), folder)


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ------------------------------------------------------------------------- the machine's limit


def bandwidth() -> float:
    """Measure the bytes per second with which a large tensor is read."""
    x = torch.zeros(64 << 20)
    return x.nbytes / statistics.median(seconds(x.sum) for _ in range(7))


def arithmetic() -> float:
    """Measure the floating-point operations per second of a large matrix product in float32."""
    x, y = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / statistics.median(seconds(lambda: x @ y) for _ in range(7))


def least_seconds(
    config: ours.ModelConfig, lengths: np.ndarray, byte_rate: float, operation_rate: float
) -> float:
    """Compute how long a rollout with completions of these lengths takes at the very least.

    Each decoding step must read weights and caches once, and do its arithmetic: the longer of the
    two counts. The prompts are pure arithmetic.
    """
    c = config
    attention = c.hidden_size * (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    body = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    head = c.vocab_size * c.hidden_size
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # numbers per token
    attending = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim  # FLOPs per position

    prompts = 2 * body * P * PROMPT + 2 * head * P + attending * P * PROMPT**2 / 2
    total = prompts / operation_rate
    for t in range(1, int(lengths.max())):
        rows = int((lengths > t).sum())
        read = 4 * (body + head + cached * (P * PROMPT + rows * t))
        computed = rows * (2 * (body + head) + attending * (PROMPT + t))
        total += max(read / byte_rate, computed / operation_rate)
    return total


# ------------------------------------------------------------------------------- the two sides


class Ours:
    name = "ours"

    def __init__(self, folder: Path):
        self.model = ours.load_model(folder)
        self.stop = self.model.config.vocab_size - 1

    def sample(self, prompts: list[list[int]], lengths: np.ndarray) -> None:
        """Sample completions of exactly these lengths (P, G).

        The random number at the end of each completion is replaced by 2, which means the stop id.
        """
        uniforms, choose = ours.uniforms, ours.choose
        ends = {tuple(prompt): row for prompt, row in zip(prompts, lengths - 1)}

        def planned_uniforms(seed, prompt, index, count):
            numbers = uniforms(seed, prompt, index, count)
            numbers[ends[tuple(prompt)][index]] = 2
            return numbers

        def planned_choose(logprobs: Tensor, uniform: Tensor, *args, **kwargs) -> Tensor:
            chosen = choose(logprobs, uniform, *args, **kwargs)
            chosen[chosen == self.stop] = 0
            return torch.where(uniform > 1, self.stop, chosen)

        with (
            patch.object(ours, "uniforms", planned_uniforms),
            patch.object(ours, "choose", planned_choose),
        ):
            groups = ours.generate(self.model, prompts, G, NEW, stop_ids=(self.stop,))
        assert [[len(c.tokens) for c in group] for group in groups] == lengths.tolist()


class Theirs:
    name = "transformers"

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def sample(self, prompts: list[list[int]], lengths: np.ndarray) -> None:
        """Sample completions of exactly these lengths (P, G)."""
        ends = torch.from_numpy(lengths).flatten()

        def planned_stop(ids: Tensor, scores, **kwargs) -> Tensor:
            return ids.shape[1] - PROMPT >= ends

        tokens = torch.tensor(prompts)
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=G,
            max_new_tokens=NEW,
            pad_token_id=0,
            stopping_criteria=[planned_stop],
        )
        assert out.shape == (P * G, PROMPT + lengths.max())


SIDES = {side.name: side for side in (Ours, Theirs)}


def random_prompts(generator: np.random.Generator, vocab_size: int) -> list[list[int]]:
    return generator.integers(0, vocab_size - 1, (P, PROMPT)).tolist()


# ------------------------------------------------------------------------------------- rollout


def rollout(folder: Path, repeats: int) -> None:
    sides = [Ours(folder), Theirs(folder)]
    config = sides[0].model.config
    generator = np.random.default_rng(0)
    prompts = random_prompts(generator, config.vocab_size)
    mixed = generator.permutation(np.linspace(16, NEW, P * G).astype(int)).reshape(P, G)
    byte_rate, operation_rate = bandwidth(), arithmetic()
    print(
        f"{folder}: {P} prompts of {PROMPT} x {G}, {torch.get_num_threads()} threads; "
        f"reads {byte_rate / 1e9:.0f} GB/s, {operation_rate / 1e9:.0f} GFLOP/s"
    )
    for label, lengths in (("all of 128", np.full((P, G), NEW)), ("16 to 128", mixed)):
        times = {side.name: [] for side in sides}
        for _ in range(repeats + 1):
            for side in sides:
                times[side.name].append(seconds(lambda: side.sample(prompts, lengths)))
        # The first turn warms up.
        mine, other = (statistics.median(times[side.name][1:]) for side in sides)
        tokens = int(lengths.sum())
        least = least_seconds(config, lengths.flatten(), byte_rate, operation_rate)
        print(
            f"  {label:10}  ours {tokens / mine:5.0f} new tokens/s ({mine:.2f} s)   "
            f"transformers {tokens / other:5.0f} ({other:.2f} s)   ratio {other / mine:.2f}   "
            f"ours reaches {least / mine:.0%} of the machine's limit"
        )
    for name in SIDES:
        peak = in_a_process("sample_peak", name, str(folder))
        print(f"  peak memory {name}: {peak / 2**20:.0f} MiB")


def sample_peak(name: str, folder: str) -> int:
    prompts = random_prompts(np.random.default_rng(0), 1000)
    SIDES[name](Path(folder)).sample(prompts, np.full((P, G), NEW))
    return peak_memory()


# ---------------------------------------------------------------------------------------- load


def load(folder: Path, repeats: int) -> None:
    for name in SIDES:
        runs = [in_a_process("load_peak", name, str(folder)) for _ in range(repeats)]
        took, added, weights = (statistics.median(column) for column in zip(*runs))
        print(
            f"  {name:12} {took:.2f} s, peak {added / 2**20:.0f} MiB over the start "
            f"= {added / weights:.2f} x the weights in fp32"
        )


def load_peak(name: str, folder: str) -> tuple[float, int, int]:
    """Return seconds, bytes of memory over the start, and bytes of weights.

    A tiny model is loaded first, so that the libraries do not count.
    """
    sizes = ("vocab_size", "hidden_size", "intermediate_size")
    counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    with tempfile.TemporaryDirectory() as tiny:
        write_random_model(Path(tiny), **dict.fromkeys(sizes, 32), **dict.fromkeys(counts, 1))
        SIDES[name](Path(tiny))
    before, start = peak_memory(), time.perf_counter()
    model = SIDES[name](Path(folder)).model
    took = time.perf_counter() - start
    return took, peak_memory() - before, sum(p.nbytes for p in model.parameters())


# ---------------------------------------------------------------------------------------- step


def our_steps(folder: Path, recompute: bool, token_budget: int, count: int) -> list[float]:
    """Return the seconds of each step, with random prompts and rewards in place of real ones."""
    config = GRPOConfig(
        prompts=P,
        group_size=G,
        max_new_tokens=NEW,
        recompute=recompute,
        token_budget=token_budget,
    )
    run = Run(model=folder, out=Path(), config=config, reward_config=RewardConfig())
    policies = load_policies(run, None)
    generator = np.random.default_rng(0)

    def step(seed: int) -> None:
        prompts = random_prompts(generator, policies.model.config.vocab_size)
        groups = ours.generate(policies.model, prompts, G, NEW, seed=seed)
        advantages = group_advantages(torch.from_numpy(generator.random((P, G))))
        update(policies, list(map(Group, prompts, groups, advantages.tolist())), config)

    return [seconds(lambda: step(seed)) for seed in range(count)]


def their_steps(folder: Path, recompute: bool, rows: int, count: int) -> list[float]:
    """Return the seconds of each step of TRL with `rows` completions in a micro-batch.

    Prompts are words "w0 w1 ..." of one token each; all completions have the full length.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig as Settings
    from trl import GRPOTrainer

    size = ours.read_config(folder).vocab_size
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=f"w{size - 1}",
        pad_token="w0",
        padding_side="left",
    )
    generator = np.random.default_rng(0)
    prompts = generator.integers(1, size - 1, (P * count, PROMPT))
    data = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in prompts]})
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - self.start)

    def reward(completions, **kwargs) -> list[float]:
        return generator.random(len(completions)).tolist()

    with tempfile.TemporaryDirectory() as out:
        settings = Settings(
            output_dir=out,
            max_steps=count,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=P * G // rows,
            num_generations=G,
            max_completion_length=NEW,
            beta=0.04,
            learning_rate=5e-7,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=recompute,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            generation_kwargs={"min_new_tokens": NEW},
            model_init_kwargs={"dtype": "float32"},
        )
        trainer = GRPOTrainer(
            str(folder),
            reward,
            settings,
            data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return times


# By label: activation checkpointing, and the size of a micro-batch in tokens or completions.
OUR_SETTINGS = {
    "default": (True, 8192),
    "no checkpointing": (False, 8192),
    "--token-budget 1024": (True, 1024),
    f"--token-budget 1024, {LEAN}": (True, 1024),
}
THEIR_SETTINGS = {
    "default": (True, P * G),
    "no checkpointing": (False, P * G),
    "4 micro-batches": (True, G),
    f"4 micro-batches, {LEAN}": (True, G),
}


def step(folder: Path, repeats: int) -> None:
    print(
        f"{folder}: one step of GRPO on {P} prompts of {PROMPT} x {G} completions of {NEW}, "
        f"{torch.get_num_threads()} threads"
    )

    def measure(name: str, steps: str, label: str, settings: tuple) -> tuple[float, int]:
        arguments = (steps, str(folder), *settings, repeats + 1)
        times, peak = in_a_process("step_peak", *arguments, lean=LEAN in label)
        took = statistics.median(times[1:])  # the first step warms up
        print(f"  {name} {label:44} {took:5.1f} s   {peak / 2**20:5.0f} MiB", flush=True)
        return took, peak

    theirs = {
        label: measure("TRL ", "their_steps", label, settings)
        for label, settings in THEIR_SETTINGS.items()
    }
    mine = {
        label: measure("ours", "our_steps", label, settings)
        for label, settings in OUR_SETTINGS.items()
    }
    for label, (took, peak) in mine.items():
        for other, (its_time, its_peak) in theirs.items():
            print(
                f"  ours {label:44} beside TRL {other:40}   "
                f"{its_time / took:.2f} x the steps per second, {peak / its_peak:.2f} x the memory"
            )


def step_peak(steps: str, folder: str, *settings) -> tuple[list[float], int]:
    return globals()[steps](Path(folder), *settings), peak_memory()


# ---------------------------------------------------------------------------------------- eval


def evaluation(folder: Path, data: Path, items: int, new: int, repeats: int) -> None:
    """Let both sides write an answer to each problem, and count how many texts are the same."""
    problems = spread_problems(read_benchmark(data), items)
    tokenizer = ours.Tokenizer(folder)
    mine, other = Ours(folder).model, Theirs(folder).model

    def by_evaluate() -> list[str]:
        result = evaluate(mine, tokenizer, problems, max_new_tokens=new)
        return [record["text"] for record in result["responses"]]

    def by_transformers() -> list[str]:
        prompts = [tokenizer.chat(build_messages(problem)) for problem in problems]
        return generated_texts(other, tokenizer, prompts, new)

    texts, times = {}, {by_evaluate: [], by_transformers: []}
    for _ in range(repeats):
        for side in times:
            start = time.perf_counter()
            texts[side] = side()
            times[side].append(time.perf_counter() - start)
    took, its_time = (statistics.median(values) for values in times.values())
    equal = sum(a == b for a, b in zip(*texts.values()))
    print(
        f"{folder}: {len(problems)} items of {data}, at most {new} new tokens, greedy, "
        f"{torch.get_num_threads()} threads\n"
        f"  evaluate {took:.1f} s   transformers {its_time:.1f} s   "
        f"ratio {its_time / took:.2f}   equal texts {equal}"
    )


def generated_texts(
    model, tokenizer: ours.Tokenizer, prompts: list[list[int]], new: int, batch_size: int = 16
) -> list[str]:
    """Continue prompts greedily with the `generate` of transformers."""
    texts = [""] * len(prompts)
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(prompts), batch_size):
        batch = longest_first[start : start + batch_size]
        tokens, mask = pad_left([prompts[i] for i in batch])
        out = model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=tokenizer.stop_ids[0],
        )
        for i, row in zip(batch, out[:, tokens.shape[1] :].tolist()):
            stops = [t for t, token in enumerate(row) if token in tokenizer.stop_ids]
            if stops:
                row = row[: stops[0] + 1]
            texts[i] = tokenizer.completion_text(prompts[i], row)
    return texts


def pad_left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Put lists of ids into one tensor, padded on the left -> tokens (B, T), mask (B, T)."""
    tokens, mask = ours.pad([row[::-1] for row in rows], torch.device("cpu"))
    return tokens.flip(1), mask.long().flip(1)


# --------------------------------------------------------------------- processes of their own


def in_a_process(function: str, *arguments, lean: bool = False):
    """Return what `function(*arguments)` of this file returns in a new process."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench, torch
torch.set_num_threads({torch.get_num_threads()})
print(bench.{function}(*{arguments!r}))
"""
    environment = dict(os.environ)
    if lean:
        name, _, value = LEAN.partition("=")
        environment[name] = value
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return ast.literal_eval(run.stdout.splitlines()[-1])


def peak_memory() -> int:
    """Return the most bytes that this process has held; ru_maxrss would inherit the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: peaks are measured on Linux only")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rollout", "load", "step", "eval"])
    parser.add_argument("--model", type=Path, help="checkpoint folder (random weights)")
    parser.add_argument("--data", type=Path, help="eval: benchmark files")
    parser.add_argument("--items", type=int, default=200, help="eval: how many, evenly spread")
    parser.add_argument("--new", type=int, default=128, help="eval: new tokens at most")
    parser.add_argument("--repeats", type=int, help="turns of each side (5; step 3; eval 1)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "eval" and not (args.model and args.data):
        parser.error("eval needs --model, for texts that end, and --data")
    try:
        import transformers  # noqa: F401
    except ImportError:
        parser.error(
            "the other side is missing: pip install transformers "
            "(in an environment of its own, with requirements.txt)"
        )
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model
        if folder is None:
            folder = Path(temporary) / "random-42M"
            write_random_model(folder)
        if args.what == "rollout":
            rollout(folder, args.repeats or 5)
        elif args.what == "load":
            load(folder, args.repeats or 5)
        elif args.what == "step":
            step(folder, args.repeats or 3)
        else:
            evaluation(folder, args.data, args.items, args.new, args.repeats or 1)


if __name__ == "__main__":
    main()
