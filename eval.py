"""Benchmark files in, numbers out: accuracy, the shortcut gap, and how the policy reasoned (METHOD.md sections 1 and 8).

    accuracy       share of right answers; a response without a readable answer is wrong, and counted in parse_rate
    shortcut_gap   accuracy on control stories - accuracy on hard ones (generated stories): what shortcuts are worth to the policy
    stage_order    share of responses with all four SIP stages, in order
    option_early   share that name an option before Response Generation: the paper's *reasoning parasitism* [P]
    length         mean number of sampled tokens

One reader serves ToMBench's JSONL, ToMBench-Hard's CSV and our own JSONL: columns are found by name, in any spelling.
"""
import argparse
import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from model import Tokenizer, Transformer, check_device, generate, load_model, waves
from rewards import early_options
from socialr1 import LETTERS, STAGES, TINY, Parser, Problem, build_messages, exit_on_error, generate_problems, parse_response, read_rows, write_json

# --------------------------------------------------------------------------------------------------------------- readers

# Column names, after dropping blanks, newlines, "-" and "_" and lowering the case; the wanted language's come first.
_STORY = {"en": ("story", "context"), "zh": ("故事",)}
_QUESTION = {"en": ("question",), "zh": ("问题",)}
_OPTION = {"en": ("option{}", "choice{}", "{}"), "zh": ("选项{}",)}
_OPTION_LIST = ("options", "choices")
_ANSWER = ("答案answer", "answer", "答案", "label", "gold")
_ABILITY = ("能力ability", "ability", "能力", "category", "dimension", "type")
DO_NOT_TRAIN = {"tombench": "ToMBench asks in so many words that its items never be trained on"}


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _text(value: object) -> str:
    """A cell as stripped text; "" for what is missing: None, NaN, an empty cell."""
    if value is None or isinstance(value, float) and math.isnan(value) or value == "nan":
        return ""
    return str(value).strip()


def _options(row: dict, lang: str) -> list[str]:
    """Option texts without their letter prefixes ("A. ", "A: ", ...); [] when the row has no option columns of this language."""
    texts = next((row[name] for name in _OPTION_LIST if row.get(name)), None)
    if isinstance(texts, str):
        try:
            texts = ast.literal_eval(texts)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(f"the options column holds no list: {texts[:60]!r}") from None
    if texts is None:
        for pattern in _OPTION[lang]:
            if pattern.format("a") in row:
                texts = [row.get(pattern.format(letter.lower())) for letter in LETTERS]
                break
    if not isinstance(texts, (list, tuple)):
        return []
    if len(texts) > len(LETTERS):
        raise ValueError(f"{len(texts)} options; there are letters for {len(LETTERS)}")
    texts = [_text(text) for text in texts]
    while texts and not texts[-1]:
        texts.pop()
    if "" in texts:
        raise ValueError(f"option {LETTERS[texts.index('')]} is empty, though a later one is not")
    return [re.sub(rf"^{letter}\s*[.:：．、)]\s*(?=\S)", "", text) for letter, text in zip(LETTERS, texts)]


def _letter(answer: object, options: list[str], first_index: int) -> str:
    """The gold as a letter: given as one ("A", "A. "), as an option's text, or as an index."""
    text = _text(answer)
    if len(text) > 2 and text[0] in LETTERS[: len(options)] and options[LETTERS.index(text[0])] == re.sub(r"^.\s*[.:：．、)]\s*", "", text):
        return text[0]  # "A. the text of option A"
    bare = text.rstrip(".) ").upper()
    letters = LETTERS[: len(options)]
    if len(bare) == 1 and bare in letters:
        return bare
    if options.count(text) == 1:
        return letters[options.index(text)]
    if bare.isdecimal() and 0 <= int(bare) - first_index < len(options):
        return letters[int(bare) - first_index]
    raise ValueError(f"answer {text!r} has no option: expected one letter of {letters}, or an option's text")


def _find(row: dict, names: tuple[str, ...]) -> str:
    return next((_text(row[name]) for name in names if name in row), "")


def _read_file(file: Path, name: str | None, lang: str) -> tuple[str, list[Problem], list[str]]:
    """The benchmark's name, its problems, and notes on rows that were left out."""
    raw = list(read_rows(file))
    if not raw:
        raise ValueError(f"{file}: no rows; expected JSONL or CSV with one problem a row")
    rows = [(number, {_key(key): value for key, value in row.items()}) for number, row in raw]
    other = "zh" if lang == "en" else "en"
    columns = rows[0][1].keys()
    if not (columns & {*_STORY[lang], *_QUESTION[lang]}):  # a file in the other language only
        lang, other = other, lang
    story_names, question_names = _STORY[lang], _QUESTION[lang]
    found = {
        "story": columns & set(story_names),
        "question": columns & set(question_names),
        "options": columns & {*_OPTION_LIST, *(pattern.format("a") for pattern in _OPTION[lang])},
        "answer": columns & set(_ANSWER),
    }
    if missing := [part for part, names in found.items() if not names]:
        raise ValueError(f"{file}: no column for {', '.join(missing)}; the columns are: {', '.join(map(repr, raw[0][1]))}")
    bilingual = {*_STORY["en"]} & columns and {*_STORY["zh"]} & columns
    if name is None:
        name = "tombench-hard" if file.suffix.lower() == ".csv" else "tombench" if "optiona" in columns or "选项a" in columns else "problems"
    first_index = 0 if any(_find(row, _ANSWER) == "0" for _, row in rows) else 1

    problems, notes = [], []
    for number, row in rows:
        try:
            options = _options(row, lang)
            if bilingual and lang == "en" and len(options) != len(_options(row, other)):
                notes.append(f"{file}:{number}: left out: its English question belongs to another story")
                continue
            problem = Problem(
                story=_find(row, story_names),
                question=_find(row, question_names),
                options=options,
                answer=_letter(_find(row, _ANSWER), options, first_index),
                ability=_find(row, _ABILITY).partition(":")[0].strip().lower(),  # "Belief: Second-order beliefs" is belief
                source=_text(row.get("source")) or f"{name}/{file.stem}",
                id=_text(row.get("id")) or f"{file.stem}:{number}",
                variant=_text(row.get("variant")),
            )
            if not problem.question or not problem.story:
                raise ValueError("the story or the question is empty")
            "".join((problem.story, problem.question, *problem.options)).encode()  # a lone surrogate is no text
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        problems.append(problem)
    return name, problems, notes


def read_files(path: str | Path, name: str | None = None, lang: str = "en") -> tuple[set[str], list[Problem], list[str]]:
    """Names of the benchmarks found, all problems, and notes on rows left out; `path` is a file, or a folder of them."""
    if lang not in ("en", "zh"):
        raise ValueError(f"unknown language {lang!r}: expected 'en' or 'zh'")
    path = Path(path)
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in (".jsonl", ".csv")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no .jsonl or .csv file in this folder")
    parts = [_read_file(file, name, lang) for file in files]
    return {part[0] for part in parts}, [p for part in parts for p in part[1]], [n for part in parts for n in part[2]]


def read_benchmark(path: str | Path, name: str | None = None, lang: str = "en") -> list[Problem]:
    """Problems of ToMBench (JSONL), ToMBench-Hard (CSV) or our JSONL, a file or a folder. Errors: ValueError with file and line.

    Our JSONL has story, question, options (a list) and answer (a letter), and may have ability, source, id and variant.
    """
    return read_files(path, name, lang)[1]


# ------------------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    seed: int = 0,
    thinking: bool = True,
    token_budget: int = 32768,
    label: str | None = None,
) -> dict:
    """Answer every problem once (temperature 0: greedy) -> the measures above, and `responses`, one record per problem.

    `hard`, `control` and `shortcut_gap` are None where no problem has that variant. `label` names a progress bar.
    """
    if not problems:
        raise ValueError("no problems to evaluate")
    max_new_tokens = max_new_tokens or tokenizer.max_new_tokens
    prompts = check_lengths(model, tokenizer, problems, max_new_tokens, thinking)
    answers: dict[tuple[int, ...], list[int]] = {}  # prompt -> sampled tokens
    with tqdm(total=len(set(map(tuple, prompts))), desc=label, unit="prompt", disable=label is None, leave=False) as bar:
        for wave in waves(prompts, 1, max_new_tokens, token_budget):
            groups = generate(model, wave, 1, max_new_tokens, temperature, top_p, 0, tokenizer.stop_ids, seed, token_budget)
            answers |= {prompt: completion.tokens for prompt, (completion,) in zip(wave, groups)}
            bar.update(len(wave))
    prefix = tokenizer.think_prefix(thinking)
    tokens = [answers[tuple(prompt)] for prompt in prompts]
    records = [measure(problem, prefix + tokenizer.decode(ids), len(ids)) for problem, ids in zip(problems, tokens)]
    return summarise(records)


def check_lengths(
    model: Transformer, tokenizer: Tokenizer, problems: list[Problem], max_new_tokens: int, thinking: bool = True
) -> list[list[int]]:
    """Prompts of all problems; ValueError names the first that leaves no room for an answer, before any work is done."""
    prompts = [tokenizer.chat(build_messages(problem), thinking) for problem in problems]
    for problem, prompt in zip(problems, prompts):
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise ValueError(
                f"problem {problem.id!r} has {len(prompt)} tokens; with --max-new-tokens {max_new_tokens} that exceeds the model's "
                f"context of {model.config.max_positions}: leave it out, or lower --max-new-tokens"
            )
    return prompts


def measure(problem: Problem, text: str, length: int) -> dict:
    """What one response shows."""
    response = parse_response(text, problem)
    return {
        "id": problem.id,
        "source": problem.source,
        "ability": problem.ability,
        "variant": problem.variant,
        "gold": problem.answer,
        "answer": response.answer,
        "correct": response.answer == problem.answer,
        "parsed": response.well_formed,
        "stage_order": tuple(name for name, _ in response.stages) == STAGES,
        "option_early": any(early_options(response, problem)),
        "length": length,
        "text": text,
    }


def summarise(records: list[dict]) -> dict:
    def mean(key: str, **where: str) -> float | None:
        values = [record[key] for record in records if all(record[k] == v for k, v in where.items())]
        return sum(values) / len(values) if values else None

    hard, control = mean("correct", variant="hard"), mean("correct", variant="control")
    return {
        "n": len(records),
        "accuracy": mean("correct"),
        "parse_rate": mean("parsed"),
        "by_ability": {ability: mean("correct", ability=ability) for ability in sorted({r["ability"] for r in records})},
        "hard": hard,
        "control": control,
        "shortcut_gap": control - hard if hard is not None and control is not None else None,
        "stage_order": mean("stage_order"),
        "option_early": mean("option_early"),
        "length": mean("length"),
        "responses": records,
    }


MEASURES = ("accuracy", "hard", "control", "shortcut_gap", "parse_rate", "stage_order", "option_early", "length")


def table(results: dict[str, dict]) -> str:
    """Results side by side, one column each: the measures, then accuracy by ability."""

    def cell(value: float | None, key: str = "") -> str:
        return "-" if value is None else f"{value:.1f}" if key == "length" else f"{value:.3f}"

    abilities = sorted({ability for result in results.values() for ability in result["by_ability"]})
    rows = [["", *results], ["problems", *(str(result["n"]) for result in results.values())]]
    rows += [[key.replace("_", " "), *(cell(result[key], key) for result in results.values())] for key in MEASURES]
    rows += [[f"  {a or '(no ability)'}", *(cell(result["by_ability"].get(a)) for result in results.values())] for a in abilities]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows)


# ---------------------------------------------------------------------------------------------------------- command line


def main() -> None:
    parser = Parser(description="Evaluate a checkpoint on benchmark files, or on generated stories.")
    add = parser.add_argument
    add("--model", type=Path, default=TINY, help="Hugging Face checkpoint folder; without it: assets/tiny")
    add("--data", type=Path, nargs="+", help="ToMBench JSONL, ToMBench-Hard CSV, our JSONL, or folders; without it: generated stories")
    add("--lang", choices=("en", "zh"), default="en", help="language of a bilingual benchmark (en)")
    add("--split", choices=("train", "test", "shift"), default="test", help="of generated stories (test); shift has new words and sentences")
    add("--limit", type=int, help="number of problems: of stories 400; of a benchmark all, else so many, evenly spread")
    add("--temperature", type=float, default=0.0, help="of sampling (0: greedy)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (1: off)")
    add("--max-new-tokens", type=int, help="tokens per response; else generation_config.json decides, or 1024")
    add("--no-thinking", action="store_true", help="ask the chat template for its non-thinking mode")
    add("--token-budget", type=int, default=32768, help="tokens in one batch (32768); less needs less memory")
    add("--seed", type=int, default=0, help="of stories and sampling (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    add("--json", type=Path, help="write the measures and every response here")
    args = parser.parse_args()
    for name in ("limit", "max_new_tokens", "token_budget"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    check_device(args.device)
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed {args.seed}: expected 0 to 2147483647")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise ValueError(f"--temperature {args.temperature} --top-p {args.top_p}: expected 0 or more, and a share in (0, 1]")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"{args.json.parent}: no such folder for --json; make it first")

    if args.data:
        problems = []
        for path in args.data:
            names, found, notes = read_files(path, lang=args.lang)
            print(f"{path}: {len(found)} problems ({', '.join(sorted(names))})", *notes, sep="\n  ")
            problems += found
        if args.limit and args.limit < len(problems):
            problems = [problems[i * len(problems) // args.limit] for i in range(args.limit)]
    else:
        problems = generate_problems(args.limit or 400, args.seed, args.split)
    model = load_model(args.model, args.device, getattr(torch, args.dtype))
    tokenizer = Tokenizer(args.model)
    result = evaluate(
        model, tokenizer, problems, args.temperature, args.top_p, args.max_new_tokens, args.seed, not args.no_thinking,
        args.token_budget, label="evaluating",
    )  # fmt: skip
    print(table({args.model.name or str(args.model): result}))
    if args.json:
        write_json(args.json, result | {"model": str(args.model), "temperature": args.temperature, "seed": args.seed})
        print(f"every response: {args.json}")


if __name__ == "__main__":
    exit_on_error(main)
