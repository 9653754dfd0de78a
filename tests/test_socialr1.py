"""Problems and texts.

Every text has one defined outcome, found in linear time. Beliefs follow what was perceived. Files
and settings name their mistakes.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from socialr1 import (
    ABILITIES,
    CAUSES,
    INSTRUCTIONS,
    MAIN,
    SHIFT,
    STAGES,
    TWISTS,
    Event,
    Parser,
    Problem,
    Settings,
    World,
    believed,
    build_messages,
    generate_problems,
    generate_stories,
    parse_response,
    read_instructions,
    read_rows,
    setting,
    stage_spans,
)

PROBLEM = Problem(
    "Anna left. Ben moved the key.",
    "Where will Anna look?",
    ("in the box", "in the bag", "in the jar"),
    "B",
)
GOOD = (
    "<think>\nCue Encoding: Anna saw the box.\nCue Interpretation: Anna thinks box.\n"
    "Goal Clarification: Anna wants it.\n"
    "Response Generation: the bag, option B.\n</think>\n<Answer> B </Answer>"
)


def test_a_well_formed_response():
    response = parse_response(GOOD, PROBLEM)
    assert (response.answer, response.well_formed, response.preamble) == ("B", True, "")
    assert [name for name, _ in response.stages] == list(STAGES)
    assert response.stages[3] == ("Response Generation", "the bag, option B.")


@pytest.mark.parametrize(
    "text, answer, well_formed",
    [
        (GOOD.replace(" B </", " b </"), "B", True),
        (GOOD.upper().replace("\n", "\r\n"), "B", True),
        (GOOD + "\nDone.", "B", False),
        ("Well. " + GOOD, "B", False),
        (GOOD.replace("</think>", "</think> So:"), "B", False),
        (GOOD.replace("Answer> B", "Answer> D"), None, False),  # three options only
        (GOOD.replace("Answer> B", "Answer> "), None, False),
        ("<think> </think><Answer> B </Answer>", "B", False),
        ("<think>x</think>", None, False),
        ("<think>x</think><Answer> B", None, False),
        ("<think>x</think></think><Answer> B </Answer>", "B", False),
        ("<think >x</think><Answer> B </Answer>", "B", False),
        ("<thin\u212a>x</think><Answer> B </Answer>", "B", False),  # the Kelvin sign is no k
        ("", None, False),
        ("B", None, False),
    ],
)
def test_answer_and_form(text, answer, well_formed):
    response = parse_response(text, PROBLEM)
    assert (response.answer, response.well_formed) == (answer, well_formed)


@pytest.mark.parametrize(
    "text, answer, well_formed",
    [
        # behind the think block exactly one answer block counts
        (GOOD + GOOD, None, False),
        (GOOD + "<Answer> B </Answer>", None, False),
        (GOOD + "<Answer> B", "B", False),  # an unclosed block is none, but text
        (GOOD + "</Answer>", "B", False),
        ("<think>x</think><Answer><Answer> B </Answer></Answer>", None, False),
        ("<think>x</think><think>y</think><Answer> B </Answer>", "B", False),
        # what stands before it does not
        ("<Answer> B </Answer><think>x</think>", None, False),
        ("<Answer> A </Answer>" + GOOD, "B", False),
        # tags that the reasoning quotes are text
        ("<think>I end with <Answer> A </Answer>.</think><Answer> B </Answer>", "B", True),
        ("<think>First <Answer>, then </Answer></think><Answer> B </Answer>", "B", True),
        ("<think>It says <think> here.</think><Answer> B </Answer>", "B", True),
        ("<think><Answer> A </think></Answer><Answer> B </Answer>", "B", False),
        ("<think>no block behind it: <Answer> B </Answer></think>", None, False),
        # without a think block the whole text is searched
        ("<think>x<Answer> B </Answer>", "B", False),
        ("x</think><Answer> B </Answer>", "B", False),
        ("Surely <Answer> B </Answer>", "B", False),
        ("<Answer> A </Answer> or <Answer> B </Answer>", None, False),
    ],
)
def test_the_answer_block_is_looked_for_behind_the_think_block(text, answer, well_formed):
    response = parse_response(text, PROBLEM)
    assert (response.answer, response.well_formed) == (answer, well_formed)


DRAWER = Problem(
    "s", "q", ("the box", "the drawer", "in it", "in it", "3.5", "-3.5", "the answer is (A)"), "B"
)


@pytest.mark.parametrize(
    "block, answer",
    [
        *(
            (block, "B")
            for block in (
                "B",
                "b",
                " B ",
                "(B)",
                "[b]",
                "**B**",
                "*B*",
                "__B__",
                "`B`",
                "**(B)**",
                "(**B**)",
            )
        ),
        *(
            (block, "B")
            for block in (
                "B.",
                "B)",
                "B:",
                "B,",
                "**B.**",
                "\nB\n",
                "\u3000B\u00a0",
                "\uff22",
                "\uff42",
                "\uff08\uff22\uff09",
                "B\u3002",
            )
        ),
        *(
            (block, "B")
            for block in (
                "B. the drawer",
                "(B) the drawer",
                "B: The Drawer.",
                "**B. the drawer**",
                "B the  drawer",
                "b)\nthe\u00a0drawer",
                "「B」",
                "B - the drawer",
                "B. – the drawer",
            )
        ),
        *((block, "B") for block in ("the drawer", "The drawer.", "**the drawer**", "THE\tDRAWER")),
        ("in it", None),  # two options have this text
        ("C. in it", "C"),
        ("D in it", "D"),
        ("E. 3.5", "E"),
        ("3.5", "E"),
        ("-3.5", "F"),
        ("F. 3.5", None),
        ("F. -3.5", "F"),
        ("B (the drawer)", "B"),
        ("the answer is (A)", "G"),
        ("G. The answer is (A).", "G"),
        *(
            (block, None)
            for block in (
                "A or B",
                "not B",
                "B. the box",
                "A. the drawer",
                "B, not A",
                "AB",
                "BB",
                "B B",
                "A, B",
                "B?",
            )
        ),
        *(
            (block, None)
            for block in (
                "",
                " ",
                "**",
                "()",
                "H",
                "\u0412",
                "\u0392",
                "\uff28",
                "B\u0301",
                "B\u200b",
                "the answer is A",
                "the answer is B",
                "option B",
            )
        ),
        *(
            (block, None)
            for block in (
                "the drawer or the box",
                "the",
                "drawer",
                "Bthe drawer",
                "the drawer B",
                "B. the drawer, I think",
                "B<|im_end|>",
            )
        ),
    ],
)
def test_readable_answers(block, answer):
    response = parse_response(f"<think>x</think><Answer>{block}</Answer>", DRAWER)
    assert (response.answer, response.well_formed) == (answer, answer is not None)


def test_a_letter_goes_before_a_text_and_an_article_is_no_letter():
    letters = Problem("s", "q", ("B", "A", "a drawer", "drawer", "", "..."), "A")
    for block, answer in (
        ("A", "A"),
        ("B", "B"),
        ("A. B", "A"),
        ("a drawer", "C"),
        ("d drawer", "D"),
        ("", None),
        ("...", None),
    ):
        assert parse_response(f"<think>x</think><Answer>{block}</Answer>", letters).answer == answer


def test_special_tokens_outside_the_blocks_break_the_form():
    for text in (
        GOOD + "<|endoftext|>",
        "<|im_start|>" + GOOD,
        GOOD.replace("</think>", "</think><|im_end|>"),
        GOOD + "<|im_end|>\n<|im_start|>user",
    ):
        response = parse_response(text, PROBLEM)
        assert (response.answer, response.well_formed) == ("B", False)
    inside = parse_response(GOOD.replace("thinks box", "thinks <|im_end|> box"), PROBLEM)
    assert (inside.answer, inside.well_formed) == ("B", True)


HEADINGS = [
    "Cue Encoding: x",
    "cue encoding - x",
    "CUE ENCODING x",
    "Cue Encoding\nx",
    "Cue Encoding\uff1a x",
    "Cue Encoding \u2013 x",
    "1. Cue Encoding: x",
    "1) Cue Encoding: x",
    "(1) Cue Encoding: x",
    "[1] Cue Encoding: x",
    "1 Cue Encoding: x",
    "1: Cue Encoding: x",
    "12.Cue Encoding: x",
    "Step 2: CUE ENCODING\nx",
    "step 2 - Cue Encoding: x",
    "Stage 2 - Cue Encoding: x",
    "STAGE 2: Cue Encoding: x",
    "Stage 1 \u2014 Cue Encoding: x",
    "**Step 1: Cue Encoding**\nx",
    "### Stage 1: Cue Encoding\nx",
    "### **Cue Encoding**\nx",
    "# Cue Encoding #\nx",
    "**Cue Encoding:** x",
    "**Cue Encoding**: x",
    "*Cue Encoding* - x",
    "- Cue Encoding \u2014 x",
    "* Cue Encoding: x",
    "\u25e6 Cue Encoding: x",
    "\u25cf Cue Encoding: x",
    "\u2022 Cue Encoding: x",
    "> Cue Encoding: x",
    "- **1. Cue Encoding**: x",
    "1. **Cue Encoding:** x",
    "## 1. Cue Encoding: x",
    "\u00a0Cue Encoding: x",
    "Cue\u00a0Encoding:\u2003x",
    "\u3000Step\u20091:\u202fCue\tEncoding\u00a0:x",
    "\u2028Cue Encoding:\u2028x",
]


@pytest.mark.parametrize("line", HEADINGS)
def test_headings(line):
    assert parse_response(f"<think>{line}</think>", PROBLEM).stages == [("Cue Encoding", "x")]
    response = parse_response(f"<think>first\r\n{line}\n\nGoal Clarification: y</think>", PROBLEM)
    assert (response.preamble, response.stages) == (
        "first",
        [("Cue Encoding", "x"), ("Goal Clarification", "y")],
    )


@pytest.mark.parametrize(
    "name",
    [
        "Cue Encod\u0131ng",
        "Cue Encod\u0130ng",
        "Re\u017fpon\u017fe Generation",
        "Cue  Encoding",
        "Cue Encodings",
        "CueEncoding",
        "Cue\nEncoding",
        "The Cue Encoding",
        "preCue Encoding",
        "second Cue Encoding",
        "Phase 1: Cue Encoding",
        "Steps: Cue Encoding",
        "x\u2028Cue Encoding",
    ],
)
def test_what_only_looks_like_a_heading(name):
    response = parse_response(f"<think>{name}: x</think>", PROBLEM)
    assert response.stages == [] and response.preamble == f"{name}: x"


def test_passages_lie_where_the_text_has_them():
    think = "a\u3000b\n**Cue Encoding:** \uff21 saw\nGoal Clarification: x"
    assert [(name, think[start:end]) for name, start, end in stage_spans(think)] == [
        ("", "a\u3000b\n"),
        ("Cue Encoding", "\uff21 saw\n"),
        ("Goal Clarification", "x"),
    ]
    assert stage_spans("no heading") == [("", 0, 10)] and stage_spans("") == [("", 0, 0)]


def test_stages_without_text_are_absent_and_repeated_ones_add_up():
    think = "first\nCue Encoding:\nGoal Clarification: g\nCue Encoding: a\nThe Cue Encoding: b"
    think += "\nResponse Generation:"
    response = parse_response(f"<think>{think}</think>", PROBLEM)
    assert response.preamble == "first"
    assert response.stages == [
        ("Cue Encoding", "a\nThe Cue Encoding: b"),
        ("Goal Clarification", "g"),
    ]


@pytest.mark.parametrize(
    "unit",
    [
        "#",
        "\n ",
        "- ",
        "step 1",
        "<think>",
        "</Answer>",
        "Cue Encoding",
        "Cue Encoding:\n",
        "Cue Encoding:x\n",
        "\u0301",
        "\x00",
        "1. ",
        "stage",
        "B",
        "B.",
        "(",
        "\u3000",
        "\uff22",
        "\n\u3000",
        "<think><Answer>",
        "</think></Answer>",
        "<Answer>B</Answer>",
    ],
)
def test_a_megabyte_of_anything_is_parsed_in_two_seconds(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    parse_response(f"<think>{text}</think><Answer>{text}</Answer>", PROBLEM)
    parse_response(text, PROBLEM)
    assert time.process_time() - started < 2


def test_messages_letter_the_options():
    system, user = build_messages(PROBLEM)
    assert all(stage in system["content"] for stage in STAGES)
    assert "Nothing but the answer block follows </think>" in system["content"]
    example = system["content"].split("\n\n")[-1]  # shown literally, and what the parser wants
    response = parse_response(example, PROBLEM)
    assert response.well_formed and [name for name, _ in response.stages] == list(STAGES)
    assert build_messages(PROBLEM, "Other words.")[0] == {
        "role": "system",
        "content": "Other words.",
    }
    assert user["content"].endswith(
        "Where will Anna look?\nA. in the box\nB. in the bag\nC. in the jar"
    )


def test_problems_refuse_what_cannot_be_asked():
    with pytest.raises(ValueError, match="2 to 26 options, got 1"):
        Problem("s", "q", ("a",), "A")
    with pytest.raises(ValueError, match="'C' has no option"):
        Problem("s", "q", ("a", "b"), "C")


@pytest.mark.parametrize(
    "extra, belief_of_anna, bens_model_of_anna",
    [
        ([], "box", "box"),  # unseen change
        (
            [Event("peek", "Anna")],
            "bag",
            "box",
        ),  # unnoticed: Ben still thinks that she thinks it is in the box
        ([Event("tell", "Ben", "jar", "Anna")], "jar", "jar"),  # a false report
        ([Event("tell", "Ben", "jar", "Anna"), Event("peek", "Anna")], "bag", "jar"),
        ([Event("return", "Anna"), Event("set", "Ben", "jar")], "jar", "jar"),
    ],
)
def test_beliefs_of_first_and_second_order(extra, belief_of_anna, bens_model_of_anna):
    world = World(["Anna", "Ben"])
    for event in [
        Event("set", "Ben", "box"),
        Event("leave", "Anna"),
        Event("set", "Ben", "bag"),
        *extra,
    ]:
        world.apply(event)
    assert believed(world.views["Anna"]) == belief_of_anna
    assert believed(world.models["Ben", "Anna"]) == bens_model_of_anna


# ------------------------------------------------------------------------------------------ stories


def present(events, person, index):
    moves = [e.kind for e in events[:index] if e.actor == person and e.kind in ("leave", "return")]
    return not moves or moves[-1] == "return"


def belief_by_hand(events, person, knower=None):
    """Look backwards for the last event that told `person` something.

    With `knower`, look among the events that the knower knows of.
    """
    for i in reversed(range(len(events))):
        e = events[i]
        if (
            e.kind == "set"
            and present(events, person, i)
            and (knower is None or present(events, knower, i))
        ):
            return e.value
        if e.kind == "peek" and e.actor == person and knower is None:
            return [past.value for past in events[:i] if past.kind == "set"][-1]
        if e.kind == "tell" and e.target == person and knower in (None, e.actor):
            return e.value
    return ""


def answer_by_hand(story):
    events, cast, ability = story.events, story.cast, story.problem.ability
    x, y, m = cast["x"], cast.get("y"), cast["m"]
    real = [e.value for e in events if e.kind == "set"][-1]
    knower = m if story.twist == "second order" else None
    if ability == "knowledge":
        know = [p for p in (x, y) if belief_by_hand(events, p, knower) == real]
        return {0: "neither of them", 2: "both of them"}.get(len(know)) or f"only {know[0]}"
    if ability == "non-literal communication":
        said = events[-1].value
        if belief_by_hand(events, x) == said:
            return "the truth" if said == real else "a mistake"
        return (
            "a joke"
            if belief_by_hand(events, y, knower=x) == belief_by_hand(events, x)
            else "a lie"
        )
    belief = belief_by_hand(events, x, knower)
    if ability == "emotion":
        return {"pleased": "happy", "scared": "scared", "angered": "angry", "bored": "bored"}[
            story.likes[belief]
        ]
    return {"belief": "in the ", "desire": "", "intention": "at the "}[ability] + belief


@pytest.mark.parametrize("split", ["train", "test", "shift"])
def test_every_answer_follows_from_the_events(split):
    for story in generate_stories(1200, seed=3, split=split):
        assert story.problem.options["ABCD".index(story.problem.answer)] == answer_by_hand(story), (
            story
        )


@pytest.mark.parametrize("split", ["train", "test", "shift"])
def test_gold_traces_are_well_formed_and_twins_differ_in_the_shortcut(split):
    stories = generate_stories(600, seed=4, split=split)
    assert {s.problem.ability for s in stories} == set(ABILITIES) and {
        s.twist for s in stories
    } == set(TWISTS)
    for hard, control in zip(stories[::2], stories[1::2]):
        assert (hard.problem.variant, control.problem.variant) == ("hard", "control")
        assert (
            hard.problem.id == control.problem.id
            and hard.problem.options == control.problem.options
        )
        assert hard.problem.story != control.problem.story
        assert hard.shortcut != hard.problem.answer and control.shortcut == control.problem.answer
        for story in (hard, control):
            response = parse_response(story.trace, story.problem)
            assert response.well_formed and response.answer == story.problem.answer
            assert [name for name, _ in response.stages] == list(STAGES)


def test_same_seed_same_stories_and_splits_share_none():
    assert generate_stories(50, seed=1) == generate_stories(90, seed=1)[:50]
    assert generate_problems(20, seed=1) != generate_problems(20, seed=2)
    train, test, shift = (
        {p.story for p in generate_problems(3000, seed=0, split=s)}
        for s in ("train", "test", "shift")
    )
    assert not train & test and not train & shift and not test & shift
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        generate_stories(2, seed=0, split="dev")


def test_shift_shares_no_name_noun_or_sentence_with_training():
    for family, values in SHIFT.values.items():
        assert not set(values) & set(MAIN.values[family])
    for part in ("names", "objects", "rooms"):
        assert not set(getattr(SHIFT, part)) & set(getattr(MAIN, part))
    sentences = [set(sum(lexicon.sentences.values(), [])) for lexicon in (MAIN, SHIFT)]
    assert not sentences[0] & sentences[1]
    for kind, by_twist in MAIN.scripts.items():
        trained = [str(pair) for pairs in by_twist.values() for pair in pairs]
        unseen = [str(pair) for pairs in SHIFT.scripts[kind].values() for pair in pairs]
        assert len(unseen) == len(TWISTS) and not set(trained) & set(unseen)


def surface_guesses(story):
    """Return the letters that rules without any thought would give.

    A rule that finds nothing gives no letter.
    """
    problem, text = story.problem, story.problem.story
    nouns = [option.removeprefix("in the ").removeprefix("at the ") for option in problem.options]
    first = [
        (text.find(noun), letter) for noun, letter in zip(nouns, problem.letters) if noun in text
    ]
    last = [
        (text.rfind(noun), letter) for noun, letter in zip(nouns, problem.letters) if noun in text
    ]
    count = [(text.count(noun), letter) for noun, letter in zip(nouns, problem.letters)]
    return {
        "longest option": max(
            problem.letters, key=lambda letter: len(problem.options["ABCD".index(letter)])
        ),
        "shortest option": min(
            problem.letters, key=lambda letter: len(problem.options["ABCD".index(letter)])
        ),
        "first mentioned": min(first)[1] if first else None,
        "second mentioned": sorted(first)[1][1] if len(first) > 1 else None,
        "last mentioned": max(last)[1] if last else None,
        "most often mentioned": max(count)[1],
        **{f"always {letter}": letter for letter in problem.letters},
        "what the reader knows": story.shortcut,
    }


@pytest.mark.parametrize("abilities", [ABILITIES, ("belief", "desire", "intention")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_no_surface_rule_solves_the_hard_stories(split, abilities):
    stories = [
        s
        for s in generate_stories(6000, seed=5, split=split)
        if s.problem.variant == "hard" and s.problem.ability in abilities
    ]
    for rule in surface_guesses(stories[0]):
        right = sum(surface_guesses(story)[rule] == story.problem.answer for story in stories)
        assert right / len(stories) < 0.4, (rule, right / len(stories))


# ---------------------------------------------------------------------------------- files, settings


def test_rows_of_every_kind_of_file(tmp_path):
    for name, text, rows in [
        ("x.jsonl", '\n{"a": 1}\r\n \n{"a": NaN, "b": "\u2028"}', [(2, 1), (4, "NaN")]),
        ("x.json", '[{"a": 1},\n{"a": 2}]', [(1, 1), (2, 2)]),
        ("x.json", '{"data": [{"a": 3}]}', [(1, 3)]),
        ("x.json", '{"a": 3}', []),
        ("x.json", "7", []),
        ("x.csv", 'a,b\n1,"two\nlines"\n3,4\n', [(3, "1"), (4, "3")]),
        ("x.CSV", "\ufeffa\n1\n", [(2, "1")]),
    ]:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8", newline="")
        found = [(number, row["a"]) for number, row in read_rows(file)]
        assert [(number, "NaN" if a != a else a) for number, a in found] == rows


def test_broken_files_are_named_with_the_line(tmp_path):
    for name, data, message in [
        ("x.jsonl", b'{"a": 1}\n{"a"\n', r"x.jsonl:2: not JSON: Expecting"),
        ("x.jsonl", b'{"a": 1}\n\n[1]\n', r"x.jsonl:3: expected a JSON object, got list"),
        ("x.jsonl", b"[" * 100_000, r"x.jsonl:1: not JSON: maximum recursion"),
        ("x.jsonl", b'{"a": ' + b"7" * 5000 + b"}", r"x.jsonl:1: not JSON: Exceeds the limit"),
        ("x.json", b"[\n{},\n7]", r"x.json:2: expected a JSON object, got int"),
        ("x.json", b"[{},\n\n{,", r"x.json:3: not JSON: Expecting"),
        ("x.csv", b"a,b\n1,2,3\n", r"x.csv:2: more cells than the 2 columns"),
        ("x.csv", b'a,b\n1,2\n3,"4', r"x.csv:3: broken row: unexpected end of data"),
        ("x.csv", b"a,b\n1,\xff\n", r"x.csv:2: not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            list(read_rows(tmp_path / name))
    with pytest.raises(
        ValueError,
        match="none.csv: No such file or directory; expected a text file",
    ):
        list(read_rows(tmp_path / "none.csv"))


@dataclass(frozen=True)
class Oven(Settings):
    trays: int = setting(2, "trays in it", low=1, high=6)
    heat: float = setting(180.0, "degrees", above=0)
    share: float = setting(0.5, "of 100% butter", low=0, high=1)
    fan_speed: str = setting("low", "how fast the fan turns", choices=("low", "high"))
    pizza: bool = setting(False, "bake a pizza")
    timer: float = setting(None, "minutes", low=0, kind=float)
    book: Path = setting(None, "recipes", kind=Path)
    eaters: list = setting(None, "those who eat", kind=str, nargs="+", metavar="NAME")
    note: str = setting("", "what to remember")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(trays=0), "--trays 0: expected a whole number, at least 1, at most 6"),
        (dict(trays=7), "--trays 7: expected a whole number, at least 1, at most 6"),
        (dict(trays=2.0), "--trays 2.0: expected a whole number, at least 1, at most 6"),
        (dict(trays=True), "--trays True: expected a whole number"),
        (dict(trays="2"), "--trays 2: expected a whole number"),
        (dict(trays=None), "--trays None: expected a whole number"),
        (dict(trays=float("nan")), "--trays nan: expected a whole number"),
        (dict(heat=0), "--heat 0: expected a finite number, above 0"),
        (dict(heat=float("nan")), "--heat nan: expected a finite number, above 0"),
        (dict(heat=float("inf")), "--heat inf: expected a finite number, above 0"),
        (dict(heat=None), "--heat None: expected a finite number, above 0"),
        (dict(share=-0.1), "--share -0.1: expected a finite number, at least 0, at most 1"),
        (dict(share=1.1), "--share 1.1: expected a finite number, at least 0, at most 1"),
        (dict(share=float("-inf")), "--share -inf: expected a finite number"),
        (dict(fan_speed="medium"), "--fan-speed medium: expected one of low, high"),
        (dict(fan_speed=None), "--fan-speed None: expected one of low, high"),
        (dict(pizza=1), "--pizza 1: expected bool"),
        (dict(timer=-1.0), "--timer -1.0: expected a finite number, at least 0"),
        (dict(timer="soon"), "--timer soon: expected a finite number, at least 0"),
        (dict(book="x"), "--book x: expected Path"),
        (dict(eaters=["Anna", 7]), "--eaters 7: expected str"),
        (dict(note=7), "--note 7: expected str"),
    ],
)
def test_every_bad_setting_names_its_flag(values, message):
    with pytest.raises(ValueError) as error:
        Oven(**values)
    assert str(error.value).startswith(message)


def test_good_settings_pass():
    for values in (
        dict(),
        dict(trays=1),
        dict(trays=6),
        dict(heat=1),
        dict(share=0),
        dict(share=1),
        dict(timer=3),
        dict(heat=10**400),
        dict(book=Path("x")),
        dict(eaters=["Anna", "Ben"]),
    ):
        assert all(getattr(Oven(**values), name) == value for name, value in values.items())


def test_flags_are_made_from_settings():
    parser = Parser()
    Oven.add_flags(parser.add_argument_group("oven"), Oven(), Oven(trays=4, timer=5.0, note="x"))
    for arguments, expected in [
        ([], Oven(trays=3)),
        (["--trays", "4", "--fan-speed", "high"], Oven(trays=4, fan_speed="high")),
        (
            ["--pizza", "--timer", "0", "--book", "a/b"],
            Oven(trays=3, pizza=True, timer=0.0, book=Path("a/b")),
        ),
        (["--no-pizza", "--note", ""], Oven(trays=3)),
        (["--eaters", "Anna", "Ben"], Oven(trays=3, eaters=["Anna", "Ben"])),
    ]:
        assert Oven(trays=3).updated(parser.parse_args(arguments)) == expected
    assert Oven(pizza=True).updated(parser.parse_args(["--no-pizza"])) == Oven()
    assert vars(parser.parse_args([])) == dict.fromkeys(
        ("trays", "heat", "share", "fan_speed", "pizza", "timer", "book", "eaters", "note")
    )
    for arguments, message in [
        (["--trays", "many"], "argument --trays: invalid int value: 'many'; see --help"),
        (["--fan-speed", "full"], "argument --fan-speed: invalid choice: 'full'"),
        (["--lid", "1"], "unrecognized arguments: --lid 1; see --help"),
    ]:
        with pytest.raises(ValueError) as error:
            parser.parse_args(arguments)
        assert str(error.value).startswith(message)
    with pytest.raises(ValueError, match="--trays 9: expected"):
        Oven().updated(parser.parse_args(["--trays", "9"]))
    words = " ".join(parser.format_help().split())
    for text in (
        "trays in it (2 | 4)",
        "degrees (180.0)",
        "of 100% butter (0.5)",
        "--timer TIMER minutes --book",  # what None means is for the text to say
        "--eaters NAME [NAME ...]",
        "what to remember (none | x)",
        "bake a pizza (False)",
    ):
        assert text in words
    single = argparse.ArgumentParser()
    Oven.add_flags(single)
    assert "trays in it (2)" in " ".join(single.format_help().split())


@pytest.mark.parametrize(
    "text, fault",
    [
        ("<think>x</think><Answer> B </Answer>", ""),
        ("The key is in the drawer.", "no think block"),
        ("x</think><Answer> B </Answer>", "no think block"),
        ("<THINK>x <Answer> B </Answer>", "unclosed think block"),
        ("<think> \n</think><Answer> B </Answer>", "empty think block"),
        ("<think>x</think> B", "no answer block"),
        ("<think>x</think><Answer> B", "no answer block"),
        ("<think>x</think><Answer>B</Answer><Answer>B</Answer>", "two answers"),
        ("<think>x</think><Answer> the truth </Answer>", "unreadable answer"),
        ("So: <think>x</think><Answer> B </Answer>", "text outside"),
        ("<think>x</think><Answer> B </Answer><|im_start|>", "text outside"),
        ("", "no think block"),
    ],
)
def test_why_a_response_is_not_well_formed(text, fault):
    response = parse_response(text, PROBLEM)
    assert (response.fault, response.well_formed) == (fault, not fault)
    assert fault in ("", *CAUSES[1:])
    # at the length limit, that is the reason
    assert response.cause(finished=False) == ("cut off" if fault else "")
    assert response.cause(finished=True) == fault


def test_instructions_from_a_file(tmp_path):
    file = tmp_path / "told.txt"
    file.write_text(" Be brief. \n")
    assert read_instructions(file) == "Be brief." and read_instructions(None) == INSTRUCTIONS
    file.write_bytes(b"\xef\xbb\xbfBe brief.")
    assert read_instructions(file) == "Be brief."
    file.write_bytes(b"ok\nna\xefve")
    with pytest.raises(ValueError, match="told.txt:2: not UTF-8"):
        read_instructions(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="--instructions .*told.txt: the file is empty"):
        read_instructions(file)
