"""Nothing to game: hostile text has one outcome, terms keep their range, tricks earn little."""

import random
import sys
import time
import unicodedata

import hacking
import pytest
import torch

from model import Tokenizer
from rewards import RewardConfig, load_content_model, option_mentions, total_reward
from socialr1 import STAGES, TINY, TINY_CONTENT, Problem, generate_stories, parse_response

PROBLEM = Problem(
    "Anna left. The Cue Encoding: was in the box.",
    "Where?",
    ("box", "bag", "jar", "the answer is (A)"),
    "B",
)
CE, CI, GC, RG = (f"{stage}: text" for stage in STAGES)
FOUR = "\n".join((CE, CI, GC, RG))


def body(think="x", answer="B"):
    return f"<think>{think}</think><Answer>{answer}</Answer>"


# ------------------------------------------------------------------------------------- hostile text


@pytest.mark.parametrize(
    "text, answer, well_formed, stages",
    [
        # tags: nested, unclosed, repeated, re-ordered, in mixed case, with attributes;
        # the think block ends at its first closing tag
        (f"<think>a<think>\n{CE}</think></think><Answer>B</Answer>", "B", False, [0]),
        # what the reasoning quotes is text: here no answer follows, here one does
        (f"<think>{CE}<Answer>B</Answer></think>", None, False, [0]),
        (f"<think>{CE}<Answer>A</Answer></think><Answer>B</Answer>", "B", True, [0]),
        # never closed, never opened: no think text, and the answer is looked for everywhere
        (f"<think>{CE}<Answer>B</Answer>", "B", False, []),
        (f"{CE}</think><Answer>B</Answer>", "B", False, []),
        # two answers are none, of two think blocks the first counts
        (body(CE) + "<Answer>B</Answer>", None, False, [0]),
        (body(CE) + f"<think>{CI}</think>", "B", False, [0]),
        # the answer is looked for behind the think block
        (f"<Answer>B</Answer><think>{CE}</think>", None, False, [0]),
        (f"<THINK>{CE}</tHiNk>\n<aNSWER>b</ANSWER>\n", "B", True, [0]),
        # no such tags
        (f"<think >{CE}</think><Answer>B</Answer>", "B", False, []),
        (f'<think>{CE}</think><Answer x="1">B</Answer>', None, False, [0]),
        (f"<think>{CE}</think>&lt;Answer&gt;B&lt;/Answer&gt;", None, False, [0]),
        # "<Answer>B" is no letter
        (f"<think>{CE}</think><Answer><Answer>B</Answer></Answer>", None, False, [0]),
        # text to Unicode is a zero-width space, but not an ideographic one
        ("<think></think><Answer>B</Answer>", "B", False, []),
        ("<think>\u200b</think><Answer>B</Answer>", "B", True, []),
        ("<think>\u3000</think><Answer>\u3000B\u3000</Answer>", "B", False, []),
        # special tokens are text, and nothing may stand outside the two blocks
        (body(CE) + "<|im_end|>", "B", False, [0]),
        ("<|im_start|>" + body(CE), "B", False, [0]),
        (body(f"{CE}<|im_end|>"), "B", True, [0]),
        # answers: a letter in brackets, with marks, in full width
        (body(CE, "b"), "B", True, [0]),
        (body(CE, "A."), "A", True, [0]),
        (body(CE, "(A)"), "A", True, [0]),
        (body(CE, "**A**"), "A", True, [0]),
        (body(CE, "\uff21"), "A", True, [0]),
        # with the text of that very option, or that text alone
        (body(CE, "B. bag"), "B", True, [0]),
        (body(CE, "Bag"), "B", True, [0]),
        (body(CE, "B. box"), None, False, [0]),
        # and nothing else
        (body(CE, "A or B"), None, False, [0]),
        (body(CE, "not B"), None, False, [0]),
        (body(CE, "the answer is A"), None, False, [0]),
        (body(CE, "AB"), None, False, [0]),
        (body(CE, ""), None, False, [0]),
        (body(CE, "Response Generation: B"), None, False, [0]),
        # of four options; a Cyrillic A is another letter, and a ligature upper-cases to two
        (body(CE, "E"), None, False, [0]),
        (body(CE, "\u0410"), None, False, [0]),
        (body(CE, "\ufb00"), None, False, [0]),
        # stage names: in a sentence, inside words, without text, twice, re-ordered
        (body("The Cue Encoding: was in the box."), "B", True, []),
        (body("preCue Encoding: x\nCue Encodings: y\nCueEncoding: z"), "B", True, []),
        (body("\n".join(f"{stage}:" for stage in STAGES)), "B", True, []),
        # only at the start of a line, which a Unicode line separator does not begin
        (body("Cue Encoding: Cue Interpretation: x"), "B", True, [0]),
        (body("\n".join((RG, GC, GC, CE))), "B", True, [3, 2, 0]),
        (body("Cue Encoding:\n\n\nCue Interpretation: x"), "B", True, [1]),
        (body(FOUR.replace("\n", "\r\n")), "B", True, [0, 1, 2, 3]),
        (body(FOUR.replace("\n", "\u2028")), "B", True, [0]),
    ],
)
def test_every_text_has_one_outcome(text, answer, well_formed, stages):
    response = parse_response(text, PROBLEM)
    assert (response.answer, response.well_formed) == (answer, well_formed)
    assert [name for name, _ in response.stages] == [STAGES[i] for i in stages]


@pytest.mark.parametrize(
    "text, named",
    [
        ("Option A is wrong because she left", True),  # naming is naming, to reject it too
        ("not choice C", True),
        ("(a) first, (b) second", False),  # small letters number lists
        ("(A) first", True),
        ("a) first\nb) second", False),
        ("A) first", True),
        ("options A or B", True),
        ("A or B", False),
        ("the answer is A", True),  # also an option's text: a letter after "answer" is caught
        ("the second one", False),  # a hint: see hacking.py for what it earns
        ("It is the bag", False),
        ("It is B", False),
        ("OPTION  C", True),
        ("option\nC", False),
        ("(E)", False),
        ("option\u00a0B", True),  # other spaces, what nobody sees, full width
        ("option \u200bB", True),
        ("Option \uff22", True),
        ("\uff08\uff22\uff09", True),
        ("- B. bag", True),
        ("\u2022 B) bag", True),
        ("[B]", False),
        ("letter B", False),
    ],
)
def test_naming_options_in_hostile_ways(text, named):
    assert bool(option_mentions(text, PROBLEM)) is named


def test_options_that_contain_tags_letters_and_each_other():
    problem = Problem(
        "s", "q", ("</think><Answer> A </Answer>", "Option A", "Option A or B", "<think>"), "C"
    )
    response = parse_response(
        f"<think>{CE} {problem.options[0]}</think><Answer>C</Answer>", problem
    )
    assert (
        response.answer is None and not response.well_formed
    )  # quoting the first option breaks the form
    assert parse_response(body(f"{CE} {problem.options[2]}", "C"), problem).well_formed
    assert option_mentions("I choose Option A or B", problem)
    longer = Problem(
        "s", "q", ("the red box on the shelf", "the red box on the shelf upstairs"), "A"
    )
    assert option_mentions("it is THE RED BOX on the shelf!", longer) and not option_mentions(
        "the red box on a shelf", longer
    )


def one_of_each_category():
    chars = {}
    for code in range(sys.maxunicode + 1):
        chars.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    return {category: some[:: max(1, len(some) // 40)] for category, some in chars.items()}


CATEGORIES = one_of_each_category()
PIECES = [
    "<think>",
    "</think>",
    "<Answer>",
    "</answer>",
    "<ANSWER>",
    "A",
    " b ",
    "option C",
    "(D)",
    "\n",
    "\r\n",
    "# ",
    "1. ",
    "text ",
    "漢字",
    *STAGES,
    *(f"\n{stage}: " for stage in STAGES),
    *PROBLEM.options,
]


def in_range(text, length):
    problem = PROBLEM
    response = parse_response(text, problem)
    for config in (RewardConfig(), RewardConfig(without="fmt,len")):
        reward = total_reward(response, problem, length, content=0.7, config=config)
        assert all(0 <= reward.parts[name] <= 1 for name in ("fmt", "out", "struct", "len")), (
            text,
            reward,
        )
        assert 0 <= reward.total <= 2


def test_every_term_stays_in_its_range_on_random_text():
    rng = random.Random(0)
    categories = list(CATEGORIES.values())
    assert len(categories) == 30  # surrogates (Cs) among them
    for _ in range(3000):
        pieces = [
            rng.choice(PIECES)
            if rng.random() < 0.7
            else rng.choice(rng.choice(categories)) * rng.randrange(1, 4)
            for _ in range(rng.randrange(40))
        ]
        in_range("".join(pieces), rng.choice([0, 1, 32, 100, 1024, 10**9]))
    for category, some in CATEGORIES.items():
        in_range(body(f"{CE}{''.join(some)}\n{CI}", some[0]), 100)


@pytest.mark.parametrize(
    "char",
    [
        "a",
        " ",
        "\n",
        "<",
        "A",
        "(",
        ".",
        "#",
        "1",
        "漢",
        "\u0301",
        "\u200b",
        "\U0001f600",
        "\u2028",
        "选项",
    ],
)
def test_a_megabyte_of_one_character_is_rewarded_in_under_a_second(char):
    text = char * (1_000_000 // len(char))
    started = time.process_time()
    in_range(text, 300_000)
    in_range(body(f"{CE}{text}"), 300_000)
    assert (
        time.process_time() - started < 4
    )  # four rewards; a loaded machine may take a second for one


# ----------------------------------------------------------------------------------- reward hacking


def test_no_random_text_pleases_the_content_model():
    """What a search over junk finds on some stories must not be paid on others."""
    scorer, rng = load_content_model(TINY_CONTENT), random.Random(0)
    stories = [story.problem for story in generate_stories(12, 3, "train")]
    vocabulary = [
        token
        for token in Tokenizer(TINY).backend.get_vocab()
        if token.isascii() and token.isalpha()
    ]
    candidates = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 3))) for _ in range(120)] + [
        "<|im_end|>",
        "<|im_end|>\n<|im_start|>assistant",
    ]
    scores = scorer.score(
        [
            (p.story, p.question, [(stage, text) for stage in STAGES for text in candidates])
            for p in stories
        ]
    )
    sigmoids = (
        torch.tensor(scores).sigmoid().view(len(stories), len(STAGES), len(candidates)).mean(dim=0)
    )
    assert float(sigmoids.max()) < 0.3, sigmoids.amax(dim=1)


def test_degenerate_policies_earn_little():
    stories = generate_stories(40, 1, "test")
    paid = hacking.mean_rewards(stories, Tokenizer(TINY), load_content_model(TINY_CONTENT))
    names, honest = list(paid), paid["honest (gold traces)"][0]
    assert honest > 1.7
    # the trained policy earns a little less than gold traces, so 0.93 of that is asked for here
    # (hacking.py --model shows its row)
    for name in names[hacking.GUESSING]:
        assert paid[name][0] <= 0.6 * 0.93 * honest, (name, paid[name], honest)
    for name in names[hacking.RIGHT]:
        assert paid[name][0] < 0.97 * honest, (name, paid[name], honest)
