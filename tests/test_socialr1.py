"""Parsing: every text has one defined outcome, in linear time. The simulator: beliefs follow what was perceived."""
import time

import pytest

from socialr1 import STAGES, Event, Problem, World, believed, build_messages, parse_response

PROBLEM = Problem("Anna left. Ben moved the key.", "Where will Anna look?", ("in the box", "in the bag", "in the jar"), "B")
GOOD = (
    "<think>\nCue Encoding: Anna saw the box.\nCue Interpretation: Anna thinks box.\nGoal Clarification: Anna wants it.\n"
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
        (GOOD.replace("Answer> B", "Answer> D"), None, False),  # three options only
        (GOOD.replace("Answer> B", "Answer> B."), None, False),
        (GOOD + GOOD, None, False),
        ("<Answer> B </Answer>" + GOOD.split("<Answer>")[0], "B", False),
        ("<think> </think><Answer> B </Answer>", "B", False),
        ("<think>x<Answer> B </Answer>", "B", False),
        ("<think>x</think></think><Answer> B </Answer>", "B", False),
        ("", None, False),
        ("B", None, False),
    ],
)
def test_answer_and_form(text, answer, well_formed):
    response = parse_response(text, PROBLEM)
    assert (response.answer, response.well_formed) == (answer, well_formed)


@pytest.mark.parametrize(
    "line", ["Cue Encoding: x", "cue encoding - x", "1. Cue Encoding: x", "Step 2: CUE ENCODING\nx", "### **Cue Encoding**\nx",
             "**Cue Encoding:** x", "- Cue Encoding — x", "(1) Cue Encoding: x"],
)  # fmt: skip
def test_headings(line):
    assert parse_response(f"<think>{line}</think>", PROBLEM).stages == [("Cue Encoding", "x")]


def test_stages_without_text_are_absent_and_repeated_ones_add_up():
    think = "first\nCue Encoding:\nGoal Clarification: g\nCue Encoding: a\nThe Cue Encoding: b\nResponse Generation:"
    response = parse_response(f"<think>{think}</think>", PROBLEM)
    assert response.preamble == "first"
    assert response.stages == [("Cue Encoding", "a\nThe Cue Encoding: b"), ("Goal Clarification", "g")]


@pytest.mark.parametrize("unit", ["#", "\n ", "- ", "step 1", "<think>", "</Answer>", "Cue Encoding", "Cue Encoding:\n", "\u0301", "\x00"])
def test_a_megabyte_of_anything_takes_under_a_second(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.perf_counter()
    parse_response(f"<think>{text}</think><Answer>{text}</Answer>", PROBLEM)
    assert time.perf_counter() - started < 1


def test_messages_letter_the_options():
    system, user = build_messages(PROBLEM)
    assert all(stage in system["content"] for stage in STAGES)
    assert user["content"].endswith("Where will Anna look?\nA. in the box\nB. in the bag\nC. in the jar")


def test_problems_refuse_what_cannot_be_asked():
    with pytest.raises(ValueError, match="2 to 26 options, got 1"):
        Problem("s", "q", ("a",), "A")
    with pytest.raises(ValueError, match="'C' has no option"):
        Problem("s", "q", ("a", "b"), "C")


@pytest.mark.parametrize(
    "extra, belief_of_anna, bens_model_of_anna",
    [
        ([], "box", "box"),  # unseen change
        ([Event("peek", "Anna")], "bag", "box"),  # unnoticed: Ben still thinks that she thinks it is in the box
        ([Event("tell", "Ben", "jar", "Anna")], "jar", "jar"),  # a false report
        ([Event("tell", "Ben", "jar", "Anna"), Event("peek", "Anna")], "bag", "jar"),
        ([Event("return", "Anna"), Event("set", "Ben", "jar")], "jar", "jar"),
    ],
)
def test_beliefs_of_first_and_second_order(extra, belief_of_anna, bens_model_of_anna):
    world = World(["Anna", "Ben"])
    for event in [Event("set", "Ben", "box"), Event("leave", "Anna"), Event("set", "Ben", "bag"), *extra]:
        world.apply(event)
    assert believed(world.views["Anna"]) == belief_of_anna
    assert believed(world.models["Ben", "Anna"]) == bens_model_of_anna
