"""Make pairs of segments for the content model from generated stories, whose facts are known [O].

    python assets/make_pairs.py --out runs/pairs
    python rewards.py --pairs runs/pairs/train.jsonl --held-out runs/pairs/held_out.jsonl

The first command writes 60,000 pairs of training stories and 1,998 of test stories; the second
trains a content model on the former and examines it on the latter. assets/content learned from
these pairs.

A pair is a true segment, from the trace that the simulator writes, and a false one: the same with
one fact corrupted. Each kind of corruption occurs in both directions (an unseen event reported as
seen, a seen one as missed; reality instead of the belief, an outdated belief instead of reality;
two people exchanged), so that the words of a segment do not tell true from false: one has to read
the story, or, where the person is wrong, at least the question. The last kind is no corruption but
nonsense, fragments and segments of other stories. Without it such texts, which no pair would ever
mention, could have any score.

    python assets/make_pairs.py --out runs/pairs --from-rollouts POLICY

makes the pairs from trajectories of a policy, as the paper does, with the simulator as the judge.
"""

import itertools
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Tokenizer, Transformer, generate, load_model  # noqa: E402
from rewards import Pair, hold_out, parse_groups, words  # noqa: E402
from socialr1 import MAIN, SHIFT, STAGES, WORDS, Parser, Problem, Response  # noqa: E402
from socialr1 import Story, View, believed, build_messages, exit_on_error  # noqa: E402
from socialr1 import generate_stories, gold_stages, replay, write_text  # noqa: E402

KINDS = (
    "wrong person",
    "unseen event treated as seen",
    "reality reported as belief",
    "goal of somebody else",
    "invented cue",
    "off topic",
)

# ------------------------------------------------------------------------- pairs of stories


def story_pairs(n: int, seed: int, split: str = "train") -> list[Pair]:
    """Make `n` pairs, or up to 5 less, so that all kinds are equally frequent.

    Hard stories and their control twins are used alike. Same seed, same pairs; a shorter list is
    the beginning of a longer one.
    """
    rng = random.Random(f"pairs {split} {seed}")
    wanted = n // len(KINDS)
    by_kind: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
    for part in itertools.count():
        stories = generate_stories(240, seed=100_000 * (seed + 1) + part, split=split)
        for i, story in enumerate(stories):
            twin = stories[i ^ 1]
            gold, problem = gold_stages(story), story.problem
            for kind, texts in corruptions(story, twin, rng).items():
                if texts:
                    stage, text = rng.choice(texts)
                    pair = (problem.story, problem.question, STAGES[stage], gold[stage], text, kind)
                    by_kind[kind].append(Pair(*pair))
        if all(len(pairs) >= wanted for pairs in by_kind.values()):
            in_turn = itertools.chain(*zip(*by_kind.values()))
            return list(itertools.islice(in_turn, wanted * len(KINDS)))


def corruptions(story: Story, twin: Story, rng: random.Random) -> dict[str, list[tuple[int, str]]]:
    """Corrupt a story's four true segments -> by kind: (number of the stage, false text).

    The twin is the same story with one event moved, so its segments hold the one wrong cue, belief
    or conclusion. Exchanging two people, or naming a thing that the story does not name, gives the
    others. What would be true all the same is left out.
    """
    gold, gold_of_twin = gold_stages(story), gold_stages(twin)
    cast, ability = story.cast, story.problem.ability
    x, other = cast["x"], cast.get("y") or cast["m"]
    family = WORDS[ability]["family"]
    lexicon = SHIFT if story.problem.source.endswith("shift") else MAIN
    things = lexicon.values[family]
    found: dict[str, list[tuple[int, str]]] = {kind: [] for kind in KINDS}

    found["unseen event treated as seen"].append((0, gold_of_twin[0]))
    for i in (1, 2, 3):
        # Both feelings about both presents are facts of the story.
        if (i, ability) != (2, "emotion"):
            found["reality reported as belief"].append((i, gold_of_twin[i]))

    views_of_x, views_of_other = views_of_two(story, other)
    beliefs_of_x = [believed(view) for view in views_of_x]
    beliefs_of_other = [believed(view) for view in views_of_other]
    exchanged = [exchange(text, x, other) for text in gold]
    if views_of_x != views_of_other:
        found["wrong person"].append((0, exchanged[0]))
    # With a wish or a plan, the exchange also changes whose wish or plan it is.
    if beliefs_of_x != beliefs_of_other or family in ("wish", "plan"):
        found["wrong person"].append((1, exchanged[1]))
        # M is where M plans to be, whoever believes it.
        if ability != "intention" or beliefs_of_x != [replay(story).value]:
            found["wrong person"].append((3, exchanged[3]))

    if ability == "intention":  # to meet is mutual, so only a stranger's goal is false
        absent = [name for name in lexicon.names if name not in story.problem.story]
        owner = rng.choice(absent)
    elif ability == "knowledge":
        owner = cast["m"]
    else:
        owner = other
    found["goal of somebody else"].append((2, exchange(gold[2], x, owner)))

    for i, text in enumerate(gold):
        named = [match for match in re.finditer(r"\w+", text) if match[0] in things]
        if named:
            match = rng.choice(named)
            absent = rng.choice([thing for thing in things if thing not in story.problem.story])
            invented = text[: match.start()] + absent + text[match.end() :]
            found["invented cue"].append((i, invented))
        found["off topic"].append((i, nonsense(text, story, rng)))
    for kind, texts in found.items():
        found[kind] = [(i, text) for i, text in texts if text != gold[i]]
    return found


def views_of_two(story: Story, other: str) -> tuple[list[View], list[View]]:
    """Return what X and the other person perceived, at the level of minds of the trace."""
    world, x, m = replay(story), story.cast["x"], story.cast["m"]
    if story.problem.ability == "non-literal communication":
        of_x = [world.views[x], world.models[x, other]]
        return of_x, [world.views[other], world.models[other, x]]
    if story.twist == "second order":
        of_other = world.models[x, m] if other == m else world.models[m, other]
        return [world.models[m, x]], [of_other]
    return [world.views[x]], [world.views[other]]


def exchange(text: str, a: str, b: str) -> str:
    """Put the names a and b in each other's place."""
    return re.sub(rf"\b({a}|{b})\b", lambda match: b if match[0] == a else a, text)


CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;!?'-<>|/0123456789"
PLACES = ("first", "second", "third", "fourth", "last")
HINTS = (
    "It is {letter}.",
    "{letter} is right.",
    "So {letter}.",
    "It is the {place} one.",
    "The {place} one is right.",
    "I say {letter}.",
)


def nonsense(true: str, story: Story, rng: random.Random) -> str:
    """Write something that is not about the story, or add it to the true segment."""
    sort = rng.randrange(6)
    length = len(true.split())
    told = f"{story.problem.story} {story.problem.question} {story.trace}"
    at_hand = f"{told} {' '.join(story.cast.values())}".split()
    if sort == 0:
        return babble(at_hand, rng.randint(1, 2 * length), rng)
    if sort == 1:  # a few beginnings of words
        count = rng.randint(1, 3)
        return " ".join([rng.choice(at_hand)[: rng.randint(1, 5)] for _ in range(count)])
    if sort == 2:  # a piece of the true segment
        start = rng.randrange(length)
        return " ".join(true.split()[start : start + rng.randint(1, max(1, length // 2))])
    if sort == 3:  # a piece of the story or its trace
        start = rng.randrange(len(at_hand))
        return " ".join(at_hand[start : start + rng.randint(1, 2 * length)])
    if sort == 4:  # a segment of another story
        return rng.choice(gold_stages(rng.choice(generate_stories(24, rng.randrange(10**6)))))
    # The true segment with a hint at an option, or with words that have no place there.
    hint = rng.choice(HINTS).format(letter=rng.choice("ABCD"), place=rng.choice(PLACES))
    if rng.random() < 0.6:
        added = hint
    else:
        added = " ".join([rng.choice(at_hand) for _ in range(rng.randint(1, 4))])
    return rng.choice((f"{added} {true}", f"{true} {added}"))


def babble(at_hand: list[str], count: int, rng: random.Random) -> str:
    """String together words at hand, or pieces of them, and random characters."""
    pieces = []
    for _ in range(count):
        if rng.random() < 0.5:
            pieces.append("".join(rng.sample(CHARACTERS, rng.randint(1, 3))))
        else:
            pieces.append(rng.choice(at_hand))
    between = rng.choice((" ", " ", ""))
    for i, piece in enumerate(pieces):
        if rng.random() >= 0.5:
            pieces[i] = piece[: rng.randint(1, 4)]
    return between.join(pieces)


# ------------------------------------------------------------------------ pairs of rollouts


Judge = Callable[[str, str], bool]  # (stage, text) -> is it grounded in the story?


def rollout_pairs(
    policy: Transformer, tokenizer: Tokenizer, stories: list[Story], samples: int, seed: int
) -> list[Pair]:
    """Sample trajectories of generated stories and pair their segments, judged by the simulator."""
    pairs = []
    for start in tqdm(range(0, len(stories), 16), desc="rollouts", unit="batch", leave=False):
        batch = stories[start : start + 16]
        problems = [story.problem for story in batch]
        prompts = [tokenizer.chat(build_messages(problem)) for problem in problems]
        groups = generate(
            policy,
            prompts,
            group_size=samples,
            max_new_tokens=tokenizer.max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            seed=seed,
        )
        responses = parse_groups(problems, prompts, groups, tokenizer)
        for story, group in zip(batch, responses):
            true_segments = dict(zip(STAGES, gold_stages(story)))

            def judge(stage: str, text: str) -> bool:
                return facts(text) == facts(true_segments[stage])  # noqa: B023

            pairs += segment_pairs(story.problem, group, judge)
    return pairs


def segment_pairs(problem: Problem, responses: list[Response], judge: Judge) -> list[Pair]:
    """Pair segments of several trajectories of one problem, as the paper does [P].

    The paper samples 6 trajectories for each of 700 problems, cuts them into stages, and asks a
    judge which of two segments of the same stage is better grounded. Here `judge(stage, text)`
    says whether a segment is true, and a true segment is chosen over each that is not [O].
    """
    pairs = []
    for stage in STAGES:
        said = [dict(response.stages).get(stage) for response in responses]
        texts = dict.fromkeys(text for text in said if text)
        true = [text for text in texts if judge(stage, text)]
        false = [text for text in texts if text not in true]
        about = (problem.story, problem.question, stage)
        pairs += [Pair(*about, true[0], text, "rollout") for text in false if true]
    return pairs


def facts(text: str) -> set[tuple[str, ...]]:
    """Return the sentences of a segment, whatever their order, case and punctuation.

    A segment that has the true one's sentences, all of them and no other, is true. This knows the
    simulator's wording only: it cannot judge free text.
    """
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    return {tuple(words(sentence)) for sentence in sentences}


# ----------------------------------------------------------------------------- command line


def main() -> None:
    parser = Parser(description="Make pairs of segments for `python rewards.py --pairs FILE`.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/pairs"), help="folder of the files (runs/pairs)")
    add("--count", type=int, default=60_000, help="pairs of training stories (60000)")
    add("--from-rollouts", type=Path, metavar="POLICY", help="sample segments of this checkpoint")
    add("--problems", type=int, default=700, help="problems to sample with --from-rollouts (700)")
    add("--samples", type=int, default=6, help="trajectories of each problem (6)")
    add("--seed", type=int, default=0, help="of stories, mistakes and rollouts (0)")
    args = parser.parse_args()
    for name, least in (("count", len(KINDS)), ("problems", 2), ("samples", 2), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least {least}")
    if args.from_rollouts:
        policy, tokenizer = load_model(args.from_rollouts), Tokenizer(args.from_rollouts)
        stories = generate_stories(args.problems, args.seed)
        pairs = rollout_pairs(policy, tokenizer, stories, args.samples, args.seed)
        train, held_out = hold_out(pairs, args.seed)
    else:
        train = story_pairs(args.count, args.seed)
        held_out = story_pairs(min(2000, args.count), args.seed, "test")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("train", train), ("held_out", held_out)):
        lines = [json.dumps(asdict(pair), ensure_ascii=False) for pair in pairs]
        write_text(args.out / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
        print(f"{len(pairs)} pairs: {args.out / name}.jsonl")
    files = f"--pairs {args.out}/train.jsonl --held-out {args.out}/held_out.jsonl"
    print(f"next: python rewards.py {files}")


if __name__ == "__main__":
    exit_on_error(main)
