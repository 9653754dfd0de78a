"""The reward of one response: what this project calls good reasoning, as a number.

In reinforcement learning nobody shows a model the right response. The model in training, the
policy, writes a response of its own (a trajectory: the reasoning, then the answer), receives a
number for it, and is changed so that responses with higher numbers become more likely. grpo.py does
the changing; this file makes the number. It is all that the policy learns from, so it has to say
everything that matters. The problems are short stories, with a question about somebody's mind and
lettered options to choose from. Social-R1 (arXiv 2603.09249) makes the number from five terms:

    R = R_fmt * ( w_out * R_out + tau(t) * ( w_struct * R_struct + w_content * R_content ) ) * R_len

    R_fmt      can the response be read?             R_content  is each stage true of the story?
    R_out      is the answer right?                  R_len      is it neither empty nor padded?
    R_struct   are the stages there, in order, with no option named early?

Why the reasoning is rewarded, and not the answer alone. Four options make a guess right in one case
of four. A shortcut ("people know whatever I, the reader, know") is right far more often, as long as
the questions are easy. A reward for the letter pays both as much as it pays thought, and the paper
names two habits that grow from this. *Reasoning parasitism*: the model settles on an option first
and then writes a justification for it. *Interpretation bottleneck*: the model repeats what was said
and done, but never works out what each person therefore believes, wants and feels. The letter does
not show these habits; the reasoning that leads to it does. R_struct looks at the course of the
reasoning, and R_content at what it says. Both rely on the reasoning's four stages, Cue Encoding,
Cue Interpretation, Goal Clarification and Response Generation, which come from Social Information
Processing (SIP), a theory of how people read a social situation.

Why the outcome comes first. A letter can be compared with the truth. Good reasoning cannot: a rule
and a small model stand in for a judge, and pleasing them is easier than reasoning well. Paid in
full for the process from the start, a policy may learn to fill four headings with anything.
So the curriculum tau(t) starts low, while the policy learns to be right, and rises to 1, so that it
learns to be right for a reason.

Why some terms are factors and some are addends. A factor is a condition for everything else:
without a readable answer all merits are worth nothing, and in a response that says everything twice
they are worth half. An addend is a merit that counts without the others. A right letter after a
muddle is worth something, and so is sound reasoning that ends at a wrong letter. Five responses at
the end of a run, with the default weights 1, 0.5 and 0.5:

                                                   fmt   out   struct  content  len      R
    sound reasoning, right letter                   1     1      1       1       1      2.0
    a right letter, and no stage at all             1     1      0       0       1      1.0
    sound reasoning, but a wrong letter             1     0      1       1       1      1.0
    four stages of a wrong story, right letter      1     1      1       0       1      1.5
    cut off before the answer                       0                                   0.0

This matters because GRPO learns from nothing but differences between responses to the same
question: where all of them are right, or all are wrong, the letter makes no difference, but the
reasoning still does.

Two marks tell where a rule or a number comes from. [P]: the paper states it. [O]: it is our own
choice, because the paper is silent or asks a closed model to judge. The docstring of each term says
what the term is against and what it cannot catch. The latter matters as much as the former: what a
reward overlooks is what a policy finds. The README shows what the cheapest tricks earn.

Each term is a float in [0, 1], and the total comes with its terms, so that a run can log them all.
A response may be any text: its reward is defined, costs linear time, and never raises an error.
"""

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import Packed, Tokenizer, Transformer, batches, load_model
from model import parse_config, refuse_existing, save_model
from socialr1 import STAGES, TINY, Parser, Problem, Response, Settings, even_out, exit_on_error
from socialr1 import parse_response, read_rows, setting

# The terms, each with its value when it is off or not computed: a factor is then 1, an addend 0. A
# new factor is a function below, an entry here and its place in `total_reward`; an addend needs a
# weight, too. The switch (--without) takes its names from here, and the log has all terms that were
# computed, whether they count or not.
TERMS = {"fmt": 1.0, "out": 0.0, "struct": 0.0, "content": 0.0, "len": 1.0}

# ---------------------------------------------------------------------------------------- the terms


def format_reward(response: Response, problem: Problem) -> float:
    """Reward a form that can be read: R_fmt in {0, 1} [P].

    It is 1 for a think block with text in it, then exactly one readable answer block, and nothing
    else. Against responses that nobody can grade: as a factor it takes away the whole reward. It
    cannot catch anything inside the blocks, where an empty phrase is as well-formed as a thought.
    """
    return float(response.well_formed)


def outcome_reward(response: Response, problem: Problem) -> float:
    """Reward the right letter: R_out in {0, 1} [P].

    Against being wrong. It cannot catch a lucky guess, a shortcut that happens to work, or an
    option that was chosen first and justified later: all of these have the right letter.
    """
    return float(response.answer == problem.answer)


def structure_reward(response: Response, problem: Problem) -> float:
    """Reward going through the stages before naming an option: R_struct in [0, 1] [O].

        R_struct = coverage * order * independence          (0 when no stage is present)

        coverage      = stages present / 4
        order         = largest set of stages in the right order / stages present
        independence  = sections that name no option / sections

    The sections are the stages other than the last (Response Generation), wherever they stand, and
    the text before the first heading. Independence is 1 when there is no such section.

    Against reasoning parasitism: a justification tends to name its option before there is a reason
    to. It cannot catch stages that say nothing (four headings over filler earn 1), nor "It is B",
    "option b", "the second one", or a short option in its own words.
    """
    coverage = len(response.stages) / len(STAGES)
    independence = 1 - mean(early_options(response, problem))
    return coverage * order_fraction(response) * independence


def order_fraction(response: Response) -> float:
    """Return the longest increasing subsequence of the stages / the stages present, or 0 of none.

    The longest increasing subsequence is what remains, in order, when as few stages as possible
    are crossed out.
    """
    order = [STAGES.index(name) for name, _ in response.stages]
    longest: list[int] = []  # of the increasing subsequences that end with this stage
    for i, stage in enumerate(order):
        before = [longest[j] for j in range(i) if order[j] < stage]
        longest.append(1 + max(before, default=0))
    return max(longest) / len(order) if order else 0.0


def early_options(response: Response, problem: Problem) -> list[bool]:
    """Tell for each of R_struct's sections whether it names an option."""
    stages = [text for name, text in response.stages if name != STAGES[-1]]
    sections = [response.preamble, *stages]
    return [bool(option_mentions(section, problem)) for section in sections if section]


def content_reward(scores: list[float]) -> float:
    """Reward stages that are true of the story: R_content in [0, 1] [P].

        R_content = mean of s(score) over the stages present,    s(x) = 1 / (1 + exp(-x))

    A content model (below) scores the text of each stage. Without any stage R_content is 0.

    Against the interpretation bottleneck: a stage that reports what is real where somebody's
    belief was asked for, or the cues of the wrong person, gets a low score. It cannot catch what
    the content model was never taught. And a mean has a gap of its own: leaving out a stage that
    would score below the others raises it. Where all four were there, in order, the coverage in
    R_struct takes as much back.
    """
    return mean([logistic(score) for score in scores])


def length_reward(
    response: Response, length: int, min_length=32, max_length=1024, sharpness=50.0
) -> float:
    """Reward a response that is neither too short nor padded: R_len in [0, 1] [P].

        R_len     = window(L) * distinct 4-grams / all 4-grams of the words of the reasoning   [O]
        window(L) = s(k (L - Lmin) / (Lmax - Lmin)) * (1 - s(k (L - Lmax) / (Lmax - Lmin)))    [P]

    L is `length`, the sampled tokens with a closing stop token; k is `sharpness`. The window is
    soft: with the defaults .17 at 0 tokens, .5 at 32, .97 at 100, .5 at 1024 and .02 at 1100.

    Against reasoning that is missing and reasoning that goes round in circles. It cannot catch
    padding that finds new words all the time and still ends within the window.
    """
    if min_length >= max_length:
        raise ValueError(f"min_length {min_length} must be below max_length {max_length}")
    k = sharpness / (max_length - min_length)
    long_enough = logistic(k * (length - min_length))
    short_enough = logistic(-k * (length - max_length))  # 1 - s(x) = s(-x)
    return long_enough * short_enough * distinct_fraction(response.think)


def distinct_fraction(text: str) -> float:
    """Return distinct / all 4-grams of words, which is 1 without repetition or without 4-grams."""
    run = words(text)
    distinct = set(zip(run, run[1:], run[2:], run[3:]))
    return len(distinct) / (len(run) - 3) if distinct else 1.0


def mean(values: list[float]) -> float:
    """Return the arithmetic mean, or 0 of no values."""
    return sum(values) / len(values) if values else 0.0


def logistic(x: float) -> float:
    """Return s(x) = 1 / (1 + exp(-x)), by way of tanh, which overflows for no x."""
    return 0.5 * (1 + math.tanh(x / 2))


# ---------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class RewardConfig(Settings):
    """Weights, switches and constants of the reward."""

    w_out: float = setting(1.0, "weight of R_out, the right letter [O]", low=0)
    w_struct: float = setting(0.5, "weight of R_struct, the four stages in order [O]", low=0)
    w_content: float = setting(0.5, "weight of R_content, grounding in the story [O]", low=0)
    # The paper's run with R_fmt * R_out alone is --without struct,content,len.
    without: str = setting("", f"terms to turn off, any of {','.join(TERMS)}")
    min_length: int = setting(32, "tokens; the length window is 0.5 here ... [O]", low=1)
    max_length: int = setting(1024, "... and here; grpo.py: --max-new-tokens [O]", low=2)
    sharpness: float = setting(50.0, "steepness k of the length window [P]", above=0)
    tau_start: float = setting(0.2, "weight of the process terms at first [O]", low=0, high=1)
    tau_from: float = setting(0.0, "fraction of the run before tau rises [O]", low=0, high=1)
    tau_to: float = setting(0.6, "fraction of the run after which tau is 1 [O]", low=0, high=1)

    def __post_init__(self):
        super().__post_init__()
        if self.min_length >= self.max_length:
            raise ValueError(f"--min-length {self.min_length} >= --max-length {self.max_length}")
        if self.tau_from > self.tau_to:
            raise ValueError(f"--tau-from {self.tau_from} comes after --tau-to {self.tau_to}")
        if not self.off <= set(TERMS):
            raise ValueError(f"--without {self.without}: expected any of {','.join(TERMS)}")

    @property
    def off(self) -> set[str]:
        """Name the terms that do not count: those of `without`, and those whose weight is 0."""
        names = {name.strip() for name in self.without.split(",")} - {""}
        weights = {"out": self.w_out, "struct": self.w_struct, "content": self.w_content}
        return names | {name for name, weight in weights.items() if weight == 0}


@dataclass(frozen=True)
class Reward:
    """A total and its parts: each term by its name (None if it was not computed), and tau."""

    total: float
    parts: dict[str, float | None]


def curriculum(step: int, steps: int, config: RewardConfig) -> float:
    """Return tau in [0, 1] at `step`, counted from 0, of a run of `steps` [P, its numbers O].

    With x = step / (steps - 1), tau is tau_start until x = tau_from. From there it rises on a
    straight line, and it is 1 from x = tau_to on.
    """
    x = step / (steps - 1) if steps > 1 else 1.0
    if x >= config.tau_to:
        return 1.0
    if x <= config.tau_from:
        return config.tau_start
    risen = (x - config.tau_from) / (config.tau_to - config.tau_from)
    return config.tau_start + (1 - config.tau_start) * risen


def total_reward(
    response: Response, problem: Problem, length: int, tau=1.0, content=None, config=RewardConfig()
) -> Reward:
    """Combine the terms into the reward of one response [P].

        R = R_fmt * (w_out R_out + tau (w_struct R_struct + w_content R_content)) * R_len

    `content` is R_content, or None where no content model computed it. An addend that is off or not
    computed is 0, a factor that is off is 1, and no weight changes.
    """
    window = (config.min_length, config.max_length, config.sharpness)
    parts = {
        "fmt": format_reward(response, problem),
        "out": outcome_reward(response, problem),
        "struct": structure_reward(response, problem),
        "content": content,
        "len": length_reward(response, length, *window),
        "tau": tau,
    }
    left_out = [name for name in TERMS if name in config.off or parts[name] is None]
    r = parts | {name: TERMS[name] for name in left_out}
    process = config.w_struct * r["struct"] + config.w_content * r["content"]
    total = r["fmt"] * (config.w_out * r["out"] + tau * process) * r["len"]
    return Reward(total, parts)


def parse_groups(problems: list, prompts: list, groups: list, tokenizer: Tokenizer) -> list:
    """Parse the completions of P prompts: P lists of G Completions -> P lists of G Responses."""
    responses = []
    for problem, prompt, group in zip(problems, prompts, groups):
        texts = [tokenizer.completion_text(prompt, completion.tokens) for completion in group]
        responses.append([parse_response(text, problem) for text in texts])
    return responses


# ------------------------------------------------------------------ what counts as naming an option


def option_mentions(text: str, problem: Problem) -> list[tuple[int, int]]:
    """Find where a text names an option, by its letter or by a quotation -> spans (start, end)."""
    seen = [i for i, character in enumerate(text) if ord(character) not in INVISIBLE]
    visible = plain(text)
    spans = letter_mentions(visible, problem) + quotations(visible, problem)
    return [(seen[start], seen[end - 1] + 1) for start, end in spans]


# Zero-width characters, soft hyphens and the like are dropped, lest they split an option's name.
INVISIBLE = dict.fromkeys([0xAD, 0xFEFF, *range(0x200B, 0x2010), *range(0x2060, 0x2065)])


def plain(text: str) -> str:
    """Drop what nobody sees, and make full-width characters and Unicode's many spaces plain."""
    return even_out(text.translate(INVISIBLE))


CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


def words(text: str) -> list[str]:
    """List the case-folded words of a text; a CJK character is a word."""
    return list(map(str.casefold, WORD.findall(text)))


# "option B", "The answer is: B", "选项B". Bounded repeats keep the search linear.
OPTION_WORD = r"(?i:\b(?:option|choice|answer)s?\b|选项|答案)(?i: {0,3}(?:is\b|是))?"
QUOTES = r"[ :*\"'“‘(\[「『《【]{0,4}"
# "The only answer I can give" names no option: an I counts before punctuation or a line's end.
LETTER = rf"(?:([A-HJ-Z])(?![^\W{CJK}])|(I)(?= {{0,3}}(?:[^\w\s('’‘`´\[]|['’‘`´](?!\w)|$)))"
IN_PARENTHESES = r"\(([A-Z])\)"
AT_LINE_START = r"^ {0,8}(?:[-*•] {0,3})?([A-Z])[.)]"
NAMED = re.compile(f"(?m){OPTION_WORD}{QUOTES}{LETTER}|{IN_PARENTHESES}|{AT_LINE_START}")


def letter_mentions(text: str, problem: Problem) -> list[tuple[int, int]]:
    """Find capital letters that name an option of this problem, "Option A is wrong" included.

    A letter names an option after "option", "choice" or "answer", in parentheses, or at the start
    of a line before "." or ")". Lower-case letters do not, since they number lists.
    """
    matches = NAMED.finditer(text)
    return [match.span() for match in matches if match[match.lastindex] in problem.letters]


def quotations(text: str, problem: Problem) -> list[tuple[int, int]]:
    """Find where a text quotes an option of four or more words that story and question lack.

    Shorter options do not count: the reasoning must be free to say "in the box".
    """
    told = [words(plain(problem.story)), words(plain(problem.question))]
    said = words(text)
    quoted = []
    for run in [words(plain(option)) for option in problem.options]:
        if len(run) >= 4 and not any(occurrences(run, passage) for passage in told):
            quoted += [(first, first + len(run) - 1) for first in occurrences(run, said)]
    matches = list(WORD.finditer(text)) if quoted else []
    return [(matches[first].start(), matches[last].end()) for first, last in quoted]


def occurrences(run: list[str], said: list[str]) -> list[int]:
    """Find where a run of words begins in what was said."""
    starts = [i for i, word in enumerate(said) if word == run[0]]
    return [i for i in starts if said[i : i + len(run)] == run]


# -------------------------------------------------------------------------------- the content model

Segment = tuple[str, str]  # the name of a stage, and what a response says there
Asked = tuple[str, str, list[Segment]]  # a story, a question about it, and segments to score
EncodedStory = tuple[list[int], list[list[int]]]  # ids of a prompt, and of each of its segments


class ContentModel:
    """The model behind R_content: a transformer that scores the text of a stage [P].

    It reads the story and the question, then the text of one stage, and ends in one number where a
    language model has logits: the higher, the better the text is grounded in the story. It sees
    neither the options nor which of them is right.

    It learns by comparing two texts of the same stage. So its scores have no zero of their own: 7
    more for every text of a stage changes no comparison, but it changes s(score). Therefore an
    estimate of the score between true and false is subtracted: `centre` holds for each stage the
    mean score of held-out texts, of which half are true and half are false, or 0 without any [O].
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        tokenizer.moment = 0.0  # chat templates may write the date; scores are the same every day
        self.centre = model.config.raw.get("content_centre") or dict.fromkeys(STAGES, 0.0)

    def rewards(self, problems: list[Problem], groups: list[list[Response]]) -> list[list[float]]:
        """Compute R_content of every response: P lists of G responses -> P lists of G floats."""
        asked = []
        for problem, group in zip(problems, groups):  # equal segments are scored once
            segments = dict.fromkeys(segment for response in group for segment in response.stages)
            asked.append((problem.story, problem.question, list(segments)))
        rewards = []
        for (_, _, segments), scores, group in zip(asked, self.score(asked), groups):
            score_of = dict(zip(segments, scores))
            rewards.append([content_reward([score_of[s] for s in r.stages]) for r in group])
        return rewards

    @torch.inference_mode()
    def score(self, asked: list[Asked], token_budget: int = 32768) -> list[list[float]]:
        """Score triples (story, question, segments) -> the centred scores of each.

        A story goes through the network once for all of its segments. `token_budget` limits how
        many tokens the network sees at a time, but it sees one story's at least.
        """
        encoded = [self.encode(*entry) for entry in asked if entry[2]]
        parts = batches(encoded, lambda stories: tokens_in(stories) <= token_budget)
        found = itertools.chain(*(segment_scores(self.model, part).tolist() for part in parts))
        centred = []
        for _, _, segments in asked:
            centred.append([next(found) - self.centre[stage] for stage, _ in segments])
        return centred

    def encode(self, story: str, question: str, segments: list[Segment]) -> EncodedStory:
        """Encode a story's prompt and its segments, each cut off where the context ends.

        ValueError: the story leaves less than 32 tokens for a segment.
        """
        message = {"role": "user", "content": f"Story: {story}\nQuestion: {question}"}
        prompt = self.tokenizer.chat([message])
        context = self.model.config.max_position_embeddings
        left = context - len(prompt)
        if left < 32:
            raise ValueError(f"a story takes {len(prompt)} of the content model's {context} tokens")
        encoded = []
        for stage, text in segments:
            # Only a long text's start is read, and half a surrogate pair becomes a question mark.
            # The name of a special token is plain text: no policy can end the turn with it.
            text = f"{stage}: {text[: 20 * left]}".encode("utf-8", "replace").decode()
            encoded.append(self.tokenizer.encode(text, special=False)[:left])
        return prompt, encoded


def segment_scores(model: Transformer, batch: list[EncodedStory]) -> Tensor:
    """Score each segment by the scalar head at its last token; gradients flow.

        P prompts with B segments altogether -> (B,) in float32

    Segments are packed like completions, so a story is read once for all of its segments.
    """
    prompts, segments = zip(*batch)
    packed = Packed(prompts, segments, model.device)
    ends = [places[-1] for places in itertools.chain(*packed.completions)]
    ends = torch.tensor(ends, device=model.device)
    hidden = model.hidden(packed.tokens, packed)[0, ends]  # (B, d)
    return model.score(hidden)[:, 0].float()


def tokens_in(stories: list[EncodedStory]) -> int:
    """Count the tokens of the stories' prompts and of all their segments."""
    return sum(len(prompt) + sum(map(len, segments)) for prompt, segments in stories)


def load_content_model(path: Path, device: str = "cpu", dtype=torch.float32) -> ContentModel:
    """Load a content model that `python rewards.py` has trained; ValueError: any other folder."""
    model = load_model(path, device, dtype, scalar=True).requires_grad_(False)
    centre = model.config.raw.get("content_centre")
    values = [centre.get(stage) for stage in STAGES] if isinstance(centre, dict) else [None]
    if not all(type(value) is float and math.isfinite(value) for value in values):
        raise ValueError(f"{path}: content_centre is {centre!r}; expected a number for each stage")
    return ContentModel(model, Tokenizer(path))


# -------------------------------------------------------------------- what the content model learns


@dataclass(frozen=True)
class Pair:
    """Two texts of the same stage of the same story; `chosen` is the better grounded one [P]."""

    story: str
    question: str
    stage: str
    chosen: str
    rejected: str
    kind: str = ""  # of mistake, where it is known


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs from JSONL with story, question, stage, chosen, rejected and perhaps kind [O].

    ValueError names file and line of what does not fit. assets/make_pairs.py writes such a file,
    from generated stories or, as the paper does, from trajectories of a policy.
    """
    names = ("story", "question", "stage", "chosen", "rejected")
    pairs = []
    for line, row in read_rows(path):
        texts = [row.get(name) for name in names]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}:{line}: expected the texts {', '.join(names)}")
        if row["chosen"] == row["rejected"] or re.search("[\ud800-\udfff]", "".join(texts)):
            raise ValueError(f"{path}:{line}: the same text twice, or half a surrogate pair in it")
        if row["stage"] not in STAGES:
            raise ValueError(f"{path}:{line}: stage {row['stage']!r}; expected {', '.join(STAGES)}")
        pairs.append(Pair(*texts, kind=str(row.get("kind") or "")))
    if not pairs:
        raise ValueError(f"{path}: no pairs in it")
    return pairs


def grouped(values: list, keys: list) -> dict:
    """Collect the values that have the same key, in order of appearance."""
    groups: dict = {}
    for value, key in zip(values, keys):
        groups.setdefault(key, []).append(value)
    return groups


def by_question(pairs: list[Pair]) -> list[list[Pair]]:
    """Collect the pairs of each story and question, since these share a prompt."""
    return list(grouped(pairs, [(pair.story, pair.question) for pair in pairs]).values())


def hold_out(pairs: list[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Hold out a tenth of the stories, about 2000 pairs at most [P] -> (other pairs, theirs)."""
    stories = list(dict.fromkeys(pair.story for pair in pairs))
    if len(stories) < 2:
        raise ValueError(f"{len(pairs)} pairs of one story: too few to hold some out")
    count = max(1, min(len(stories) // 10, 2000 * len(stories) // len(pairs)))
    picked = set(random.Random(f"held out {seed}").sample(stories, count))
    held_out = [pair for pair in pairs if pair.story in picked]
    return [pair for pair in pairs if pair.story not in picked], held_out


# ------------------------------------------------------------------- training the content model


@dataclass(frozen=True)
class ContentConfig(Settings):
    """Settings of the content model and its training, all [O]."""

    model: Path = setting(None, "checkpoint folder to start from; else assets/tiny", kind=Path)
    pairs: Path = setting(None, "JSONL, see assets/make_pairs.py", kind=Path, required=True)
    held_out: Path = setting(None, "pairs to examine on; else a tenth of the stories", kind=Path)
    out: Path = setting(Path("runs/content"), "the new folder")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    epochs: int = setting(1, "passes over the pairs", low=1)
    batch: int = setting(64, "pairs in one update, whole questions", low=1)
    lr: float = setting(1e-5, "AdamW's highest learning rate", above=0, high=1)
    token_budget: int = setting(8192, "tokens in one micro-batch; only memory depends on it", low=1)
    seed: int = setting(0, "of the head, the order, what is held out", low=0, high=2**31 - 1)


FROM_TINY = ContentConfig(model=TINY, lr=1e-3)  # from the embedded policy


def with_scalar_head(model: Transformer, seed: int) -> Transformer:
    """Put a head of one output on a language model's body; a content model stays as it is."""
    if model.config.scalar:
        return model
    raw = model.config.raw
    kind = {"qwen3": "Qwen3", "llama": "Llama"}[raw["model_type"]]
    head = {"architectures": [f"{kind}ForSequenceClassification"], "id2label": {"0": "grounded"}}
    model.config = parse_config(raw | head | {"label2id": {"grounded": 0}})
    del model.lm_head
    torch.manual_seed(seed)
    model.score = nn.Linear(model.config.hidden_size, 1, bias=False).to(model.embed_tokens.weight)
    return model


def pair_scores(scorer: ContentModel, questions: list[list[Pair]], budget: int) -> Iterator[Tensor]:
    """Yield scores (n, 2) of the chosen and rejected texts, n pairs at a time. Differentiable."""
    encoded = []
    for pairs in questions:
        segments = []
        for pair in pairs:
            segments += [(pair.stage, pair.chosen), (pair.stage, pair.rejected)]
        encoded.append(scorer.encode(pairs[0].story, pairs[0].question, segments))
    for batch in batches(encoded, lambda stories: tokens_in(stories) <= budget):
        yield segment_scores(scorer.model, batch).view(-1, 2)


def train_content_model(scorer: ContentModel, pairs: list[Pair], config: ContentConfig) -> None:
    """Teach a content model, in place, to score the chosen text of a pair above the rejected [P].

    After Bradley and Terry a comparison is a contest, and the chosen text wins it with probability
    s(score(chosen) - score(rejected)). The loss is small where the wins in the data are likely:

        loss = mean over the pairs of -log s(score(chosen) - score(rejected))
    """
    model, rng = scorer.model, random.Random(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    questions = by_question(pairs)
    updates = []
    for _ in range(config.epochs):
        shuffled = rng.sample(questions, len(questions))
        updates += batches(shuffled, lambda asked: sum(map(len, asked)) <= config.batch)
    progress = tqdm(updates, desc="content model", unit="update")
    for update, batch in enumerate(progress, start=1):
        count = sum(map(len, batch))
        right = 0
        for scores in pair_scores(scorer, batch, config.token_budget):
            margins = scores[:, 0] - scores[:, 1]
            loss = -nn.functional.logsigmoid(margins).sum() / count
            loss.backward()
            right += int((margins > 0).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        x = update / len(updates)
        rising, falling = x / 0.03, (1 - x) / 0.97 + 0.01  # a warm-up, then a straight line
        optimizer.param_groups[0]["lr"] = config.lr * min(rising, falling, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(right=f"{right / count:.3f}")


@torch.no_grad()
def examine(scorer: ContentModel, pairs: list[Pair]) -> dict:
    """Measure the share of held-out pairs whose chosen text scores higher, and the centres.

    -> pairs, accuracy, by_stage and by_kind (accuracy by name), centre (mean score by stage)
    """
    questions = by_question(pairs)
    ordered = list(itertools.chain(*questions))
    progress = tqdm(pair_scores(scorer, questions, 16384), desc="held-out pairs", leave=False)
    scores = torch.cat(list(progress))  # (n, 2)
    right = (scores[:, 0] > scores[:, 1]).tolist()
    by_stage = grouped(right, [pair.stage for pair in ordered])
    by_kind = grouped(right, [pair.kind or "(no kind given)" for pair in ordered])
    middles = grouped(scores.mean(dim=1).tolist(), [pair.stage for pair in ordered])
    return {
        "pairs": len(pairs),
        "accuracy": mean(right),
        "by_stage": {name: mean(by_stage[name]) for name in sorted(by_stage)},
        "by_kind": {name: mean(by_kind[name]) for name in sorted(by_kind)},
        "centre": {stage: mean(middles.get(stage, [])) for stage in STAGES},
    }


# ------------------------------------------------------------------------------------- command line


def main() -> None:
    parser = Parser(description="Train a content model (defaults: from assets/tiny | from others)")
    ContentConfig.add_flags(parser, FROM_TINY, ContentConfig())
    args = parser.parse_args()
    from_tiny = args.model is None or args.model.resolve() == TINY.resolve()
    config = (FROM_TINY if from_tiny else ContentConfig()).updated(args)
    refuse_existing(config.out)

    pairs = read_pairs(config.pairs)
    if config.held_out:
        held_out = read_pairs(config.held_out)
    else:
        pairs, held_out = hold_out(pairs, config.seed)
    model = load_model(config.model, config.device, scalar=None)
    scorer = ContentModel(with_scalar_head(model, config.seed), Tokenizer(config.model))
    for question in by_question(pairs + held_out):
        scorer.encode(question[0].story, question[0].question, [])  # a story too long says so now
    print(f"{len(pairs)} pairs to learn from, {len(held_out)} held out")
    train_content_model(scorer, pairs, config)
    dtype = torch.bfloat16 if from_tiny else torch.float32  # the embedded model has to stay small
    model.to(dtype).float()  # rounds the weights: what is examined is what will be loaded
    result = examine(scorer, held_out)
    print(f"{result['accuracy']:.3f} of {result['pairs']} held-out pairs are right")
    for name, accuracy in (result["by_stage"] | result["by_kind"]).items():
        print(f"  {name:32}{accuracy:6.3f}")
    raw = model.config.raw | {"content_centre": result["centre"]}
    model.config = replace(model.config, raw=raw)
    save_model(model.to(dtype), config.out)
    print(f"content model: {config.out}\nnext: python grpo.py --content {config.out}")


if __name__ == "__main__":
    exit_on_error(main)
