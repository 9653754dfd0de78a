"""Parsing: every text has one defined outcome, in linear time. The simulator: beliefs follow what was perceived."""
import time

import pytest

from socialr1 import (
    ABILITIES,
    MAIN,
    SHIFT,
    STAGES,
    TWISTS,
    Event,
    Problem,
    World,
    believed,
    build_messages,
    generate_problems,
    generate_stories,
    parse_response,
)

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


@pytest.mark.parametrize("name", ["Cue Encod\u0131ng", "Cue Encod\u0130ng", "Re\u017fpon\u017fe Generation", "Cue  Encoding", "Cue Encodings"])
def test_what_only_looks_like_a_heading(name):
    response = parse_response(f"<think>{name}: x</think>", PROBLEM)
    assert response.stages == [] and response.preamble == f"{name}: x"


def test_stages_without_text_are_absent_and_repeated_ones_add_up():
    think = "first\nCue Encoding:\nGoal Clarification: g\nCue Encoding: a\nThe Cue Encoding: b\nResponse Generation:"
    response = parse_response(f"<think>{think}</think>", PROBLEM)
    assert response.preamble == "first"
    assert response.stages == [("Cue Encoding", "a\nThe Cue Encoding: b"), ("Goal Clarification", "g")]


@pytest.mark.parametrize("unit", ["#", "\n ", "- ", "step 1", "<think>", "</Answer>", "Cue Encoding", "Cue Encoding:\n", "\u0301", "\x00"])
def test_a_megabyte_of_anything_takes_under_a_second(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    parse_response(f"<think>{text}</think><Answer>{text}</Answer>", PROBLEM)
    assert time.process_time() - started < 1


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


# ------------------------------------------------------------------------------------------------------------- stories


def present(events, person, index):
    moves = [e.kind for e in events[:index] if e.actor == person and e.kind in ("leave", "return")]
    return not moves or moves[-1] == "return"


def belief_by_hand(events, person, knower=None):
    """Looks backwards for the last event that told `person` something; with `knower`, among those that the knower knows of."""
    for i in reversed(range(len(events))):
        e = events[i]
        if e.kind == "set" and present(events, person, i) and (knower is None or present(events, knower, i)):
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
        return "a joke" if belief_by_hand(events, y, knower=x) == belief_by_hand(events, x) else "a lie"
    belief = belief_by_hand(events, x, knower)
    if ability == "emotion":
        return {"pleased": "happy", "scared": "scared", "angered": "angry", "bored": "bored"}[story.likes[belief]]
    return {"belief": "in the ", "desire": "", "intention": "at the "}[ability] + belief


@pytest.mark.parametrize("split", ["train", "test", "shift"])
def test_every_answer_follows_from_the_events(split):
    for story in generate_stories(1200, seed=3, split=split):
        assert story.problem.options["ABCD".index(story.problem.answer)] == answer_by_hand(story), story


@pytest.mark.parametrize("split", ["train", "test", "shift"])
def test_gold_traces_are_well_formed_and_twins_differ_in_the_shortcut(split):
    stories = generate_stories(600, seed=4, split=split)
    assert {s.problem.ability for s in stories} == set(ABILITIES) and {s.twist for s in stories} == set(TWISTS)
    for hard, control in zip(stories[::2], stories[1::2]):
        assert (hard.problem.variant, control.problem.variant) == ("hard", "control")
        assert hard.problem.id == control.problem.id and hard.problem.options == control.problem.options
        assert hard.problem.story != control.problem.story
        assert hard.shortcut != hard.problem.answer and control.shortcut == control.problem.answer
        for story in (hard, control):
            response = parse_response(story.trace, story.problem)
            assert response.well_formed and response.answer == story.problem.answer
            assert [name for name, _ in response.stages] == list(STAGES)


def test_same_seed_same_stories_and_splits_share_none():
    assert generate_stories(50, seed=1) == generate_stories(90, seed=1)[:50]
    assert generate_problems(20, seed=1) != generate_problems(20, seed=2)
    train, test, shift = ({p.story for p in generate_problems(3000, seed=0, split=s)} for s in ("train", "test", "shift"))
    assert not train & test and not train & shift and not test & shift
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        generate_stories(2, seed=0, split="dev")


def test_shift_shares_no_name_noun_or_sentence_with_training():
    for family, values in SHIFT.values.items():
        assert not set(values) & set(MAIN.values[family])
    for part in ("names", "objects", "rooms"):
        assert not set(getattr(SHIFT, part)) & set(getattr(MAIN, part))
    sentences = [set("|".join(lexicon.sentences.values()).split("|")) for lexicon in (MAIN, SHIFT)]
    assert not sentences[0] & sentences[1]
    for trained, unseen in zip(MAIN.scripts, SHIFT.scripts):
        assert not set(sum(trained.values(), ())) & set(sum(unseen.values(), ()))


def surface_guesses(story):
    """Letters that rules without any thought would give; a rule that finds nothing gives no letter."""
    problem, text = story.problem, story.problem.story
    nouns = [option.removeprefix("in the ").removeprefix("at the ") for option in problem.options]
    first = [(text.find(noun), letter) for noun, letter in zip(nouns, problem.letters) if noun in text]
    last = [(text.rfind(noun), letter) for noun, letter in zip(nouns, problem.letters) if noun in text]
    count = [(text.count(noun), letter) for noun, letter in zip(nouns, problem.letters)]
    return {
        "longest option": max(problem.letters, key=lambda letter: len(problem.options["ABCD".index(letter)])),
        "shortest option": min(problem.letters, key=lambda letter: len(problem.options["ABCD".index(letter)])),
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
    stories = [s for s in generate_stories(6000, seed=5, split=split) if s.problem.variant == "hard" and s.problem.ability in abilities]
    for rule in surface_guesses(stories[0]):
        right = sum(surface_guesses(story)[rule] == story.problem.answer for story in stories)
        assert right / len(stories) < 0.4, (rule, right / len(stories))
