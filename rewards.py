"""The reward of one trajectory, term by term (METHOD.md section 3) [P: the form; O: the verifiable stand-ins]:

    R = R_fmt * ( w_out * R_out + tau(t) * ( w_struct * R_struct + w_content * R_content ) ) * R_len

Each term maps a problem and a parsed response to a float in [0, 1]; the total comes with its parts, so that each is logged.
Model output is hostile input: any text has a defined reward, found in linear time, without an exception.

The second half is R_content's model (section 4): how it scores, the pairs that teach it, its training, `python rewards.py`.
"""
import itertools
import json
import math
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import (
    Completion, Linear, ModelConfig, Sequences, Tokenizer, Transformer, check_device, generate, load_model, pad,
    refuse_other_folders, save_model,
)  # fmt: skip
from socialr1 import (
    FAMILY, MAIN, SHIFT, STAGES, TINY, Parser, Problem, Response, Story, View, believed, build_messages, exit_on_error,
    generate_stories, gold_stages, parse_response, read_rows, replay, write_text,
)  # fmt: skip


def setting(default, help: str):
    """A config field that knows its meaning; the command line takes its help from here."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RewardConfig:
    """Weights and constants of the reward. A weight of 0 removes its term: that is how the ablations run."""

    w_out: float = setting(1.0, "weight of R_out, the right letter [O]")
    w_struct: float = setting(0.5, "weight of R_struct, the four stages in order [O]")
    w_content: float = setting(0.5, "weight of R_content, grounding in the story [O]; left out where there is no content model")
    without: str = setting("", "terms to leave out, any of fmt,out,struct,content,len; only the outcome: struct,content,len")
    min_length: int = setting(32, "tokens; the length window is 0.5 here ... [O]")
    max_length: int = setting(1024, "... and here [O]")
    sharpness: float = setting(50.0, "steepness k of the length window [P]")
    tau_start: float = setting(0.2, "curriculum, outcome first [P: the idea; O: the numbers]: weight of the process terms at first")
    tau_from: float = setting(0.0, "share of the run until which it stays there")
    tau_to: float = setting(0.6, "share of the run from which it is 1")

    def __post_init__(self):
        if not 0 < self.min_length < self.max_length:
            raise ValueError(f"--min-length {self.min_length} --max-length {self.max_length}: expected 0 < min < max")
        if not 0 <= self.tau_from <= self.tau_to <= 1 or not 0 <= self.tau_start <= 1:
            raise ValueError("--tau-start, --tau-from and --tau-to are shares in [0, 1], and --tau-from comes before --tau-to")
        if unknown := self.off - {"fmt", "out", "struct", "content", "len"}:
            raise ValueError(f"--without {','.join(sorted(unknown))}: expected any of fmt,out,struct,content,len")
        weights = (self.w_out, self.w_struct, self.w_content)
        if not all(0 <= weight < math.inf for weight in weights) or not 0 < self.sharpness < math.inf:
            raise ValueError("--w-out, --w-struct and --w-content must be finite and 0 or more, --sharpness finite and above 0")

    @property
    def off(self) -> set[str]:
        return set(filter(None, map(str.strip, self.without.split(","))))

    def weights(self, tau: float, content: bool) -> dict[str, float]:
        """What the terms of the sum count at this point of the curriculum."""
        weights = {"out": self.w_out, "struct": tau * self.w_struct, "content": tau * self.w_content if content else 0.0}
        return {name: 0.0 if name in self.off else weight for name, weight in weights.items()}


@dataclass(frozen=True)
class Reward:
    total: float
    parts: dict[str, float | None]  # fmt, out, struct, content (None when not computed), len, tau


def format_reward(response: Response, problem: Problem) -> float:
    """R_fmt in {0, 1} [P]: one think block with text, then one answer block with one existing letter, nothing else."""
    return float(response.well_formed)


def outcome_reward(response: Response, problem: Problem) -> float:
    """R_out in {0, 1}: the letter is right."""
    return float(response.answer == problem.answer)


# ------------------------------------------------------------------------------------------------------------- structure

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def words(text: str) -> list[str]:
    """Case-folded words; a CJK character counts as a word."""
    return _WORD.findall(text.casefold())


def located_words(text: str) -> list[tuple[tuple[int, int], str]]:
    """The same, each with where it stands."""
    return [(match.span(), word) for match in _WORD.finditer(text) for word in words(match[0])]


_NAMED_LETTER = re.compile(
    r"(?i:\b(?:option|choice|answer)s?\b|选项|答案)(?i:[ \t]{0,3}(?:is\b|是))?[ \t:：*\"'“‘(\[]{0,4}([A-Z])" + rf"(?![^\W{_CJK}])"
    r"|[(（]([A-Z])[)）]"
    r"|^[ \t]{0,8}(?:[-*•][ \t]{0,3})?([A-Z])[.)]",
    re.MULTILINE,
)
# Spellings that look the same: full-width letters and brackets, other spaces; characters that nobody sees are dropped.
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys((0xA0, *range(0x2000, 0x200B), 0x202F, 0x3000), " ")
_PLAIN |= dict.fromkeys((0xAD, *range(0x200B, 0x2010), *range(0x2060, 0x2065), 0xFEFF))


def option_mentions(text: str, problem: Problem) -> list[tuple[int, int]]:
    """Where the text names an option: spans by its letter, then those that quote one of four words or more (METHOD.md section 3).

    By its letter: a capital after "option", "choice" or "answer" ("Option A is wrong" names it, too), in parentheses, or at a
    line's start before "." or ")", bullets aside. Small letters number lists; "It is B", "[B]", "the second one" are not caught.
    """
    kept = [i for i, character in enumerate(text) if _PLAIN.get(ord(character), "") is not None]
    matches = [match for match in _NAMED_LETTER.finditer(text.translate(_PLAIN)) if match[match.lastindex] in problem.letters]
    spans = [(kept[match.start()], kept[match.end() - 1] + 1) for match in matches]
    runs = [run for option in problem.options if len(run := words(option)) >= 4]
    if not runs:
        return spans
    places = located_words(text)
    starts = list(itertools.accumulate((len(word) + 1 for _, word in places), initial=0))  # of each word, in the next line's text
    quoted, known = (f" {' '.join(run)} " for run in ((word for _, word in places), words(f"{problem.story}\n{problem.question}")))
    for run in runs:
        needle, at = f" {' '.join(run)} ", -1
        while needle not in known and (at := quoted.find(needle, at + 1)) >= 0:
            first = bisect_left(starts, at)
            spans.append((places[first][0][0], places[first + len(run) - 1][0][1]))
            at += len(needle) - 2
    return spans


def names_option(text: str, problem: Problem) -> bool:
    return bool(option_mentions(text, problem))


def stage_order(response: Response) -> float:
    """Longest increasing subsequence of the present stages / stages present; 0 when none is present."""
    tails: list[int] = []  # tails[i]: smallest last stage of an increasing run of length i + 1
    for name, _ in response.stages:
        index = STAGES.index(name)
        tails[bisect_left(tails, index) : bisect_left(tails, index) + 1] = [index]
    return len(tails) / len(response.stages) if response.stages else 0.0


def early_options(response: Response, problem: Problem) -> list[bool]:
    """For each passage before the answer stage (other stages, wherever they stand, and any preamble): does it name an option?"""
    passages = [text for name, text in response.stages if name != STAGES[-1]]
    passages += [response.preamble] if response.preamble else []
    return [names_option(text, problem) for text in passages]


def structure_reward(response: Response, problem: Problem) -> float:
    """R_struct in [0, 1] = coverage x order x independence [O]; 0 when no stage is present."""
    if not response.stages:
        return 0.0
    early = early_options(response, problem)
    independence = 1 - sum(early) / len(early) if early else 1.0
    return len(response.stages) / len(STAGES) * stage_order(response) * independence


# ---------------------------------------------------------------------------------------------------- length, curriculum


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def length_reward(
    response: Response, length: int, min_length: int = 32, max_length: int = 1024, sharpness: float = 50.0
) -> float:
    """R_len in [0, 1]: a soft window over `length` (sampled tokens, EOS included) x distinct / all 4-grams of the think text."""
    if min_length >= max_length:
        raise ValueError(f"min_length {min_length} must be below max_length {max_length}")
    scale = sharpness / (max_length - min_length)
    window = logistic(scale * (length - min_length)) * logistic(-scale * (length - max_length))
    return window * distinct_share(response.think)


def distinct_share(text: str) -> float:
    """Distinct / all 4-grams of a text's words: 1 without repetition, and below four words."""
    run = words(text)
    grams = list(zip(run, run[1:], run[2:], run[3:]))
    return len(set(grams)) / len(grams) if grams else 1.0


def repetitions(text: str) -> list[tuple[int, int]]:
    """Where the 4-grams of words stand that occurred before."""
    places, seen, spans = located_words(text), set(), []
    for four in zip(places, places[1:], places[2:], places[3:]):
        gram = tuple(word for _, word in four)
        if gram in seen:
            spans.append((four[0][0][0], four[3][0][1]))
        seen.add(gram)
    return spans


def parse(problems: list[Problem], groups: list[list[Completion]], tokenizer: Tokenizer) -> list[list[Response]]:
    """The responses in the completions; P lists of G."""
    prefix = tokenizer.think_prefix()
    return [
        [parse_response(prefix + tokenizer.decode(completion.tokens), problem) for completion in group]
        for problem, group in zip(problems, groups)
    ]


def curriculum(step: int, steps: int, config: RewardConfig) -> float:
    """tau in [0, 1] at `step` (0-based) of `steps`: tau_start until x = tau_from, then linear to 1 at x = tau_to."""
    x = step / (steps - 1) if steps > 1 else 1.0
    if x >= config.tau_to:
        return 1.0
    if x <= config.tau_from:
        return config.tau_start
    return config.tau_start + (1 - config.tau_start) * (x - config.tau_from) / (config.tau_to - config.tau_from)


def total_reward(
    response: Response,
    problem: Problem,
    length: int,
    tau: float = 1.0,
    content: float | Callable[[Response, Problem], float] | None = None,
    config: RewardConfig = RewardConfig(),
) -> Reward:
    """R and its parts. `content` is R_content, or what computes it; without it R_content is None and left out of the sum."""
    if not config.w_content or "content" in config.off:
        content = None
    elif callable(content):
        content = content(response, problem)
    parts: dict[str, float | None] = {
        "fmt": format_reward(response, problem),
        "out": outcome_reward(response, problem),
        "struct": structure_reward(response, problem),
        "content": content,
        "len": length_reward(response, length, config.min_length, config.max_length, config.sharpness),
        "tau": tau,
    }
    total = sum(weight * (parts[name] or 0.0) for name, weight in config.weights(tau, content is not None).items())
    for factor in {"fmt", "len"} - config.off:
        total *= parts[factor]
    return Reward(total, parts)


# --------------------------------------------------------------------------------------------------- content model: scores

Segment = tuple[str, str]  # a stage and its text
Encoded = tuple[list[int], list[list[int]]]  # ids of a prompt, and of each of its segments


class ContentModel:
    """R_content: a transformer with a scalar head, which scores the text of one stage for its grounding in the story [P].

    It reads the story and the question, not the options, and then one stage. Bradley-Terry scores have no zero of their own:
    `centre`, the mean score of a stage's held-out segments, true and false in equal number, is what a probability of 0.5 stands for.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.centre = model.config.raw.get("content_centre") or dict.fromkeys(STAGES, 0.0)

    def encode(self, story: str, question: str, segments: list[Segment]) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt, and of each segment. What goes beyond the context is cut off, long before it is all read."""
        prompt = self.tokenizer.chat([{"role": "user", "content": f"Story: {story}\nQuestion: {question}"}])
        context = self.model.config.max_positions
        room = context - len(prompt)
        if room < 32:
            raise ValueError(f"a story takes {len(prompt)} of the {context} tokens of the content model's context: leave it out")
        texts = (f"{stage}: {text[: 20 * room]}".encode("utf-8", "replace").decode() for stage, text in segments)
        return prompt, [self.tokenizer.encode(text, special=False)[:room] for text in texts]  # a policy cannot end the turn

    @torch.inference_mode()
    def score(self, asked: list[tuple[str, str, list[Segment]]], token_budget: int = 32768) -> list[list[float]]:
        """Centred scores of segments; story, question and segments -> a list for each story.

        A story goes through the network once for all of its segments, equal segments once; batches stay within the budget.
        """
        distinct = [(story, question, list(dict.fromkeys(some))) for story, question, some in asked]
        batches = within_budget([self.encode(*one) for one in distinct], token_budget)
        values = iter([value for batch in batches for value in segment_scores(self.model, batch).tolist()])
        scores = [{segment: next(values) - self.centre[segment[0]] for segment in some} for _, _, some in distinct]
        return [[of_segment[segment] for segment in some] for of_segment, (_, _, some) in zip(scores, asked)]

    def rewards(self, problems: list[Problem], groups: list[list[Response]]) -> list[list[float]]:
        """R_content in [0, 1] of every response: the mean over its present stages of sigmoid(score); 0 when none is present."""
        segments = [[segment for response in group for segment in response.stages] for group in groups]
        asked = [(problem.story, problem.question, some) for problem, some in zip(problems, segments)]
        values = iter(itertools.chain(*self.score(asked)))
        return [[mean([logistic(next(values)) for _ in response.stages]) for response in group] for group in groups]


def mean(values: list[float]) -> float:
    """0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def load_content_model(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ContentModel:
    """Load a content model that `python rewards.py` has trained; ValueError: any other checkpoint."""
    model = load_model(path, device, dtype, scalar=True).requires_grad_(False)
    centre = model.config.raw.get("content_centre")
    if not isinstance(centre, dict) or not all(type(centre.get(stage)) is float and math.isfinite(centre[stage]) for stage in STAGES):
        raise ValueError(f"{path}/config.json: content_centre is {centre!r}; expected a number for each stage: was it made by rewards.py?")
    return ContentModel(model, Tokenizer(path))


def segment_scores(model: Transformer, batch: list[Encoded]) -> Tensor:
    """Scalar head at the last token of each segment -> (B,) in fp32, B segments of P prompts. Differentiable.

    As in sampling, a prompt goes through the network once, and its segments share the cache. ValueError: an empty prompt or segment.
    """
    if not any(segments for _, segments in batch) or not all(prompt and all(segments) for prompt, segments in batch):
        raise ValueError("no segment, or a prompt or segment without tokens: nothing to score")
    device = model.embed_tokens.weight.device
    rows = [segment for _, segments in batch for segment in segments]
    owner = torch.tensor([p for p, (_, segments) in enumerate(batch) for _ in segments], dtype=torch.long, device=device)  # (B,)
    tokens, valid = pad([prompt for prompt, _ in batch], "left", device)
    prefill = Sequences(valid)
    model.hidden(tokens, prefill)
    tokens, valid = pad(rows, "right", device)  # (B, T)
    hidden = model.hidden(tokens, Sequences(valid, prefill, owner))  # (B, T, d)
    at_end = hidden[torch.arange(len(rows), device=device), valid.sum(dim=1) - 1]  # (B, d)
    return model.score(at_end)[:, 0].float()


def within_budget(items: list[Encoded], budget: int) -> Iterator[list[Encoded]]:
    """Those that have segments, in order, as many at a time (at least one) as keep their padded tokens in the budget."""
    batch: list[Encoded] = []
    for item in filter(lambda item: item[1], items):
        rows = [segment for _, segments in (*batch, item) for segment in segments]
        prompt = max(len(prompt) for prompt, _ in (*batch, item))
        if batch and (len(batch) + 1) * prompt + len(rows) * max(map(len, rows)) > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------- content model: pairs


@dataclass(frozen=True)
class Pair:
    """Two texts of one stage of one story; `chosen` is the better grounded one."""

    story: str
    question: str
    stage: str
    chosen: str
    rejected: str
    kind: str = ""  # of corruption, where it is known


# Where facts are known, a false segment is a true one with one fact corrupted [O]. Each kind occurs in both directions (an unseen
# event reported as seen, a seen one as missed; reality instead of the belief, an outdated belief instead of reality; two people
# exchanged), so that the words of a segment do not tell true from false: one has to read the story, or, for wrong people, at
# least the question. The last kind is no corruption but nonsense, fragments and other people's stories: without it such texts,
# which no pair would ever mention, could have any score.
KINDS = (
    "wrong person", "unseen event treated as seen", "reality reported as belief", "goal of somebody else", "invented cue", "off topic",
)  # fmt: skip


def corruptions(story: Story, twin: Story, rng: random.Random) -> dict[str, list[tuple[int, str]]]:
    """False variants of a story's four true segments [O], by kind: (number of the stage, text).

    The twin is the same story with one event moved, so its segments hold the one wrong cue, belief or conclusion; exchanging
    people, or naming a thing that the story does not, gives others. What would be true all the same is left out.
    """
    gold, of_twin, cast, ability = gold_stages(story), gold_stages(twin), story.cast, story.problem.ability
    family, lexicon = FAMILY[ability], SHIFT if story.problem.source.endswith("shift") else MAIN
    x, other = cast["x"], cast.get("y") or cast["m"]
    of_x, of_other = views_of_two(story, other)
    same_view, same_belief = of_x == of_other, beliefs(of_x) == beliefs(of_other)
    person, unseen, reality, goal, invented, off_topic = ([] for _ in KINDS)

    unseen.append((0, of_twin[0]))
    # both feelings about both presents are facts of the story
    reality += [(i, of_twin[i]) for i in (1, 2, 3) if (i, ability) != (2, "emotion")]
    if not same_view:
        person.append((0, exchange(gold[0], x, other)))
    if not same_belief or family in ("wish", "plan"):  # there the exchange changes whose wish or plan it is, too
        person.append((1, exchange(gold[1], x, other)))
        if ability != "intention" or beliefs(of_x) != [replay(story).value]:  # M is where M plans to be
            person.append((3, exchange(gold[3], x, other)))
    if ability == "intention":  # to meet is mutual: a stranger's goal
        stranger = rng.choice([name for name in lexicon.names if name not in story.problem.story])
        goal.append((2, exchange(gold[2], x, stranger)))
    else:
        goal.append((2, exchange(gold[2], x, cast["m"] if ability == "knowledge" else other)))
    for i in range(4):
        if named := [match for match in re.finditer(r"\w+", gold[i]) if match[0] in lexicon.values[family]]:
            match = rng.choice(named)
            absent = rng.choice([thing for thing in lexicon.values[family] if thing not in story.problem.story])
            invented.append((i, gold[i][: match.start()] + absent + gold[i][match.end() :]))
        off_topic.append((i, nonsense(gold[i], story, rng)))
    by_kind = zip(KINDS, (person, unseen, reality, goal, invented, off_topic))
    return {kind: [(i, text) for i, text in some if text != gold[i]] for kind, some in by_kind}


def views_of_two(story: Story, other: str) -> tuple[list[View], list[View]]:
    """What X and the other person perceived, as the trace reports it, on whatever level of minds that is."""
    world, x, m = replay(story), story.cast["x"], story.cast["m"]
    if story.problem.ability == "non-literal communication":  # what each perceived, and knows of the other
        return [world.views[x], world.models[x, other]], [world.views[other], world.models[other, x]]
    if story.twist == "second order":
        return [world.models[m, x]], [world.models[x, m] if other == m else world.models[m, other]]
    return [world.views[x]], [world.views[other]]


def beliefs(views: list[View]) -> list[str]:
    return [believed(view) for view in views]


def exchange(text: str, a: str, b: str) -> str:
    """The text with a and b in each other's place."""
    return re.sub(rf"\b({a}|{b})\b", lambda match: b if match[0] == a else a, text)


def nonsense(true: str, story: Story, rng: random.Random) -> str:
    """What says nothing about the story: pieces of words, of the story or of the segment, another story's segment; or the true segment
    with such a piece, or a hint at an option, added."""
    sort, length = rng.randrange(6), len(true.split())
    at_hand = f"{story.problem.story} {story.problem.question} {story.trace} {' '.join(story.cast.values())}".split()
    if sort == 0:  # as many words as the segment, or fewer, or more; whole ones or pieces
        count = rng.randint(1, 2 * length)
        pieces = ["".join(rng.sample(_LETTERS, rng.randint(1, 3))) if rng.random() < 0.5 else rng.choice(at_hand) for _ in range(count)]
        return rng.choice((" ", " ", "")).join(piece if rng.random() < 0.5 else piece[: rng.randint(1, 4)] for piece in pieces)
    if sort == 1:
        return " ".join(rng.choice(at_hand)[: rng.randint(1, 5)] for _ in range(rng.randint(1, 3)))
    if sort == 2:
        start = rng.randrange(length)
        return " ".join(true.split()[start : start + rng.randint(1, max(1, length // 2))])
    if sort == 3:
        start = rng.randrange(len(at_hand))
        return " ".join(at_hand[start : start + rng.randint(1, 2 * length)])
    if sort == 4:
        return rng.choice(gold_stages(rng.choice(generate_stories(24, rng.randrange(10**6)))))
    hint = rng.choice(_HINTS).format(letter=rng.choice("ABCD"), place=rng.choice(("first", "second", "third", "fourth", "last")))
    added = hint if rng.random() < 0.6 else " ".join(rng.choice(at_hand) for _ in range(rng.randint(1, 4)))
    return rng.choice((f"{added} {true}", f"{true} {added}"))


_HINTS = ("It is {letter}.", "{letter} is right.", "So {letter}.", "It is the {place} one.", "The {place} one is right.", "I say {letter}.")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;!?'-<>|/0123456789"


def story_pairs(n: int, seed: int, split: str = "train") -> list[Pair]:
    """`n` pairs from generated stories, hard and control alike; all kinds equally often (n is rounded down to a multiple of 6)."""
    rng = random.Random(f"pairs {split} {seed}")
    by_kind: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
    for part in itertools.count():
        stories = generate_stories(240, seed=100_000 * (seed + 1) + part, split=split)
        for i, story in enumerate(stories):
            gold = gold_stages(story)
            for kind, some in corruptions(story, stories[i ^ 1], rng).items():
                if some:
                    stage, text = rng.choice(some)
                    by_kind[kind].append(Pair(story.problem.story, story.problem.question, STAGES[stage], gold[stage], text, kind))
        if all(len(pairs) >= n // len(KINDS) for pairs in by_kind.values()):
            return list(itertools.chain(*zip(*by_kind.values())))[: n // len(KINDS) * len(KINDS)]


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from JSONL with story, question, stage, chosen, rejected (METHOD.md section 4); ValueError names file and line."""
    pairs, names = [], ("story", "question", "stage", "chosen", "rejected")
    for number, row in read_rows(path):
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in names):
            raise ValueError(f"{path}:{number}: expected the texts {', '.join(names)}")
        if row["chosen"] == row["rejected"] or any("\ud800" <= char <= "\udfff" for name in names for char in row[name]):
            raise ValueError(f"{path}:{number}: chosen and rejected are the same, or a text holds half a surrogate pair")
        if row["stage"] not in STAGES:
            raise ValueError(f"{path}:{number}: stage {row['stage']!r}; expected one of {', '.join(STAGES)}")
        pairs.append(Pair(*(row[name] for name in names), kind=str(row.get("kind") or "")))
    if not pairs:
        raise ValueError(f"{path}: no pairs in it")
    return pairs


def agreement(story: Story, stage: str, text: str) -> float:
    """How well a segment agrees with the facts, in [0, 1]: F1 of its sentences and those of the true segment [O].

    It knows the simulator's wording only, whatever the case and the punctuation: no judge of free text.
    """
    texts = text, gold_stages(story)[STAGES.index(stage)]
    ours, true = ({tuple(words(sentence)) for sentence in re.split(r"(?<=[.!?])\s+", t.strip())} for t in texts)
    return 2 * len(ours & true) / (len(ours) + len(true))


def rollout_pairs(policy: Transformer, tokenizer: Tokenizer, stories: list[Story], samples: int, seed: int) -> list[Pair]:
    """The paper's way: K trajectories per problem, cut into stages, segments of the same stage paired [P].

    The paper asks a judge which is better. Here, on generated stories, a wholly true segment stands against each that is not [O].
    """
    prompts = [tokenizer.chat(build_messages(story.problem)) for story in stories]
    pairs = []
    for i in tqdm(range(0, len(stories), 16), desc="rollouts", unit="batch", leave=False):
        groups = generate(policy, prompts[i : i + 16], samples, tokenizer.max_new_tokens, stop_ids=tokenizer.stop_ids, seed=seed)
        for story, responses in zip(stories[i:], parse([story.problem for story in stories[i:]], groups, tokenizer)):
            for stage in STAGES:
                texts = dict.fromkeys(text for response in responses for name, text in response.stages if name == stage)
                true = [text for text in texts if agreement(story, stage, text) == 1]
                false = [text for text in texts if text not in true]
                pairs += [Pair(story.problem.story, story.problem.question, stage, true[0], text, "rollout") for text in false if true]
    return pairs


# ------------------------------------------------------------------------------------------------- content model: training


@dataclass(frozen=True)
class ContentConfig:
    """Settings of the content model's training; the paper gives none of them [O]."""

    epochs: int = setting(1, "passes over the pairs")
    batch: int = setting(64, "pairs in one update")
    lr: float = setting(1e-5, "learning rate of AdamW; after a short warm-up it falls linearly")
    token_budget: int = setting(8192, "tokens in one micro-batch; less needs less memory, results stay the same")
    seed: int = setting(0, "of pairs, their order and the new head")

    def __post_init__(self):
        if min(self.epochs, self.batch, self.token_budget) < 1 or not 0 < self.lr < 1 or not 0 <= self.seed < 2**31:
            raise ValueError("--epochs, --batch and --token-budget are 1 or more, --lr above 0 and below 1, --seed 0 to 2147483647")


TINY_PRESET = ContentConfig(lr=1e-3)  # from assets/tiny


def by_story(pairs: list[Pair]) -> list[list[Pair]]:
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.story, pair.question), []).append(pair)
    return list(groups.values())


def with_scalar_head(model: Transformer, seed: int) -> Transformer:
    """The language model's body under a new head of one output; a content model stays as it is."""
    if not model.config.scalar:
        kind = {"qwen3": "Qwen3", "llama": "Llama"}[model.config.raw["model_type"]]
        labels = {"id2label": {"0": "grounded"}, "label2id": {"grounded": 0}}
        model.config = ModelConfig.from_json(model.config.raw | labels | {"architectures": [f"{kind}ForSequenceClassification"]})
        del model.lm_head
        torch.manual_seed(seed)
        model.score = Linear(model.config.hidden_size, 1).to(model.embed_tokens.weight)
    return model


def encode_pairs(scorer: ContentModel, groups: list[list[Pair]], budget: int) -> Iterator[list[Encoded]]:
    """Batches of stories with the segments of their pairs: chosen, rejected, chosen, rejected, ..."""
    segments = [[(pair.stage, text) for pair in some for text in (pair.chosen, pair.rejected)] for some in groups]
    return within_budget([scorer.encode(some[0].story, some[0].question, texts) for some, texts in zip(groups, segments)], budget)


def whole_stories(groups: list[list[Pair]], size: int) -> list[list[list[Pair]]]:
    """Batches of stories, each of at least `size` pairs but for the last."""
    batches: list[list[list[Pair]]] = [[]]
    for group in groups:
        if sum(map(len, batches[-1])) >= size:
            batches.append([])
        batches[-1].append(group)
    return batches


def train_content_model(scorer: ContentModel, pairs: list[Pair], config: ContentConfig) -> None:
    """Bradley-Terry: minimise -log sigmoid(score(chosen) - score(rejected)), whole stories at a time [P]."""
    model, groups = scorer.model, by_story(pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    rng, right = random.Random(config.seed), 0.5
    batches = [batch for _ in range(config.epochs) for batch in whole_stories(rng.sample(groups, len(groups)), config.batch)]
    bar = tqdm(enumerate(batches, start=1), total=len(batches), desc="content model", unit="update")
    for update, batch in bar:
        count, good = sum(map(len, batch)), 0
        for part in encode_pairs(scorer, batch, config.token_budget):
            chosen, rejected = segment_scores(model, part).view(-1, 2).unbind(dim=1)
            (-F.logsigmoid(chosen - rejected).sum() / count).backward()
            good += int((chosen > rejected).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        x = update / len(batches)
        optimizer.param_groups[0]["lr"] = config.lr * min(x / 0.03, 1.0, (1 - x) / 0.97 + 0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        right += 0.02 * (good / count - right)
        bar.set_postfix(right=f"{right:.3f}")


@torch.no_grad()
def examine(scorer: ContentModel, pairs: list[Pair]) -> dict:
    """Held-out pairwise accuracy, overall, by stage and by kind; and the centre: the mean score of each stage's segments."""
    groups = by_story(pairs)
    batches = tqdm(list(encode_pairs(scorer, groups, 16384)), desc="held-out pairs", unit="batch", leave=False)
    scores = torch.cat([segment_scores(scorer.model, batch) for batch in batches]).view(-1, 2)
    right = (scores[:, 0] > scores[:, 1]).tolist()
    ordered = [pair for some in groups for pair in some]

    def accuracy(of: Callable[[Pair], str]) -> dict[str, float]:
        names = dict.fromkeys(sorted(of(pair) for pair in ordered))
        return {name: mean([hit for hit, pair in zip(right, ordered) if of(pair) == name]) for name in names}

    return {
        "pairs": len(pairs),
        "accuracy": mean(right),
        "by_stage": accuracy(lambda pair: pair.stage),
        "by_kind": accuracy(lambda pair: pair.kind or "(no kind given)"),
        "centre": {stage: mean([float(two.mean()) for two, pair in zip(scores, ordered) if pair.stage == stage]) for stage in STAGES},
    }


def hold_out(pairs: list[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """About a tenth of the pairs, about 2000 at most [P], in whole stories; -> the others, and these."""
    stories: dict[str, list[Pair]] = {}
    for pair in pairs:
        stories.setdefault(pair.story, []).append(pair)
    groups = list(stories.values())
    random.Random(f"held out {seed}").shuffle(groups)
    kept: list[Pair] = []
    while len(groups) > 1 and len(kept) < max(1, min(len(pairs) // 10, 2000)):
        kept += groups.pop()
    if not kept:
        raise ValueError(f"{len(pairs)} pairs of {len(stories)} stories: too few to hold some out; give more stories")
    return list(itertools.chain(*groups)), kept


def show(result: dict) -> str:
    rows = [("held-out pairs", str(result["pairs"])), ("right", f"{result['accuracy']:.3f}")]
    rows += [(f"  {name}", f"{value:.3f}") for key in ("by_stage", "by_kind") for name, value in result[key].items()]
    return "\n".join(f"{name:34}{value:>6}" for name, value in rows)


def main() -> None:
    parser = Parser(description="Train the content model (R_content) on pairs of segments; the better one gets the higher score.")
    add = parser.add_argument
    add("--model", type=Path, default=TINY, help="checkpoint folder to start from, a language model or a content model (assets/tiny)")
    add("--pairs", type=Path, help="JSONL with story, question, stage, chosen, rejected; without it: pairs from generated stories")
    add("--from-rollouts", type=Path, metavar="POLICY", help="sample trajectories on generated stories from this checkpoint, pair their stages")
    add("--problems", type=int, default=700, help="problems to sample with --from-rollouts (700)")
    add("--samples", type=int, default=6, help="trajectories per problem with --from-rollouts (6)")
    add("--count", type=int, default=60_000, help="pairs to make from generated stories (60000)")
    add("--out", type=Path, default=Path("runs/content"), help="folder of the content model (runs/content)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where there is one, else cpu")
    for f in fields(ContentConfig):
        shown = f"{f.default}; without --model {TINY_PRESET.lr}" if f.name == "lr" else f.default
        add(f"--{f.name.replace('_', '-')}", type=type(f.default), help=f"{f.metadata['help']} ({shown})")
    args = parser.parse_args()
    check_device(args.device)
    tiny = args.model.resolve() == TINY.resolve()
    preset = TINY_PRESET if tiny else ContentConfig()
    config = replace(preset, **{f.name: value for f in fields(preset) if (value := getattr(args, f.name)) is not None})
    if args.pairs and args.from_rollouts:
        raise ValueError("--pairs and --from-rollouts exclude each other: the pairs come from one of them")
    for name, least in (("problems", 2), ("samples", 2), ("count", len(KINDS))):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least {least}")
    refuse_other_folders(args.out)

    if args.pairs:
        pairs, held_out = hold_out(read_pairs(args.pairs), config.seed)
    elif args.from_rollouts:
        policy, tokenizer = load_model(args.from_rollouts, args.device), Tokenizer(args.from_rollouts)
        stories = generate_stories(args.problems, config.seed)
        found = rollout_pairs(policy, tokenizer, stories, args.samples, config.seed)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        file = args.out.with_name(f"{args.out.name}.pairs.jsonl")  # at once, and beside the folder, which saving replaces
        write_text(file, "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in found))
        print(f"pairs: {file}")
        pairs, held_out = hold_out(found, config.seed)
    else:
        pairs, held_out = story_pairs(args.count, config.seed), story_pairs(min(2000, args.count), config.seed, "test")
    start = load_model(args.model, args.device, scalar=None)
    scorer = ContentModel(with_scalar_head(start, config.seed), Tokenizer(args.model))
    for group in by_story(pairs + held_out):
        scorer.encode(group[0].story, group[0].question, [])  # what is too long says so now
    counts = [f"{len(some)} pairs of {len(by_story(some))}" for some in (pairs, held_out)]
    print(f"{counts[0]} stories; held out: {counts[1]} others")
    train_content_model(scorer, pairs, config)
    model, stored = scorer.model, torch.bfloat16 if tiny else torch.float32
    model.to(stored).float()  # examined as it will be loaded
    result = examine(scorer, held_out)
    model.config = replace(model.config, raw=model.config.raw | {"content_centre": result["centre"]})
    save_model(model.to(stored), args.out)
    print(f"{show(result)}\ncontent model: {args.out}\nnext: python grpo.py --content {args.out}")


if __name__ == "__main__":
    exit_on_error(main)
