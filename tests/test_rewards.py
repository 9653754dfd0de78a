"""Every term of the reward against values worked by hand."""

import itertools
import math
import time

import pytest

from eval import repetitions
from model import Completion, Tokenizer
from rewards import (
    TERMS,
    RewardConfig,
    curriculum,
    format_reward,
    length_reward,
    option_mentions,
    outcome_reward,
    parse_groups,
    order_fraction,
    structure_reward,
    total_reward,
)
from socialr1 import STAGES, TINY, Problem, build_messages, parse_response

PROBLEM = Problem(
    "Anna put the key in the box and left. Ben moved it to the bag. It was a very cold winter day.",
    "Where will Anna look?",
    ("in the box", "in the bag that Ben took home", "nowhere", "a very cold winter day"),
    "A",
)
CE, CI, GC, RG = (
    "Cue Encoding: Anna left.",
    "Cue Interpretation: Anna thinks box.",
    "Goal Clarification: the key.",
    "Response Generation: box, option A.",
)


def respond(*lines, answer="A"):
    return parse_response(
        "<think>\n" + "\n".join(lines) + f"\n</think>\n<Answer> {answer} </Answer>", PROBLEM
    )


@pytest.mark.parametrize(
    "text, named",
    [
        ("It is option B.", True),
        ("The answer is C", True),
        ("Answer: D", True),
        ("choice (A)", True),
        ("I say (B) here", True),
        ("A. in the box", True),
        ("so\n C) nowhere", True),
        ("选项B正确", True),
        ("答案是 B", True),
        ("（C）", True),
        ("option E", False),  # no such option
        ("option b", False),  # not a capital
        ("Anna has an option A-frame", True),
        ("He had no answer\nA man came", False),
        ("options Bag", False),
        ("A box.", False),
        ("I think B is right", False),
        ("optional A", False),
        (
            "it lies in the bag that ben took home now",
            True,
        ),  # a quotation of four words or more, in any case
        ("in the box", False),  # three words: stories name them
        ("a very cold winter day", False),  # stands in the story
        ("in the bag that Ben took", False),  # not all of it
        ("", False),
    ],
)
def test_naming_an_option(text, named):
    assert bool(option_mentions(text, PROBLEM)) is named


NINE = Problem("Anna left.", "Who?", tuple("abcdefghi"), "I")


@pytest.mark.parametrize(
    "text, named",
    [
        # before a mark, or at the end of a line or of the text, an I is the ninth letter
        ("The answer is I.", True),
        ("option I, since he left", True),
        ("Option I", True),
        ("choice I\nbecause", True),
        ("answer: **I**", True),
        ("the answer is (I)", True),
        ('option "I" it is', True),
        ("option 'I' it is", True),
        ("I choose option I - she left", True),
        ("选项I。", True),
        ("答案是 I", True),
        ("(I)", True),
        ("I. the ninth", True),
        ("Option \uff29\uff0c so", True),
        # else it is somebody who speaks
        ("The only answer I can give is that he left", False),
        ("the answer I gave", False),
        ("Options I see: two", False),
        ("the answer I'd give", False),
        ("the answer I\u2019d give", False),
        ("the answer I\u00b4d give", False),
        ("选项「I」", True),
        ("a choice I (the reader) make", False),
        ("I think so", False),
        ("the answer is It", False),
        ("the answer is II.", False),
        # the other letters need no mark
        ("The answer H can be", True),
        ("option A can be", True),
        ("the only answer I can give is option B", True),
    ],
)
def test_the_letter_i_names_an_option_before_a_mark_only(text, named):
    assert bool(option_mentions(text, NINE)) is named
    assert not option_mentions("The answer is I.", PROBLEM)  # four options


def test_a_quotation_counts_where_neither_story_nor_question_says_it():
    options = (
        "the old man by the river",
        "a boat of his own",
        "where did the dog go",
        "went out and the dog",
    )
    told = "The old man by the river had no boat. Anna went out"
    problem = Problem(told, "and the dog? Where did the dog go?", options, "B")
    quoted = (
        "The old man by the river; a boat of his own; where did the dog go; went out and the dog"
    )
    spans = option_mentions(quoted, problem)
    # the first stands in the story, the third in the question, the last in neither of the two
    assert [quoted[start:end] for start, end in spans] == [
        "a boat of his own",
        "went out and the dog",
    ]
    twice = "A boat of his own, A BOAT of\u200b his\u3000own!"
    spans = option_mentions(twice, problem)
    assert [twice[start:end] for start, end in spans] == [
        "A boat of his own",
        "A BOAT of\u200b his\u3000own",
    ]
    chinese = Problem("安娜走了", "谁", ("在红色的盒子里", "在包里"), "A")
    assert option_mentions("它在红色的盒子里面", chinese)
    assert not option_mentions("它在包里", chinese)


def test_mentions_are_places_of_the_text_as_it_stands():
    text = "so \u200boption\u200b B, then (\uff23)"
    assert [text[start:end] for start, end in option_mentions(text, PROBLEM)] == [
        "option\u200b B",
        "(\uff23)",
    ]


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
        (
            ("It is option A.", CE, CI, GC, RG),
            0.75,
        ),  # the text before the first heading is a passage too
        (
            (RG, CE + " option A", CI, GC),
            0.75 * 2 / 3,
        ),  # wherever it stands: order 3/4, independence 2/3
        ((CE, "Cue Interpretation:", GC, RG), 0.75),  # a heading without text is no stage
    ],
)
def test_structure(lines, value):
    assert structure_reward(respond(*lines), PROBLEM) == pytest.approx(value, abs=1e-12)


def test_stage_order():
    assert order_fraction(respond(CE, GC, CI, RG)) == 0.75
    assert order_fraction(respond("nothing")) == 0.0


@pytest.mark.parametrize(
    "length, value",
    [
        (32, 0.5),
        (1024, 0.5),
        (528, 1.0),
        (0, 0.166185),
        (1, 0.173288),
        (80, 0.918291),
        (1200, 0.000140),
        (10**9, 0.0),
    ],
)
def test_length_window(length, value):
    # By hand, k = 50, scale = 50 / 992, for instance at L = 0:
    # s(-32 * 50 / 992) = s(-1.612903) = 1 / (1 + 5.0174) = 0.166185
    assert length_reward(respond("one two three"), length) == pytest.approx(value, abs=1e-6)


def test_repetition_is_distinct_over_all_4_grams():
    # "a b a b a b": 4-grams abab, baba, abab: 2 of 3.
    assert length_reward(respond("a b a b a b"), 528) == pytest.approx(2 / 3, abs=1e-9)
    assert length_reward(respond("a a a"), 528) == pytest.approx(1.0, abs=1e-9)
    text = "One two three four! ONE two three four"
    spans = repetitions(text)
    assert [text[start:end] for start, end in spans] == [
        "ONE two three four"
    ]  # 1 of 5 occurred before
    assert length_reward(respond(text), 528) == pytest.approx(4 / 5, abs=1e-9)
    with pytest.raises(ValueError, match="min_length 10 must be below max_length 10"):
        length_reward(respond("a"), 5, min_length=10, max_length=10)


def test_curriculum():
    config = RewardConfig(tau_start=0.2, tau_from=0.25, tau_to=0.75)
    assert [curriculum(step, 9, config) for step in (0, 2, 4, 6, 8)] == pytest.approx(
        [0.2, 0.2, 0.6, 1.0, 1.0]
    )
    assert curriculum(0, 1, config) == 1.0
    with pytest.raises(ValueError, match="--tau-from 0.9 comes after --tau-to 0.5"):
        RewardConfig(tau_from=0.9, tau_to=0.5)


def test_the_total_is_the_paper_s_form():
    response = respond(CE, CI, GC)  # coverage 3/4
    reward = total_reward(response, PROBLEM, length=528, tau=0.5)
    assert reward.total == pytest.approx(1.0 + 0.5 * 0.5 * 0.75, abs=1e-9)
    expected = {"fmt": 1, "out": 1, "struct": 0.75, "content": None, "len": 1, "tau": 0.5}
    assert {name: reward.parts[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    scored = total_reward(response, PROBLEM, length=528, tau=0.5, content=0.25)
    assert scored.total == pytest.approx(1.0 + 0.5 * (0.5 * 0.75 + 0.5 * 0.25), abs=1e-9)
    assert (
        total_reward(respond(CE, answer="B"), PROBLEM, 528, config=RewardConfig(w_struct=0.0)).total
        == 0.0
    )
    assert (
        total_reward(respond(CE, answer="E"), PROBLEM, 528).total == 0.0
    )  # not well-formed: nothing counts
    assert (
        format_reward(respond(CE, answer="E"), PROBLEM),
        outcome_reward(respond(CE, answer="E"), PROBLEM),
    ) == (0.0, 0.0)


def test_each_term_goes_off_by_one_flag():
    # coverage 3/4; the length window is 0.5 at 32 tokens
    response = respond(CE, CI, GC)
    terms = dict(out=1.0, struct=0.5 * 0.75, content=0.5 * 0.25)

    def total(without, response=response, **weights):
        return total_reward(
            response, PROBLEM, 32, content=0.25, config=RewardConfig(without=without, **weights)
        ).total

    assert total("") == pytest.approx(0.5 * sum(terms.values()), abs=1e-6)
    for name, value in terms.items():
        assert total(name) == pytest.approx(0.5 * (sum(terms.values()) - value), abs=1e-6)
        assert total("", **{f"w_{name}": 0.0}) == pytest.approx(total(name), abs=1e-12)
    assert total("len") == pytest.approx(sum(terms.values()), abs=1e-6)
    assert total("struct,content,len") == 1.0  # the paper's "only R_out"
    broken = parse_response("<think>\n" + CE + "</think>\n<Answer> A </Answer>.", PROBLEM)
    assert total("", broken) == 0.0 and total("fmt,len", broken) == pytest.approx(
        1 + 0.5 * 0.25 + 0.5 * 0.25, abs=1e-9
    )
    without_content = RewardConfig(without="content")
    reward = total_reward(response, PROBLEM, 32, content=0.25, config=without_content)
    assert reward.parts["content"] == 0.25  # what was computed is logged, whether it counts or not
    with pytest.raises(
        ValueError, match="--without length: expected any of fmt,out,struct,content,len"
    ):
        RewardConfig(without="length")


def test_each_term_and_every_set_of_terms_can_be_left_out():
    """By hand, at tau = 0.5: fmt 1, out 1, struct 3/4, content 1/4, len 0.5 (its window at 32)."""
    response = respond(CE, CI, GC)
    struct, content = 0.5 * 0.5 * 0.75, 0.5 * 0.5 * 0.25
    for count in range(len(TERMS) + 1):
        for off in itertools.combinations(TERMS, count):
            config = RewardConfig(without=" , ".join(off))
            assert config.off == set(off)
            reward = total_reward(response, PROBLEM, 32, tau=0.5, content=0.25, config=config)
            merit = ("out" not in off) * 1.0 + ("struct" not in off) * struct
            merit += ("content" not in off) * content
            expected = merit if "len" in off else 0.5 * merit
            assert reward.total == pytest.approx(expected, abs=1e-9), off
            assert list(reward.parts) == [*TERMS, "tau"]
            assert reward.parts["content"] == 0.25


def test_a_factor_of_0_counts_unless_it_is_off():
    broken = respond(CE, CI, GC, answer="E")  # no such option: R_fmt and R_out are 0
    for without, value in {"": 0.0, "fmt": 0.1875, "fmt,len": 0.375, "len": 0.0}.items():
        config = RewardConfig(without=without)
        assert total_reward(broken, PROBLEM, 32, config=config).total == pytest.approx(value)


def test_a_weight_of_0_is_a_term_that_is_off():
    assert RewardConfig().off == set()
    config = RewardConfig(w_out=0.0, w_content=0.0, without="len")
    assert config.off == {"out", "content", "len"}
    structured = total_reward(respond(CE), PROBLEM, 32, content=None, config=config)
    reward = total_reward(respond(CE), PROBLEM, 32, content=0.5, config=config)
    assert reward.total == structured.total and reward.parts["content"] == 0.5


@pytest.mark.parametrize(
    "setting, value",
    [
        ("w_out", -1.0),
        ("w_struct", math.nan),
        ("w_content", math.inf),
        ("sharpness", 0.0),
        ("tau_start", 1.5),
        ("min_length", 0),
        ("tau_to", -0.1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_flag(setting, value):
    with pytest.raises(ValueError, match=f"--{setting.replace('_', '-')} "):
        RewardConfig(**{setting: value})
    with pytest.raises(ValueError, match="--min-length 160 >= --max-length 160"):
        RewardConfig(min_length=160, max_length=160)


def test_groups_are_parsed_as_their_prompt_ends():
    tokenizer = Tokenizer(TINY)
    text = "<think>\n" + "\n".join((CE, CI)) + "\n</think>\n<Answer> A </Answer>"
    completion = Completion(tokenizer.encode(text) + [tokenizer.stop_ids[0]], [], True)
    prompt = tokenizer.chat(build_messages(PROBLEM))
    groups = parse_groups([PROBLEM] * 2, [prompt] * 2, [[completion] * 2, [completion]], tokenizer)
    assert [len(group) for group in groups] == [2, 1]
    assert groups[0][0].answer == "A" and groups[0][0].well_formed
    assert [name for name, _ in groups[1][0].stages] == list(STAGES[:2])


@pytest.mark.parametrize(
    "unit",
    [
        "A. ",
        "(A) ",
        "option ",
        "in the bag that ",
        "a",
        "答案",
        "\n",
        "Cue Encoding: x\n",
        "option\n",
        "the answer I ",
        "in the bag ",
        "\u200b",
    ],
)
def test_a_megabyte_of_anything_has_a_reward_in_under_a_second(unit):
    response = respond(unit * (1_000_000 // len(unit)))
    started = time.process_time()
    assert 0 <= total_reward(response, PROBLEM, length=300_000).total <= 2
    assert (
        time.process_time() - started < 2
    )  # the limit is one second; a loaded machine gets another
