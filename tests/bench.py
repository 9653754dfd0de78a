"""Speed and memory beside what one would use instead, both sides in one run: prints ratios, asserts nothing.

    python tests/bench.py rollout|load|step [--model DIR] [--repeats 5] [--threads 2]
    python tests/bench.py eval --model DIR --data tombench/data [--items 200] [--new 128] [--repeats 1]

`rollout` samples 4 prompts of 256 tokens x 5 completions, at most 128 new tokens, at temperature 1, with generate and with that of
transformers (to be installed beside the project's requirements). `load` reads the checkpoint into fp32. `step` is a whole step of GRPO on
such a rollout: sampling, reference (beta .04), update with AdamW, in fp32, with activation checkpointing (the default of both) and
without, whole and in micro-batches, beside TRL's GRPOTrainer (to be installed too). `eval` answers the items of a benchmark greedily, with evaluate and with transformers' generate in
batches of 16, padded left and sorted by length. Without --model the model is Qwen3-shaped with random weights: width 512, 8 layers,
vocabulary 32000, 42M parameters. Sides take turns; times are medians; memory is the peak of a process of its own.
"""
import argparse
import ast
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model as ours  # noqa: E402
from eval import evaluate, read_benchmark, spread_problems  # noqa: E402
from grpo import GRPOConfig, Rollout, Run, group_advantages, load_policies, update  # noqa: E402
from rewards import RewardConfig  # noqa: E402
from socialr1 import build_messages  # noqa: E402

P, G, PROMPT, NEW = 4, 5, 256, 128
RAW = dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, rope_theta=10000.0, rms_norm_eps=1e-6, hidden_act="silu",
    tie_word_embeddings=True, max_position_embeddings=1024,
)  # fmt: skip


def write_random_model(folder: Path) -> None:
    torch.manual_seed(0)
    ours.save_model(ours.Transformer(ours.ModelConfig.from_json(RAW)), folder)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------- the machine's limit


def bandwidth() -> float:
    """Bytes per second when a large tensor is read once."""
    x = torch.zeros(64 << 20)
    return x.nbytes / statistics.median(seconds(x.sum) for _ in range(7))


def arithmetic() -> float:
    """Floating-point operations per second of a large matrix product in fp32, plain or packed, whichever is faster."""
    x, layer = torch.randn(2048, 2048), ours.Linear(2048, 2048)
    with torch.inference_mode():
        plain = statistics.median(seconds(lambda: layer(x)) for _ in range(7))
        if ours._packing_works():
            layer.packed = ours._pack(layer.weight)
        return 2 * 2048**3 / min(plain, statistics.median(seconds(lambda: layer(x)) for _ in range(7)))


def limit(config: ours.ModelConfig, lengths: np.ndarray, rate_bytes: float, rate_flops: float) -> float:
    """Seconds that no implementation can beat: per step, reading weights and caches once, or the arithmetic, whichever is longer."""
    c = config
    layer = c.hidden_size * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 3 * c.hidden_size * c.intermediate_size
    body, head = c.num_layers * layer, c.vocab_size * c.hidden_size
    position = 2 * c.num_layers * c.num_kv_heads * c.head_dim  # cached numbers per token
    per_row = 4 * c.num_layers * c.num_heads * c.head_dim  # operations per attended position
    total = (2 * body * P * PROMPT + 2 * head * P + per_row * P * PROMPT**2 / 2) / rate_flops
    for t in range(1, int(lengths.max())):
        rows = int((lengths > t).sum())
        read = 4 * (body + head + position * (P * PROMPT + rows * t))
        total += max(read / rate_bytes, (2 * rows * (body + head) + per_row * rows * (PROMPT + t)) / rate_flops)
    return total


# ------------------------------------------------------------------------------------------------------------- the two sides


class Ours:
    name = "ours"

    def __init__(self, folder: Path):
        self.model = ours.load_model(folder)
        self.stop = self.model.config.vocab_size - 1

    def sample(self, prompts: list[list[int]], lengths: np.ndarray) -> None:
        """Every completion ends after its planned length: its random number there is 2, which means the stop id."""
        plan = {(tuple(p), g): lengths[i, g] for i, p in enumerate(prompts) for g in range(G)}
        uniforms, choose = ours.uniforms, ours.choose

        def planned_uniforms(seed, prompt, place, count):
            numbers = uniforms(seed, prompt, place, count)
            numbers[plan[tuple(prompt), place] - 1] = 2
            return numbers

        def planned_choose(log_probs, uniform, *settings) -> Tensor:
            chosen = choose(log_probs, uniform, *settings)
            chosen[chosen == self.stop] = 0
            return torch.where(uniform > 1, self.stop, chosen)

        ours.uniforms, ours.choose = planned_uniforms, planned_choose
        try:
            groups = ours.generate(self.model, prompts, G, NEW, stop_ids=(self.stop,))
        finally:
            ours.uniforms, ours.choose = uniforms, choose
        assert [[len(c.tokens) for c in group] for group in groups] == lengths.tolist()


class Theirs:
    name = "transformers"

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def sample(self, prompts: list[list[int]], lengths: np.ndarray) -> None:
        ends = torch.from_numpy(lengths).flatten()

        def planned_stop(ids: Tensor, scores, **kwargs) -> Tensor:
            return ids.shape[1] - PROMPT >= ends

        tokens = torch.tensor(prompts)
        out = self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=G, max_new_tokens=NEW, pad_token_id=0, stopping_criteria=[planned_stop],
        )  # fmt: skip
        assert out.shape == (P * G, PROMPT + lengths.max())


def rollout(folder: Path, repeats: int) -> None:
    sides = [Ours(folder), Theirs(folder)]
    config = sides[0].model.config
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, config.vocab_size - 1, (P, PROMPT)).tolist()
    spread = generator.permutation(np.linspace(16, NEW, P * G).astype(int)).reshape(P, G)
    rates = bandwidth(), arithmetic()
    print(f"{folder}: {P} prompts of {PROMPT} x {G}, {torch.get_num_threads()} threads; reads {rates[0] / 1e9:.0f} GB/s, {rates[1] / 1e9:.0f} GFLOP/s")
    for label, lengths in (("all of 128", np.full((P, G), NEW)), ("16 to 128", spread)):
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        for repeat in range(repeats + 1):
            for side in sides:
                took = seconds(lambda: side.sample(prompts, lengths))
                times[side.name] += [took] if repeat else []  # the first turn warms up
        mine, other = (statistics.median(times[side.name]) for side in sides)
        new, best = int(lengths.sum()), limit(config, lengths.flatten(), *rates)
        print(
            f"  {label:10}  ours {new / mine:5.0f} new tokens/s ({mine:.2f} s)   transformers {new / other:5.0f} ({other:.2f} s)   "
            f"ratio {other / mine:.2f}   ours reaches {best / mine:.0%} of the machine's limit"
        )
    for side in (Ours, Theirs):
        print(f"  peak memory {side.name}: {in_a_process('sample_peak', side.__name__, str(folder)) / 2**20:.0f} MiB")


def load(folder: Path, repeats: int) -> None:
    for side in (Ours, Theirs):
        runs = [in_a_process("load_peak", side.__name__, str(folder)) for _ in range(repeats)]
        took, over, weights = (statistics.median(column) for column in zip(*runs))
        print(f"  {side.name:12} {took:.2f} s, peak {over / 2**20:.0f} MiB over the start = {over / weights:.2f} x the weights in fp32")


def our_steps(folder: Path, recompute: bool, token_budget: int, count: int) -> list[float]:
    """Seconds of each of `count` steps on prompts and rewards of random numbers, so that the answer's text does not matter."""
    config = GRPOConfig(prompts=P, group_size=G, max_new_tokens=NEW, recompute=recompute, token_budget=token_budget)
    model, reference, optimizer = load_policies(Run(folder, Path(), (), "en", "cpu", config, RewardConfig()), None)
    generator, times = np.random.default_rng(0), []

    def step(seed: int) -> None:
        prompts = generator.integers(0, model.config.vocab_size - 1, (P, PROMPT)).tolist()
        groups = ours.generate(model, prompts, G, NEW, seed=seed)
        advantages = group_advantages(torch.from_numpy(generator.random((P, G))).float())
        update(model, reference, optimizer, Rollout(prompts, groups, advantages), config)

    for seed in range(count):
        times.append(seconds(lambda: step(seed)))
    return times


def their_steps(folder: Path, recompute: bool, rows: int, count: int) -> list[float]:
    """The same with TRL, `rows` completions in a micro-batch: words w0 w1 ... for prompts, one token each; completions of full length."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig as Settings, GRPOTrainer

    size = ours.read_config(folder).vocab_size
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"w{size - 1}", pad_token="w0", padding_side="left")
    generator, times = np.random.default_rng(0), []
    prompts = generator.integers(1, size - 1, (P * count, PROMPT))

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - self.start)

    def reward(completions, **kwargs) -> list[float]:
        return generator.random(len(completions)).tolist()

    with tempfile.TemporaryDirectory() as out:
        settings = Settings(
            output_dir=out, max_steps=count, per_device_train_batch_size=rows, gradient_accumulation_steps=P * G // rows, num_generations=G,
            max_completion_length=NEW, beta=0.04, learning_rate=5e-7, use_cpu=True, bf16=False, gradient_checkpointing=recompute,
            report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no", generation_kwargs={"min_new_tokens": NEW},
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in prompts]})
        trainer = GRPOTrainer(str(folder), reward, settings, data, processing_class=tokenizer, callbacks=[Clock()])
        trainer.train()
    return times


def step_peak(steps: str, folder: str, *settings) -> tuple[list[float], int]:
    return globals()[steps](Path(folder), *settings), high_water()


def step(folder: Path, repeats: int) -> None:
    print(f"{folder}: one step of GRPO on {P} prompts of {PROMPT} x {G} completions of {NEW}, {torch.get_num_threads()} threads")
    ours_with = {"default": (True, 8192), "no checkpointing": (False, 8192), "--token-budget 1024": (True, 1024), f"--token-budget 1024, {LEAN}": (True, 1024)}
    theirs_with = {"default": (True, P * G), "no checkpointing": (False, P * G), "4 micro-batches": (True, G), f"4 micro-batches, {LEAN}": (True, G)}
    found = {}
    for side, settings in (("their_steps", theirs_with), ("our_steps", ours_with)):
        for label, values in settings.items():
            times, peak = in_a_process("step_peak", side, str(folder), *values, repeats + 1, lean=LEAN in label)
            found[side, label] = statistics.median(times[1:]), peak  # the first step warms up
            print(f"  {'TRL ' if side == 'their_steps' else 'ours'} {label:44} {found[side, label][0]:5.1f} s   {peak / 2**20:5.0f} MiB", flush=True)
    for label in ours_with:
        for other in theirs_with:
            (mine, my_peak), (its, its_peak) = found["our_steps", label], found["their_steps", other]
            print(f"  ours {label:44} beside TRL {other:40}   {its / mine:.2f} x the steps per second, {my_peak / its_peak:.2f} x the memory")


def evaluation(folder: Path, data: Path, items: int, new: int, repeats: int, batch: int = 16) -> None:
    """Both sides get problems and give texts; the share of equal texts says that they do the same."""
    problems = spread_problems(read_benchmark(data), items)
    tokenizer, mine, other = ours.Tokenizer(folder), Ours(folder).model, Theirs(folder).model

    def by_evaluate() -> list[str]:
        return [record["text"] for record in evaluate(mine, tokenizer, problems, max_new_tokens=new)["responses"]]

    def by_transformers() -> list[str]:
        prompts = [tokenizer.chat(build_messages(problem)) for problem in problems]
        order, texts = sorted(range(len(problems)), key=lambda i: -len(prompts[i])), [""] * len(problems)
        for start in range(0, len(problems), batch):
            some = order[start : start + batch]
            tokens, mask = ours.pad([prompts[i] for i in some], "left", torch.device("cpu"))
            out = other.generate(
                tokens, attention_mask=mask.long(), do_sample=False, max_new_tokens=new, eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.stop_ids[0]
            )
            for i, row in zip(some, out[:, tokens.shape[1] :].tolist()):
                end = next((at + 1 for at, token in enumerate(row) if token in tokenizer.stop_ids), new)
                texts[i] = tokenizer.decode(row[:end])
        return texts

    texts, times = {}, {by_evaluate: [], by_transformers: []}
    for _ in range(repeats):
        for side in times:
            times[side].append(seconds(lambda: texts.update({side: side()})))
    took, others = (statistics.median(some) for some in times.values())
    equal = sum(a == b for a, b in zip(*texts.values()))
    print(
        f"{folder}: {len(problems)} items of {data}, at most {new} new tokens, greedy, {torch.get_num_threads()} threads\n"
        f"  evaluate {took:.1f} s   transformers {others:.1f} s   ratio {others / took:.2f}   equal texts {equal}"
    )


# ---------------------------------------------------------------------------------------------------- in processes of their own


LEAN = "MALLOC_MMAP_THRESHOLD_=4194304"  # glibc gives blocks of 4 MiB and more back at once; else it keeps some, and memory grows by the holes


def in_a_process(function: str, *arguments, lean: bool = False):
    """What `function(*arguments)` of this file returns in a new process."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench, torch; torch.set_num_threads({torch.get_num_threads()}); "
    code += f"print(bench.{function}(*{arguments!r}))"
    environment = os.environ | dict([LEAN.split("=")] if lean else [])
    lines = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout.splitlines()
    return ast.literal_eval(lines[-1])


def high_water() -> int:
    """Bytes of memory that this process has held at most (ru_maxrss would inherit the parent's)."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def sample_peak(side: str, folder: str) -> int:
    prompts = np.random.default_rng(0).integers(0, 1000, (P, PROMPT)).tolist()
    globals()[side](Path(folder)).sample(prompts, np.full((P, G), NEW))
    return high_water()


def load_peak(side: str, folder: str) -> tuple[float, int, int]:
    """Seconds, bytes over the start, bytes of weights; a tiny model is loaded first, so that libraries do not count."""
    with tempfile.TemporaryDirectory() as small:
        tiny = RAW | dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
        ours.save_model(ours.Transformer(ours.ModelConfig.from_json(tiny)), small)
        globals()[side](Path(small))
    before, start = high_water(), time.perf_counter()
    model = globals()[side](Path(folder)).model
    return time.perf_counter() - start, high_water() - before, sum(p.nbytes for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rollout", "load", "step", "eval"])
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: random weights, 42M parameters")
    parser.add_argument("--data", type=Path, help="eval: benchmark files")
    parser.add_argument("--items", type=int, default=200, help="eval: so many, evenly spread")
    parser.add_argument("--new", type=int, default=128, help="eval: new tokens at most")
    parser.add_argument("--repeats", type=int, help="turns of each side (5; step 3; eval 1)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "eval" and not (args.model and args.data):
        parser.error("eval needs --model, for texts that end, and --data")
    torch.set_num_threads(args.threads)
    try:
        import transformers  # noqa: F401
    except ImportError:
        parser.error("the other side is missing: pip install transformers (in an environment of its own, with requirements.txt)")
    with tempfile.TemporaryDirectory() as temporary:
        if args.model is None:
            args.model = Path(temporary) / "random-42M"
            write_random_model(args.model)
        if args.what == "eval":
            evaluation(args.model, args.data, args.items, args.new, args.repeats or 1)
        elif args.what == "step":
            step(args.model, args.repeats or 3)
        else:
            {"rollout": rollout, "load": load}[args.what](args.model, args.repeats or 5)


if __name__ == "__main__":
    main()
