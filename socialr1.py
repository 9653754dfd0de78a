"""Problems, the SIP response format, and generated stories: everything about *text*; nothing here needs torch.

The reasoning that Social-R1 asks for runs through four stages of Social Information Processing (METHOD.md section 2) [P]:

    <think>
    Cue Encoding: ...            what was perceived, and by whom
    Cue Interpretation: ...      what the person therefore believes
    Goal Clarification: ...      what the person wants
    Response Generation: ...     what follows, and which option says so
    </think>
    <Answer> B </Answer>

The second half of the file is a small simulator [O], our stand-in for ToMBench-Hard's training examples. It replays events
(who put what where, who was away, who peeked, who told whom what), keeps for every person what that person perceived and what
each knows of the others, and writes from it an English story, a question, four options, and the gold trace. Every story has a
*control twin*: nearly the same story, in which the shortcut ("people know what I, the reader, know") happens to be right.
"""
import argparse
import csv
import io
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STAGES = ("Cue Encoding", "Cue Interpretation", "Goal Clarification", "Response Generation")


# ---------------------------------------------------------------------------------------------- problems and responses


@dataclass(frozen=True)
class Problem:
    """One multiple-choice question about a story.

    `variant` is "hard" or "control" for generated stories; twins share source and id. Problems of one source with the same `joint`
    count as one, right when all are (EmoBench asks for an emotion and its cause).
    """

    story: str
    question: str
    options: tuple[str, ...]
    answer: str  # one letter
    ability: str = ""
    source: str = ""
    id: str = ""
    variant: str = ""
    joint: str = ""

    def __post_init__(self):
        object.__setattr__(self, "options", tuple(self.options))
        if not 2 <= len(self.options) <= 26:
            raise ValueError(f"a problem needs 2 to 26 options, got {len(self.options)}")
        if self.answer not in tuple(self.letters):
            raise ValueError(f"answer {self.answer!r} has no option: expected one letter of {self.letters}")

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]


SYSTEM_PROMPT = (
    "First think about the reasoning process, then give the answer. Put the reasoning inside <think> </think> and the answer, "
    "one letter, inside <Answer> </Answer>. Inside <think> go through four stages in this order, each on a new line under its "
    "name as a heading: Cue Encoding, Cue Interpretation, Goal Clarification, Response Generation. Do not name any option "
    "before Response Generation."
)


def build_messages(problem: Problem) -> list[dict[str, str]]:
    """Chat messages that ask for the SIP format (METHOD.md section 2): instructions as system, story and options as user."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(problem.letters, problem.options))
    user = f"Story: {problem.story}\nQuestion: {problem.question}\n{options}"
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}]


@dataclass(frozen=True)
class Response:
    """A completion, parsed. `stages` holds the present stages, in order of first appearance; `preamble` the text before them."""

    think: str
    answer: str | None
    well_formed: bool
    stages: list[tuple[str, str]] = field(default_factory=list)
    preamble: str = ""


_TAG = re.compile(r"<(/?)(think|answer)>", re.IGNORECASE)
# A heading: the stage name at the start of a line, with list numbers, "Step 2:", # and * around it and a closing colon or dash.
# Bounded repeats, and classes without the newline, keep the match linear on hostile text.
_HEADING = re.compile(
    r"^[ \t#*>\-]{0,12}(?:step )?(?:[(\[]?\d{1,3}[.)\]:\-]{0,2})?[ \t#*\-]{0,12}"
    r"(?P<name>" + "|".join(STAGES) + r")(?!\w)[ \t*#]{0,8}[:：\-–—]{0,3}[ \t*#]{0,8}",
    re.IGNORECASE | re.MULTILINE,
)
_STAGE_OF = {name.lower(): name for name in STAGES}


def _blocks(text: str, tags: list[re.Match], name: str) -> list[str]:
    """Texts of the blocks <name> ... </name>, each from an opening tag to the first closing tag after it."""
    blocks, start = [], None
    for tag in tags:
        if tag[2].lower() != name:
            continue
        if not tag[1] and start is None:
            start = tag.end()
        elif tag[1] and start is not None:
            blocks.append(text[start : tag.start()])
            start = None
    return blocks


def stage_spans(think: str) -> Iterator[tuple[str, int, int]]:
    """Stage name ("" before the first heading), start and end of every passage, headings aside; a heading can come again."""
    # IGNORECASE also matches letters such as the dotless i, which are no stage's
    headings = [match for match in _HEADING.finditer(think) if match["name"].lower() in _STAGE_OF]
    yield "", 0, headings[0].start() if headings else len(think)
    for heading, following in zip(headings, headings[1:] + [None]):
        yield _STAGE_OF[heading["name"].lower()], heading.end(), following.start() if following else len(think)


def _split_stages(think: str) -> tuple[str, list[tuple[str, str]]]:
    """Text before the first heading, and the stages that have text; a repeated heading adds to the first one."""
    texts: dict[str, list[str]] = {}
    for name, start, end in stage_spans(think):
        body = think[start:end].strip()
        texts.setdefault(name, []).extend([body] if body else [])
    return "".join(texts.pop("")), [(name, "\n".join(parts)) for name, parts in texts.items() if parts]


def parse_response(text: str, problem: Problem) -> Response:
    """Parse a completion, decoded without special tokens (METHOD.md section 2). Any text gives a Response; nothing raises.

    Tags count in any case, exactly as spelt (`<think >` is none). A block runs from an opening tag to the first closing one, so
    nested tags end early; an unclosed block is none. `think` is the first think block; two answer blocks are no answer, and so
    is anything but one letter: "A.", "(A)", "A or B". Well-formed means exactly the four tags in order, and nothing outside.
    Stage names count as headings at the start of a line of `think` only, not in sentences, other words or the answer.
    """
    tags = list(_TAG.finditer(text))
    thinks, answers = _blocks(text, tags, "think"), _blocks(text, tags, "answer")
    think = thinks[0] if thinks else ""
    letter = answers[0].strip().upper() if len(answers) == 1 else ""
    answer = letter if len(letter) == 1 and letter in problem.letters else None
    # Exactly four tags in this order, and only white space before, between and after the two blocks.
    in_order = [tag[0].lower() for tag in tags] == ["<think>", "</think>", "<answer>", "</answer>"]
    outside = text[: tags[0].start()] + text[tags[1].end() : tags[2].start()] + text[tags[3].end() :] if in_order else "x"
    well_formed = in_order and not outside.strip() and bool(think.strip()) and answer is not None
    preamble, stages = _split_stages(think)
    return Response(think.strip(), answer, well_formed, stages, preamble)


# ------------------------------------------------------------------------------------------------------- the simulator

View = list[tuple[str, str]]  # what somebody perceived, in order: (verb, value)


@dataclass(frozen=True)
class Event:
    """What happened: set, leave, return, peek, tell (to `target`), say (to `target`) or note (a value named in passing)."""

    kind: str
    actor: str
    value: str = ""
    target: str = ""


class World:
    """Replays events. views[a]: what a perceived; models[a, b]: what a knows of b's perceiving."""

    def __init__(self, people: list[str]):
        self.people, self.present, self.value, self.said = people, set(people), "", ""
        self.views: dict[str, View] = {a: [] for a in people}
        self.models: dict[tuple[str, str], View] = {(a, b): [] for a in people for b in people if a != b}

    def apply(self, event: Event) -> None:
        if event.kind == "leave":
            self.present.discard(event.actor)
        elif event.kind == "return":
            self.present.add(event.actor)
        elif event.kind == "set":
            self.value = event.value
            for b in self.people:
                cue = ("noticed" if b in self.present else "missed", event.value)
                self.views[b].append(cue)
                for a in self.present - {b}:
                    self.models[a, b].append(cue)
        elif event.kind == "peek":  # nobody notices, so nobody's model of the actor changes
            self.views[event.actor].append(("glimpsed", self.value))
        elif event.kind == "tell":  # private, and believed; the teller knows that it was heard
            self.views[event.target].append(("was told of", event.value))
            self.models[event.actor, event.target].append(("was told of", event.value))
        elif event.kind == "say":  # what the question is about; what it does to beliefs comes after the story
            self.said = event.value


def believed(view: View) -> str:
    """The value that somebody with this view takes to be real: the last one not missed."""
    return next((value for verb, value in reversed(view) if verb != "missed"), "")


# ------------------------------------------------------------------------------------------ scripts: what can happen

ABILITIES = ("belief", "desire", "emotion", "intention", "knowledge", "non-literal communication")
TWISTS = ("unseen change", "being told", "peeking", "false report", "second order")
FEELINGS = {"pleased": "happy", "scared": "scared", "angered": "angry", "bored": "bored"}
SPEECH = ("the truth", "a mistake", "a lie", "a joke")

# A script is a few events. Roles: X is asked about, M makes the changes, Y is a third person. "=2" M makes value 2 real,
# "X-" leaves, "X+" comes back, "X?" peeks, "M>X2" M tells X value 2, "X!2" X says value 2 to Y. Each line: "hard / control".
_ONE_MIND = {  # belief, desire, emotion, intention: what does X believe; in the second order: what does M think X believes
    "unseen change": ("=1 X- =2 X+ / =1 X- X+ =2", "=1 =2 X- =3 X+ / =1 =2 X- X+ =3", "=1 X- =2 =3 =2 X+ / =1 X- X+ =2 =3 =2"),
    "being told": ("=1 X- =2 M>X2 =3 / =1 X- =2 =3 M>X3", "=1 =2 X- =3 M>X3 =2 / =1 =2 X- =3 =2 M>X2"),
    "peeking": ("=1 X- =2 X? =3 / =1 X- =2 =3 X?", "=1 =2 X- =3 X? =2 / =1 =2 X- =3 =2 X?"),
    "false report": ("=1 X- =2 M>X3 / =1 X- =2 M>X2", "=1 X- =2 X+ X- M>X3 / =1 X- =2 X+ X- =3 M>X3"),
    "second order": ("=1 X- =2 X? / =1 X- =2 M>X2", "=1 X- =2 M>X3 X? / =1 X- =2 X? M>X2"),
}
_TWO_MINDS = {  # knowledge: who of X and Y knows; in the second order: who, in M's view
    "unseen change": ("=1 X- =2 X+ / =1 X- X+ =2", "=1 Y- =2 Y+ / =1 Y- Y+ =2", "=1 X- Y- =2 X+ Y+ / =1 X- Y- X+ Y+ =2"),
    "being told": ("=1 X- =2 M>X2 =3 / =1 X- =2 =3 M>X3", "=1 X- Y- =2 M>Y2 / =1 X- Y- =2 M>Y2 M>X2"),
    "peeking": ("=1 X- =2 X? =3 / =1 X- =2 =3 X?", "=1 X- Y- =2 Y? / =1 X- Y- =2 Y? X?"),
    "false report": ("=1 X- =2 M>X3 / =1 X- =2 M>X2", "=1 X- Y- =2 M>X2 M>Y3 / =1 X- Y- =2 M>X2 M>Y2"),
    "second order": ("=1 X- Y- =2 X? M>Y2 / =1 X- Y- =2 M>X2 M>Y2", "=1 Y- =2 Y? / =1 Y- =2 M>Y2"),
}
_SPEECH_ACTS = {  # non-literal communication: X says something to Y; is it the truth, a mistake, a lie or a joke?
    "unseen change": ("=1 X- =2 X+ X!1 / =1 X- X+ =2 X!2", "=1 X- Y- =2 X+ Y+ X!1 / =1 Y- =2 Y+ X!1"),
    "being told": ("=1 X- =2 M>X2 =3 X+ X!2 / =1 X- =2 =3 M>X3 X+ X!3", "=1 Y- =2 X>Y2 Y+ X!1 / =1 Y- =2 Y+ X!1"),
    "peeking": ("=1 X- =2 X? =3 X+ X!2 / =1 X- =2 =3 X? X+ X!3", "=1 X- =2 X? =3 X+ X!2 / =1 X- Y- =2 X? X+ Y+ X!1"),
    "false report": ("=1 X- =2 M>X3 X+ X!3 / =1 X- =2 M>X2 X+ X!2", "=1 X- Y- =2 M>X3 X+ Y+ X!2 / =1 X- Y- =2 M>X2 X+ Y+ X!1"),
    "second order": ("=1 Y- Y+ =2 X!1 / =1 Y- =2 Y+ X!1", "=1 =2 X!1 / =1 Y- =2 Y+ X!1"),
}
_SHIFT_ONE_MIND = {
    "unseen change": ("=1 X- X+ =2 X- =3 X+ / =1 X- X+ =2 X- X+ =3",),
    "being told": ("=1 X- =2 M>X2 X+ X- =3 / =1 X- =2 M>X2 X+ =3",),
    "peeking": ("=1 X- =2 X? =3 =4 / =1 X- =2 =3 =4 X?",),
    "false report": ("=1 =2 X- M>X3 X+ / =1 =2 X- =3 M>X3 X+",),
    "second order": ("=1 X- X+ X- =2 X? / =1 X- X+ X- =2 M>X2",),
}
_SHIFT_TWO_MINDS = {
    "unseen change": ("=1 X- Y- Y+ =2 X+ / =1 X- Y- Y+ X+ =2",),
    "being told": ("=1 Y- =2 M>Y2 =3 / =1 Y- =2 =3 M>Y3",),
    "peeking": ("=1 X- Y- =2 X? Y? =3 X+ / =1 X- Y- =2 =3 X? Y? X+",),
    "false report": ("=1 Y- X- =2 M>Y3 X? / =1 Y- X- =2 M>Y2 X?",),
    "second order": ("=1 X- X+ Y- =2 Y? / =1 X- X+ Y- =2 M>Y2",),
}
_SHIFT_SPEECH_ACTS = {
    "unseen change": ("=1 X- =2 =3 X+ X!1 / =1 X- X+ =2 =3 X!3",),
    "being told": ("=1 Y- =2 =3 X>Y3 Y+ X!1 / =1 Y- =2 =3 Y+ X!1",),
    "peeking": ("=1 X- Y- Y+ =2 X? =3 X+ X!2 / =1 X- Y- Y+ =2 =3 X? X+ X!3",),
    "false report": ("=1 =2 X- =3 M>X1 X+ X!1 / =1 =2 X- =3 M>X3 X+ X!3",),
    "second order": ("=1 X- Y- X+ Y+ =2 X!1 / =1 X- Y- X+ =2 Y+ X!1",),
}


# ---------------------------------------------------------------------------------------------- words: how it is told


@dataclass(frozen=True)
class Lexicon:
    """Names, nouns and sentences. `shift` has its own of each, and scripts of its own, none of them ever trained on."""

    names: list[str]
    rooms: list[str]
    objects: list[str]
    values: dict[str, list[str]]  # by family
    sentences: dict[str, str]  # "family event" -> alternatives, separated by "|"
    scripts: tuple[dict, dict, dict]


# What the changing fact is: where an object is, what M wants to eat, where M plans to go, what is in M's parcel for X.
FAMILY = dict(zip(ABILITIES, ("place", "wish", "parcel", "plan", "place", "place")))
# In all sentences x, y, m are people, a is whoever acts, o the object, r the room, v a value.
_QUESTIONS = {
    "belief": ("Where will {x} look for the {o}?", "Where does {m} think {x} will look for the {o}?"),
    "desire": ("What will {x} cook for {m}?", "What does {m} think {x} will cook for {m}?"),
    "emotion": ("How does {x} feel about the parcel?", "How does {m} think {x} feels about the parcel?"),
    "intention": ("Where will {x} wait for {m}?", "Where does {m} think {x} will wait for {m}?"),
    "knowledge": ("Who knows where the {o} is, {x} or {y}?", "Who knows where the {o} is, {x} or {y}, in the view of {m}?"),
    "non-literal communication": ("What were the words of {x}?",) * 2,
}
_THOUGHTS = {"place": "the {o} is in the {v}", "wish": "{m} wants {v}", "plan": "{m} will go to the {v}", "parcel": "the {v} is in the parcel"}
_GOALS = {"belief": "{x} wants to find the {o}.", "desire": "{x} wants to please {m}.", "intention": "{x} wants to meet {m}.",
          "knowledge": "{x} and {y} want to find the {o}."}  # fmt: skip
_DEEDS = {"belief": "{x} will look {option}", "desire": "{x} will cook {option}", "emotion": "{x} feels {option}",
          "intention": "{x} will wait {option}", "knowledge": "It is known to {option}",
          "non-literal communication": "It was {option}"}  # fmt: skip
_OPTIONS = {"place": "in the {v}", "wish": "{v}", "plan": "at the {v}"}
_NOUN = {"place": "the {v}", "wish": "{v}", "plan": "the {v}", "parcel": "the {v}"}

MAIN = Lexicon(
    names="Anna Ben Cara David Ella Frank Grace Henry Ivy Jack Kate Leo Mia Nick Olga Paul Rosa Sam Tina Victor Wendy Xavier Yara Zoe".split(),
    rooms="kitchen garden office hall attic classroom".split(),
    objects="ball key book coin phone ring letter hat apple cup watch pen torch camera doll knife".split(),
    values={
        "place": "box bag jar drawer basket chest cupboard bucket suitcase tin fridge oven locker trunk".split(),
        "wish": "soup pasta pizza rice salad fish curry pancakes beans chicken noodles potatoes tofu eggs".split(),
        "plan": "park station library museum market harbour theatre cinema bakery church school gym bridge fountain".split(),
        "parcel": "drum mask clock kite puppet lamp scarf puzzle robot vase candle mirror rabbit trumpet".split(),
    },
    sentences={
        "place open": "{all} were in the {r}.|{all} were tidying the {r}.|One day {all} met in the {r}.",
        "place set": "{a} put the {o} in the {v}.|{a} laid the {o} in the {v}.",
        "place reset": "{a} moved the {o} to the {v}.|Then {a} took the {o} and put it in the {v}.",
        "place peek": "Through the window {a} secretly saw the {o} in the {v}.|In secret {a} peeked at where the {o} was.",
        "place tell": '{a} phoned {b} and said that the {o} was in the {v}.|{a} sent {b} a message: "The {o} is in the {v}."',
        "place say": '{a} said to {b}: "The {o} is in the {v}."|"The {o} is in the {v}," {a} said to {b}.',
        "place note": "There was a {v} in the corner.|A {v} stood near the door.",
        "wish open": "{x} was going to cook for {m}.|In the evening {x} was to cook dinner for {m}.",
        "wish set": "{a} wanted {v} and said so.|{a} asked for {v}.",
        "wish reset": "Then {a} wanted {v} instead and said so.|After that {a} asked for {v} instead.",
        "wish peek": "Behind the door {a} secretly heard {m} ask for {v}.|In secret {a} heard what {m} wanted now.",
        "wish tell": '{a} phoned {b} and asked for {v}.|{a} sent {b} a message: "I want {v}."',
        "wish note": "There was a lot of {v} in the house.|Last week they had eaten {v}.",
        "plan open": "{x} was going to meet {m} later.|{x} and {m} were to meet in town.",
        "plan set": "{a} planned to go to the {v} and said so.|{a} decided to go to the {v}.",
        "plan reset": "Then {a} planned to go to the {v} instead.|After that {a} chose the {v} instead.",
        "plan peek": "Behind the door {a} secretly heard {m} talk about the {v}.|In secret {a} heard about the new plan of {m}.",
        "plan tell": '{a} phoned {b} and spoke of going to the {v}.|{a} sent {b} a message: "I will go to the {v}."',
        "plan note": "Last week they had been to the {v}.|The {v} was very busy.",
        "parcel open": "{feelings}. {m} had a parcel for {x}.|{m} packed a parcel for {x}. Everybody knew that {feelings}.",
        "parcel set": "{a} put the {v} in the parcel.|Into the parcel {a} put the {v}.",
        "parcel reset": "{a} took it out and put in the {v}.|Then {a} put the {v} in the parcel instead.",
        "parcel peek": "Through the window {a} secretly saw the {v} in the parcel.|In secret {a} looked into the parcel.",
        "parcel tell": '{a} phoned {b} and said that the {v} was in the parcel.|{a} sent {b} a message: "The {v} is in the parcel."',
        "leave": "{a} left.|{a} went out.|{a} went to the shop.",
        "return": "{a} came back.|{a} returned.|Soon {a} was back.",
        "false": "That was not true.|It was not so.",
    },
    scripts=(_ONE_MIND, _TWO_MINDS, _SPEECH_ACTS),
)
SHIFT = Lexicon(
    names="Omar Priya Quentin Ruth Stefan Ursula Wang Bella Carlos Dora Emil Farid".split(),
    rooms="garage cellar workshop barn studio".split(),
    objects="wallet guitar whistle badge hammer ticket pearl stamp".split(),
    values={
        "place": "crate pot cabinet envelope vault barrel sack pouch".split(),
        "wish": "bread cheese lentils steak sushi porridge dumplings stew".split(),
        "plan": "zoo castle airport beach stadium temple lake palace".split(),
        "parcel": "flute carpet globe statue violin balloon helmet teapot".split(),
    },
    sentences={
        "place open": "{all} spent the afternoon in the {r}.|In the old {r}, {all} were at work.",
        "place set": "The {o} went into the {v}: {a} placed it there.|{a} chose the {v} as a place for the {o}.",
        "place reset": "Later on, the {v} was where {a} placed the {o}.|{a} preferred the {v} and brought the {o} there.",
        "place peek": "Nobody saw {a} take a quick look at the {o}.|Unobserved, {a} checked the {v} and found the {o}.",
        "place tell": '"You will find the {o} in the {v}," {a} wrote to {b}.|According to the note that {b} got from {a}, the {o} was in the {v}.',
        "place say": 'Turning to {b}, {a} said: "Look for the {o} in the {v}."',
        "place note": "Next to the wall was a {v}.|Somebody had painted the {v} green.",
        "wish open": "The meal that {x} would make was for {m}.|{m} was invited by {x} to eat.",
        "wish set": "{v}, said {a}, would be lovely.|The first idea of {a} was {v}.",
        "wish reset": "No, {v} would be better, {a} said later.|A new idea of {a} was {v}.",
        "wish peek": "Nobody saw {a} listen as {m} spoke of {v}.|Unobserved, {a} learned what {m} wished for.",
        "wish tell": '"Please make {v}," {a} wrote to {b}.|According to the note that {b} got from {a}, the wish was {v}.',
        "wish note": "In the shop, {v} was cheap.|The neighbours liked {v}.",
        "plan open": "{x} hoped to join {m} in the afternoon.|Later, {x} would look for {m} in the city.",
        "plan set": "The {v}, said {a}, would be nice.|The first idea of {a} was the {v}.",
        "plan reset": "No, the {v} would be nicer, {a} said later.|A new idea of {a} was the {v}.",
        "plan peek": "Nobody saw {a} listen as {m} spoke of the {v}.|Unobserved, {a} learned where {m} would be.",
        "plan tell": '"Find me at the {v}," {a} wrote to {b}.|According to the note that {b} got from {a}, {a} would be at the {v}.',
        "plan note": "On the map, the {v} was easy to find.|A film had been made about the {v}.",
        "parcel open": "A parcel was being made for {x} by {m}. As all knew, {feelings}.",
        "parcel set": "The {v} went into the parcel: {a} placed it there.|{a} chose the {v} and wrapped it in the parcel.",
        "parcel reset": "Later on, {a} replaced it with the {v}.|{a} preferred the {v} and wrapped that in the parcel.",
        "parcel peek": "Nobody saw {a} take a quick look into the parcel.|Unobserved, {a} opened the parcel and found the {v}.",
        "parcel tell": '"You will get the {v} in the parcel," {a} wrote to {b}.|According to the note that {b} got from {a}, the parcel held the {v}.',
        "leave": "{a} had to go away.|Off to town went {a}.",
        "return": "Not long after, {a} walked in again.|{a} joined the others again.",
        "false": "This was made up.|In fact this was wrong.",
    },
    scripts=(_SHIFT_ONE_MIND, _SHIFT_TWO_MINDS, _SHIFT_SPEECH_ACTS),
)


# -------------------------------------------------------------------------------------------- stories, answers, traces


@dataclass(frozen=True)
class Story:
    """A generated problem and what the simulator knows of it."""

    problem: Problem
    trace: str  # the gold SIP text, as a policy should write it
    events: tuple[Event, ...]
    twist: str
    shortcut: str  # the letter that "everybody knows what the reader knows" leads to: right in controls, wrong in hard stories
    cast: dict[str, str] = field(repr=False)  # roles x, y, m; words o, r
    likes: dict[str, str] = field(default_factory=dict, repr=False)  # emotion: value -> pleased, scared, ...


def replay(story: Story) -> World:
    world = World([story.cast[role] for role in "xym" if role in story.cast])
    for event in story.events:
        world.apply(event)
    return world


def minds(world: World, ability: str, twist: str, cast: dict[str, str]) -> tuple[View, View]:
    """The views that decide the answer: of X and of Y, as they are or (second order) as M knows them."""
    x, y, m = cast["x"], cast.get("y"), cast["m"]  # Y only where there is a third person
    if ability == "non-literal communication":
        return world.views[x], world.models[x, y]
    if twist == "second order":
        return world.models[m, x], world.models[m, y] if y else []
    return world.views[x], world.views[y] if y else []


def readers_minds(world: World, ability: str, cast: dict[str, str]) -> tuple[View, View]:
    """The shortcut: as if everybody had seen all changes (and a listener nothing: a false statement is then always a lie)."""
    seen = world.views[cast["m"]]  # M makes all changes
    return seen, [] if ability == "non-literal communication" else seen


def conclude(ability: str, of_x: View, of_y: View, world: World, cast: dict[str, str], likes: dict[str, str]) -> str:
    """The text of the option that follows from two views."""
    belief = believed(of_x)
    if ability == "knowledge":
        knows = (belief == world.value, believed(of_y) == world.value)
        return {
            (True, True): "both of them",
            (True, False): f"only {cast['x']}",
            (False, True): f"only {cast['y']}",
            (False, False): "neither of them",
        }[knows]
    if ability == "non-literal communication":
        if belief == world.said:
            return "the truth" if world.said == world.value else "a mistake"
        return "a joke" if believed(of_y) == belief else "a lie"
    if ability == "emotion":
        return FEELINGS[likes[belief]]
    return _OPTIONS[FAMILY[ability]].format(v=belief)


def _list(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def write_stages(story: Story, of_x: View, of_y: View) -> list[str]:
    """The texts of the four stages for somebody who ascribes these views; the gold trace, when the views are the true ones."""
    problem, cast, world = story.problem, story.cast, replay(story)
    ability, family = problem.ability, FAMILY[problem.ability]

    def view(name: str, cues: View) -> str:
        return f"{name} " + (_list([f"{verb} {_NOUN[family].format(v=value)}" for verb, value in cues]) or "noticed nothing")

    def thought(value: str) -> str:
        return _THOUGHTS[family].format(v=value, **cast)

    option = conclude(ability, of_x, of_y, world, cast, story.likes)
    letter = problem.letters[problem.options.index(option)]
    x, y, m = cast["x"], cast.get("y", ""), cast["m"]
    knows, thinks = (f"{m} knows that ", f"{m} thinks that ") if story.twist == "second order" else ("", "")
    cues = knows + view(x, of_x) + "."
    meaning = f"{thinks}{x} thinks {thought(believed(of_x))}."
    goal = _GOALS.get(ability, "").format(**cast)
    if ability == "knowledge":
        cues = f"Really {thought(world.value)}. {cues} {knows}{view(y, of_y)}."
        meaning += f" {thinks}{y} thinks {thought(believed(of_y))}."
    elif ability == "non-literal communication":
        cues = f"Really {thought(world.value)}. {view(x, of_x)}. {x} knows that {view(y, of_y)}. {x} said {world.said}."
        meaning = f"{x} thinks {thought(believed(of_x))}. {x} thinks that {y} thinks {thought(believed(of_y))}."
        goal = f"{x} wants to {dict(zip(SPEECH, ('inform', 'inform', 'mislead', 'amuse')))[option]} {y}."
    elif ability == "emotion":
        goal = f"The {believed(of_x)} {story.likes[believed(of_x)]} {x}."
    return [cues, meaning, goal, _DEEDS[ability].format(option=option, **cast) + f": {letter}."]


def gold_stages(story: Story) -> list[str]:
    """The texts of the four stages, all true."""
    return write_stages(story, *minds(replay(story), story.problem.ability, story.twist, story.cast))


def format_trace(stages: list[tuple[str, str]], letter: str) -> str:
    return "<think>\n" + "\n".join(f"{name}: {text}" for name, text in stages) + f"\n</think>\n<Answer> {letter} </Answer>"


_STEP = re.compile(r"(?P<role>[XYM])?(?P<kind>[=\-+?>!])(?P<target>[XYM])?(?P<value>\d)?")
_KINDS = {"=": "set", "-": "leave", "+": "return", "?": "peek", ">": "tell", "!": "say"}


def _events(script: str, cast: dict[str, str], values: list[str]) -> list[Event]:
    events, current = [], ""
    for step in script.split():
        match = _STEP.fullmatch(step)
        kind, value = _KINDS[match["kind"]], values[int(match["value"]) - 1] if match["value"] else ""
        current = value if kind == "set" else current
        target = cast["y"] if kind == "say" else cast.get((match["target"] or "").lower(), "")
        events.append(Event(kind, cast[(match["role"] or "M").lower()], current if kind == "peek" else value, target))
    return events


def _tell(events: tuple[Event, ...], wording: dict[str, str], family: str, words: dict[str, str]) -> str:
    """The story in English. A report of something that is not so says that it is not: the reader knows, the character does not."""
    opening = wording[f"{family} open"].format(**words)
    sentences, current = [opening[0].upper() + opening[1:]], ""
    for event in events:
        kind = "reset" if event.kind == "set" and current else event.kind
        template = wording[kind] if kind in wording else wording[f"{family} {kind}"]
        text = template.format(**words, a=event.actor, b=event.target, v=event.value)
        sentences.append(text[0].upper() + text[1:])
        current = event.value if event.kind == "set" else current
        if event.kind == "tell" and event.value != current:
            sentences.append(wording["false"])
    return " ".join(sentences)


def _twins(split: str, seed: int, pair: int) -> list[Story]:
    """A hard story and its control twin: same people, words, wording and options; only the script differs."""
    rng = random.Random(f"{split}/{seed}/{pair}")
    ability, twist = ABILITIES[pair % 6], TWISTS[pair // 6 % 5]
    family, lexicon = FAMILY[ability], SHIFT if split == "shift" else MAIN
    one, two, speech = lexicon.scripts
    scripts = rng.choice({"knowledge": two, "non-literal communication": speech}.get(ability, one)[twist]).split(" / ")
    while True:  # test takes a fifth of the casts, train the others: no story is in both
        x, m, y = rng.sample(lexicon.names, 3)
        values = rng.sample(lexicon.values[family], 4)
        marks = lexicon.names.index(x) + lexicon.names.index(m) + lexicon.values[family].index(values[0])
        if split == "shift" or (marks % 5 == 0) == (split == "test"):
            break
    cast = {"x": x, "m": m, "o": rng.choice(lexicon.objects), "r": rng.choice(lexicon.rooms)}
    if family == "place" and ability != "belief":
        cast = {"x": x, "y": y} | cast
    likes = dict(zip(values, rng.sample(list(FEELINGS), 4))) if ability == "emotion" else {}
    wording = {key: rng.choice(alternatives.split("|")) for key, alternatives in lexicon.sentences.items()}
    people = [cast[role] for role in "xym" if role in cast]
    feelings = [f"the {value} {feeling} {x}" for value, feeling in likes.items()]
    opening = {"all": _list(rng.sample(people, len(people))), "feelings": _list(rng.sample(feelings, len(feelings)))}
    if ability == "knowledge":
        options = [f"only {x}", f"only {y}", "both of them", "neither of them"]
    else:
        options = {"emotion": list(FEELINGS.values()), "non-literal communication": list(SPEECH)}.get(ability)
        options = options or [_OPTIONS[family].format(v=value) for value in values]
    rng.shuffle(options)
    noted, note = rng.choice(("first", "last", None)), Event("note", m, rng.choice(values))  # a value named in passing
    noted = noted if ability in ("belief", "desire", "intention") else None
    question = _QUESTIONS[ability][twist == "second order"].format(**cast)

    stories = []
    for variant, script in zip(("hard", "control"), scripts):
        events = _events(script, cast, values)
        if noted:
            events.insert(0 if noted == "first" else len(events), note)
        world = World(people)
        for event in events:
            world.apply(event)
        gold = conclude(ability, *minds(world, ability, twist, cast), world, cast, likes)
        short = conclude(ability, *readers_minds(world, ability, cast), world, cast, likes)
        assert (gold == short) == (variant == "control"), (script, gold, short)
        text = _tell(tuple(events), wording, family, cast | opening)
        problem = Problem(
            text, question, options, LETTERS[options.index(gold)], ability, f"stories/{split}", f"{split}-{seed}-{pair}", variant
        )
        story = Story(problem, "", tuple(events), twist, LETTERS[options.index(short)], cast, likes)
        stories.append(replace(story, trace=format_trace(list(zip(STAGES, gold_stages(story))), problem.answer)))
    return stories


def generate_stories(n: int, seed: int, split: str = "train") -> list[Story]:
    """`n` stories, hard and control in turn, abilities and twists in rotation. Splits: train, test, shift (METHOD.md section 8).

    Same seed, same stories; a shorter list is the beginning of a longer one. Train and test share words but no story; shift
    has names, nouns, sentences and scripts of its own.
    """
    if split not in ("train", "test", "shift"):
        raise ValueError(f"unknown split {split!r}: expected 'train', 'test' or 'shift'")
    return [story for pair in range((n + 1) // 2) for story in _twins(split, seed, pair)][:n]


def generate_problems(n: int, seed: int, split: str = "train") -> list[Problem]:
    """The problems of `generate_stories`."""
    return [story.problem for story in generate_stories(n, seed, split)]


# ------------------------------------------------------------------------------------- what the command lines share

TINY = Path(__file__).parent / "assets" / "tiny"  # the embedded policy
TINY_CONTENT = Path(__file__).parent / "assets" / "content"  # and its content model


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see --help")


def read_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """(line number, row) of a JSONL or CSV file; (place, row) of a JSON file with a list of rows, alone or under "data".

    ValueError names file and line.
    """
    try:
        data = file.read_bytes()
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}:{data[: error.start].count(10) + 1}: not UTF-8: {error.reason}") from None
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; expected a .jsonl, .json or .csv file, or a folder of them") from None
    number, whole = 1, file.suffix.lower() == ".json"
    try:
        if file.suffix.lower() == ".csv":
            reader = csv.DictReader(text, strict=True)
            for row in reader:
                number = reader.line_num
                if None in row:
                    raise ValueError(f"{file}:{number}: more cells than the {len(reader.fieldnames)} columns")
                yield number, row
            return
        for number, item in enumerate(_json_list(text) if whole else text, start=1):
            if whole or item.strip():
                row = item if whole else json.loads(item)  # reads the bare NaN of ToMBench
                if not isinstance(row, dict):
                    raise ValueError(f"{file}:{number}: expected a JSON object, got {type(row).__name__}")
                yield number, row
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno if whole else number}: not JSON, at column {error.colno}: {error.msg}") from None
    except (csv.Error, RecursionError, OverflowError) as error:
        raise ValueError(f"{file}:{number}: broken row: {error}") from None


def _json_list(text: io.StringIO) -> list:
    """The rows of a JSON file; none where it holds something else."""
    value = json.load(text)
    value = value.get("data") if isinstance(value, dict) else value
    return value if isinstance(value, list) else []


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name and rename: the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def exit_on_error(main: Callable[[], None]) -> None:
    """Call a command's main; a bad file, flag or value is one line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
