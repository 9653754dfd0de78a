"""Every term against values worked by hand from METHOD.md section 3."""
import time

import pytest

from rewards import (
    RewardConfig,
    curriculum,
    format_reward,
    length_reward,
    names_option,
    outcome_reward,
    stage_order,
    structure_reward,
    total_reward,
)
from socialr1 import Problem, parse_response

PROBLEM = Problem(
    "Anna put the key in the box and left. Ben moved it to the bag. It was a very cold winter day.",
    "Where will Anna look?",
    ("in the box", "in the bag that Ben took home", "nowhere", "a very cold winter day"),
    "A",
)
CE, CI, GC, RG = "Cue Encoding: Anna left.", "Cue Interpretation: Anna thinks box.", "Goal Clarification: the key.", "Response Generation: box, option A."


def respond(*lines, answer="A"):
    return parse_response("<think>\n" + "\n".join(lines) + f"\n</think>\n<Answer> {answer} </Answer>", PROBLEM)


@pytest.mark.parametrize(
    "text, named",
    [
        ("It is option B.", True), ("The answer is C", True), ("Answer: D", True), ("choice (A)", True), ("I say (B) here", True),
        ("A. in the box", True), ("so\n C) nowhere", True), ("选项B正确", True), ("答案是 B", True), ("（C）", True),
        ("option E", False),  # no such option
        ("option b", False),  # not a capital
        ("Anna has an option A-frame", True),
        ("He had no answer\nA man came", False),
        ("options Bag", False), ("A box.", False), ("I think B is right", False), ("optional A", False),
        ("it lies in the bag that ben took home now", True),  # a quotation of four words or more, in any case
        ("in the box", False),  # three words: stories name them
        ("a very cold winter day", False),  # stands in the story
        ("in the bag that Ben took", False),  # not all of it
        ("", False),
    ],
)  # fmt: skip
def test_naming_an_option(text, named):
    assert names_option(text, PROBLEM) is named


@pytest.mark.parametrize(
    "lines, value",
    [
        ((CE, CI, GC, RG), 1.0),
        ((), 0.0),
        (("no heading at all",), 0.0),
        ((CE, CI, GC), 0.75),
        ((CE, RG), 0.5),
        ((RG,), 0.25),  # nothing stands before the answer stage: independence 1
        ((CI, CE, GC, RG), 0.75),  # longest increasing run 3 of 4
        ((RG, GC, CI, CE), 0.25),
        ((CE, CI + " So option B.", GC, RG), 2 / 3),  # one of three passages names an option
        (("It is option A.", CE, CI, GC, RG), 0.75),  # the text before the first heading is a passage too
        ((RG, CE + " option A", CI, GC), 0.75 * 2 / 3),  # wherever it stands: order 3/4, independence 2/3
        ((CE, "Cue Interpretation:", GC, RG), 0.75),  # a heading without text is no stage
    ],
)
def test_structure(lines, value):
    assert structure_reward(respond(*lines), PROBLEM) == pytest.approx(value, abs=1e-12)


def test_stage_order():
    assert stage_order(respond(CE, GC, CI, RG)) == 0.75
    assert stage_order(respond("nothing")) == 0.0


@pytest.mark.parametrize(
    "length, value",
    [(32, 0.5), (1024, 0.5), (528, 1.0), (0, 0.166185), (1, 0.173288), (80, 0.918291), (1200, 0.000140), (10**9, 0.0)],
)
def test_length_window(length, value):
    # By hand, k = 50, scale = 50 / 992: e.g. L = 0: s(-32 * 50 / 992) = s(-1.612903) = 1 / (1 + 5.0174) = 0.166185.
    assert length_reward(respond("one two three"), length) == pytest.approx(value, abs=1e-6)


def test_repetition_is_distinct_over_all_4_grams():
    # "a b a b a b": 4-grams abab, baba, abab: 2 of 3.
    assert length_reward(respond("a b a b a b"), 528) == pytest.approx(2 / 3, abs=1e-9)
    assert length_reward(respond("a a a"), 528) == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(ValueError, match="min_length 10 must be below max_length 10"):
        length_reward(respond("a"), 5, min_length=10, max_length=10)


def test_curriculum():
    config = RewardConfig(tau_start=0.2, tau_from=0.25, tau_to=0.75)
    assert [curriculum(step, 9, config) for step in (0, 2, 4, 6, 8)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    assert curriculum(0, 1, config) == 1.0
    with pytest.raises(ValueError, match="--tau-start, --tau-from and --tau-to"):
        RewardConfig(tau_from=0.9, tau_to=0.5)


def test_the_total_is_the_paper_s_form():
    response = respond(CE, CI, GC)  # coverage 3/4
    reward = total_reward(response, PROBLEM, length=528, tau=0.5)
    assert reward.total == pytest.approx(1.0 + 0.5 * 0.5 * 0.75, abs=1e-9)
    assert reward.parts == pytest.approx({"fmt": 1, "out": 1, "struct": 0.75, "content": None, "len": 1, "tau": 0.5}, abs=1e-9)
    scored = total_reward(response, PROBLEM, length=528, tau=0.5, content=lambda *_: 0.25)
    assert scored.total == pytest.approx(1.0 + 0.5 * (0.5 * 0.75 + 0.5 * 0.25), abs=1e-9)
    assert total_reward(respond(CE, answer="B"), PROBLEM, 528, config=RewardConfig(w_struct=0.0)).total == 0.0
    assert total_reward(respond(CE, answer="E"), PROBLEM, 528).total == 0.0  # not well-formed: nothing counts
    assert (format_reward(respond(CE, answer="E"), PROBLEM), outcome_reward(respond(CE, answer="E"), PROBLEM)) == (0.0, 0.0)


def test_each_term_goes_off_by_one_flag():
    response = respond(CE, CI, GC)  # coverage 3/4; "a b c d" said twice would show in R_len, so take its window: 0.5 at 32 tokens
    terms = dict(out=1.0, struct=0.5 * 0.75, content=0.5 * 0.25)

    def total(without, response=response, **weights):
        return total_reward(response, PROBLEM, 32, content=0.25, config=RewardConfig(without=without, **weights)).total

    assert total("") == pytest.approx(0.5 * sum(terms.values()), abs=1e-6)
    for name, value in terms.items():
        assert total(name) == pytest.approx(0.5 * (sum(terms.values()) - value), abs=1e-6)
        assert total("", **{f"w_{name}": 0.0}) == pytest.approx(total(name), abs=1e-12)
    assert total("len") == pytest.approx(sum(terms.values()), abs=1e-6)
    assert total("struct,content,len") == 1.0  # the paper's "only R_out"
    broken = parse_response("<think>\n" + CE + "</think>\n<Answer> A </Answer>.", PROBLEM)
    assert total("", broken) == 0.0 and total("fmt,len", broken) == pytest.approx(1 + 0.5 * 0.25 + 0.5 * 0.25, abs=1e-9)
    assert total_reward(response, PROBLEM, 32, content=0.25, config=RewardConfig(without="content")).parts["content"] is None
    with pytest.raises(ValueError, match="--without length: expected any of fmt,out,struct,content,len"):
        RewardConfig(without="length")


def test_weights_follow_the_curriculum():
    config = RewardConfig(w_struct=0.4, w_content=0.6)
    assert config.weights(0.5, content=True) == {"out": 1.0, "struct": 0.2, "content": 0.3}
    assert config.weights(0.5, content=False) == {"out": 1.0, "struct": 0.2, "content": 0.0}


@pytest.mark.parametrize("unit", ["A. ", "(A) ", "option ", "in the bag that ", "a", "答案", "\n", "Cue Encoding: x\n", "option\n"])
def test_a_megabyte_of_anything_has_a_reward_in_under_a_second(unit):
    response = respond(unit * (1_000_000 // len(unit)))
    started = time.process_time()
    assert 0 <= total_reward(response, PROBLEM, length=300_000).total <= 2
    assert time.process_time() - started < 2  # the limit is one second; a loaded machine gets another
