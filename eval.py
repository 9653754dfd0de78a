"""Benchmarks in, estimates out: how often a checkpoint is right, how surely, and how it reasons.

A model answers problems (`evaluate`), one response is measured (`measure`), many are summed up with
intervals (`summarise`), and tables are laid out. Then come the readers of the eight benchmarks, the
comparison of two results, the HTML page and the command line. [P] marks what the paper states
(arXiv 2603.09249), [O] marks our own choice where the paper is silent.

What is estimated. A benchmark is a sample of the questions that could have been asked. The accuracy
on it is therefore an estimate of the accuracy on all such questions, and another sample would have
given another number. The interval says how different that number could be. It holds the middle 95%
of 2000 bootstrap draws [O]: each draw takes as many stories as there are, with replacement, and
computes the mean again. *Stories* are drawn rather than questions, because the questions of a story
stand or fall together: a model that loses track of a story gets all of its questions wrong. Ten
stories with ten questions each are nearer to ten observations than to a hundred, and an interval
that counts them as a hundred is far too narrow. With few stories, or an accuracy near 0 or 1, this
one is too narrow, too: 4 right out of 4 give [1, 1].

Two results are compared on the problems that both answered, problem by problem. What makes a
problem hard is the same on both sides and cancels in the difference. The interval of the difference
is therefore narrower than the intervals of the two accuracies suggest, and two checkpoints whose
intervals overlap may still differ significantly.

What a right letter does not show. The paper's claims are about reasoning, and some of these
measures speak to them (terms: rewards.py, stages: socialr1.py):

    accuracy       problems with the right letter, joint ones with all; unreadable is wrong
    lenient        the same, but where there is no such answer, the last line counts that can be
                   read as one, or that names a single letter [O]. If the accuracy grows and this
                   does not, only the form was learned
    macro          the mean of the benchmarks' accuracies, as in the paper's main table [P]
    hard, control  the accuracy on generated stories where a shortcut, such as "people know whatever
                   the reader knows", leads to a wrong option, and on their twins, where it leads
                   to the right one
    shortcut_gap   control - hard: what shortcuts are worth to the model. High scores that rest on
                   shortcuts are the paper's *shortcut illusion* [P]
    parse_rate     responses with one readable answer; where this is far below 1, the accuracy
                   measures obedience as much as reasoning
    well_formed    responses with R_fmt = 1: reasoning, one readable answer and nothing else
    coverage       the fraction of the four stages that are present
    order          the fraction of the present stages that stand in the right order
    stage_order    responses with all four stages in order: *stage consistency* [P]
    option_early   responses that name an option outside Response Generation. A model that reasons
                   from the story does not need the options yet; one that settles on an option and
                   justifies it names it early. The paper calls this *reasoning parasitism* [P]
    first_option   where the reasoning first names an option: 0 is its beginning, 1 its end
    fault, ...     responses that are not well-formed, by reason; "cut off": at the length limit
    repetition     the fraction of 4-grams of words that were said before: length that says nothing
    length         sampled tokens: how many a model needs for what it says
    reward         R at the end of the curriculum; the result carries the settings of R
    content        how well each stage is grounded in the story, if there is a content model. Where
                   the cues score well and their interpretation does not, the model sees and does
                   not understand: the paper's *interpretation bottleneck* [P]
"""

import ast
import hashlib
import itertools
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import torch
from tqdm import tqdm

from model import Tokenizer, Transformer, check_ids, generate_stream, load_model, read_json
from rewards import ContentModel, RewardConfig, distinct_fraction, early_options, logistic, mean
from rewards import WORD, letter_mentions, load_content_model, option_mentions, order_fraction
from rewards import grouped, plain, total_reward, words
from socialr1 import ASSETS, CAUSES, INSTRUCTIONS, LETTERS, STAGES, TINY, Parser, Problem, Settings
from socialr1 import build_messages, even_out, exit_on_error, generate_problems, parse_response
from socialr1 import read_answer, read_instructions, read_rows, setting, stage_spans
from socialr1 import write_json, write_text


# ------------------------------------------------------------------------------ answering problems


@dataclass(frozen=True)
class EvalConfig(Settings):
    """How problems are answered: the settings of `evaluate`."""

    samples: int = setting(1, "responses per problem; the accuracy is their mean", low=1)
    temperature: float = setting(None, "else 0, greedy; 1 if --samples > 1", low=0, kind=float)
    top_p: float = setting(1.0, "nucleus sampling; 1 is off", above=0, high=1)
    top_k: int = setting(0, "sampling from so many best tokens; 0 is off", low=0)
    max_new_tokens: int = setting(None, "else generation_config.json's, or 1024", low=1, kind=int)
    thinking: bool = setting(True, "the chat template's mode, where it has two")
    token_budget: int = setting(32768, "tokens in caches at a time; less needs less memory", low=1)
    seed: int = setting(0, "of sampling, and of generated stories", low=0, high=2**31 - 1)


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    content: ContentModel | None = None,
    reward_config: RewardConfig = RewardConfig(),
    instructions: str = INSTRUCTIONS,
    journal: Path | None = None,
    label: str | None = None,
    **settings,
) -> dict:
    """Answer every problem and sum up the responses; `settings` are those of EvalConfig.

    `content` scores the stages of each response, `label` names a progress bar. Answers are appended
    to the file `journal` as they come; called again after an interruption, evaluate asks only for
    those that are missing. The journal also keeps when it was begun, because a chat template may
    write the date: resumed after midnight, the prompts are the same. ValueError: no problems, a
    problem too long for the model's context.
    """
    if not problems:
        raise ValueError("no problems to evaluate")
    config = EvalConfig(**settings)
    longest = config.max_new_tokens or tokenizer.max_new_tokens
    tokenizer.moment, done = read_journal(journal, tokenizer.moment)
    chats = [build_messages(problem, instructions) for problem in problems]
    prompts = [tokenizer.chat(messages, config.thinking) for messages in chats]
    for problem, prompt in zip(problems, prompts):  # here, so that an error names the problem
        check_ids(model.config, f"problem {problem.id!r}", prompt, longest)

    # 1. Ask for what the journal does not hold yet. An answer depends on the model, the settings of
    # sampling and the prompt, so together these name it; equal prompts have equal answers.
    default = 1.0 if config.samples > 1 else 0.0
    temperature = default if config.temperature is None else config.temperature
    sampling = dict(group_size=config.samples, max_new_tokens=longest, temperature=temperature)
    sampling |= dict(top_p=config.top_p, top_k=config.top_k, seed=config.seed)
    sampling["stop_ids"] = list(tokenizer.stop_ids)
    source = digest([fingerprint(model), sampling]) if journal else ""
    names = {tuple(prompt): digest([source, prompt]) for prompt in prompts}
    missing = [prompt for prompt, name in names.items() if name not in done]
    stream = generate_stream(model, missing, token_budget=config.token_budget, **sampling)
    bar = dict(desc=label, total=len(missing), unit="prompt", disable=label is None, leave=False)
    with open(journal or os.devnull, "a", encoding="utf-8", buffering=1) as file:
        for prompt, completions in tqdm(stream, **bar):
            name = names[prompt]
            read = partial(tokenizer.completion_text, prompt)
            done[name] = [(read(c.tokens), len(c.tokens), c.finished) for c in completions]
            print(json.dumps([name, done[name]]), file=file)

    # 2. Measure the responses.
    records = []
    for item, (problem, prompt) in enumerate(zip(problems, prompts)):
        for sample, (text, length, finished) in enumerate(done[names[tuple(prompt)]]):
            grounding = ground(content, problem, text) if content else None
            record = measure(problem, text, length, grounding, reward_config, finished)
            records.append(record | {"item": item, "sample": sample})
    return summarise(records) | {"reward_config": asdict(reward_config)}


def read_journal(journal: Path | None, moment: float) -> tuple[float, dict[str, list]]:
    """Return when an evaluation began, and its answers by name; a new one begins at `moment`.

    One line holds the moment, and each other one a name and the answers to a prompt: the text of
    each sample, its number of tokens, and whether it was finished. The file is written anew, for an
    interruption can leave a torn last line. ValueError: the file is no journal.
    """
    if not journal:
        return moment, {}
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    complete = [line for line in lines if line.endswith(b"\n")]
    complete = complete or [json.dumps(["moment", moment]).encode() + b"\n"]
    answers = {}
    try:
        for name, samples in map(json.loads, complete):
            if name == "moment":
                moment = samples + 0.0
            else:
                answers[name] = [(text + "", length + 0, end) for text, length, end in samples]
    except (ValueError, TypeError):
        raise ValueError(f"{journal}: not an evaluation's journal; choose another --json") from None
    write_text(journal, b"".join(complete).decode())
    return moment, answers


def digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def fingerprint(model: Transformer) -> str:
    """Digest all that a model's outputs depend on: its weights and its config."""
    weights = hashlib.blake2b(digest_size=16)
    for p in model.parameters():
        weights.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest([weights.hexdigest(), model.config.raw])


# ------------------------------------------------------------------------- what one response shows


def ground(content: ContentModel, problem: Problem, text: str) -> dict[str, float]:
    """Ask the content model how well each stage is grounded in the story, from 0 to 1."""
    stages = parse_response(text, problem).stages
    (scores,) = content.score([(problem.story, problem.question, stages)])
    return {stage: logistic(score) for (stage, _), score in zip(stages, scores)}


def measure(
    problem: Problem, text: str, length: int, content=None, config=RewardConfig(), finished=True
) -> dict:
    """Measure one response of `length` tokens: all that the tables and the page show of it.

    `content` has a score from 0 to 1 for each stage present, if there is a content model.
    """
    response = parse_response(text, problem)
    think = response.think
    named = [start for _, start, _ in locate_options(think, problem)]
    grounding = None if content is None else mean(list(content.values()))
    reward = total_reward(response, problem, length, content=grounding, config=config)
    return {
        **asdict(problem),
        "benchmark": problem.source.partition("/")[0],
        "gold": problem.answer,
        "answer": response.answer,  # in place of the problem's
        "correct": response.answer == problem.answer,
        "lenient": (response.answer or lenient_answer(text, problem)) == problem.answer,
        "parse_rate": response.answer is not None,
        "well_formed": response.well_formed,
        "coverage": len(response.stages) / len(STAGES),
        "order": order_fraction(response),
        "stage_order": tuple(name for name, _ in response.stages) == STAGES,
        "option_early": any(early_options(response, problem)),
        "first_option": min(named) / len(think) if named else None,
        "repetition": 1 - distinct_fraction(think),
        "length": length,
        "reward": reward.total,
        "terms": reward.parts,
        "content": content,
        **{f"content, {stage}": value for stage, value in (content or {}).items()},
        **{f"fault, {name}": response.cause(finished) == name for name in CAUSES},
        "text": text,
        "finished": finished,
    }


def lenient_answer(text: str, problem: Problem) -> str | None:
    """Return the letter in the last line that reads as an answer, or that names a single letter.

    A letter is named by "option B", "the answer is B", "(B)", or "B." at the line's start. A line
    that lists several, as in "B or C", is passed over.
    """
    lines = re.sub(r"(?i)</?(?:think|answer)>|\\boxed\{|\}", "\n", plain(text)).splitlines()
    for line in reversed(lines):
        spans = letter_mentions(line, problem)
        named = {re.findall("[A-Z]", line[start:end])[-1] for start, end in spans}
        letter = rf"\b[{problem.letters}]\b"
        listed = re.search(rf"{letter}\W{{0,3}}(?:,|/|\bor\b|\band\b)\W{{0,3}}{letter}", line)
        answer = read_answer(line, problem) or "".join(named)
        if len(answer) == 1 and not listed:
            return answer
    return None


def locate_options(think: str, problem: Problem) -> list[tuple[str, int, int]]:
    """Find where the reasoning names an option: stage, start and end."""
    places = []
    for stage, begin, end in stage_spans(think):
        for start, stop in option_mentions(think[begin:end], problem):
            places.append((stage, begin + start, begin + stop))
    return places


# ----------------------------------------------------------------------- estimates and intervals
#
# An estimate is an array: first the mean of the data, then the same mean in each bootstrap draw.
# The difference of two estimates is therefore the difference of two arrays, and needs no formula
# for its error: `control - hard` holds the gap, and the gap in each draw.

DRAWS = 2000
Estimate = np.ndarray  # (1 + DRAWS,), or with a column for each measure


def estimate(stories: Sequence[str], values: Sequence, weights: Sequence) -> Estimate:
    """Estimate a weighted mean of values, each of some story; with K columns, K means.

        mean in a draw = sum_s(n_s * sum_i(w_i * v_i)) / sum_s(n_s * sum_i(w_i))

    The outer sums run over the stories s, the inner ones over the values of a story; n_s says how
    often the draw has story s. Values and weights (n,) give an estimate (1 + DRAWS,), and (n, K)
    give (1 + DRAWS, K). A mean without any weight is NaN. The same stories are drawn alike always.
    """
    names, place = np.unique(stories, return_inverse=True)
    n, weights = len(names), np.asarray(weights, dtype=float)
    sums, totals = np.zeros((2, n, *weights.shape[1:]))
    np.add.at(sums, place, np.multiply(values, weights))
    np.add.at(totals, place, weights)
    generator = np.random.default_rng(int(digest(names.tolist()), 16))
    draws = generator.multinomial(n, np.full(n, 1 / n), size=DRAWS)
    counts = np.vstack([np.ones(n), draws])  # how often each draw has each story; row 0: the data
    with np.errstate(invalid="ignore"):
        return (counts @ sums) / (counts @ totals)


def interval(values: Estimate) -> list[float]:
    """Return the bounds of the middle 95% of the draws."""
    return np.nanpercentile(values[1:], (2.5, 97.5)).tolist()


def normalise(story: str) -> str:
    """Keep only the letters, in lower case: marks, blanks and line numbers make no new story."""
    return "".join(filter(str.isalpha, story.casefold()))


# The rows of a table, and what grpo.py logs during training.
ACCURACIES = ("accuracy", "lenient", "macro", "hard", "control", "shortcut_gap")
PROCESS = "parse_rate well_formed coverage order stage_order option_early first_option".split()
PROCESS += ["repetition", "length", "reward", *(f"content, {stage}" for stage in STAGES)]
FAILURES = [f"fault, {name}" for name in CAUSES]
MEASURES = "accuracy hard control shortcut_gap parse_rate stage_order option_early length".split()
SPLITS = {"by_benchmark": "benchmark", "by_file": "source", "by_ability": "ability"}


class Unit(NamedTuple):
    """What is scored as one, with all samples: a problem, or problems that only count together.

    `values` has the mean of each measure, and `weights` how much each counts; 0: there is no data.
    """

    records: list[dict]
    story: str
    measures: list[str]
    values: np.ndarray
    weights: np.ndarray


def make_units(records: list[dict]) -> list[Unit]:
    """Gather the records of each problem, and the problems of one source with the same `joint`."""
    groups = defaultdict(lambda: defaultdict(list))
    for place, record in enumerate(records):
        item = record.get("item", place)
        groups[record["source"], record["joint"] or item][item].append(record)
    return [make_unit(list(problems.values())) for problems in groups.values()]


def make_unit(problems: list[list[dict]]) -> Unit:
    """Score problems that count together: the k-th sample is right if the k-th answers all are."""
    records = list(itertools.chain(*problems))
    right = [all(record["correct"] for record in sample) for sample in zip(*problems)]
    lenient = [all(record["lenient"] for record in sample) for sample in zip(*problems)]
    first = records[0]
    # Accuracies weigh units alike; the other measures weigh responses, where they have a value.
    data = {"accuracy": (mean(right), 1), "lenient": (mean(lenient), 1)}
    data |= {name: (mean(right), first["variant"] == name) for name in ("hard", "control")}
    for key in (*PROCESS, *FAILURES):
        known = [record[key] for record in records if record.get(key) is not None]
        data[key] = (mean(known), len(known))
    # Twins share source and id: they are one story told twice, and drawn together.
    story = f"{first['source']} {first['id']}" if first["variant"] else normalise(first["story"])
    values, weights = np.array(list(data.values()), dtype=float).T
    return Unit(records, story, list(data), values, weights)


def group_units(units: list[Unit], key: str) -> dict[str, list[Unit]]:
    return dict(sorted(grouped(units, [unit.records[0][key] for unit in units]).items()))


def summarise(records: list[dict]) -> dict:
    """Sum up the records of `measure`: the estimates, and the records themselves.

    `n` counts units, `questions` problems.
    """
    questions = sum(not record.get("sample") for record in records)
    return sum_up(make_units(records)) | {"questions": questions, "responses": records}


def sum_up(units: list[Unit]) -> dict:
    """Estimate every measure over all units, and the accuracy over each group of them.

    The former are in "overall" and at the top of the result, the latter in "by_ability" and its
    like; so are the bounds in "intervals", and in "counts" how many units have data. A measure
    without data, such as `hard` on a benchmark, is missing; those of MEASURES are None at the top.
    """

    def accuracy(members: list[Unit]) -> Estimate:
        right = [unit.values[0] for unit in members]  # values[0] is the accuracy
        return estimate([unit.story for unit in members], right, np.ones(len(members)))

    groups = {section: group_units(units, key) for section, key in SPLITS.items()}
    estimates = map_sections(accuracy, groups)
    _, stories, measures, values, weights = zip(*units)
    drawn = zip(measures[0], estimate(stories, values, weights).T)
    overall = {measure: draws for measure, draws in drawn if not np.isnan(draws[0])}
    benchmarks = estimates["by_benchmark"].values()
    overall["macro"] = sum(benchmarks) / len(benchmarks)
    if "hard" in overall and "control" in overall:
        overall["shortcut_gap"] = overall["control"] - overall["hard"]
    estimates["overall"] = overall
    having = np.count_nonzero(weights, axis=0).tolist()  # units that have a measure at all
    counts = map_sections(len, groups) | {"overall": dict(zip(measures[0], having))}
    means = map_sections(lambda draws: float(draws[0]), estimates)
    result = dict.fromkeys(MEASURES) | means["overall"] | means
    result |= {"n": len(units), "counts": counts}
    return result | {"intervals": map_sections(interval, estimates)}


def map_sections(function: Callable, sections: dict[str, dict]) -> dict[str, dict]:
    """Apply a function to each value of the dicts in a dict."""
    return {s: {name: function(v) for name, v in sections[s].items()} for s in sections}


# ----------------------------------------------------------------------------------------- tables

Rows = list[list[str]]  # the first row is the header


def aligned(rows: Rows) -> str:
    """Set rows as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for label, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def table_rows(results: dict[str, dict], with_intervals: Sequence[str] = ()) -> Rows:
    """Lay out named results, a column each: measures, then accuracy by benchmark, file, ability."""

    def row(label: str, section: str, name: str) -> list[str]:
        counts, cells = [], []
        for column, result in results.items():
            value, bounds = result[section].get(name), result["intervals"][section].get(name)
            cells.append(cell(name, value, bounds if column in with_intervals else None))
            counts.append(str(result["counts"][section].get(name, result["n"])))
        return [label, "/".join(dict.fromkeys(counts)), *cells]

    rows = [["", "n", *results]]
    for key in (*ACCURACIES, *PROCESS, *FAILURES):
        values = [result["overall"].get(key) for result in results.values()]
        if any(value is not None and (value or key not in FAILURES) for value in values):
            rows.append(row(key.replace("_", " "), "overall", key))
    for section in SPLITS:
        names = sorted(set().union(*(result[section] for result in results.values())))
        if len(names) > 1 or section == "by_ability":
            rows.append([f"accuracy {section.replace('_', ' ')}", *[""] * (len(results) + 1)])
            rows += [row(f"  {name or '(none given)'}", section, name) for name in names]
    return rows


def cell(key: str, value: float | None, bounds: Sequence[float] | None = None) -> str:
    """Write a value, with its interval if there are bounds; "-" for None."""
    if value is None:
        return "-"
    digits = 1 if key == "length" else 3
    texts = [f"{number:z.{digits}f}" for number in (value, *(bounds or ()))]  # z: no "-0.000"
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if bounds else texts[0]


# ---------------------------------------------------------------------- readers of the benchmarks
#
# A reader turns a row of an original file into items: dicts with story, question, options and
# answer, and where the row has them ability and id. `subset` is the part of the benchmark, where it
# is not the file's name; problems with the same `joint` count only together; `cut` says that a line
# was dropped. In place of an item a reader may yield the reason why there is none. The names of the
# row's cells have lost case, blanks, _ and -: "question type" is "questiontype".
#
# The rest is common to all. The options of a problem may begin with their letters. Answers may be
# letters, texts of options or places; the whole file decides which. A cell may be missing, or have
# blanks around it. Where a file gives the options in no order, or the right letter is biased, they
# are shuffled, each problem's with a seed of its own. All that is repaired or left out is noted
# with its rows. Where a line is for a special case, the complete original files have that case.

TEXTS = json.loads((ASSETS / "benchmarks.json").read_text("utf-8"))
DO_NOT_TRAIN = TEXTS["do not train"]  # benchmark: why; grpo.py warns
COLUMNS = TEXTS["columns"]  # language: text: the names that its column may have, best first
# The endings of files that nobody takes for data; README and LICENSE have none.
COMPANIONS = ".md .rst .txt .lst .py .sh .ipynb .html .pdf .png .jpg .svg .yml .yaml .toml .cfg"
COMPANIONS = ("", *COMPANIONS.split())


def emobench_eu(row: dict, lang: str) -> Iterator[dict | str]:
    """Ask for an emotion and for its cause, which are right together; the file has no questions."""
    name = f"EU:{lang}:{row['qid']}"
    for half in ("emotion", "cause"):
        question = TEXTS["emobench"][lang][half].format(row["subject"])
        item = dict(story=row["scenario"], question=question, ability=row["coarsecategory"])
        item |= dict(options=row[f"{half}choices"], answer=row[f"{half}label"])
        yield item | dict(subset="EU", id=f"{name}:{half}", joint=name)


def emobench_ea(row: dict, lang: str) -> Iterator[dict | str]:
    question = TEXTS["emobench"][lang][row["questiontype"]].format(row["subject"])
    item = dict(story=row["scenario"], question=question, ability=row["category"])
    item |= dict(options=row["choices"], answer=row["label"])
    yield item | dict(subset="EA", id=f"EA:{lang}:{row['qid']}")


def motivebench(row: dict, lang: str) -> Iterator[dict | str]:
    """Ask three questions a row; each has a scenario of its own, which stands in front of it."""
    for place, kind in enumerate(("motivation", "behavior", "motivation and behavior"), start=1):
        sentences = split_sentences(row[simplify(f"{kind} reasoning question")].strip())
        asking = [sentence for sentence in sentences if sentence.endswith("?")]
        unasked = f"What is the most likely {kind}?"
        question = asking[-1] if asking and len(sentences) > 1 else unasked
        story = " ".join(sentence for sentence in sentences if sentence != question)
        item = dict(story=story, question=question, ability=kind)
        item |= dict(options=row[f"options{place}"], answer=row[f"correctanswer{place}"])
        yield item | dict(id=f"{row['idx']}:{place}")


# Titles and the like; and single letters, as in initials, "U.S.", "e.g." and "a.m."
TITLES = "|".join(TEXTS["abbreviations"])
ABBREVIATED = re.compile(rf"(?i)(?:(?<!\w)(?:{TITLES})|(?<![\w'’])[a-z])\.$")


def split_sentences(text: str) -> list[str]:
    """Split a text at blanks behind . ! or ?, unless it may go on: "Mr. Hale", "e.g. this".

    Where it is unclear, two sentences stay together, which costs less than one cut in two.
    """
    sentences = [""]
    for piece in re.split(r"(?<=[.!?])(?=\s+[^\sa-z])", text):
        last = sentences[-1]
        quoting = last.count('"') % 2 or last.count("“") > last.count("”")
        if not last or quoting or ABBREVIATED.search(last):
            sentences[-1] += piece
        else:
            sentences.append(piece.lstrip())
    return sentences


def hitom(row: dict, lang: str) -> Iterator[dict | str]:
    """Ask with the original prompts' note, in our words: without it deception makes no sense."""
    if row.get("promptingtype", "CoTP") != "CoTP":  # 138 of these 600 have another gold answer
        yield "repeats a CoTP row, some with a wrong answer"
        return
    lines = row["story"].split("\n")
    kept = [line for line in lines if line.strip() != "***"]
    question = row.get("questionold", row["question"])  # the newer one repeats the options
    item = dict(story="\n".join(kept), question=f"{question}\n{TEXTS['hitom']}")
    item |= dict(options=re.split(r",\s(?=[A-Z]\. )", row["choices"]), answer=row["answer"])
    item |= dict(ability=f"order {row['questionorder']}", id=f"hitom:{row['sampleid']}")
    yield item | dict(cut=kept != lines)


def tactfultom(row: dict, lang: str) -> Iterator[dict | str]:
    """Ask the questions of five lists; the right answer and the wrong ones have no order."""
    for kind in ("justification", "fact_reason", "fact_truth", "belief", "lieability"):
        name = simplify(f"{kind}QA")
        for asked in row.get(name, row.get(f"{name}s", [])):
            options, wrong = [asked["correct_answer"]], asked["wrong_answer"]
            options += [wrong] if isinstance(wrong, str) else wrong
            person = asked["question"].partition(" believe about")[0].split(" ")[-1]
            if kind == "belief" and not any(option.startswith(person) for option in options):
                yield "asks about one person, and all options speak of another"
                continue
            question = TEXTS["tactfultom"].get(kind, "") + asked["question"]
            item = dict(story=row["fullcontext"], question=question, id=asked["q_id"])
            yield item | dict(options=options, answer="A", ability=kind.replace("_", " "))
    for name, questions in row.items():
        if name == "comprehensionqa" or name.endswith(("qasbinary", "qalist", "qaslist")):
            yield from ["yes/no, or a list of names: no options to choose from"] * len(questions)


def simpletom(row: dict, lang: str) -> Iterator[dict | str]:
    kinds = {"aware": "mental state", "action": "behavior", "judge": "judgment"}
    kind = kinds[row["id"].rpartition("_")[2]]
    item = dict(story=row["story"], question=row["question"], ability=kind, subset=kind)
    yield item | dict(options=row["choices"]["text"], answer=row["answerkey"], id=row["id"])


def by_columns(row: dict, lang: str) -> Iterator[dict | str]:
    """Read a row that has a column for each text, under one of the names in COLUMNS."""
    options = read_options(row, lang)
    item = {text: first_cell(row, COLUMNS[lang][text]) for text in ("story", "question", "answer")}
    complete = options and given(item["story"]) and given(item["question"])
    if "故事" in row and not complete:
        yield f"has no question in {lang!r}"
        return
    if lang == "en" and given(row.get("故事")) and len(read_options(row, "zh")) == 2 < len(options):
        yield "its English question may belong to another story: the Chinese one is yes or no"
        return
    # "Belief: Second-order beliefs" is belief
    ability = given(first_cell(row, COLUMNS[lang]["ability"])).partition(":")[0]
    yield item | dict(options=options, ability=ability.strip().lower())


def our_own(row: dict, lang: str) -> Iterator[dict | str]:
    extra = {name: given(row.get(name)) for name in ("source", "id", "variant", "trace")}
    for item in by_columns(row, lang):
        yield item | {name: text for name, text in extra.items() if text}


class Reader(NamedTuple):
    """A benchmark, the columns that give its files away, and what turns a row into problems."""

    name: str
    columns: str
    items: Callable[[dict, str], Iterator[dict | str]]
    shuffled: bool = False


READERS = (  # the first that fits; the last fits all
    Reader("emobench", "qid language emotionchoices causechoices", emobench_eu, shuffled=True),
    Reader("emobench", "qid language questiontype choices", emobench_ea, shuffled=True),
    Reader("motivebench", "motivationreasoningquestion options1", motivebench, shuffled=True),
    Reader("hitom", "questionorder sampleid story choices", hitom),
    Reader("tactfultom", "fullcontext beliefqas characters", tactfultom, shuffled=True),
    Reader("simpletom", "id story question choices answerkey", simpletom, shuffled=True),
    Reader("socialiqa", "context question answera answerb answerc", by_columns),
    Reader("tombench", "答案answer", by_columns),
    Reader("problems", "", our_own),
)


class NoProblems(ValueError):
    """A file that holds no problems, or cannot be read; a folder may have such files, too."""


def recognise(file: Path, columns: list[str]) -> Reader:
    """Return the reader of a file with these columns; NoProblems names the texts without one."""
    present = {simplify(name) for name in columns}
    reader = next(reader for reader in READERS if present.issuperset(reader.columns.split()))
    if reader.items not in (by_columns, our_own):
        return reader
    # ToMBench-Hard has ToMBench's columns or others, but comes as CSV, and has four options.
    hard = file.suffix.lower() == ".csv" and reader.name != "socialiqa"
    hard = hard and present.isdisjoint(("variant", "trace"))  # those are ours
    letters = "abcd" if hard else "a"
    names = COLUMNS["en"]
    for pattern in names["option"]:
        if present.issuperset(pattern.format(letter) for letter in letters):
            present.add("options")
    texts = ("story", "question", "options", "answer")
    missing = [text for text in texts if present.isdisjoint(names[text])]
    if missing:
        listed = ", ".join(map(repr, columns))
        raise NoProblems(f"no column for {', '.join(missing)}; the columns are: {listed}")
    return Reader("tombench-hard", "", by_columns) if hard else reader


def simplify(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def clean(cell: object) -> str:
    """Return a cell as stripped text; "" for what is missing: None, or NaN as a number."""
    return "" if cell is None or cell != cell else str(cell).strip()


def given(cell: object) -> str:
    """Return a cell as stripped text; "" for what is missing, and for "nan" and "NaN", too."""
    text = clean(cell)
    return "" if text in ("nan", "NaN") else text


def first_cell(row: dict, names: list[str]) -> object:
    return next((row[name] for name in names if name in row), "")


def read_options(row: dict, lang: str) -> list:
    """Return the options' cells, from one column or several, without empty ones at the end."""
    cells, reading = first_cell(row, COLUMNS[lang]["options"]), clean
    if cells and isinstance(cells, str):
        try:
            cells = ast.literal_eval(cells)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(f"the options column holds no list: {cells[:60]!r}") from None
    for pattern in COLUMNS[lang]["option"]:
        if not cells and pattern.format("a") in row:
            cells = [row.get(pattern.format(letter.lower())) for letter in LETTERS]
            # A last option "nan" is missing in a CSV; elsewhere it is a word.
            reading = given if row["csv"] else clean
    cells = list(cells) if isinstance(cells, (list, tuple)) else []
    while cells and not reading(cells[-1]):
        cells.pop()
    return cells


def without_letter(text: str, letter: str) -> str:
    """Drop an option's letter, with its marks, before its text; "A.M." has none."""
    lettered = rf"(?i)[(\[]?{letter} *[.:、)\]](?: +(?=\S)|(?=\S)(?!\w\.))"
    found = re.match(lettered, even_out(text))
    return text[found.end() :] if found else text


def tidy(item: dict) -> tuple[dict, list[str]]:
    """Clean the texts of an item -> the item, with its options by letter, and what was repaired.

    ValueError: a text is missing or no text, there are too few or too many options, or the answer
    is the text of several.
    """
    raw = [item["answer"], item["story"], item["question"], *item["options"]]
    if not 2 <= len(raw) - 3 <= len(LETTERS):
        raise ValueError(f"a problem needs 2 to 26 options, got {len(raw) - 3}")
    answer, story, question, *texts = map(clean, raw)
    if "" in texts:
        raise ValueError(f"option {LETTERS[texts.index('')]} is empty")
    if not given(story) or not given(question):
        raise ValueError("the story or the question is empty")
    "".join((story, question, *texts)).encode()  # half of a surrogate pair is no text
    if texts.count(answer) > 1:
        raise ValueError(f"answer {answer!r} is the text of {texts.count(answer)} options")
    bare = [without_letter(text, letter) for letter, text in zip(LETTERS, texts)]
    lettered = all(text != full for text, full in zip(bare, texts))  # "A. Smith" alone is a name
    repairs = {
        "a line that is no part of the story": item.get("cut"),
        "blanks around a text": any(isinstance(x, str) and x != x.strip() for x in raw),
        "a letter before an option's text": lettered,
        "more than a letter as answer": answer not in texts and re.match(r"\(?[A-Z]\W", answer),
    }
    options = dict(zip(LETTERS, bare if lettered else texts))
    item = item | dict(story=story, question=question, options=options, answer=answer)
    return item, [f"repaired: {what}" for what, done in repairs.items() if done]


def possible_golds(answer: str, options: dict[str, str]) -> dict[str, str]:
    """Return what letter an answer means, by the kind of answer that it may be.

    A letter may have marks around it, or its option's text behind it.
    """
    golds = {}
    bare = even_out(answer).strip("()[]. ").upper()
    for letter, text in options.items():
        if letter == bare or without_letter(answer, letter) == text != answer:
            golds["one letter"] = letter
    same = [o for o, text in options.items() if text in (answer, without_letter(answer, o))]
    if len(same) == 1:
        golds["the text of exactly one option"] = same[0]
    number = re.fullmatch(r"(\d{1,2})(\.0)?", answer)
    for first in (1, 0):
        if number and 0 <= int(number[1]) - first < len(options):
            golds[f"a place, counted from {first},"] = LETTERS[int(number[1]) - first]
    return golds


def decide_golds(file: Path, items: list[tuple[int, dict]], benchmark: str) -> list[str]:
    """Return the right letter of each item; which kind its answer is, the whole file decides.

    A kind must fit all answers. Where several do, they must mean the same letters; SocialIQA counts
    places from 1. ValueError names the line where this is not so.
    """
    golds = [possible_golds(item["answer"], item["options"]) for _, item in items]
    fitting = Counter(itertools.chain(*golds))
    kinds = [kind for kind, count in fitting.items() if count == len(items)]
    if items and not kinds:
        usual = max(fitting, key=fitting.get, default="one letter")
        line, item = next(place for place, found in zip(items, golds) if usual not in found)
        expected = f"expected {usual} of {''.join(item['options'])}"
        raise ValueError(f"{file}:{line}: answer {item['answer']!r} has no option: {expected}")
    if benchmark == "socialiqa":
        kinds = [kind for kind in kinds if "from 1" in kind] or kinds
    unclear = [line for (line, _), found in zip(items, golds) if len({found[k] for k in kinds}) > 1]
    if unclear:
        meant = f"answers may be {' or '.join(kinds)} which differ in rows {unclear[:9]}"
        raise ValueError(f"{file}:{unclear[0]}: {meant}; write them as letters")
    return [found[kinds[0]] for found in golds]


def make_problem(item: dict, gold: str, reader: Reader) -> Problem:
    """Make a problem of an item whose right letter is known; shuffle the options if need be."""
    options, order = item["options"], list(item["options"])
    if reader.shuffled:
        order = random.Random(f"{reader.name} {item['id']}").sample(order, len(order))
    names = ("story", "question", "ability", "source", "id", "variant", "joint", "trace")
    given = {name: item.get(name, "") for name in names}
    return Problem(**given, options=[options[o] for o in order], answer=LETTERS[order.index(gold)])


Reading = tuple[list[Problem], list[str]]  # problems, notes


def read_file(file: Path, name: str | None, lang: str, in_folder: bool) -> Reading:
    """Read a file -> its problems, and notes with the rows that they are about.

    NoProblems: it has no rows, or none of problems. ValueError: it is broken, in general or a row.
    """
    if in_folder and file.suffix.lower() not in (".jsonl", ".json", ".csv"):
        raise NoProblems("this format is not read; make .jsonl, .json or .csv of it")
    rows = read_with_labels(file)
    try:
        first = next(rows)
    except StopIteration:
        raise NoProblems("no rows; expected one problem a row") from None
    except ValueError as error:
        raise (NoProblems(str(error)) if in_folder else error) from None
    reader = recognise(file, list(first[1]))
    reader = reader._replace(name=name or reader.name)
    if in_folder and reader.name == "socialiqa" and re.search("train|trn", file.stem.lower()):
        raise NoProblems("the training split; name the file to read it")

    items, notes = [], defaultdict(list)
    for line, row in itertools.chain([first], rows):
        try:
            for item in read_items(reader, file, line, row, lang):
                remarks = [f"left out: {item}"]
                if isinstance(item, dict):
                    item, remarks = tidy(item)
                    items.append((line, item))
                for remark in remarks:
                    notes[remark].append(line)
        except ValueError as error:
            raise ValueError(f"{file}:{line}: {error}") from None
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}:{line}: not a row of {reader.name}: {error!r}") from None
    golds = decide_golds(file, items, reader.name)
    problems = [make_problem(item, gold, reader) for (_, item), gold in zip(items, golds)]
    notes = [describe(file, note, lines) for note, lines in notes.items()]
    if lang != "en" and "language" not in reader.columns and "故事" not in first[1]:
        notes.append(f"{file}: in one language only, so --lang {lang} changes nothing")
    return problems, notes


def read_items(reader: Reader, file: Path, line: int, row: dict, lang: str) -> Iterator[dict | str]:
    """Read a row's items, with source and id, or in place of an item why there is none."""
    row = {simplify(name): cell for name, cell in row.items()}
    row["csv"] = file.suffix.lower() == ".csv"
    if "language" in reader.columns and row["language"] != lang:
        yield "in the other language"
        return
    for item in reader.items(row, lang):
        if isinstance(item, dict):
            source = f"{reader.name}/{item.get('subset', file.stem)}"
            item = {"source": source, "id": f"{file.stem}:{line}"} | item
        yield item


def describe(file: Path, note: str, lines: list[int]) -> str:
    """Write a note with its count and its first rows: "x.csv: 3 left out: ... (rows 2, 5, 9)"."""
    rows = list(dict.fromkeys(lines))
    shown = ", ".join(map(str, rows[:5])) + ", ..." * (len(rows) > 5)
    return f"{file}: {len(lines)} {note} (row{'s' * (len(rows) > 1)} {shown})"


def read_with_labels(file: Path) -> Iterator[tuple[int, dict]]:
    """Read rows; SocialIQA has the answers in a second file, one a line."""
    labels = file.with_name(f"{file.stem}-labels.lst")
    if not labels.exists():
        yield from read_rows(file)
        return
    rows = list(read_rows(file))
    answers = labels.read_text(encoding="utf-8", errors="replace").split()
    if len(answers) != len(rows):
        raise ValueError(f"{labels}: {len(answers)} answers for {len(rows)} rows of {file.name}")
    for (line, row), label in zip(rows, answers):
        yield line, row | {"label": label}


def find_files(path: Path, known: set[str]) -> Iterator[Path]:
    """List a file, or the files below a folder, also behind links, but no hidden ones.

    `known` collects the real paths of the folders, so that a loop of links has an end.
    """
    real = os.path.realpath(path)
    if not path.is_dir():
        yield path
    elif real not in known:
        known.add(real)
        for below in sorted(path.iterdir()):
            if not below.name.startswith(".") and below.name != "__MACOSX":
                yield from find_files(below, known)


def read_files(path: Path, name: str | None, lang: str, known: set[str]) -> Reading:
    """Read a file or a folder; skip files in `known`, and add what was read to it (real paths).

    In a folder, files without problems and SocialIQA's training split are left out with a note;
    COMPANIONS and hidden files without one.
    """
    if lang not in COLUMNS:
        raise ValueError(f"unknown language {lang!r}: expected 'en' or 'zh'")
    found = [f for f in find_files(path, set()) if f == path or f.suffix.lower() not in COMPANIONS]
    problems, notes = [], []
    for file in sorted(found, key=Path.is_symlink):  # a file comes before links to it
        if os.path.realpath(file) in known:
            notes.append(f"{file}: read already, counts once")
            continue
        known.add(os.path.realpath(file))
        try:
            of_file, of_notes = read_file(file, name, lang, in_folder=file != path)
        except NoProblems as reason:
            if file == path:
                raise ValueError(f"{file}: {reason}") from None
            of_file, of_notes = [], [f"{file}: left out: {reason}"]
        problems += of_file
        notes += of_notes
    if not problems and not any("read already" in note for note in notes):
        raise ValueError("; ".join([f"{path}: no problems in {lang!r} found", *notes[:3]]))
    return problems, notes


def read_benchmark(path: str | Path, name: str | None = None, lang: str = "en") -> list[Problem]:
    """Read one of the eight benchmarks in its original files, or our JSONL; a file or a folder.

    The benchmark is recognised from the columns. Our JSONL has story, question, options (a list)
    and answer (a letter), and may have ability, source, id, variant and trace. ValueError names the
    line.
    """
    return read_files(Path(path), name, lang, set())[0]


def read_all(paths: list[Path], lang: str) -> list[Problem]:
    """Read several files and folders; say what was read, repaired and left out."""
    problems, known = [], set()
    for path in paths:
        of_path, notes = read_files(path, None, lang, known)
        names = sorted({problem.source.partition("/")[0] for problem in of_path})
        tqdm.write("\n  ".join([f"{path}: {len(of_path)} problems ({', '.join(names)})", *notes]))
        problems += of_path
    return problems


def spread(items: list, count: int) -> list:
    """Choose at most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def spread_problems(problems: list[Problem], count: int) -> list[Problem]:
    """Choose about `count` problems, evenly spread; those that count together stay together."""
    keys = [(problem.source, problem.joint or place) for place, problem in enumerate(problems)]
    groups = list(grouped(problems, keys).values())
    chosen = math.ceil(count * len(groups) / max(len(problems), 1))
    return list(itertools.chain(*spread(groups, chosen)))


def contamination_note(training: list[Problem], evaluation: list[Problem]) -> str:
    """Say how many training problems have a story that stands in the evaluation data, too."""
    known = {normalise(problem.story) for problem in evaluation}
    seen = [problem for problem in training if normalise(problem.story) in known]
    if not seen:
        return f"no story of the {len(training)} training problems stands in the evaluation data"
    count = f"WARNING: {len(seen)} of {len(training)} training problems"
    return f"{count} have a story of the evaluation data, as has {seen[0].source} {seen[0].id}"


# -------------------------------------------------------------------------- comparing two results


def read_result(path: Path) -> dict:
    """Read what --json wrote, or grpo.py's before.json and after.json with all evaluations in them.

    Responses, content scores and R's settings are taken over; what a response shows is measured
    anew. ValueError: another file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a result of eval.py --json")
    stored = read_json(path)
    records = []
    try:
        evaluations = [stored] if "responses" in stored else stored.values()
        for place, evaluation in enumerate(evaluations):
            reward_config = RewardConfig(**evaluation.get("reward_config", {}))
            for item, record in enumerate(evaluation["responses"]):
                item = (place, int(record.get("item", item)))
                records.append(measure_again(record, reward_config) | {"item": item})
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a result of eval.py --json: {error!r}") from None
    if not records:
        raise ValueError(f"{path}: no responses in it")
    return summarise(records)


def problem_of(record: dict) -> Problem:
    given = {f.name: record.get(f.name, f.default) for f in fields(Problem)}
    return Problem(**given | {"answer": record["gold"]})


def measure_again(record: dict, reward_config: RewardConfig) -> dict:
    """Measure a stored record; LookupError, TypeError and ValueError say what does not fit."""
    problem, text, content = problem_of(record), record["text"], record.get("content")
    # Only texts can be joined and encoded: a TypeError or a ValueError for anything else.
    "".join([text, *problem.options, *(asdict(problem) | {"options": ""}).values()]).encode()
    if content is not None:
        content = {stage: float(value) for stage, value in content.items()}
    finished = record.get("finished", True) is True
    measured = measure(problem, text, record["length"] + 0, content, reward_config, finished)
    return measured | {"sample": int(record.get("sample", 0))}


def match(results: list[dict]) -> list[tuple[Unit, ...]]:
    """Pair the units that all results have, in the order of the first result."""
    sides = []
    for result in results:
        units = make_units(result["responses"])
        sides.append({tuple(dict.fromkeys(map(problem_of, unit.records))): unit for unit in units})
    common = [name for name in sides[0] if all(name in units for units in sides)]
    return [tuple(units[name] for units in sides) for name in common]


def compare_rows(a: dict, b: dict, names: Sequence[str]) -> Rows:
    """Lay out the paired differences b - a on the problems that both answered.

    A difference is estimated like everything else, from the differences of all units. It leaves out
    what only one side has, such as a first named option.
    """
    pairs = match([a, b])
    if not pairs:
        raise ValueError(f"{' and '.join(names)} have no problem in common")
    changes = []
    for before, after in pairs:
        weights = np.minimum(before.weights, after.weights)
        changes.append(before._replace(values=after.values - before.values, weights=weights))
    columns = (*names, "difference [95%]")
    results = dict(zip(columns, map(sum_up, (*zip(*pairs), changes))))
    return table_rows(results, with_intervals=columns[2:])


# --------------------------------------------------------------------------------------- the page


def report_page(
    results: dict[str, dict], tables: list[Rows], curves: dict | None = None, title="", limit=97
) -> str:
    """Return one self-contained HTML page: curves, tables, then up to `limit` units of problems.

    They are evenly spread; a prime limit seldom falls in step with what stories rotate. `results`
    are none, one, or two of the same problems, whose responses then stand side by side.
    `curves` are {chart: {line: [(x, y), ...]}}. The template escapes all text: what a model wrote
    stays text.
    """
    units = match(list(results.values())) if results else []
    shown = spread(units, limit)
    problems = []
    for sides in shown:
        first_samples = [[r for r in unit.records if not r.get("sample")] for unit in sides]
        problems += zip(*first_samples)
    page = dict(names=list(results), tables=tables, problems=problems, passages=mark_passages)
    page |= dict(title=title or " and ".join(results), curves=curves or {})
    page |= dict(count=f"{len(shown)} of {len(units)}", letters=LETTERS, stages=STAGES)
    template = (ASSETS / "report.html").read_text("utf-8")
    return jinja2.Environment(autoescape=True).from_string(template).render(page)


def mark_passages(record: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """Split the reasoning into passages: a stage, and runs of (mark, text).

    A mark is "early" for an option named outside Response Generation, "again" for four words that
    were said before, or "".
    """
    problem = problem_of(record)
    think = parse_response(record["text"], problem).think
    marks = [""] * len(think)
    for start, end in repetitions(think):
        marks[start:end] = ["again"] * (end - start)
    for stage, start, end in locate_options(think, problem):
        if stage != STAGES[-1]:
            marks[start:end] = ["early"] * (end - start)
    passages = []
    for stage, start, end in stage_spans(think):
        groups = itertools.groupby(range(start, end), key=marks.__getitem__)
        runs = [(mark, "".join(think[i] for i in places)) for mark, places in groups]
        passages.append((stage, runs))
    return passages


def repetitions(text: str) -> list[tuple[int, int]]:
    """Find the 4-grams of words that occurred before -> spans (start, end)."""
    run, matches = words(text), list(WORD.finditer(text))
    seen, repeated = set(), []
    for i, gram in enumerate(zip(run, run[1:], run[2:], run[3:])):
        if gram in seen:
            repeated.append((matches[i].start(), matches[i + 3].end()))
        seen.add(gram)
    return repeated


# -------------------------------------------------------------------------- settings, command line


@dataclass(frozen=True)
class Command(EvalConfig):
    """What the command line asks for: an evaluation, or a comparison of two results."""

    model: Path = setting(TINY, "checkpoint folder", kind=Path)
    data: list = setting(None, "original files, folders, our JSONL", kind=Path, nargs="+")
    lang: str = setting("en", "language of a bilingual benchmark", choices=("en", "zh"))
    split: str = setting("test", "of generated stories", choices=("train", "test", "shift"))
    limit: int = setting(None, "problems; else 400 stories, or all data", low=1, kind=int)
    train: list = setting(None, "look for their stories in the data", kind=Path, nargs="+")
    instructions: Path = setting(None, "file with another system message", kind=Path)
    content: Path = setting(None, "content model of rewards.py, to score the stages", kind=Path)
    json: Path = setting(None, "write measures and responses here; can be resumed", kind=Path)
    report: Path = setting(None, "write a page (HTML) with marked responses here", kind=Path)
    compare: list = setting(None, "two results: B - A", kind=Path, nargs=2, metavar=("A", "B"))
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    dtype: str = setting(None, "float32; cuda: bfloat16", kind=str, choices=("float32", "bfloat16"))


def main() -> None:
    parser = Parser(description="Answer benchmarks or generated stories, or compare two results.")
    Command.add_flags(parser)
    command = Command().updated(parser.parse_args())
    for path in filter(None, (command.json, command.report)):
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"{path}: expected the name of a file in a folder that exists")
    if command.compare:
        sides = zip("AB", command.compare)
        names = [f"{side}: {path.resolve().parent.name}/{path.stem}" for side, path in sides]
        results = dict(zip(names, map(read_result, command.compare)))
        tables = [compare_rows(*results.values(), names)]
    else:
        result = run(command)
        results = {command.model.name or str(command.model): result}
        tables = [table_rows(results, with_intervals=list(results))]
    print(*map(aligned, tables), sep="\n\n")
    if command.report:
        write_text(command.report, report_page(results, tables))
        print(f"the page: {command.report}")


def run(command: Command) -> dict:
    """Run the evaluation that the flags ask for."""
    if command.data:
        problems = read_all(command.data, command.lang)
        problems = spread_problems(problems, command.limit or len(problems))
    else:
        problems = generate_problems(command.limit or 400, command.seed, command.split)
    if command.train:
        print(contamination_note(read_all(command.train, command.lang), problems))
    default = "bfloat16" if command.device.startswith("cuda") else "float32"
    where = (command.device, getattr(torch, command.dtype or default))
    model = load_model(command.model, *where)
    content = load_content_model(command.content, *where) if command.content else None
    instructions, target = read_instructions(command.instructions), command.json
    journal = target.with_name(f"{target.name}.part") if target else None
    settings = {field.name: getattr(command, field.name) for field in fields(EvalConfig)}
    more = dict(content=content, instructions=instructions, journal=journal, label="evaluating")
    result = evaluate(model, Tokenizer(command.model), problems, **more, **settings)
    if target:
        asked = dict(model=str(command.model), split=command.split, limit=command.limit)
        write_json(target, result | asked | {"settings": settings})
        journal.unlink()
        print(f"every response: {target}")
    return result


if __name__ == "__main__":
    exit_on_error(main)
