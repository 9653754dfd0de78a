"""Problems, the four-stage response, generated stories, and what all command lines share.

A problem is a short story and a multiple-choice question about what somebody in it believes, wants,
feels, intends or knows. The paper observes that language models often start from the options and
then find reasons for one of them. Social-R1 asks them to reason as people are thought to do, in the
four stages of Social Information Processing (SIP), and to answer afterwards [P]:

    <think>
    Cue Encoding: ...            what happened, and who perceived it
    Cue Interpretation: ...      what people therefore believe
    Goal Clarification: ...      what they want
    Response Generation: ...     what follows, and which option says so
    </think>
    <Answer> B </Answer>

The first part of this file holds the problem, the prompt that asks for this form, and the parser of
responses. The second part is a small simulator of our own, which stands in for the training
questions of the paper: it tells events as a story with a question and four options, keeps what
every person perceived, and answers correctly from that. Last come files, settings and errors.
Nothing here needs torch.

In all files, [P] marks what the paper (arXiv 2603.09249) states, and [O] marks our own choice where
the paper is silent.
"""

import argparse
import csv
import io
import itertools
import json
import math
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STAGES = ("Cue Encoding", "Cue Interpretation", "Goal Clarification", "Response Generation")
ASSETS = Path(__file__).parent / "assets"
TINY = ASSETS / "tiny"  # the embedded policy
TINY_CONTENT = ASSETS / "content"  # its content model

# ------------------------------------------------------------------------------ problem and prompt


@dataclass(frozen=True)
class Problem:
    """A multiple-choice question about a story.

    Generated problems come in pairs, a "hard" one and its "control" (`variant`), which have the
    same source and id. Problems of one source with the same `joint` count as one, which is right
    when all of them are: EmoBench asks for an emotion and for its cause. `trace` is a correct
    response that a file gave with the problem, if any. ValueError where there are too few or too
    many options, or where the answer is not the letter of one.
    """

    story: str
    question: str
    options: tuple[str, ...]
    answer: str  # a letter
    ability: str = ""
    source: str = ""
    id: str = ""
    variant: str = ""
    joint: str = ""
    trace: str = ""

    def __post_init__(self):
        object.__setattr__(self, "options", tuple(self.options))
        if not 2 <= len(self.options) <= 26:
            raise ValueError(f"a problem needs 2 to 26 options, got {len(self.options)}")
        if self.answer not in tuple(self.letters):
            raise ValueError(f"answer {self.answer!r} has no option among {self.letters}")

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]


# The system message asks for the two pairs of tags [P]. The headings, the ban on naming options
# early and the example of the form are ours [O].
INSTRUCTIONS = (ASSETS / "instructions.txt").read_text(encoding="utf-8").strip()


def read_instructions(file: Path | None) -> str:
    """Read another system message from a file, or return the usual one; ValueError: it is empty."""
    instructions = read_lines(file).read().strip() if file else INSTRUCTIONS
    if not instructions:
        raise ValueError(f"--instructions {file}: the file is empty")
    return instructions


def build_messages(problem: Problem, instructions: str = INSTRUCTIONS) -> list[dict[str, str]]:
    """Write the chat messages of a problem: instructions as system, story and options as user."""
    lettered = zip(problem.letters, problem.options)
    options = "\n".join(f"{letter}. {option}" for letter, option in lettered)
    user = f"Story: {problem.story}\nQuestion: {problem.question}\n{options}"
    return [{"role": "system", "content": instructions}, {"role": "user", "content": user}]


# -------------------------------------------------------------------------------------- the parser
#
# What a policy (the model in training) writes is hostile input: it will try whatever is rewarded.
# So every text has one defined outcome, no text raises an exception, and the time grows linearly
# with the length (a repeat written *+ does not backtrack).


@dataclass(frozen=True)
class Response:
    """A completion, parsed.

    `think` is the reasoning; `answer` is a letter, or None where no letter can be read. `stages`
    has the name and text of every stage that is present, in order of first appearance, and
    `preamble` the text before the first heading, which belongs to no stage. `fault` is the first
    thing that is wrong with its form, in the order of `parse_response`, or "".
    """

    think: str
    answer: str | None
    stages: list[tuple[str, str]] = field(default_factory=list)
    preamble: str = ""
    fault: str = ""

    @property
    def well_formed(self) -> bool:
        return not self.fault

    def cause(self, finished: bool) -> str:
        """Say why it is not well-formed: it was cut off, or else its `fault`; "" if it is."""
        return self.fault and (self.fault if finished else "cut off")


CAUSES = ("cut off", "no think block", "unclosed think block", "empty think block")
CAUSES += ("no answer block", "two answers", "unreadable answer", "text outside")


def parse_response(text: str, problem: Problem) -> Response:
    """Parse a completion: find its reasoning, its answer and its stages, and judge its form.

    Well-formed means a think block with text in it, then exactly one readable answer block, and
    nothing but white space around the two [P]. The answer is looked for after the think block, so
    that the reasoning may quote answer tags; without a think block, in the whole text.

    The text comes with its special tokens, except for the one that ends it. They count as text, so
    a response that goes on with another turn of the chat is not well-formed [O]. Where the chat
    template opens <think> itself, Tokenizer.completion_text has put the tag back.
    """
    before, inside, behind = split_at_block(text, "think")
    between, block, after = split_at_block(behind, "answer")
    _, second_block, _ = split_at_block(after, "answer")
    think = (inside or "").strip()
    answer = read_answer(block or "", problem) if second_block is None else None
    faults = {
        "no think block": inside is None and not re.search("(?ai)<think>", text),
        "unclosed think block": inside is None,
        "empty think block": think == "",
        "no answer block": block is None,
        "two answers": second_block is not None,
        "unreadable answer": answer is None,
        "text outside": (before + between + after).strip() != "",
    }
    fault = next((name for name, is_found in faults.items() if is_found), "")
    preamble, stages = collect_stages(think)
    return Response(think, answer, stages, preamble, fault)


def split_at_block(text: str, tag: str) -> tuple[str, str | None, str]:
    """Return what stands before, inside and after the first block <tag> ... </tag> of a text.

    The block ends at the first closing tag. Upper case does not matter, but spaces do: `<think >`
    is no tag. Where there is no block, nothing stands before it, None is inside it, and the whole
    text stands after it.
    """
    before, *rest = re.split(f"(?ai)<{tag}>", text, maxsplit=1)
    inside, *behind = re.split(f"(?ai)</{tag}>", "".join(rest), maxsplit=1)
    if not behind:
        return "", None, text
    return before, inside, behind[0]


# Full-width forms of the ASCII characters, which Chinese and Japanese keyboards type.
FULL_WIDTH = {code + 0xFEE0: chr(code) for code in range(0x21, 0x7F)}
MARKS = " ()[]{}【】「」『』〔〕《》*_`.,:;!。、"  # brackets, emphasis and closing marks
LETTERED = re.compile(rf"([a-z])(?:[{re.escape(MARKS)}]+(?:[–—-] )?(.*))?")  # "b", "b. the drawer"


def even_out(text: str) -> str:
    """Replace full-width characters and Unicode spaces by plain ones, one for one."""
    return re.sub(r"[^\S\n]", " ", text.translate(FULL_WIDTH))


def bare(text: str) -> str:
    """Return a text in lower case, with single spaces, and without marks at its two ends."""
    return " ".join(even_out(text).casefold().split()).strip(MARKS)


def read_answer(block: str, problem: Problem) -> str | None:
    """Return the letter that an answer block gives, or None where it cannot be read.

    An answer block can be read [O] if it holds the letter of an option, alone or with the text of
    that very option after it, or if it holds the text of exactly one option. Let B be "the
    drawer". Then `B`, `(b)`, `**B**`, `B. the drawer` and `The drawer.` are B; `A or B`, `not B`
    and `B. the box` are None, since none of them settles on one option.
    """
    said = bare(block)
    texts = {letter: bare(option) for letter, option in zip(problem.letters, problem.options)}
    lettered = LETTERED.fullmatch(said)
    if lettered:
        letter, text = lettered[1].upper(), lettered[2]
        if letter in texts and text in (None, texts[letter]):
            return letter
    fitting = [letter for letter, text in texts.items() if said and text == said]
    return fitting[0] if len(fitting) == 1 else None


# A heading is the name of a stage at the start of a line, in any case. List numbers, "Step 2:",
# "Stage 2 -", bullets, # and * may stand before it, emphasis, a colon or a dash after it [O].
# Every name is a group of the pattern: group 1 is the first stage.
NAMES = "|".join(f"({re.escape(name)})" for name in STAGES)
NUMBERING = r"(?:[ #*>+•·◦▪●‐‑−–—-]|[\d.:()\[\]]|step|stage)*+"
HEADING = re.compile(rf"(?aim)^{NUMBERING}(?:{NAMES})\b[ *#]*+[:‐‑−–—-]*+[ *#]*+")


def stage_spans(think: str) -> list[tuple[str, int, int]]:
    """Divide the reasoning into passages, and return the stage, start and end of each.

    A passage goes from the end of its heading to the start of the next one. The passage before the
    first heading has the stage "". A stage can have several passages.
    """
    headings = list(HEADING.finditer(even_out(think)))
    ends = [heading.start() for heading in headings] + [len(think)]
    spans = [("", 0, ends[0])]
    for heading, end in zip(headings, ends[1:]):
        spans.append((STAGES[heading.lastindex - 1], heading.end(), end))
    return spans


def collect_stages(think: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the text before the first heading, and name and text of the stages that are present.

    A stage is present if it has text. A heading that comes again adds to its first text [O].
    """
    passages: dict[str, list[str]] = {}
    for name, start, end in stage_spans(think):
        passages.setdefault(name, []).append(think[start:end].strip())
    texts = {name: "\n".join(filter(None, parts)) for name, parts in passages.items()}
    preamble = texts.pop("")
    return preamble, [(name, text) for name, text in texts.items() if text]


# ----------------------------------------------------------- the simulator: events and beliefs
#
# A story is about one fact that changes: where an object is, what M wants to eat, where M will go,
# or what is in M's parcel for X. The question is about X, or about X and a third person, Y; M makes
# all changes. For example:
#
#     story       M puts the key in the box. X leaves. M moves it to the bag. X comes back.
#     X's view    noticed the box, missed the bag: so X believes that it is in the box
#     question    Where will X look for the key? In the box. The shortcut says: in the bag.
#
# The *shortcut* is to think that X and Y know what the reader knows. (Where X's words are judged,
# Y, who listens, is taken to know nothing, so that every untruth is a lie.) Every hard story, in
# which the shortcut is wrong, has a control twin with the same people, words and options, in which
# other events make it right: X comes back before the key is moved. A model that always takes the
# shortcut solves all of the controls and none of the hard stories.


@dataclass(frozen=True)
class Event:
    """Something that happens in a story.

    set: the actor makes a value real. leave, return: the actor goes and comes back. peek: the actor
    secretly sees the real value. tell: the actor tells the target a value, in private. say: the
    actor says a value to the target, and the question is about these words. note: a value is named
    in passing and changes nothing.
    """

    kind: str
    actor: str
    value: str = ""
    target: str = ""


View = list[tuple[str, str]]  # what a person perceived or missed, in order: (verb, value)


class World:
    """What is real, who is present, and what everybody perceived.

    `models[a, b]` is what a knows of b's view, and `views[a]` is models[a, a], a's own view.
    """

    def __init__(self, people: list[str]):
        self.people = people
        self.present = set(people)
        self.value, self.said = "", ""
        self.models = {pair: [] for pair in itertools.product(people, repeat=2)}
        self.views = {a: self.models[a, a] for a in people}

    def apply(self, event: Event) -> None:
        """Update what is real, who is present and what everybody perceived.

        A change that an absent person misses is entered, too, even in that person's own view:
        `believed` skips it, and the trace tells it.
        """
        if event.kind == "leave":
            self.present.discard(event.actor)
        elif event.kind == "return":
            self.present.add(event.actor)
        elif event.kind == "set":
            self.value = event.value
            for person in self.people:
                verb = "noticed" if person in self.present else "missed"
                for knower in self.present | {person}:
                    self.models[knower, person].append((verb, event.value))
        elif event.kind == "peek":  # in secret: it enters nobody else's model
            self.views[event.actor].append(("glimpsed", self.value))
        elif event.kind == "tell":  # the target believes it, and the actor knows that
            for knower in (event.actor, event.target):
                self.models[knower, event.target].append(("was told of", event.value))
        elif event.kind == "say":  # the last event: what it makes others believe is not asked
            self.said = event.value


def believed(view: View) -> str:
    """Return the value that a person with this view takes to be real: the last one not missed."""
    return next((value for verb, value in reversed(view) if verb != "missed"), "")


# ------------------------------------------------------------- the simulator: words and scripts
#
# Words are data, in assets/stories.json. There, {x}, {y} and {m} are people, {o} is the object, {r}
# the room and {v} a value; in sentences, {a} is the person who acts and {b} the one who is told.
# Some patterns have more such names, which are filled in alike.

STORIES = json.loads((ASSETS / "stories.json").read_text(encoding="utf-8"))
WORDS = STORIES["abilities"]  # by ability: the question, the thoughts, the goal ...
# belief, desire, emotion, intention, knowledge, non-literal communication
ABILITIES = tuple(WORDS)
# What makes a hard story hard:
TWISTS = ("unseen change", "being told", "peeking", "false report", "second order")

# A lexicon has names, rooms and objects; values, by family (the kind of fact that changes: place,
# wish, plan or parcel); sentences, by "family event", or by "event" for all families; and scripts,
# by the kind of story ("one mind" ...) and by twist.
Lexicon = SimpleNamespace
MAIN = Lexicon(**STORIES["main"])  # of the splits train and test
SHIFT = Lexicon(**STORIES["shift"])  # of the split shift; training has nothing of it

# A script is a line of steps. A step says who acts, what happens, to whom, and which of the story's
# four values it is about: "m=2" m makes value 2 real, "x-" x leaves, "x+" x comes back, "x?2" x
# peeks and sees value 2, "m>x2" m tells x value 2, "x!y2" x says value 2 to y. The example of
# the key has the script "m=1 x- m=2 x+", and its control "m=1 x- x+ m=2".
STEP = re.compile(r"([xym])([=\-+?>!])([xym]?)([1-4]?)")
KINDS = {"=": "set", "-": "leave", "+": "return", "?": "peek", ">": "tell", "!": "say"}


def read_script(script: str, cast: dict[str, str], values: list[str]) -> list[Event]:
    """Read the events of a script, with the people and values of a story in it."""
    events = []
    for step in script.split():
        actor, sign, target, place = STEP.fullmatch(step).groups()
        value = values[int(place) - 1] if place else ""
        events.append(Event(KINDS[sign], cast[actor], value, cast.get(target, "")))
    return events


@dataclass(frozen=True)
class Story:
    """A generated problem and what the simulator knows of it."""

    problem: Problem
    trace: str  # a correct response
    events: tuple[Event, ...]
    twist: str
    shortcut: str  # the letter to which the shortcut leads
    cast: dict[str, str] = field(repr=False)  # x, y, m: people; o: the object; r: the room
    likes: dict[str, str] = field(default_factory=dict, repr=False)  # value -> pleased, scared, ...


def people_of(cast: dict[str, str]) -> list[str]:
    return [cast[role] for role in "xym" if role in cast]


def replay(story: Story) -> World:
    """Return the world after all events of a story."""
    world = World(people_of(story.cast))
    for event in story.events:
        world.apply(event)
    return world


# --------------------------------------------------------- the simulator: the answer and its trace


def perspectives(story: Story) -> list[tuple[str, str]]:
    """Return whose views decide the answer, as roles (knower, about) of World.models.

    Mostly these are people's own views. A second-order question depends on what M knows of them.
    Where X's words are judged, it is X's own view, and what X knows of the listener Y's.
    """
    if story.problem.ability == "non-literal communication":
        return [("x", "x"), ("x", "y")]
    roles = [role for role in "xy" if role in story.cast]
    return [("m" if story.twist == "second order" else role, role) for role in roles]


def minds(story: Story, world: World) -> list[View]:
    """Return the views that decide the answer."""
    cast = story.cast
    return [world.models[cast[knower], cast[role]] for knower, role in perspectives(story)]


def readers_minds(story: Story, world: World) -> list[View]:
    """Return the views that the shortcut ascribes to X and Y: both saw all changes, as M did.

    Only a listener is taken to know nothing, which makes every false statement a lie.
    """
    seen = world.views[story.cast["m"]]
    if story.problem.ability == "non-literal communication":
        return [seen, []]
    return [seen, seen]


def conclude(story: Story, world: World, views: list[View]) -> str:
    """Return the text of the option that follows from these views."""
    ability, cast = story.problem.ability, story.cast
    beliefs = [believed(view) for view in views]
    if ability == "emotion":
        return WORDS[ability]["feelings"][story.likes[beliefs[0]]]
    if ability == "knowledge":
        knowing = [cast[role] for role, belief in zip("xy", beliefs) if belief == world.value]
        if len(knowing) == 1:
            return f"only {knowing[0]}"
        return "both of them" if knowing else "neither of them"
    if ability == "non-literal communication":
        if world.said == beliefs[0]:
            return "the truth" if world.said == world.value else "a mistake"
        return "a joke" if beliefs[1] == beliefs[0] else "a lie"  # a joke: Y knows better, too
    return WORDS[ability]["option"].format(v=beliefs[0])


def write_stages(story: Story, views: list[View]) -> list[str]:
    """Write the texts of the four stages for somebody who ascribes these views to X (and Y)."""
    cast, world, words = story.cast, replay(story), WORDS[story.problem.ability]
    cues, meanings = [], []
    if "y" in cast:
        cues.append(f"Really {words['thought'].format(**cast, v=world.value)}.")
    for (knower, role), view in zip(perspectives(story), views):
        knows = "" if knower == role else f"{cast[knower]} knows that "
        thinks = "" if knower == role else f"{cast[knower]} thinks that "
        perceived = [f"{verb} {words['thing'].format(v=value)}" for verb, value in view]
        thought = words["thought"].format(**cast, v=believed(view))
        cues.append(f"{knows}{cast[role]} {join_words(perceived) or 'noticed nothing'}.")
        meanings.append(f"{thinks}{cast[role]} thinks {thought}.")
    if world.said:
        cues.append(f"{cast['x']} said {world.said}.")
    belief, option = believed(views[0]), conclude(story, world, views)
    feeling, aim = story.likes.get(belief), words.get("aims", {}).get(option)
    goal = words["goal"].format(**cast, belief=belief, feeling=feeling, aim=aim)
    conclusion = words["conclusion"].format(**cast, option=option)
    letter = letter_of(story.problem, option)
    return [" ".join(cues), " ".join(meanings), goal, f"{conclusion}: {letter}."]


def gold_stages(story: Story) -> list[str]:
    """Write the texts of the four stages, all true."""
    return write_stages(story, minds(story, replay(story)))


def format_trace(stages: list[tuple[str, str]], letter: str) -> str:
    """Write a response with these stages, (name, text) each, and this answer."""
    think = "\n".join(f"{name}: {text}" for name, text in stages)
    return f"<think>\n{think}\n</think>\n<Answer> {letter} </Answer>"


def letter_of(problem: Problem, option: str) -> str:
    return problem.letters[problem.options.index(option)]


def join_words(items: list[str]) -> str:
    """Join items to "a, b and c"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


# ----------------------------------------------------------- the simulator: stories and their twins


def generate_stories(n: int, seed: int, split: str = "train") -> list[Story]:
    """Generate n stories, hard and control in turn, abilities and twists in rotation.

    The same seed gives the same stories, and a shorter list is the beginning of a longer one. Train
    and test share words, but no combination of X, M and the first value. "shift" has names, nouns,
    sentences and scripts of its own. Any other split is a ValueError.
    """
    if split not in ("train", "test", "shift"):
        raise ValueError(f"unknown split {split!r}: expected 'train', 'test' or 'shift'")
    stories = []
    for pair in range((n + 1) // 2):
        stories += make_twins(split, seed, pair)
    return stories[:n]


def generate_problems(n: int, seed: int, split: str = "train") -> list[Problem]:
    """Generate the problems of `generate_stories`."""
    return [story.problem for story in generate_stories(n, seed, split)]


def make_twins(split: str, seed: int, pair: int) -> list[Story]:
    """Make a hard story and its control twin: same people, words and options, other events.

    All random numbers are drawn here and in `draw_cast`. Their order must stay as it is, or a seed
    gives other stories, so some are drawn that an ability has no use for.
    """
    rng = random.Random(f"{split}/{seed}/{pair}")
    ability, twist = ABILITIES[pair % 6], TWISTS[pair // 6 % 5]
    words = WORDS[ability]
    lexicon = SHIFT if split == "shift" else MAIN
    scripts = rng.choice(lexicon.scripts[words["scripts"]][twist])
    cast, values = draw_cast(rng, lexicon, ability, split)
    effects = list(words.get("feelings", ()))
    likes = dict(zip(values, rng.sample(effects, len(effects))))
    wording = {event: rng.choice(sentences) for event, sentences in lexicon.sentences.items()}
    people = people_of(cast)
    feelings = [f"the {value} {feeling} {cast['x']}" for value, feeling in likes.items()]
    everybody = join_words(rng.sample(people, len(people)))
    opening = cast | {"all": everybody, "feelings": join_words(rng.sample(feelings, len(feelings)))}
    options = words.get("options") or [words["option"].format(v=value) for value in values]
    options = [option.format(**cast) for option in options]
    rng.shuffle(options)
    # A value that is named in passing, so that the first and the last one named do not tell much.
    notes_before, notes_after = rng.choice(((1, 0), (0, 1), (0, 0)))
    note = Event("note", cast["m"], rng.choice(values))
    if "option" not in words:
        notes_before = notes_after = 0

    asked = "second-order question" if twist == "second order" else "question"
    question = words[asked].format(**cast)
    origin = {"ability": ability, "source": f"stories/{split}", "id": f"{split}-{seed}-{pair}"}
    stories = []
    for variant in ("hard", "control"):
        events = read_script(scripts[variant], cast, values)
        events = [note] * notes_before + events + [note] * notes_after
        text = tell(events, wording, words["family"], opening)
        # Until the story is solved, its answer and its shortcut are "A".
        problem = Problem(text, question, options, answer="A", variant=variant, **origin)
        stories.append(solve(Story(problem, "", tuple(events), twist, "A", cast, likes)))
    return stories


def draw_cast(rng: random.Random, lexicon: Lexicon, ability: str, split: str) -> tuple[dict, list]:
    """Draw people and things; return the cast, by role, and four values of the fact that changes.

    Test takes a fifth of the combinations of X, M and the first value, and train the others.
    """
    places = lexicon.values[WORDS[ability]["family"]]
    while True:
        x, m, y = rng.sample(lexicon.names, 3)
        values = rng.sample(places, 4)
        mark = lexicon.names.index(x) + lexicon.names.index(m) + places.index(values[0])
        if split == "shift" or (mark % 5 == 0) == (split == "test"):
            break
    cast = {"x": x, "y": y, "m": m}
    if WORDS[ability]["scripts"] == "one mind":
        del cast["y"]
    return cast | {"o": rng.choice(lexicon.objects), "r": rng.choice(lexicon.rooms)}, values


def tell(events: list[Event], wording: dict[str, str], family: str, words: dict[str, str]) -> str:
    """Tell events in English, one sentence each, after an opening.

    After a false report the text says so: the reader knows, the character does not.
    """
    patterns = {name.removeprefix(f"{family} "): pattern for name, pattern in wording.items()}
    sentences, real = [patterns["open"].format(**words)], ""
    for event in events:
        kind = "reset" if event.kind == "set" and real else event.kind
        happening = {"a": event.actor, "b": event.target, "v": event.value}
        sentences.append(patterns[kind].format(**words, **happening))
        if event.kind == "set":
            real = event.value
        elif event.kind == "tell" and event.value != real:
            sentences.append(patterns["false"])
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def solve(story: Story) -> Story:
    """Fill in what follows from the events of a story: its answer, its shortcut and its trace."""
    world = replay(story)
    answer = letter_of(story.problem, conclude(story, world, minds(story, world)))
    shortcut = letter_of(story.problem, conclude(story, world, readers_minds(story, world)))
    assert (answer == shortcut) == (story.problem.variant == "control"), story
    story = replace(story, problem=replace(story.problem, answer=answer), shortcut=shortcut)
    return replace(story, trace=format_trace(list(zip(STAGES, gold_stages(story))), answer))


# ------------------------------------------------------------------------------------------- files


def read_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """Read a JSONL, CSV or JSON file, and yield (line, row); for JSON (place in the list, row).

    A JSON file holds a list of rows, alone or under "data"; if it holds anything else it has no
    rows. ValueError: a file that cannot be read, by its name; a broken row, by file and line.
    """
    read = {".csv": read_csv, ".json": read_json_list}.get(file.suffix.lower(), read_jsonl)
    for number, row in read(file, read_lines(file)):
        if not isinstance(row, dict):
            raise ValueError(f"{file}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def read_jsonl(file: Path, lines: io.StringIO) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, parse_json(line.strip(), file, number)


def read_json_list(file: Path, lines: io.StringIO) -> Iterator[tuple[int, object]]:
    value = parse_json(lines.read(), file, 1)
    rows = value.get("data") if isinstance(value, dict) else value
    if isinstance(rows, list):
        yield from enumerate(rows, start=1)


def read_csv(file: Path, lines: io.StringIO) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row:
                given = f"{file}:{reader.line_num}"
                raise ValueError(f"{given}: more cells than the {len(row) - 1} columns")
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.reader.line_num}: broken row: {error}") from None


def read_lines(file: Path) -> io.StringIO:
    """Open a UTF-8 file in memory; line ends are kept."""
    try:
        return io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}:{line}: not UTF-8: {error.reason}") from None
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; expected a text file") from None


def parse_json(text: str, file: Path, line: int) -> object:
    """Parse JSON that starts on this line of a file; a bare NaN, as in ToMBench, is a number."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(f"{file}:{line}: not JSON: {getattr(error, 'msg', error)}") from None


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is complete or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    # A result may hold a file name that is not UTF-8: its stray bytes become question marks.
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


# ------------------------------------------------------------------------ settings, command lines


def setting(default, help, low=-math.inf, high=math.inf, above=-math.inf, kind=None, **options):
    """Declare a field of a Settings class: its default, its meaning, and which values are allowed.

    A number is finite, from `low` to `high`, and greater than `above`. `kind` is the type; it must
    be given if the default is None. The `options` mean what they mean to argparse: with nargs, a
    field holds a list of values of this kind.
    """
    rule = {"help": help, "low": low, "high": high, "above": above, "options": options}
    return field(default=default, metadata=rule | {"kind": kind or type(default)})


def expected_instead(value: object, rule: dict) -> str:
    """Say what was expected of a value that breaks its field's rule; "" if it does not."""
    kind, low, above, high = rule["kind"], rule["low"], rule["above"], rule["high"]
    choices = rule["options"].get("choices")
    if choices:
        return "" if value in choices else "one of " + ", ".join(choices)
    if kind not in (int, float):
        return "" if isinstance(value, kind) else kind.__name__
    if type(value) in (int, kind) and low <= value <= high and above < value < math.inf:
        return ""
    bounds = {"at least": low, "above": above, "at most": high}.items()
    limits = [f", {words} {bound}" for words, bound in bounds if abs(bound) < math.inf]
    return ("a whole number" if kind is int else "a finite number") + "".join(limits)


def settings_of(owner: object) -> list:
    """Return the fields of a Settings class that `setting` has made; it may have others, too."""
    return [entry for entry in fields(owner) if entry.metadata]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


class Settings:
    """Base of frozen dataclasses with fields that `setting` has made.

    It checks the values and makes the flags of a command line. A value that is not allowed is a
    ValueError that names its flag; None is allowed where it is the default. A class with rules
    between its fields overrides __post_init__ and calls this one first.
    """

    def __post_init__(self):
        for entry in settings_of(self):
            value = getattr(self, entry.name)
            if value is None and entry.default is None:
                continue
            items = value if "nargs" in entry.metadata["options"] else [value]
            for item in items:
                expected = expected_instead(item, entry.metadata)
                if expected:
                    raise ValueError(f"{flag_of(entry.name)} {item}: expected {expected}")

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser, *presets: "Settings") -> None:
        """Add a flag for every field, None unless given.

        Its help ends with the presets' values, unless the default is None: then the help itself
        says what happens without the flag.
        """
        for entry in settings_of(cls):
            text, kind = entry.metadata["help"], entry.metadata["kind"]
            reading = {"type": kind, **entry.metadata["options"]}
            if kind is bool:
                reading = {"action": argparse.BooleanOptionalAction}
            if entry.default is not None:
                values = [getattr(preset, entry.name) for preset in presets or (cls(),)]
                defaults = " | ".join(dict.fromkeys(str(value) or "none" for value in values))
                text = f"{text} ({defaults})"
            parser.add_argument(flag_of(entry.name), **reading, help=text.replace("%", "%%"))

    def updated(self, args: argparse.Namespace) -> "Settings":
        """Return these settings with the values that were given on the command line."""
        given = {entry.name: getattr(args, entry.name, None) for entry in settings_of(self)}
        return replace(self, **{name: value for name, value in given.items() if value is not None})


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors, like all others, are one line. Flags must be spelt out."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see --help")


def exit_on_error(main: Callable[[], None]) -> None:
    """Call a command's main; a bad file, flag or value is one line on stderr and exit code 2.

    SIGTERM (of batch systems) and SIGHUP (of a closed terminal) end it like Ctrl-C. Characters that
    the terminal cannot show are replaced, for they must not end hours of work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup it is ignored
            signal.signal(number, signal.default_int_handler)
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
