"""The study: what each part of the reward does to the embedded policy.

    python tests/study.py [--out runs/study] [--seeds 5] [--jobs 2] [--figures assets] [flags of grpo.py]

For each condition below and each seed it runs `python grpo.py`, one thread for each of the jobs,
with the same number of steps and the same evaluations: 400 test and 400 shift problems before and
after, sampled at temperature 1. With two cores this takes about an hour. Interrupted, it goes on
where it was, with the same command.

Then it makes, from the files of the runs, OUT/study.md (means over the seeds; in parentheses the
mean difference to "all terms" of the same seed, with its 95% interval by Student's t, bold where
that is clear of 0) and the figures learning.svg, ablations.svg and trajectory.svg. R_content of all
responses is computed here, because runs without that term do not. The figures need matplotlib,
which nothing else in this project does.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from html import escape
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from eval import mark_passages, problem_of, read_result  # noqa: E402
from rewards import load_content_model  # noqa: E402
from socialr1 import STAGES, TINY_CONTENT, parse_response  # noqa: E402

CONDITIONS = {
    "all terms": "",
    "only R_out": "--without struct,content,len",
    "without struct": "--without struct",
    "without content": "--without content",
    "without len": "--without len",
    "without curriculum": "--tau-start 1",
}
ALL, ONLY = list(CONDITIONS)[:2]
# What the tables show, by the names of eval.py: its label, and digits after the point.
MEASURES = {
    "hard": ("hard accuracy", 3),
    "control": ("control accuracy", 3),
    "shortcut_gap": ("shortcut gap", 3),
    "well_formed": ("well formed", 3),
    "stage_order": ("four stages in order", 3),
    "option_early": ("option named early", 3),
    "R_content": ("R_content", 3),
    "repetition": ("repetition", 3),
    "length": ("length in tokens", 1),
}
SETS = {"test": MEASURES, "shift": dict(list(MEASURES.items())[:6])}
# The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# ------------------------------------------------------------------------------------- the runs


def folder_of(out: Path, condition: str, seed: int) -> Path:
    return out / f"{condition.replace(' ', '-')}-{seed}"


def train(out: Path, condition: str, seed: int, flags: list[str]) -> None:
    """Run grpo.py, or go on with it, unless it is finished."""
    folder = folder_of(out, condition, seed)
    if (folder / "report.html").exists():
        return
    command = [sys.executable, str(ROOT / "grpo.py"), "--seed", str(seed), "--out", str(folder)]
    command += [*CONDITIONS[condition].split(), *flags]
    command += ["--resume"] if folder.is_dir() else []
    print("$ python", " ".join(command[1:]), flush=True)
    with open(out / f"{folder.name}.log", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    if not (folder / "report.html").exists():
        raise KeyboardInterrupt(f"{folder} was stopped")


# ----------------------------------------------------------------------------------- the tables


def read_values(file: Path, dataset: str) -> dict[str, float]:
    """Read the measures of one evaluation, and compute the mean of R_content beside them."""
    cache = file.with_name(f"{file.stem}-content.json")
    if not cache.exists():
        cache.write_text(json.dumps(grade(file)), "utf-8")
    values = json.loads(file.read_text("utf-8"))[dataset]["overall"]
    return values | {"R_content": json.loads(cache.read_text("utf-8"))[dataset]}


def grade(file: Path) -> dict[str, float]:
    """Compute the mean of R_content over the responses of each set of problems."""
    scorer = load_content_model(TINY_CONTENT)
    means = {}
    for dataset, result in json.loads(file.read_text("utf-8")).items():
        records = result["responses"]
        problems = [problem_of(record) for record in records]
        responses = [[parse_response(r["text"], p)] for r, p in zip(records, problems)]
        means[dataset] = float(np.mean(scorer.rewards(problems, responses)))
    return means


def collect(out: Path, condition: str, when: str, dataset: str, seeds: range) -> dict:
    """Return the values of all seeds, by measure -> {measure: (seeds,)}."""
    files = [folder_of(out, condition, seed) / f"{when}.json" for seed in seeds]
    values = [read_values(file, dataset) for file in files]
    return {name: np.array([of_seed[name] for of_seed in values]) for name in SETS[dataset]}


def margin(differences: np.ndarray) -> float:
    """Return half of the 95% interval of the mean of paired differences, one for each seed."""
    n = len(differences)
    return STUDENT[n - 2] * differences.std(ddof=1) / n**0.5


def make_table(out: Path, dataset: str, seeds: range) -> str:
    """Write a table in Markdown: a row for each condition, a column for each measure."""
    shown = SETS[dataset]
    rows = [["", *(label for label, _ in shown.values())], ["---"] * (len(shown) + 1)]
    before = collect(out, ALL, "before", dataset, seeds)
    rows.append(["before training", *(f"{before[m].mean():.{shown[m][1]}f}" for m in shown)])
    full = collect(out, ALL, "after", dataset, seeds)
    rows.append([f"**{ALL}**", *(f"{full[m].mean():.{shown[m][1]}f}" for m in shown)])
    for condition in list(CONDITIONS)[1:]:
        values = collect(out, condition, "after", dataset, seeds)
        cells = []
        for measure, (_, digits) in shown.items():
            differences = values[measure] - full[measure]
            mean, half = differences.mean(), margin(differences)
            change = f"({mean:+.{digits}f} ± {half:.{digits}f})"
            change = f"**{change}**" if abs(mean) > half else change
            cells.append(f"{values[measure].mean():.{digits}f} {change}")
        rows.append([condition, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_demonstration(out: Path, seeds: range) -> str:
    """Write what the default run does, before and after: mean and range of the seeds."""
    rows = [["", "before", "after"], ["---"] * 3]
    for dataset, shown in SETS.items():
        sides = [collect(out, ALL, when, dataset, seeds) for when in ("before", "after")]
        for measure, (label, _) in list(shown.items())[:6]:
            cells = []
            for side in sides:
                numbers = (side[measure].mean(), side[measure].min(), side[measure].max())
                cells.append("{:z.2f} ({:z.2f} to {:z.2f})".format(*numbers))
            rows.append([f"{dataset}: {label}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---------------------------------------------------------------------------------- the figures

GREY = "#7d7d7d"  # can be read on white and on black
COLOURS = {ALL: "#2f86d1", ONLY: "#d9822b"}


def new_figure(width: float, panels: int):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY}
    style |= {"xtick.color": GREY, "ytick.color": GREY, "svg.hashsalt": "study", "font.size": 9}
    pyplot.rcParams.update(style | {"svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(1, panels, figsize=(width, 2.6), layout="constrained")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.patch.set_alpha(0)
    return figure, axes


def save(figure, file: Path) -> None:
    figure.savefig(file, transparent=True, metadata={"Date": None})
    print(f"figure: {file}")


def learning_curve(out: Path, condition: str, measure: str, seeds: range) -> tuple:
    """Return the steps of the evaluations on test, and the measure -> (n,), (seeds, n)."""
    lines = []
    for seed in seeds:
        folder = folder_of(out, condition, seed)
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        points = {0: read_values(folder / "before.json", "test")[measure]}
        points |= {x["step"] + 1: x["eval_test"][measure] for x in log if "eval_test" in x}
        points[len(log)] = read_values(folder / "after.json", "test")[measure]
        lines.append(points)
    return list(lines[0]), np.array([list(points.values()) for points in lines])


def compare_on_the_way(out: Path, seeds: range) -> str:
    """Say how ONLY differs from ALL on average over the evaluations in the last 60% of training."""
    lines = [f"{ONLY} - {ALL} on test, mean of the evaluations in the last 60% of the steps:"]
    for measure in ("hard", "control", "stage_order", "option_early"):
        steps, full = learning_curve(out, ALL, measure, seeds)
        _, values = learning_curve(out, ONLY, measure, seeds)
        late = [i for i, step in enumerate(steps) if step >= 0.4 * steps[-1]]
        differences = (values - full)[:, late].mean(axis=1)
        change = f"{differences.mean():+.3f} ± {margin(differences):.3f}"
        lines.append(f"{MEASURES[measure][0]} {change}")
    return "\n".join(lines) + "\n"


def draw_learning(out: Path, file: Path, seeds: range) -> None:
    """Draw how held-out measures go during training: the seeds' mean, and from least to most."""
    shown = ("hard", "stage_order", "option_early")
    figure, axes = new_figure(9, len(shown))
    for panel, measure in zip(axes, shown):
        for condition, colour in COLOURS.items():
            steps, values = learning_curve(out, condition, measure, seeds)
            label = {ONLY: "only R_out, the right letter"}.get(condition, condition)
            panel.plot(steps, values.mean(axis=0), color=colour, label=label)
            panel.fill_between(
                steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.25, lw=0
            )
        panel.set_title(MEASURES[measure][0], fontsize=10)
        panel.set_xlabel("steps of GRPO")
        panel.set_ylim({"stage_order": 0.6}.get(measure, 0), {"option_early": None}.get(measure, 1))
    axes[0].legend(frameon=False)
    save(figure, file)


def draw_ablations(out: Path, file: Path, seeds: range) -> None:
    """Draw the differences to all terms after training, with their intervals."""
    shown = ("hard", "stage_order", "option_early", "R_content")
    figure, axes = new_figure(10, len(shown))
    full = collect(out, ALL, "after", "test", seeds)
    others = list(CONDITIONS)[1:]
    for panel, measure in zip(axes, shown):
        for place, condition in enumerate(others):
            values = collect(out, condition, "after", "test", seeds)[measure]
            differences = values - full[measure]
            mean, half = differences.mean(), margin(differences)
            panel.barh(place, mean, color="#4a98dd", height=0.6)
            panel.plot((mean - half, mean + half), (place, place), color=GREY)
        panel.axvline(0, color=GREY, lw=0.8)
        panel.set_title(f"{MEASURES[measure][0]}: change", fontsize=10)
        panel.locator_params(axis="x", nbins=4)
        panel.set_yticks(range(len(others)), others if panel is axes[0] else [""] * len(others))
        panel.invert_yaxis()
    save(figure, file)


# A trajectory: two columns of boxes, one for each stage, dark on light in both modes.
FILLS = ("#dcebf8", "#dcf0e2", "#f8ecd0", "#ecdff5")
EDGES = ("#2a78b8", "#2f8f4e", "#a87400", "#8a4fb0")
BOXES = {"": ("#eeeeee", "#999999")} | dict(zip(STAGES, zip(FILLS, EDGES)))
WIDTH, LINE = 440, 17  # of a column, and from line to line, in pixels


def wrap(runs: list[tuple[str, str]], letters: int = 64) -> list[list[tuple[str, str]]]:
    """Break a passage of (mark, text) into lines of (mark, word)."""
    lines, used = [[]], 0
    for mark, text in runs:
        for word in text.split():
            if used + len(word) > letters:
                lines.append([])
                used = 0
            lines[-1].append((mark, word))
            used += len(word) + 1
    return lines


def draw_column(record: dict, title: str, x: int, y: int) -> tuple[list[str], int]:
    """Draw a response from y downwards -> SVG elements, and where they end."""
    verdict = "right" if record["correct"] else f"wrong, {record['gold']} is right"
    heading = f"{title}: {verdict}; R = {record['reward']:.2f} of at most 2"
    parts = [f'<text x="{x}" y="{y}" fill="{GREY}" font-weight="bold">{escape(heading)}</text>']
    y += 8
    for stage, runs in mark_passages(record):
        lines = wrap(runs)
        if lines == [[]]:
            continue
        fill, edge = BOXES[stage]
        height = LINE * (len(lines) + 1) + 8
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{height}" fill="{fill}"/>')
        parts.append(f'<rect x="{x}" y="{y}" width="5" height="{height}" fill="{edge}"/>')
        name = f'<text x="{x + 14}" y="{y + LINE}" fill="{edge}" font-weight="bold">{stage}</text>'
        parts.append(name)
        for number, line in enumerate(lines, start=2):
            words = []
            for mark, word in line:
                style = ' fill="#c0281c" font-weight="bold"' if mark == "early" else ""
                words.append(f"<tspan{style}>{escape(word)}</tspan>")
            text = " ".join(words)
            parts.append(f'<text x="{x + 14}" y="{y + LINE * number}" fill="#222">{text}</text>')
        y += height + 6
    answer = f"<Answer> {record['answer']} </Answer>"
    parts.append(f'<text x="{x}" y="{y + 10}" fill="{GREY}">{escape(answer)}</text>')
    return parts, y + 18


def draw_trajectory(before: dict, after: dict, file: Path) -> None:
    """Draw how one problem was answered before and after, with early options in red."""
    parts, y = [], 18
    lettered = zip("ABCDEFGH", before["options"])
    options = "   ".join(f"{letter}. {option}" for letter, option in lettered)
    for text in (before["story"], f"{before['question']} {options}"):
        for line in wrap([("", text)], letters=128):
            words = escape(" ".join(word for _, word in line))
            parts.append(f'<text x="0" y="{y}" fill="{GREY}">{words}</text>')
            y += LINE
    left, left_end = draw_column(before, "before", 0, y + 12)
    right, right_end = draw_column(after, "after", WIDTH + 20, y + 12)
    size = f'width="{2 * WIDTH + 20}" height="{max(left_end, right_end)}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    )
    file.write_text("\n".join([head, *parts, *left, *right, "</svg>"]) + "\n", "utf-8")
    print(f"figure: {file}")


def choose_trajectory(folder: Path) -> tuple[dict, dict] | None:
    """Return a hard problem of test that was answered wrong before and well after, if there is one.

    Well: right, all stages in order, no option named early. Of several it is the first in which
    most of this was amiss before.
    """
    sides = [read_result(folder / f"{when}.json")["responses"] for when in ("before", "after")]

    def amiss(record: dict) -> int:
        return (not record["correct"]) + (not record["stage_order"]) + record["option_early"]

    mended = [
        (before, after)
        for before, after in zip(*sides)
        if before["source"].endswith("/test") and before["variant"] == "hard"
        if not before["correct"] and not amiss(after)
    ]
    return max(mended, key=lambda pair: amiss(pair[0]), default=None)


# ------------------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), metavar="2..10")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (2)")
    parser.add_argument("--figures", type=Path, default=ROOT / "assets", help="where they go")
    args, flags = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(train, args.out, condition, seed, flags)
            for seed in seeds
            for condition in CONDITIONS
        ]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:  # Ctrl-C, too: the runs under way have saved and stopped
            pool.shutdown(cancel_futures=True)
            raise
    tables = [f"{ALL}\n\n{make_demonstration(args.out, seeds)}\n"]
    tables += [f"{dataset}\n\n{make_table(args.out, dataset, seeds)}\n" for dataset in SETS]
    tables.append(compare_on_the_way(args.out, seeds))
    (args.out / "study.md").write_text("\n".join(tables), "utf-8")
    print("\n".join(tables))
    print(f"tables: {args.out / 'study.md'}")
    draw_learning(args.out, args.figures / "learning.svg", seeds)
    draw_ablations(args.out, args.figures / "ablations.svg", seeds)
    pair = choose_trajectory(folder_of(args.out, ALL, 0))
    if pair:
        draw_trajectory(*pair, args.figures / "trajectory.svg")


if __name__ == "__main__":
    main()
