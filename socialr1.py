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
import random
import re
from dataclasses import dataclass, field

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STAGES = ("Cue Encoding", "Cue Interpretation", "Goal Clarification", "Response Generation")


# ---------------------------------------------------------------------------------------------- problems and responses


@dataclass(frozen=True)
class Problem:
    """One multiple-choice question about a story. `variant` is "hard" or "control" for generated stories; twins share source and id."""

    story: str
    question: str
    options: tuple[str, ...]
    answer: str  # one letter
    ability: str = ""
    source: str = ""
    id: str = ""
    variant: str = ""

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


def _split_stages(think: str) -> tuple[str, list[tuple[str, str]]]:
    """Text before the first heading, and the stages that have text; a repeated heading adds to the first one."""
    headings = list(_HEADING.finditer(think))
    preamble = think[: headings[0].start()] if headings else think
    texts: dict[str, list[str]] = {}
    for heading, following in zip(headings, headings[1:] + [None]):
        name = _STAGE_OF[" ".join(heading["name"].lower().split())]
        body = think[heading.end() : following.start() if following else len(think)].strip()
        texts.setdefault(name, []).extend([body] if body else [])
    return preamble.strip(), [(name, "\n".join(parts)) for name, parts in texts.items() if parts]


def parse_response(text: str, problem: Problem) -> Response:
    """Parse a completion, decoded without special tokens (METHOD.md section 2). Any text gives a Response; nothing raises."""
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


@dataclass(frozen=True)
class Event:
    """What happened: set, leave, return, peek, tell (to `target`), say (to `target`) or note (a value named in passing)."""

    kind: str
    actor: str
    value: str = ""
    target: str = ""


class World:
    """Replays events. views[a]: what a perceived; models[a, b]: what a knows of b's perceiving; both lists of (verb, value)."""

    def __init__(self, people: list[str]):
        self.people, self.present, self.value = people, set(people), ""
        self.views: dict[str, list[tuple[str, str]]] = {a: [] for a in people}
        self.models: dict[tuple[str, str], list[tuple[str, str]]] = {(a, b): [] for a in people for b in people if a != b}

    def apply(self, event: Event) -> None:
        if event.kind == "leave":
            self.present.discard(event.actor)
        elif event.kind == "return":
            self.present.add(event.actor)
        elif event.kind == "set":
            self.value = event.value
            for b in self.people:
                cue = ("saw" if b in self.present else "missed", event.value)
                self.views[b].append(cue)
                for a in self.present - {b}:
                    self.models[a, b].append(cue)
        elif event.kind == "peek":  # nobody notices, so nobody's model of the actor changes
            self.views[event.actor].append(("glimpsed", self.value))
        elif event.kind == "tell":  # private, and believed; the teller knows that it was heard
            self.views[event.target].append(("heard of", event.value))
            self.models[event.actor, event.target].append(("heard of", event.value))


def believed(view: list[tuple[str, str]]) -> str:
    """The value that somebody with this view takes to be real: the last one not missed."""
    return next((value for verb, value in reversed(view) if verb != "missed"), "")
