"""The evening run: does the reward make a real pretrained model reason better?

    python assets/make_evening.py MODEL DIR [--steps N] [--jobs 2] [--data FILES]

MODEL is SmolLM2-135M-Instruct, or another small checkpoint. What is done, with the commands that it
prints, one thread for each of the jobs:

    1. a warm-up of 140 updates on 1,120 correct traces of generated stories    DIR/warm
    2. GRPO from there, seeds 0, 1 and 2, with the full reward                   DIR/full0 ...
       and with R_out alone, for the same number of steps                        DIR/out0 ...
    3. evaluation of MODEL, of the warmed-up model and of the six others         DIR/*.json
       on 400 test and 400 shift stories, sampled and greedy
    4. tables: means, ranges of the seeds, paired differences with intervals;    DIR/tables.txt
       and the stages beside the truth, which the simulator knows

It takes hours. Interrupted, it goes on where it was, with the same command. `--data` names files of
a benchmark that is asked greedily, too, as a check on what else has changed.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from eval import compare_rows, normalise, read_result, summarise, table_rows  # noqa: E402
from socialr1 import STAGES, Story, generate_stories, gold_stages, parse_response  # noqa: E402

CONTENT = ROOT / "assets" / "content"
COMMON = "--prompts 4 --group-size 8 --max-new-tokens 128 --min-length 16 --beta 0 --no-recompute"
COMMON += " --eval-problems 0 --eval-every 0 --save-every 5"
UPDATES = 140
SEEDS = (0, 1, 2)
TWO_MINDS = ("knowledge", "non-literal communication")  # the other abilities ask for one
KINDS = {"full": "", "out": "--without struct,content,len"}
SETS = {
    f"{split}-{mode}": f"--split {split} --limit 400 {flags}"
    for split in ("test", "shift")
    for mode, flags in (("sampled", "--temperature 1"), ("greedy", ""))
}


def call(done: Path, log: Path, script: str, *arguments: object) -> None:
    """Run one of the project's commands, unless the file or folder that it leaves exists."""
    if done.exists():
        return
    command = [sys.executable, str(ROOT / script)]
    for argument in arguments:
        command += [str(argument)] if isinstance(argument, Path) else str(argument).split()
    print(" ".join(["$ python", script, *command[2:]]), flush=True)
    with open(log, "a") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=output, stderr=output, env=environment)


def train(out: Path, last: int, *arguments: object) -> Path:
    """Train, or go on with it; return the last checkpoint."""
    checkpoint = out / f"checkpoint-{last:06d}"
    resume = ["--resume"] if out.is_dir() else []
    call(checkpoint, out.with_suffix(".log"), "grpo.py", *arguments, COMMON, "--out", out, *resume)
    return checkpoint


def evaluate(model: Path, name: str, folder: Path, data: list[Path]) -> None:
    """Ask a model all sets of problems, and the benchmark's files if there are any."""
    asked = {dataset: ("--content", CONTENT, flags) for dataset, flags in SETS.items()}
    if data:
        asked["data"] = ("--data", *data)
    for dataset, flags in asked.items():
        result = folder / f"{name}-{dataset}.json"
        common = ("--max-new-tokens 128 --json", result)
        call(result, result.with_suffix(".log"), "eval.py", "--model", model, *flags, *common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)

    # The warm-up belongs to a run of its own, of one step.
    warm = args.dir / "warm"
    train(warm, 1, "--model", args.model, "--content", CONTENT, f"--warm-up {UPDATES} --steps 1")
    warmed = warm / "warm-up" / f"checkpoint-{UPDATES:06d}"

    def run(kind: str, seed: int) -> None:
        name, settings = f"{kind}{seed}", f"{KINDS[kind]} --seed {seed} --steps {args.steps}"
        learning = "--lr 2e-5 --warmup-steps 5"
        given = ("--model", warmed, "--content", CONTENT, learning, settings)
        evaluate(train(args.dir / name, args.steps, *given), name, args.dir, args.data)

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, kind, seed) for seed in SEEDS for kind in KINDS]
        jobs.append(pool.submit(evaluate, warmed, "warm", args.dir, args.data))
        jobs.append(pool.submit(evaluate, args.model, "base", args.dir, args.data))
        for job in jobs:
            job.result()
    tables = "\n\n".join(make_tables(args.dir, [*SETS, *(["data"] if args.data else [])]))
    (args.dir / "tables.txt").write_text(tables + "\n", encoding="utf-8")
    print(tables)


def read_seeds(folder: Path, kind: str, dataset: str) -> list[dict]:
    return [read_result(folder / f"{kind}{seed}-{dataset}.json") for seed in SEEDS]


def pooled(results: list[dict]) -> dict:
    """Sum up the results of all seeds as one, with a seed's response as a sample of the problem."""
    records = []
    for seed, result in enumerate(results):
        records += [record | {"sample": seed} for record in result["responses"]]
    return summarise(sorted(records, key=lambda record: record["item"]))


def part(result: dict, belongs: Callable[[dict], bool]) -> dict:
    """Sum up those responses of a result that belong to a part of the problems."""
    return summarise([record for record in result["responses"] if belongs(record)])


def parts_of(dataset: str, result: dict) -> dict[str, Callable[[dict], bool]]:
    """Name parts of a set of problems: stories by how many minds they ask for, data by halves."""
    if dataset != "data":
        belongs = {"": lambda record: True}
        belongs[", one mind"] = lambda record: record["ability"] not in TWO_MINDS
        belongs[", two minds"] = lambda record: record["ability"] in TWO_MINDS
        return belongs
    stories = list(dict.fromkeys(normalise(record["story"]) for record in result["responses"]))
    first = set(stories[::2])
    return {
        "": lambda record: True,
        ", one half of the stories": lambda record: normalise(record["story"]) in first,
        ", the other half": lambda record: normalise(record["story"]) not in first,
    }


def markdown(lines: list[list[str]]) -> str:
    """Write a table whose first line is the header."""
    header, *rows = lines
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def make_table(base: dict, warm: dict, full: list[dict], out: list[dict]) -> str:
    """Lay out in Markdown the means of all measures, with the ranges of the seeds, and differences.

    The intervals of the differences draw stories, as eval.py --compare does, and no seeds.
    """
    columns = {"as it comes": base, "warmed up": warm}
    columns |= {"full reward": pooled(full), "only R_out": pooled(out)}
    by_seed = [table_rows(dict(enumerate(results))) for results in (full, out)]
    ranges = [{label: values for label, _, *values in rows} for rows in by_seed]
    compared = (("warmed up", "full reward"), ("only R_out", "full reward"))
    changes = []
    for names in compared:
        rows = compare_rows(*(columns[name] for name in names), names)
        changes.append({row[0]: row[-1] for row in rows})
    (_, _, *header), *rows = table_rows(columns)
    header += ["full - warmed up", "full - only R_out"]
    lines = [["", *header]]
    for label, _, *cells in rows:
        for place, of_seeds in enumerate(ranges, start=2):
            values = sorted(map(float, filter(is_number, of_seeds.get(label, []))))
            if values:
                cells[place] += f" ({values[0]:g} to {values[-1]:g})"
        lines.append([label.strip(), *cells, *(change.get(label, "-") for change in changes)])
    return markdown(lines)


def is_number(cell: str) -> bool:
    return cell not in ("", "-")


def check_facts(record: dict, story: Story) -> dict[str, bool]:
    """Compare the stages of a response with what the simulator knows: no model judges here."""
    problem = story.problem
    stages = dict(parse_response(record["text"], problem).stages)
    said = stages.get(STAGES[-1], "").casefold()
    spoken = {}  # the letters of the options that the last stage names, by length
    for letter, option in zip(problem.letters, problem.options):
        if re.search(rf"\b{re.escape(option.casefold())}\b", said):
            spoken[len(option)] = letter
    named = spoken[max(spoken)] if spoken else ""
    facts = {}
    if named:
        facts["the letter is that of the option named"] = named == record["answer"]
    for name, gold in zip(STAGES, gold_stages(story)):
        facts[f"{name}, word for word the simulator's"] = stages.get(name) == gold
    return facts


def facts_table(columns: dict[str, list[dict]], split: str) -> str:
    """Lay out in Markdown the share of responses in which each fact holds; in parentheses, seeds."""
    stories = generate_stories(400, 0, split)
    cells = defaultdict(list)
    for results in columns.values():
        shares = defaultdict(list)
        for result in results:
            facts = defaultdict(list)
            for record, story in zip(result["responses"], stories, strict=True):
                assert record["story"] == story.problem.story
                for name, holds in check_facts(record, story).items():
                    facts[name].append(holds)
            for name, values in facts.items():
                shares[name].append(sum(values) / len(values))
        for name, values in shares.items():
            each = " ".join(f"{value:.3f}" for value in values)
            mean = f"{sum(values) / len(values):.3f}"
            cells[name].append(f"{mean} ({each})" if len(values) > 1 else mean)
    return markdown([["", *columns], *([name, *row] for name, row in cells.items())])


def make_tables(folder: Path, datasets: list[str]) -> list[str]:
    """Make tables for each set of problems and its parts, and of the facts in generated stories."""
    tables = []
    for dataset in datasets:
        sides = [[read_result(folder / f"{name}-{dataset}.json")] for name in ("base", "warm")]
        sides += [read_seeds(folder, kind, dataset) for kind in KINDS]
        for name, belongs in parts_of(dataset, sides[0][0]).items():
            (base,), (warm,), full, out = [[part(r, belongs) for r in side] for side in sides]
            tables.append(f"{dataset}{name}\n{make_table(base, warm, full, out)}")
        if dataset != "data":
            names = ("warmed up", "full reward", "only R_out")
            columns = dict(zip(names, sides[1:]))
            tables.append(f"{dataset}, facts\n{facts_table(columns, dataset.partition('-')[0])}")
    return tables


if __name__ == "__main__":
    main()
