"""Benchmark files in, numbers out: accuracy with intervals, and how the policy reasoned (METHOD.md sections 1, 6 and 8).

    accuracy       share of right answers; a response without a readable answer is wrong, and counted in parse_rate
    macro          mean of the benchmarks' accuracies, as in the paper's Table 2 [P]
    shortcut_gap   accuracy on control stories - accuracy on hard ones (generated stories): what shortcuts are worth to the policy
    stage_order    share of responses with all four SIP stages, in order
    option_early   share that name an option before Response Generation: the paper's *reasoning parasitism* [P]
    length         mean number of sampled tokens

Intervals hold 95% of 2000 bootstrap draws [O]; whole stories are drawn, since the questions of one story stand or fall together.
"""
import argparse
import ast
import hashlib
import html
import itertools
import json
import math
import random
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import ModelConfig, Tokenizer, Transformer, check_device, generate, load_model, logits_in_tokens, read_json, waves
from rewards import (
    ContentModel, distinct_share, early_options, load_content_model, logistic, mean, option_mentions, repetitions, stage_order, total_reward,
)  # fmt: skip
from socialr1 import (
    LETTERS, STAGES, TINY, Parser, Problem, build_messages, exit_on_error, generate_problems, parse_response, read_rows, stage_spans,
    write_json, write_text,
)  # fmt: skip

# --------------------------------------------------------------------------------------------------------------- readers
#
# A reader turns one row, its keys in lower case without blanks and marks, into items: story, question, options, answer (a letter, an
# option's text or an index), and where they differ from the usual: ability, id, kind (the part of the benchmark; else the file's name),
# joint (what counts only if all items with this name are right) or left_out (why it is not asked). What the rows look like, and
# their traps, was counted in the originals by others than us; the comments name the trap that a line is for.

Items = Iterator[dict]
DO_NOT_TRAIN = {
    "tombench": "ToMBench asks in so many words that its items never be trained on",
    "tactfultom": "TactfulToM is for evaluation only",
}


def emobench_understanding(row: dict, lang: str) -> Items:
    asked = {
        "en": ("What does {} feel in the end, in this situation?", "Why does {} feel like that?"),
        "zh": ("在这种情境下，{}最终会有什么情绪？", "为什么{}会有这样的情绪？"),
    }[row["language"]]
    both = f"EU:{row['language']}:{row['qid']}"
    for part, question in zip(("emotion", "cause"), asked):
        item = dict(story=row["scenario"], question=question.format(row["subject"]), options=row[f"{part}choices"], answer=row[f"{part}label"])
        yield item | dict(ability=row["coarsecategory"], kind="EU", id=f"{both}:{part}", joint=both)


def emobench_application(row: dict, lang: str) -> Items:
    what = {"Action": "行动", "Response": "回应"}[row["questiontype"]]
    question = {
        "en": f"In this situation, what is the most effective {row['questiontype'].lower()} for {row['subject']}?",
        "zh": f"在这种情境下，对{row['subject']}来说最有效的{what}是什么？",
    }[row["language"]]
    item = dict(story=row["scenario"], question=question, options=row["choices"], answer=row["label"])
    yield item | dict(ability=row["category"], kind="EA", id=f"EA:{row['language']}:{row['qid']}")


def motivebench(row: dict, lang: str) -> Items:
    for place, kind in enumerate(("motivation", "behavior", "motivation and behavior"), start=1):
        sentences = re.split(r"(?<=[.!?])\s+", row[_key(f"{kind} reasoning question")].strip())  # the scenario is a part of the question: its last sentence asks
        last = max((i for i, sentence in enumerate(sentences) if sentence.endswith("?")), default=None)
        question = sentences.pop(last) if last is not None and len(sentences) > 1 else f"What is the most likely {kind}?"
        item = dict(story=" ".join(sentences), question=question, options=_split_letters(row[f"options{place}"]))
        yield item | dict(answer=row[f"correctanswer{place}"], ability=kind, id=f"{row['idx']}:{place}")


_HITOM_NOTE = (
    "Note: everyone sees all that happens in a room until they leave it. One can know what others believe only after having been in a "
    "room with them, or talked to them. People tend to lie: hearing a statement does not change what one believes oneself, except that "
    "one trusts a speaker who left the room later than oneself. What is said in private is heard by nobody else, what is said in public "
    "by all."
)


def hitom(row: dict, lang: str) -> Items:
    story = re.sub(r"\A\s*Read the following[^\n]*\n|^\s*\*{3}\s*$", "", row["story"], flags=re.MULTILINE)
    options = re.split(r",\s(?=[A-Z]\. )", row["choices"])
    item = dict(story=story, question=f"{row.get('questionold', row['question'])}\n{_HITOM_NOTE}", options=_split_letters(options))
    item |= dict(answer=row["answer"], ability=f"order {row['questionorder']}", id=f"hitom:{row['sampleid']}")
    item["repaired"] = {"a line that is no part of the story": story != row["story"]}
    if row.get("promptingtype", "CoTP") != "CoTP":  # 138 of these 600 have another gold answer, nearly always a wrong one
        item["left_out"] = "repeats a CoTP row, some with a wrong answer"
    yield item


def tactfultom(row: dict, lang: str) -> Items:
    for kind in ("justification", "fact_reason", "fact_truth", "belief", "lieability"):
        for asked in row.get(_key(f"{kind}QA"), row.get(_key(f"{kind}QAs"), [])):
            wrong = asked["wrong_answer"]
            item = dict(story=row["fullcontext"], question=asked["question"], ability=kind.replace("_", " "), id=asked["q_id"])
            item |= dict(options=[asked["correct_answer"], *([wrong] if isinstance(wrong, str) else wrong)], answer="A")
            about = asked["question"].partition(" believe about")[0].rpartition(" ")[2]
            if kind == "belief" and not any(option.startswith(about) for option in item["options"]):
                item["left_out"] = "asks about one person, and all options speak of another"
            yield item
    for name, asked in row.items():
        if name == "comprehensionqa" or name.endswith(("qasbinary", "qalist", "qaslist")):
            yield from [dict(left_out="yes/no, or a list of names: no options to choose from")] * len(asked)


def simpletom(row: dict, lang: str) -> Items:
    kinds = {"aware": "mental state", "action": "behavior", "judge": "judgment"}
    kind = kinds[row["id"].rpartition("_")[2]]
    labels = row["choices"].get("label") or LETTERS[: len(row["choices"]["text"])]
    answer = LETTERS[list(labels).index(row["answerkey"])]
    item = dict(story=row["story"], question=row["question"], options=row["choices"]["text"], answer=answer)
    yield item | dict(ability=kind, kind=kind, id=row["id"])


# Everything else has a column for each part: ToMBench, ToMBench-Hard, SocialIQA and our own files; the wanted language's come first.
_STORY = {"en": ("story", "context"), "zh": ("故事",)}
_QUESTION = {"en": ("question",), "zh": ("问题",)}
_OPTION = {"en": ("option{}", "choice{}", "answer{}", "{}"), "zh": ("选项{}",)}
_OPTION_LIST = ("options", "choices")
_ANSWER = ("答案answer", "answer", "答案", "label", "gold", "correct")
_ABILITY = ("能力ability", "ability", "能力", "category", "dimension", "type")


def by_columns(row: dict, lang: str) -> Items:
    other = "zh" if lang == "en" else "en"
    if not row.keys() & {*_STORY[lang], *_QUESTION[lang]}:  # the other language only
        lang, other = other, lang
    item = dict(story=_find(row, _STORY[lang]), question=_find(row, _QUESTION[lang]), options=_options(row, lang), answer=_find(row, _ANSWER))
    item["ability"] = _text(_find(row, _ABILITY)).partition(":")[0].strip().lower()  # "Belief: Second-order beliefs" is belief
    if lang == "en" and row.keys() & {*_STORY["zh"]} and len(item["options"]) != len(_options(row, other)):
        item["left_out"] = "its English question belongs to another story"
    yield item


def our_own(row: dict, lang: str) -> Items:
    for item in by_columns(row, lang):
        yield item | {name: _text(row[name]) for name in ("source", "id", "variant") if _text(row.get(name))}


@dataclass(frozen=True)
class Reader:
    """`columns` give a benchmark away; options are shuffled where the gold letter is biased, or where there is no order."""

    name: str
    columns: set[str]
    items: Callable[[dict, str], Items]
    shuffled: bool = False


READERS = (
    Reader("emobench", {"qid", "language", "emotionchoices", "causechoices"}, emobench_understanding, shuffled=True),
    Reader("emobench", {"qid", "language", "questiontype", "choices"}, emobench_application, shuffled=True),
    Reader("motivebench", {"motivationreasoningquestion", "options1", "correctanswer1"}, motivebench, shuffled=True),
    Reader("hitom", {"questionorder", "sampleid", "story", "choices"}, hitom),
    Reader("tactfultom", {"fullcontext", "beliefqas", "characters"}, tactfultom, shuffled=True),
    Reader("simpletom", {"id", "story", "question", "choices", "answerkey"}, simpletom, shuffled=True),
    Reader("socialiqa", {"context", "question", "answera", "answerb", "answerc"}, by_columns),
    Reader("tombench", {"story", "question", "optiona", "答案answer"}, by_columns),
    Reader("tombench", {"故事", "问题", "选项a", "答案answer"}, by_columns),
)


def _recognise(file: Path, columns: set[str]) -> tuple[Reader | None, list[str]]:
    """The reader of a file with these columns; or None, and the parts of a problem that no column holds."""
    reader = next((reader for reader in READERS if reader.columns <= columns), Reader("problems", set(), our_own))
    if reader.items not in (by_columns, our_own):
        return reader, []
    hard = file.suffix.lower() == ".csv" and reader.name != "socialiqa"  # ToMBench-Hard has ToMBench's columns, or others, but comes as CSV
    patterns, least = [pattern for some in _OPTION.values() for pattern in some], "abcd" if hard else "a"
    held = {
        "story": columns & {*_STORY["en"], *_STORY["zh"]}, "question": columns & {*_QUESTION["en"], *_QUESTION["zh"]},
        "options": columns & set(_OPTION_LIST) or any({pattern.format(letter) for letter in least} <= columns for pattern in patterns),
        "answer": columns & set(_ANSWER),
    }  # fmt: skip
    missing = [part for part, columns in held.items() if not columns]
    return (None if missing else Reader("tombench-hard", set(), by_columns) if hard else reader), missing


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _text(value: object) -> str:
    """A cell as stripped text; "" for what is missing: None, NaN, an empty cell."""
    if value is None or isinstance(value, float) and math.isnan(value) or value in ("nan", "NaN"):
        return ""
    return str(value).strip()


def _find(row: dict, names: tuple[str, ...]) -> object:
    return next((row[name] for name in names if name in row), "")


def _options(row: dict, lang: str) -> list:
    """Cells of the options up to the last that is not empty; [] when the row has none in this language."""
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
    texts = list(texts) if isinstance(texts, (list, tuple)) else []
    while texts and not _text(texts[-1]):
        texts.pop()
    return texts


_MARK = r"\s*[.:：．、)]\s*(?=\S)(?![A-Z]\.)"  # between an option's letter and its text; "A.I. is clever" has no letter


def _split_letters(options: Sequence[object]) -> list[str]:
    """Option texts without their letters ("A. ", "A: ", ...)."""
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options; there are letters for {len(LETTERS)}")
    return [re.sub(f"^{letter}{_MARK}", "", _text(option)) for letter, option in zip(LETTERS, options)]


def _letter(answer: object, options: list[str], first_index: int) -> str:
    """The gold as a letter: given as one ("A", "A. "), as an option's text, with or without its letter, or as an index."""
    text, letters = _text(answer), LETTERS[: len(options)]
    bare = text.rstrip(".) ").upper()
    if len(bare) == 1 and bare in letters:
        return bare
    if options.count(text) == 1:
        return letters[options.index(text)]
    if text[:1] in tuple(letters) and re.sub(f"^.{_MARK}", "", text) == options[letters.index(text[0])]:
        return text[0]
    if bare.isdecimal() and 0 <= int(bare) - first_index < len(options):
        return letters[int(bare) - first_index]
    raise ValueError(f"answer {text!r} has no option: expected one letter of {letters}, or an option's text")


def _problem(item: dict, reader: Reader, file: Path, number: int, first_index: int) -> tuple[Problem, list[str]]:
    """An item as a problem, and what had to be repaired."""
    options = _split_letters(item["options"])
    if len(options) < 2:
        raise ValueError(f"a problem needs 2 to 26 options, got {len(options)}")
    if "" in options:
        raise ValueError(f"option {LETTERS[options.index('')]} is empty")
    letter = _letter(item["answer"], options, first_index)
    given = [item["story"], item["question"], *item["options"]]
    repairs = item.get("repaired", {}) | {
        "blanks around a text": any(isinstance(text, str) and text != text.strip() for text in given),
        "a letter before an option's text": options != list(map(_text, item["options"])),
        "more than a letter as answer": _text(item["answer"]) not in (letter, letter.lower(), *options) and not _text(item["answer"]).isdecimal(),
    }
    name = item.get("id", f"{file.stem}:{number}")
    if reader.shuffled:
        order = random.Random(f"{reader.name} {name}").sample(range(len(options)), len(options))
        options, letter = [options[i] for i in order], LETTERS[order.index(LETTERS.index(letter))]
    problem = Problem(
        story=_text(item["story"]), question=_text(item["question"]), options=options, answer=letter, ability=item.get("ability", ""),
        source=item.get("source", f"{reader.name}/{item.get('kind', file.stem)}"), id=name, variant=item.get("variant", ""),
        joint=item.get("joint", ""),
    )  # fmt: skip
    if not problem.question or not problem.story:
        raise ValueError("the story or the question is empty")
    "".join((problem.story, problem.question, *problem.options)).encode()  # a lone surrogate is no text
    return problem, [repair for repair, needed in repairs.items() if needed]


def _with_labels(file: Path, rows: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """SocialIQA's rows with their answers, which are in a second file, one a line; all other rows as they are."""
    labels = file.with_name(f"{file.stem}-labels.lst")
    if not labels.exists():
        return rows
    answers = labels.read_text(encoding="utf-8", errors="replace").split()
    if len(answers) != len(rows):
        raise ValueError(f"{labels}: {len(answers)} answers for {len(rows)} rows of {file.name}; expected one each")
    return [(number, row | {"label": answer}) for (number, row), answer in zip(rows, answers)]


def _read_file(file: Path, lang: str, rows: list[tuple[int, dict]], reader: Reader) -> tuple[list[Problem], list[str]]:
    """A file's problems, and notes on what was repaired and left out, with the lines."""
    first_index = 0 if any(_text(_find(row, _ANSWER)) == "0" for _, row in rows) else 1  # decided over the whole file
    problems: list[Problem] = []
    notes: dict[str, list[int]] = defaultdict(list)
    for number, row in rows:
        try:
            if "language" in reader.columns and row["language"] != lang:
                notes["left out: in the other language"].append(number)
                continue
            for item in reader.items(row, lang):
                if reason := item.get("left_out"):
                    notes[f"left out: {reason}"].append(number)
                    continue
                problem, repairs = _problem(item, reader, file, number, first_index)
                problems.append(problem)
                for repair in repairs:
                    notes[f"repaired: {repair}"].append(number)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file}:{number}: not a row of {reader.name}: {type(error).__name__} {error}") from None
    return problems, [f"{file}: {len(numbers)} {note} ({_first(list(dict.fromkeys(numbers)))})" for note, numbers in notes.items()]


def _first(numbers: list[int]) -> str:
    """ "rows 3, 5, 8, ...": some of many."""
    return f"row{'s'[: len(numbers) - 1]} {', '.join(map(str, numbers[:5]))}{', ...' if len(numbers) > 5 else ''}"


def read_files(path: str | Path, name: str | None = None, lang: str = "en") -> tuple[set[str], list[Problem], list[str]]:
    """Names of the benchmarks found, all problems, and notes on what was repaired and left out; `path` is a file, or a folder of them.

    In a folder, and those below it, files that hold no problems are left out with a note.
    """
    if lang not in ("en", "zh"):
        raise ValueError(f"unknown language {lang!r}: expected 'en' or 'zh'")
    path = Path(path)
    folder = path.is_dir()
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in (".jsonl", ".json", ".csv") and f.is_file()) if folder else [path]
    names, problems, notes = set(), [], []
    for file in files:
        raw = _with_labels(file, list(read_rows(file)))
        rows = [(number, {_key(key): value for key, value in row.items()}) for number, row in raw]
        reader, missing = _recognise(file, {key for _, row in rows[:1] for key in row})
        if reader and folder and reader.name == "socialiqa" and re.search("train|trn", file.stem.lower()):
            notes.append(f"{file}: left out: the training split; name the file to read it")
        elif reader:
            reader = replace(reader, name=name or reader.name)
            found, remarks = _read_file(file, lang, rows, reader)
            names, problems, notes = names | {reader.name}, problems + found, notes + remarks
        elif folder:
            notes.append(f"{file}: left out: no problems in it")
        elif not rows:
            raise ValueError(f"{file}: no rows; expected one problem a row")
        else:
            raise ValueError(f"{file}: no column for {', '.join(missing)}; the columns are: {', '.join(map(repr, raw[0][1]))}")
    if not problems:
        raise ValueError(f"{path}: no problems{f' in {lang!r}' if names else ''} found; expected benchmark files: .jsonl, .json or .csv")
    return names, problems, notes


def read_benchmark(path: str | Path, name: str | None = None, lang: str = "en") -> list[Problem]:
    """Problems of one of the eight benchmarks, in their original files, or of our JSONL; a file or a folder.

    The benchmark is recognised from the columns. Our JSONL has story, question, options (a list) and answer (a letter), and may
    have ability, source, id and variant. Errors: ValueError with file and line.
    """
    return read_files(path, name, lang)[1]


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def spread_problems(problems: list[Problem], count: int) -> list[Problem]:
    """About `count` of the problems, evenly spread; those that only count together stay together."""
    groups: dict[object, list[Problem]] = defaultdict(list)
    for place, problem in enumerate(problems):
        groups[(problem.source, problem.joint) if problem.joint else place].append(problem)
    return list(itertools.chain(*spread(list(groups.values()), -(-count * len(groups) // max(len(problems), 1)))))


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
    samples: int = 1,
    content: ContentModel | None = None,
    journal: Path | None = None,
) -> dict:
    """Answer every problem `samples` times (temperature 0: greedy) -> what `summarise` says of the records of `measure`.

    `label` names a progress bar. Responses are appended to the file `journal` as they come: called again after an interruption, the
    evaluation asks only for what is not there. ValueError: a journal of other settings, a problem too long for the model's context.
    """
    if not problems:
        raise ValueError("no problems to evaluate")
    max_new_tokens = max_new_tokens or tokenizer.max_new_tokens
    prompts = check_lengths(model.config, tokenizer, problems, max_new_tokens, thinking)
    settings = dict(samples=samples, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    done = _open_journal(journal, settings | {"model": _fingerprint(model), "stop_ids": list(tokenizer.stop_ids)}) if journal else {}
    prefix = tokenizer.think_prefix(thinking)
    names = {tuple(prompt): _digest(prompt) for prompt in prompts}
    missing = [prompt for prompt, name in names.items() if name not in done]
    with tqdm(total=len(names), initial=len(names) - len(missing), desc=label, unit="prompt", disable=label is None, leave=False) as bar:
        for wave in waves(missing, samples, max_new_tokens + logits_in_tokens(model.config), token_budget):  # as generate does, longest first
            groups = generate(model, wave, samples, max_new_tokens, temperature, top_p, 0, tokenizer.stop_ids, seed, token_budget)
            decoded = [[(prefix + tokenizer.decode(c.tokens), len(c.tokens)) for c in group] for group in groups]
            texts = dict(zip((names[prompt] for prompt in wave), decoded))
            if journal:
                with open(journal, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in texts.items())
            done |= texts
            bar.update(len(wave))
    answers = [done[names[tuple(prompt)]] for prompt in prompts]  # text and number of tokens of each sample
    asked = [(i, problem, k, *answers[i][k]) for i, problem in enumerate(problems) for k in range(samples)]
    records = [measure(problem, text, length) | {"item": i, "sample": k} for i, problem, k, text, length in asked]
    if content:
        responses = [(problem, parse_response(text, problem).stages) for _, problem, _, text, _ in asked]
        scores = content.score([(problem.story, problem.question, stages) for problem, stages in responses], token_budget)
        for record, (_, stages), some in zip(records, responses, scores):
            record["content"] = {stage: logistic(score) for (stage, _), score in zip(stages, some)}
    return summarise(records)


def check_lengths(
    config: ModelConfig, tokenizer: Tokenizer, problems: list[Problem], max_new_tokens: int, thinking: bool = True
) -> list[list[int]]:
    """Prompts of all problems; ValueError names the first that leaves no room for an answer, before any work is done."""
    prompts = [tokenizer.chat(build_messages(problem), thinking) for problem in problems]
    for problem, prompt in zip(problems, prompts):
        if len(prompt) + max_new_tokens > config.max_positions:
            raise ValueError(
                f"problem {problem.id!r} has {len(prompt)} tokens; with --max-new-tokens {max_new_tokens} that exceeds the model's "
                f"context of {config.max_positions}: leave it out, or lower --max-new-tokens"
            )
    return prompts


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _fingerprint(model: Transformer) -> str:
    """Changes with every update of any weight, and with the dtype."""
    return _digest([[str(p.dtype), p.double().sum().item(), p.double().square().sum().item()] for p in model.parameters()])


def _open_journal(journal: Path, settings: dict) -> dict[str, list[tuple[str, int]]]:
    """The samples that a journal holds already, by prompt: a first line with the settings, then a line for each prompt.

    A torn last line is cut off.
    """
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    try:
        then, *done = map(json.loads, whole) if whole else [settings]
        texts = {name: [(text + "", length + 0) for text, length in samples] for name, samples in done}
    except (ValueError, TypeError):
        raise ValueError(f"{journal}: not the journal of an evaluation; delete it, or choose another --json") from None
    if then != settings or any(len(samples) != settings["samples"] for samples in texts.values()):
        changed = ", ".join(key for key in settings if not isinstance(then, dict) or then.get(key) != settings[key])
        raise ValueError(f"{journal} holds an interrupted evaluation with other {changed or 'samples'}: delete it, or choose another --json")
    write_text(journal, "".join(json.dumps(line) + "\n" for line in (settings, *texts.items())))
    return texts


def measure(problem: Problem, text: str, length: int) -> dict:
    """What one response shows; `first_option` is the place in the reasoning, from 0 to 1, where it first names an option."""
    response = parse_response(text, problem)
    named = [start + at for _, start, end in stage_spans(response.think) for at, _ in option_mentions(response.think[start:end], problem)]
    return {
        "id": problem.id,
        "source": problem.source,
        "ability": problem.ability,
        "variant": problem.variant,
        "joint": problem.joint,
        "story": problem.story,
        "question": problem.question,
        "options": problem.options,
        "gold": problem.answer,
        "answer": response.answer,
        "correct": response.answer == problem.answer,
        "parsed": response.answer is not None,
        "well_formed": response.well_formed,
        "coverage": len(response.stages) / len(STAGES),
        "order": stage_order(response),
        "stage_order": tuple(name for name, _ in response.stages) == STAGES,
        "option_early": any(early_options(response, problem)),
        "first_option": min(named) / len(response.think) if named else None,
        "repetition": 1 - distinct_share(response.think),
        "length": length,
        "text": text,
    }


PROCESS = ("parsed", "well_formed", "coverage", "order", "stage_order", "option_early", "first_option", "repetition", "length")


@dataclass(frozen=True)
class Scored:
    """What counts as one: the samples of a problem, or of several that only count together."""

    records: list[dict]
    correct: float  # mean over the samples; right when all of its problems are
    majority: bool  # the same with the most frequent answer of each problem, the earlier one of two
    story: str  # what the bootstrap draws; twins share theirs

    def __getitem__(self, key: str):
        return self.records[0][key]


def count_together(records: list[dict]) -> list[Scored]:
    groups: dict[tuple, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for position, record in enumerate(records):
        item = record.get("item", position)
        groups[record["source"], record["joint"] or item][item].append(record)
    return [_scored(list(parts.values())) for parts in groups.values()]


def _scored(parts: list[list[dict]]) -> Scored:
    """From the samples of each problem that belongs to it."""
    first = parts[0][0]
    right = [all(record["correct"] for record in sample) for sample in zip(*parts)]
    votes = [Counter(record["answer"] for record in samples if record["answer"]).most_common(1) for samples in parts]
    majority = all(vote and vote[0][0] == samples[0]["gold"] for vote, samples in zip(votes, parts))
    story = f"{first['source']} {first['id']}" if first["variant"] else normalise(first["story"])
    return Scored([record for samples in parts for record in samples], mean(right), majority, story)


def normalise(story: str) -> str:
    """Its letters only, in lower case: what stays the same when line numbers, marks and blanks change."""
    return "".join(filter(str.isalpha, story.casefold()))


def bootstrap(stories: Sequence[str], values: Sequence[float], weights: Sequence[float] | None = None, draws: int = 2000) -> np.ndarray:
    """Weighted means of `values` in `draws` samples of the stories, with replacement; the same samples for the same stories."""
    names, where = np.unique(stories, return_inverse=True)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    sums, counts = np.bincount(where, weights * np.asarray(values, dtype=float)), np.bincount(where, weights)
    drawn = np.random.default_rng(int(_digest(names.tolist()), 16)).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    with np.errstate(invalid="ignore"):  # a sample without any weight has no mean
        return (drawn @ sums) / (drawn @ counts)


def interval(means: np.ndarray) -> list[float]:
    return np.nanpercentile(means, (2.5, 97.5)).tolist()


def summarise(records: list[dict]) -> dict:
    """Measures of the module's docstring, by ability, benchmark and file, with 95% intervals; and `process`, by right and wrong.

    `hard`, `control` and `shortcut_gap` are None where no problem has that variant. `questions` counts problems, `n` what is scored.
    """
    scored = count_together(records)

    def accuracy(some: list[Scored]) -> tuple[float | None, np.ndarray]:
        values = [one.correct for one in some]
        return (mean(values), bootstrap([one.story for one in some], values)) if some else (None, np.full(1, np.nan))

    def by(key: Callable[[Scored], str]) -> dict[str, tuple[float, np.ndarray]]:
        return {name: accuracy([one for one in scored if key(one) == name]) for name in sorted({key(one) for one in scored})}

    split = {
        "by_ability": by(lambda one: one["ability"]),
        "by_benchmark": by(lambda one: one["source"].partition("/")[0]),
        "by_file": by(lambda one: one["source"]),
    }
    single = {"accuracy": accuracy(scored), "macro": tuple(sum(part) / len(part) for part in zip(*split["by_benchmark"].values()))}
    single |= {variant: accuracy([one for one in scored if one["variant"] == variant]) for variant in ("hard", "control")}
    if single["hard"][0] is not None and single["control"][0] is not None:
        stories, values = [one.story for one in scored], [one.correct for one in scored]
        hard, control = (bootstrap(stories, values, [one["variant"] == name for one in scored]) for name in ("hard", "control"))
        single["shortcut_gap"] = single["control"][0] - single["hard"][0], control - hard
    if len(records) > len({record.get("item", i) for i, record in enumerate(records)}):
        majority = [one.majority for one in scored]
        single["majority"] = mean(majority), bootstrap([one.story for one in scored], majority)
    process = _process(records)
    return {
        "n": len(scored),
        "questions": len({record.get("item", i) for i, record in enumerate(records)}),
        "shortcut_gap": None,
        **{name: value for name, (value, _) in single.items()},
        "parse_rate": process["parsed"]["all"],
        **{key: process[key]["all"] for key in ("stage_order", "option_early", "length")},
        **{name: {part: value for part, (value, _) in parts.items()} for name, parts in split.items()},
        "process": process,
        "intervals": {name: interval(means) for name, (value, means) in single.items() if value is not None}
        | {name: {part: interval(means) for part, (_, means) in parts.items()} for name, parts in split.items()},
        "responses": records,
    }


def _process(records: list[dict]) -> dict[str, dict[str, float | None]]:
    """Means of the process measures over all, right and wrong responses; None of nothing (an option that is never named)."""
    values = {key: [record[key] for record in records] for key in PROCESS}
    if any(record.get("content") for record in records):
        values |= {f"content, {stage}": [record["content"].get(stage) for record in records] for stage in STAGES}

    def over(some: list[float | None], *right: bool) -> float | None:
        some = [value for value, record in zip(some, records) if record["correct"] in right and value is not None]
        return mean(some) if some else None

    return {key: {"all": over(some, True, False), "right": over(some, True), "wrong": over(some, False)} for key, some in values.items()}


MEASURES = ("accuracy", "hard", "control", "shortcut_gap", "parse_rate", "stage_order", "option_early", "length")


def _cell(value: float | None, span: list[float] | None = None, length: bool = False) -> str:
    if value is None:
        return "-"
    form = "{:.1f}" if length else "{:.3f}"
    return form.format(value) + (f" [{', '.join(map(form.format, span))}]" if span else "")


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def table_rows(results: dict[str, dict]) -> list[list[str]]:
    """Results side by side, one column each: the measures, then accuracy by benchmark, file and ability; alone, with intervals."""
    alone = len(results) == 1
    rows = [["", *results], ["problems", *(str(result["n"]) for result in results.values())]]
    measures = MEASURES if not any("majority" in result for result in results.values()) else ("accuracy", "majority", *MEASURES[1:])
    for key in measures:
        cells = ((r.get(key), r.get("intervals", {}).get(key) if alone else None) for r in results.values())
        rows.append([key.replace("_", " "), *(_cell(value, span, key == "length") for value, span in cells)])
    for group in ("by_benchmark", "by_file", "by_ability"):
        names = sorted({name for result in results.values() for name in result.get(group, {})})
        if len(names) < 2 and group != "by_ability":
            continue
        rows.append(["accuracy " + group.replace("_", " "), *("" for _ in results)])
        if group == "by_benchmark":
            rows.append(["  mean of them", *(_cell(r["macro"], r["intervals"]["macro"] if alone else None) for r in results.values())])
        for name in names:
            cells = ((r[group].get(name), r["intervals"][group].get(name) if alone else None) for r in results.values())
            rows.append([f"  {name or '(no ability)'}", *(_cell(value, span) for value, span in cells)])
    return rows


def table(results: dict[str, dict]) -> str:
    return aligned(table_rows(results))


def process_rows(result: dict) -> list[list[str]]:
    """The process measures of one result, split by right and wrong."""
    rows = [["process", "all", "right", "wrong"]]
    for key, means in result["process"].items():
        rows.append([key.replace("_", " "), *(_cell(means[part], length=key == "length") for part in ("all", "right", "wrong"))])
    return rows


# ------------------------------------------------------------------------------------------------ two results, and contamination


def read_result(path: Path) -> dict:
    """What --json wrote, or grpo.py's before.json and after.json (all of their parts); measured anew from the responses."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a result of eval.py --json")
    value = read_json(path)
    try:
        parts = [value["responses"]] if "responses" in value else [part["responses"] for part in value.values()]
        numbered = ((number, i, record) for number, part in enumerate(parts) for i, record in enumerate(part))
        records = [_record(record) | {"item": (number, record.get("item", i))} for number, i, record in numbered]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a result of eval.py --json: {type(error).__name__} {error}") from None
    if not records:
        raise ValueError(f"{path}: no responses in it")
    return summarise(records)


def _record(stored: dict) -> dict:
    """A record of `measure` from one that was stored; KeyError, TypeError and ValueError say what does not fit."""
    texts = [stored[name] for name in ("story", "question", "gold", "ability", "source", "id", "variant", "joint", "text")]
    content, length = stored.get("content"), stored["length"]
    if not all(isinstance(text, str) for text in (*texts, *stored["options"])) or type(length) is not int:
        raise TypeError(f"a response with other than texts, or with length {length!r}")
    record = measure(_asked(stored), stored["text"], length) | {"sample": int(stored.get("sample", 0))}
    return record | ({"content": {stage: float(score) for stage, score in content.items()}} if content is not None else {})


def _asked(record: dict) -> Problem:
    """The problem of a record."""
    names = ("story", "question", "options", "gold", "ability", "source", "id", "variant", "joint")
    return Problem(*(record[name] for name in names))


def _matched(a: dict, b: dict) -> tuple[list[tuple[Scored, Scored]], list[int]]:
    """What both results have, in the order of the first, and how many of each stay alone; equal names are told apart by their turn."""

    def named(result: dict) -> dict[tuple, Scored]:
        turns, found = Counter(), {}
        for one in count_together(result["responses"]):
            questions = tuple(dict.fromkeys(record["question"] for record in one.records))
            name = one["source"], one["id"], one["variant"], questions
            found[*name, turns[name]] = one
            turns[name] += 1
        return found

    ours, theirs = named(a), named(b)
    pairs = [(one, theirs[name]) for name, one in ours.items() if name in theirs]
    return pairs, [len(ours) - len(pairs), len(theirs) - len(pairs)]


def compare_rows(a: dict, b: dict, names: tuple[str, str]) -> list[list[str]]:
    """Paired differences b - a on the problems that both answered, with 95% intervals."""
    pairs, alone = _matched(a, b)
    if not pairs:
        raise ValueError(f"{names[0]} and {names[1]} have no problem in common")
    Paired = tuple[float, float, float, np.ndarray]  # mean before, after, of the differences, and of these in bootstrap draws

    def paired(some: list[tuple[Scored, Scored]], value: Callable[[Scored], float] = lambda one: one.correct) -> Paired:
        before, after = ([value(pair[side]) for pair in some] for side in (0, 1))
        changes = [y - x for x, y in zip(before, after)]
        return mean(before), mean(after), mean(changes), bootstrap([one.story for one, _ in some], changes)

    def row(label: str, count: int, found: Paired, length: bool = False) -> list[str]:
        *means, change, draws = found
        return [label, str(count), *(_cell(value, length=length) for value in means), _cell(change, interval(draws), length)]

    rows = [["", "n", *names, "difference [95%]"], row("accuracy", len(pairs), paired(pairs))]
    keys: dict[str, Callable[[Scored], str]] = {name: lambda one, name=name: one[name] for name in ("source", "ability", "variant")}
    for key, of in {"benchmark": lambda one: one["source"].partition("/")[0], **keys}.items():
        parts = {value: [pair for pair in pairs if of(pair[0]) == value] for value in sorted({of(one) for one, _ in pairs} - {""})}
        found = {value: paired(some) for value, some in parts.items()} if len(parts) > 1 else {}
        if found and key == "benchmark":
            rows.append(row("  mean of benchmarks", len(pairs), tuple(sum(part) / len(part) for part in zip(*found.values()))))
        rows += [row(f"  {value}", len(parts[value]), some) for value, some in found.items()]
    for key in PROCESS:
        if key != "first_option":  # not every response has one
            found = paired(pairs, lambda one: mean([record[key] for record in one.records]))
            rows.append(row(key.replace("_", " "), len(pairs), found, key == "length"))
    return rows + ([["in one of them only", "", *map(str, alone), ""]] if any(alone) else [])


def contamination(training: list[Problem], evaluation: list[Problem]) -> list[Problem]:
    """Training problems whose story, normalised, stands in the evaluation data too."""
    known = {normalise(problem.story) for problem in evaluation}
    return [problem for problem in training if normalise(problem.story) in known]


def contamination_note(training: list[Problem], evaluation: list[Problem]) -> str:
    found = contamination(training, evaluation)
    if not found:
        return f"no story of the {len(training)} training problems stands in the evaluation data"
    named = ", ".join(f"{problem.source} {problem.id}" for problem in found[:3])
    return f"WARNING: {len(found)} of {len(training)} training problems have a story that stands in the evaluation data: {named}{', ...' if found[3:] else ''}"


# ------------------------------------------------------------------------------------------------------------------- report

TEMPLATE = Path(__file__).parent / "assets" / "report.html"


def report_page(results: dict[str, dict], tables: list[list[list[str]]], limit: int = 100) -> str:
    """One self-contained page: tables, then up to `limit` problems, evenly spread, each with its trajectories side by side.

    `results` by name: one, or two of the same problems (before and after). All text is escaped: what a model wrote stays text.
    """
    first, *others = results.values()
    matched = _matched(first, others[0])[0] if others else [(one,) for one in count_together(first["responses"])]
    shown = spread(matched, limit)
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(" and ".join(results)),
        tables="".join(map(_html_table, tables)),
        count=f"{len(shown)} of {len(matched)}",
        problems="".join(_html_problem(sides, list(results)) for sides in shown),
    )


def _html_table(rows: list[list[str]]) -> str:
    lines = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in zip(["th"] + ["td"] * len(rows), rows))
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _html_problem(sides: tuple[Scored, ...], names: list[str]) -> str:
    """A problem, and of each side its first sample."""
    parts = []
    for places in zip(*([record for record in side.records if record.get("sample", 0) == 0] for side in sides)):
        problem, verdicts = places[0], " ".join("✓" if record["correct"] else "✗" for record in places)
        title = html.escape(" · ".join(filter(None, (problem["source"], problem["id"], problem["ability"], problem["variant"]))))
        options = "".join(
            f"<li{' class=gold' if letter == problem['gold'] else ''}>{html.escape(text)}</li>" for letter, text in zip(LETTERS, problem["options"])
        )
        asked = f"<p>{html.escape(problem['story'])}</p><p><b>{html.escape(problem['question'])}</b></p><ol type=A>{options}</ol>"
        columns = "".join(_html_trajectory(name, record) for name, record in zip(names, places))
        parts.append(f"<details><summary>{verdicts} {title}</summary>{asked}<div class=sides>{columns}</div></details>")
    return "".join(parts)


def _html_trajectory(name: str, record: dict) -> str:
    """Stages in their colours, early option names and repetitions marked, the reward's terms on top."""
    problem, content = _asked(record), record.get("content")
    response = parse_response(record["text"], problem)
    reward = total_reward(response, problem, record["length"], content=mean(list(content.values())) if content is not None else None)
    terms = {"R": reward.total} | {key: value for key, value in reward.parts.items() if key != "tau" and value is not None}
    badges = [*(f"{key} {value:.2f}" for key, value in terms.items()), f"{record['length']} tokens"]
    think, passages = response.think, []
    marks = [""] * len(think)
    for start, end in repetitions(think):
        marks[start:end] = ["again"] * (end - start)
    for stage, start, end in stage_spans(think):
        for first, last in option_mentions(think[start:end], problem) if stage != STAGES[-1] else ():
            marks[start + first : start + last] = ["early"] * (last - first)
        if think[start:end].strip():
            number, title = STAGES.index(stage) + 1 if stage else 0, stage or "before the first stage"
            passages.append(f'<section class="s{number}"><h4>{title}</h4>{_marked(think[start:end], marks[start:end])}</section>')
    body = "".join(passages) if response.well_formed else f"<p>not well-formed:</p><pre>{html.escape(record['text'])}</pre>" + "".join(passages)
    title = f"{name}: answer {response.answer or 'unreadable'}, {'right' if record['correct'] else 'wrong: ' + problem.answer}"
    terms = "".join(f"<span>{html.escape(badge)}</span>" for badge in badges)
    return f"<article><h3>{html.escape(title)}</h3><div class=terms>{terms}</div>{body}</article>"


def _marked(text: str, marks: list[str]) -> str:
    """Escaped text, each run of characters with the same mark in it."""
    pieces = ((mark, html.escape("".join(character for character, _ in run))) for mark, run in itertools.groupby(zip(text, marks), lambda pair: pair[1]))
    return f"<p>{''.join(f'<mark class={mark}>{piece}</mark>' if mark else piece for mark, piece in pieces).strip()}</p>"


# ---------------------------------------------------------------------------------------------------------- command line


def main() -> None:
    parser = Parser(
        description="Evaluate a checkpoint on the original files of ToMBench, ToMBench-Hard, SocialIQA, SimpleToM, EmoBench, MotiveBench, Hi-ToM "
        "and TactfulToM, on our JSONL, or on generated stories; or compare two evaluations."
    )
    add = parser.add_argument
    add("--model", type=Path, default=TINY, help="Hugging Face checkpoint folder; without it: assets/tiny")
    add("--data", type=Path, nargs="+", help="benchmark files or folders, in any number; without it: generated stories")
    add("--lang", choices=("en", "zh"), default="en", help="language of a bilingual benchmark (en)")
    add("--split", choices=("train", "test", "shift"), default="test", help="of generated stories (test); shift has new words and sentences")
    add("--limit", type=int, help="number of problems: of stories 400; of benchmarks all, else so many, evenly spread")
    add("--samples", type=int, default=1, help="responses per problem (1); more give their mean, and the majority's answer")
    add("--temperature", type=float, help="of sampling (0: greedy, the default; with more samples 1)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (1: off)")
    add("--max-new-tokens", type=int, help="tokens per response; else generation_config.json decides, or 1024")
    add("--no-thinking", action="store_true", help="ask the chat template for its non-thinking mode")
    add("--token-budget", type=int, default=32768, help="tokens in one batch (32768); less needs less memory")
    add("--seed", type=int, default=0, help="of stories and sampling (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    add("--content", type=Path, metavar="DIR", help="content model of rewards.py: adds its score of each stage")
    add("--train", type=Path, nargs="+", help="training files: their stories must not stand in the evaluation data, and are looked for there")
    add("--json", type=Path, metavar="FILE", help="write the measures and every response here; interrupted, the same command goes on")
    add("--report", type=Path, metavar="FILE.html", help="write a page to look at: tables and marked trajectories")
    add("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="no evaluation: paired differences of two results, B - A")
    args = parser.parse_args()
    for path in filter(None, (args.json, args.report)):
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"{path}: expected the name of a file in a folder that exists")
    if args.json and (args.compare or args.json == args.report):
        raise ValueError(f"--json {args.json}: {'--compare writes no result' if args.compare else '--report names the same file'}; leave one out")
    if args.compare:
        results = {f"{side}: {path.resolve().parent.name}/{path.stem}": read_result(path) for side, path in zip("AB", args.compare)}
        tables = [compare_rows(*results.values(), tuple(results))]
    else:
        results = {args.model.name or str(args.model): run(args)}
        tables = [table_rows(results), process_rows(*results.values())]
    print(*map(aligned, tables), sep="\n\n")
    if args.json:
        print(f"every response: {args.json}")
    if args.report:
        write_text(args.report, report_page(results, tables))
        print(f"the page: {args.report}")


def run(args: argparse.Namespace) -> dict:
    """The evaluation that the flags ask for."""
    for name in ("limit", "max_new_tokens", "token_budget", "samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    check_device(args.device)
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed {args.seed}: expected 0 to 2147483647")
    temperature = float(args.samples > 1) if args.temperature is None else args.temperature
    if not 0 <= temperature < math.inf or not 0 < args.top_p <= 1:
        raise ValueError(f"--temperature {temperature} --top-p {args.top_p}: expected 0 or more, and a share in (0, 1]")
    if args.samples > 1 and temperature == 0:
        raise ValueError(f"--samples {args.samples} --temperature 0: greedy samples are all the same; expected a temperature above 0")
    if args.data:
        problems = read_all(args.data, args.lang)
        problems = spread_problems(problems, args.limit or len(problems))
    else:
        problems = generate_problems(args.limit or 400, args.seed, args.split)
    if args.train:
        print(contamination_note(read_all(args.train, args.lang), problems))
    model = load_model(args.model, args.device, getattr(torch, args.dtype))
    content = load_content_model(args.content, args.device) if args.content else None
    journal = args.json.with_name(f"{args.json.name}.part") if args.json else None
    result = evaluate(
        model, Tokenizer(args.model), problems, temperature, args.top_p, args.max_new_tokens, args.seed, not args.no_thinking,
        args.token_budget, "evaluating", args.samples, content, journal,
    )  # fmt: skip
    if args.json:
        write_json(args.json, result | {"model": str(args.model), "temperature": temperature, "samples": args.samples, "seed": args.seed})
        journal.unlink()
    return result


def read_all(paths: list[Path], lang: str) -> list[Problem]:
    """Problems of several files and folders; says what was found, repaired and left out."""
    problems = []
    for path in paths:
        names, found, notes = read_files(path, lang=lang)
        tqdm.write("\n  ".join((f"{path}: {len(found)} problems ({', '.join(sorted(names))})", *notes)))
        problems += found
    return problems


if __name__ == "__main__":
    exit_on_error(main)
