"""The reward of one trajectory, term by term (METHOD.md section 3) [P: the form; O: the verifiable stand-ins]:

    R = R_fmt * ( w_out * R_out + tau(t) * ( w_struct * R_struct + w_content * R_content ) ) * R_len

Each term maps a problem and a parsed response to a float in [0, 1]; the total comes with its parts, so that each is logged.
Model output is hostile input: any text has a defined reward, found in linear time, without an exception.
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
    Linear,
    ModelConfig,
    Sequences,
    Tokenizer,
    Transformer,
    check_device,
    generate,
    load_model,
    pad,
    refuse_other_folders,
    save_model,
)
from socialr1 import (
    FAMILY,
    MAIN,
    SHIFT,
    STAGES,
    TINY,
    Parser,
    Problem,
    Response,
    Story,
    believed,
    build_messages,
    exit_on_error,
    generate_stories,
    gold_stages,
    parse_response,
    read_rows,
    replay,
    write_text,
)


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
        return set(filter(None, self.without.split(",")))

    def weights(self, tau: float, content: bool) -> dict[str, float]:
        """What the terms of the sum count at this point of the curriculum."""
        weights = {"out": self.w_out, "struct": tau * self.w_struct, "content": tau * self.w_content if content else 0.0}
        return {name: 0.0 if name in self.off else weight for name, weight in weights.items()}


@dataclass(frozen=True)
class Reward:
    total: float
    parts: dict[str, float | None]  # fmt, out, struct, content (None when not computed), len, tau


def format_reward(response: Response, problem: Problem) -> float:
    """R_fmt in {0, 1}: one think block with text, then one answer block with one existing letter, nothing else."""
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


_NAMED_LETTER = re.compile(
    r"(?i:\b(?:option|choice|answer)s?\b|选项|答案)(?i:[ \t]{0,3}(?:is\b|是))?[ \t:：*\"'“‘(\[]{0,4}([A-Z])" + rf"(?![^\W{_CJK}])"
    r"|[(（]([A-Z])[)）]"
    r"|^[ \t]{0,8}([A-Z])[.)]",
    re.MULTILINE,
)


def names_option(text: str, problem: Problem) -> bool:
    """Does the text name an option: by its letter, or by quoting one of four words or more (METHOD.md section 3)?"""
    if any(match[match.lastindex] in problem.letters for match in _NAMED_LETTER.finditer(text)):
        return True
    quoted, known = (f" {' '.join(words(t))} " for t in (text, f"{problem.story}\n{problem.question}"))
    runs = [words(option) for option in problem.options]
    return any(len(run) >= 4 and (needle := f" {' '.join(run)} ") in quoted and needle not in known for run in runs)


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


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def length_reward(
    response: Response, length: int, min_length: int = 32, max_length: int = 1024, sharpness: float = 50.0
) -> float:
    """R_len in [0, 1]: a soft window over `length` (sampled tokens, EOS included) x distinct / all 4-grams of the think text."""
    if min_length >= max_length:
        raise ValueError(f"min_length {min_length} must be below max_length {max_length}")
    scale = sharpness / (max_length - min_length)
    window = _logistic(scale * (length - min_length)) * _logistic(-scale * (length - max_length))
    text = words(response.think)
    grams = list(zip(text, text[1:], text[2:], text[3:]))
    return window * (len(set(grams)) / len(grams) if grams else 1.0)


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
    `centre`, the mean score of held-out segments, true and false in equal number, is what a probability of 0.5 stands for.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.centre = float(model.config.raw.get("content_centre", 0.0))

    def encode(self, story: str, question: str, segments: list[Segment]) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt, and of each segment. What goes beyond the context is cut off, long before it is all read."""
        prompt = self.tokenizer.chat([{"role": "user", "content": f"Story: {story}\nQuestion: {question}"}])
        context = self.model.config.max_positions
        room = context - len(prompt)
        if room < 32:
            raise ValueError(f"a story takes {len(prompt)} of the {context} tokens of the content model's context: leave it out")
        texts = (f"{stage}: {text[: 20 * room]}".encode("utf-8", "replace").decode() for stage, text in segments)
        return prompt, [self.tokenizer.encode(text)[:room] for text in texts]

    @torch.inference_mode()
    def score(self, asked: list[tuple[str, str, list[Segment]]], token_budget: int = 32768) -> list[list[float]]:
        """Centred scores of segments; story, question and segments -> a list for each story.

        A story goes through the network once for all of its segments, equal segments once; batches stay within the budget.
        """
        distinct = [(story, question, list(dict.fromkeys(some))) for story, question, some in asked]
        batches = within_budget([self.encode(*one) for one in distinct], token_budget)
        values = iter([value - self.centre for batch in batches for value in segment_scores(self.model, batch).tolist()])
        found = [{segment: next(values) for segment in some} for _, _, some in distinct]
        return [[scores[segment] for segment in some] for scores, (_, _, some) in zip(found, asked)]

    def rewards(self, problems: list[Problem], groups: list[list[Response]]) -> list[list[float]]:
        """R_content in [0, 1] of every response: the mean over its present stages of sigmoid(score); 0 when none is present."""
        asked = [(p.story, p.question, [s for response in group for s in response.stages]) for p, group in zip(problems, groups)]
        values = iter(itertools.chain(*self.score(asked)))
        return [[mean([_logistic(next(values)) for _ in response.stages]) for response in group] for group in groups]


def mean(values: list[float]) -> float:
    """0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def load_content_model(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ContentModel:
    """Load a content model that `python rewards.py` has trained; ValueError: any other checkpoint."""
    model = load_model(path, device, dtype)
    if not model.config.scalar:
        raise ValueError(f"{path} is a language model, no content model: train one with python rewards.py --model {path}")
    return ContentModel(model.requires_grad_(False), Tokenizer(path))


def segment_scores(model: Transformer, batch: list[Encoded]) -> Tensor:
    """Scalar head at the last token of each segment -> (B,) in fp32, B segments of P prompts. Differentiable.

    As in sampling, a prompt goes through the network once, and its segments share the cache.
    """
    device = model.embed_tokens.weight.device
    rows = [segment for _, segments in batch for segment in segments]
    owner = torch.tensor([p for p, (_, segments) in enumerate(batch) for _ in segments], dtype=torch.long, device=device)  # (B,)
    tokens, valid = pad([prompt for prompt, _ in batch], "left", device)
    prefill = Sequences(valid)
    model.hidden(tokens, prefill)
    tokens, valid = pad(rows, "right", device)  # (B, T)
    hidden = model.hidden(tokens, Sequences(valid, prefill, owner))  # (B, T, d)
    last = hidden[torch.arange(len(rows), device=device), valid.sum(dim=1) - 1]  # (B, d)
    return model.score(last)[:, 0].float()


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
# exchanged), so that no word tells true from false: only the story does.
KINDS = ("wrong person", "unseen event treated as seen", "reality reported as belief", "goal of somebody else", "invented cue")


def corruptions(story: Story, twin: Story, rng: random.Random) -> dict[str, list[tuple[int, str]]]:
    """False variants of a story's four true segments, by kind: (stage, text).

    The twin is the same story with one event moved, so its segments hold the one wrong cue, belief or conclusion; exchanging
    people, or naming a thing that the story does not, gives the others. What would be true by accident is left out.
    """
    gold, of_twin, cast, family = gold_stages(story), gold_stages(twin), story.cast, FAMILY[story.problem.ability]
    other = cast.get("y") or cast["m"]
    found: dict[str, list[tuple[int, str]]] = {kind: [] for kind in KINDS}
    for i in range(4):
        found[KINDS[1] if i == 0 else KINDS[2]].append((i, of_twin[i]))
    of_x, of_other = views_of_two(story, other)
    for i, facts in ((0, (of_x, of_other)), (1, (last(of_x), last(of_other))), (3, (last(of_x), last(of_other)))):
        if facts[0] != facts[1] or family in ("wish", "plan"):  # there the exchange changes whose wish it is, too
            found[KINDS[0]].append((i, exchange(gold[i], cast["x"], other)))
    found[KINDS[3]].append((2, exchange(gold[2], cast["x"], cast["m"] if story.problem.ability == "knowledge" else other)))
    things = (SHIFT if story.problem.source.endswith("shift") else MAIN).values[family]
    for i in range(4):
        if named := [match for match in re.finditer(r"\w+", gold[i]) if match[0] in things]:
            match = rng.choice(named)
            absent = rng.choice([thing for thing in things if thing not in story.problem.story])
            found[KINDS[4]].append((i, gold[i][: match.start()] + absent + gold[i][match.end() :]))
    return {kind: [(i, text) for i, text in some if text != gold[i]] for kind, some in found.items()}


def views_of_two(story: Story, other: str) -> tuple[list, list]:
    """What X and the other person perceived, as the trace reports it, on whatever level of minds that is."""
    world, x, m = replay(story), story.cast["x"], story.cast["m"]
    if story.problem.ability == "non-literal communication":  # what each perceived, and knows of the other
        return [world.views[x], world.models[x, other]], [world.views[other], world.models[other, x]]
    if story.twist == "second order":
        return [world.models[m, x]], [world.models[x, m] if other == m else world.models[m, other]]
    return [world.views[x]], [world.views[other]]


def last(views: list) -> list[str]:
    return [believed(view) for view in views]


def exchange(text: str, a: str, b: str) -> str:
    return re.sub(rf"\b({a}|{b})\b", lambda match: b if match[0] == a else a, text)


def story_pairs(n: int, seed: int, split: str = "train") -> list[Pair]:
    """`n` pairs from generated stories, hard and control alike; all kinds equally often (n is rounded down to a multiple of 5)."""
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
    raise AssertionError("unreachable")


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from JSONL with story, question, stage, chosen, rejected (METHOD.md section 4); ValueError names file and line."""
    pairs, names = [], ("story", "question", "stage", "chosen", "rejected")
    for number, row in read_rows(path):
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in names):
            raise ValueError(f"{path}:{number}: expected the texts {', '.join(names)}")
        if row["stage"] not in STAGES:
            raise ValueError(f"{path}:{number}: stage {row['stage']!r}; expected one of {', '.join(STAGES)}")
        pairs.append(Pair(*(row[name] for name in names), kind=str(row.get("kind") or "")))
    if not pairs:
        raise ValueError(f"{path}: no pairs in it")
    return pairs


def agreement(story: Story, stage: str, text: str) -> float:
    """How well a segment agrees with the facts, in [0, 1]: F1 of its sentences and those of the true segment."""
    sentences = [set(re.split(r"(?<=[.!?])\s+", t.strip())) for t in (text, gold_stages(story)[STAGES.index(stage)])]
    return 2 * len(sentences[0] & sentences[1]) / (len(sentences[0]) + len(sentences[1]))


def rollout_pairs(
    policy: Transformer, tokenizer: Tokenizer, stories: list[Story], samples: int, seed: int
) -> list[Pair]:
    """The paper's way: K trajectories per problem, cut into stages; the best segment of a stage against each worse one [P].

    The paper asks a judge which is better; generated stories know (`agreement`) [O].
    """
    prompts = [tokenizer.chat(build_messages(story.problem)) for story in stories]
    pairs, prefix = [], tokenizer.think_prefix()
    for i in tqdm(range(0, len(stories), 16), desc="rollouts", unit="batch", leave=False):
        groups = generate(policy, prompts[i : i + 16], samples, tokenizer.max_new_tokens, stop_ids=tokenizer.stop_ids, seed=seed)
        for story, group in zip(stories[i:], groups):
            responses = [parse_response(prefix + tokenizer.decode(completion.tokens), story.problem) for completion in group]
            for stage in STAGES:
                texts = dict.fromkeys(text for response in responses for name, text in response.stages if name == stage)
                scores = {text: agreement(story, stage, text) for text in texts}
                best = max(texts, key=scores.get, default="")
                worse = [text for text in texts if scores[text] < scores[best]]
                pairs += [Pair(story.problem.story, story.problem.question, stage, best, text, "rollout") for text in worse]
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


def train_content_model(scorer: ContentModel, pairs: list[Pair], config: ContentConfig) -> None:
    """Bradley-Terry: minimise -log sigmoid(score(chosen) - score(rejected)), whole stories at a time [P]."""
    model, groups = scorer.model, by_story(pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    updates = max(1, round(config.epochs * len(pairs) / config.batch))
    rng, queue, right = random.Random(config.seed), [], 0.5
    bar = tqdm(range(updates), desc="content model", unit="update")
    for update in bar:
        batch: list[list[Pair]] = []
        while sum(map(len, batch)) < config.batch:
            queue = queue or rng.sample(groups, len(groups))
            batch.append(queue.pop())
        count, good = sum(map(len, batch)), 0
        for part in encode_pairs(scorer, batch, config.token_budget):
            chosen, rejected = segment_scores(model, part).view(-1, 2).unbind(dim=1)
            (-F.logsigmoid(chosen - rejected).sum() / count).backward()
            good += int((chosen > rejected).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        x = (update + 1) / updates
        optimizer.param_groups[0]["lr"] = config.lr * min(x / 0.03, 1.0, (1 - x) / 0.97 + 0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        right += 0.02 * (good / count - right)
        bar.set_postfix(right=f"{right:.3f}")


@torch.no_grad()
def examine(scorer: ContentModel, pairs: list[Pair]) -> dict:
    """Held-out pairwise accuracy, overall, by stage and by kind; and the centre: the mean score of all segments."""
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
        "centre": float(scores.mean()),
    }


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    write_text(path, "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs))


def hold_out(pairs: list[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """About a tenth of the pairs, about 2000 at most [P], in whole stories; -> the others, and these."""
    groups = by_story(pairs)
    random.Random(f"held out {seed}").shuffle(groups)
    kept: list[Pair] = []
    while len(groups) > 1 and len(kept) < max(1, min(len(pairs) // 10, 2000)):
        kept += groups.pop()
    if not kept:
        raise ValueError(f"{len(pairs)} pairs of {len(by_story(pairs))} stories: too few to hold some out; give more stories")
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
    add("--from-rollouts", type=Path, metavar="POLICY", help="sample trajectories from this checkpoint on generated stories and pair their stages")
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
    preset = TINY_PRESET if args.model == TINY else ContentConfig()
    config = replace(preset, **{f.name: value for f in fields(preset) if (value := getattr(args, f.name)) is not None})
    if args.pairs and args.from_rollouts:
        raise ValueError("--pairs and --from-rollouts exclude each other: the pairs come from one of them")
    for name in ("problems", "samples", "count"):
        if getattr(args, name) < len(KINDS):
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least {len(KINDS)}")
    refuse_other_folders(args.out)

    if args.pairs:
        pairs, held_out = hold_out(read_pairs(args.pairs), config.seed)
    elif args.from_rollouts:
        policy, tokenizer = load_model(args.from_rollouts, args.device), Tokenizer(args.from_rollouts)
        stories = generate_stories(args.problems, config.seed)
        pairs, held_out = hold_out(rollout_pairs(policy, tokenizer, stories, args.samples, config.seed), config.seed)
        del policy
    else:
        pairs, held_out = story_pairs(args.count, config.seed), story_pairs(min(2000, args.count), config.seed, "test")
    scorer = ContentModel(with_scalar_head(load_model(args.model, args.device), config.seed), Tokenizer(args.model))
    print(f"{len(pairs)} pairs of {len(by_story(pairs))} stories; {len(held_out)} pairs of {len(by_story(held_out))} other stories held out")
    train_content_model(scorer, pairs, config)
    model, stored = scorer.model, torch.bfloat16 if args.model == TINY else torch.float32
    model.to(stored).float()  # examined as it will be loaded
    result = examine(scorer, held_out)
    model.config = replace(model.config, raw=model.config.raw | {"content_centre": result["centre"]})
    save_model(model.to(stored), args.out)
    if args.from_rollouts:
        write_pairs(args.out / "pairs.jsonl", pairs + held_out)
    print(f"{show(result)}\ncontent model: {args.out}\nnext: python grpo.py --content {args.out}")


if __name__ == "__main__":
    exit_on_error(main)
