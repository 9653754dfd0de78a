"""The content model: scores whatever the batch, pairs that only the story tells apart, training."""

import itertools
import json
import math
import random
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import rewards
from model import Packed, Tokenizer, Transformer, load_model, parse_config, save_model
from rewards import (
    ContentConfig,
    ContentModel,
    Pair,
    by_question,
    content_reward,
    examine,
    hold_out,
    load_content_model,
    read_pairs,
    segment_scores,
    train_content_model,
    with_scalar_head,
)
from socialr1 import STAGES, TINY, TINY_CONTENT, Problem, Response, believed, generate_stories
from socialr1 import gold_stages, replay

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets"))
import make_pairs  # noqa: E402
from make_pairs import KINDS, corruptions, facts, rollout_pairs  # noqa: E402
from make_pairs import segment_pairs, story_pairs  # noqa: E402

RAW = dict(
    model_type="qwen3",
    architectures=["Qwen3ForSequenceClassification"],
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    max_position_embeddings=64,
    id2label={"0": "grounded"},
    label2id={"grounded": 0},
)


@pytest.fixture
def scorer():
    torch.manual_seed(0)
    model = Transformer(parse_config(RAW))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


# ------------------------------------------------------------------------------------------- scores


def test_a_score_is_that_of_the_plain_forward_whatever_else_is_in_the_batch(scorer):
    prompts = [[5, 9, 2], [7, 7, 3, 11, 30, 8], [1]]
    segments = [[[3, 4], [9]], [], [[8, 8, 8, 6], [2]]]
    plain = []
    for prompt, some in zip(prompts, segments):
        for segment in some:
            whole = torch.tensor([prompt + segment])
            hidden = scorer.hidden(whole, Packed([prompt + segment], [[]], whole.device))
            plain.append(float((hidden[0, -1] @ scorer.score.weight[0]).detach()))
    assert segment_scores(scorer, list(zip(prompts, segments))).tolist() == pytest.approx(
        plain, abs=1e-5
    )
    assert len(set(plain)) == 4 and scorer.score.weight.shape == (1, 32)


def test_batches_keep_the_budget_and_hold_every_prompt_once(monkeypatch):
    """Stories of 17, 60, 35 and 9 tokens, and one without segments; 70 tokens at a time."""
    sizes = {"a": (5, [4, 4, 4]), "b": (50, [10]), "c": (5, []), "d": (5, [30]), "e": (5, [2, 2])}
    scorer = ContentModel.__new__(ContentModel)
    scorer.centre, scorer.model = dict.fromkeys(STAGES, 0.0), None

    def encode(story, question, segments):
        prompt, lengths = sizes[story]
        return [0] * prompt, [[0] * length for length in lengths]

    scorer.encode = encode
    seen = []

    def score_by_length(model, batch):
        seen.append(batch)
        return torch.tensor([float(len(s)) for _, segments in batch for s in segments])

    monkeypatch.setattr(rewards, "segment_scores", score_by_length)
    asked = [(s, "q", [(STAGES[0], f"{s}{i}") for i in range(len(sizes[s][1]))]) for s in "abcde"]
    assert scorer.score(asked, token_budget=70) == [[4.0, 4.0, 4.0], [10.0], [], [30.0], [2.0, 2.0]]
    assert [[len(prompt) for prompt, _ in batch] for batch in seen] == [[5], [50], [5, 5]]
    totals = [sum(len(p) + sum(map(len, segments)) for p, segments in batch) for batch in seen]
    assert totals == [17, 60, 44]
    seen.clear()
    assert scorer.score([], 70) == [] and scorer.score([("c", "q", [])], 70) == [[]] and not seen


def test_content_reward_by_hand():
    # s(0) = 1/2, s(2) = 1 / (1 + exp(-2)) = 0.880797, s(-1) = 0.268941
    assert content_reward([]) == 0.0
    assert content_reward([0.0]) == 0.5
    assert content_reward([0.0, 2.0, -1.0]) == pytest.approx(
        (0.5 + 0.880797 + 0.268941) / 3, abs=1e-6
    )
    assert content_reward([-1000.0]) == 0.0 and content_reward([1000.0]) == 1.0


def test_r_content_is_the_mean_sigmoid_of_the_present_stages(monkeypatch):
    scorer = ContentModel.__new__(ContentModel)
    scores = {"a": 0.0, "b": 2.0, "c": -1.0}
    monkeypatch.setattr(
        scorer,
        "score",
        lambda groups: [[scores[text] for _, text in some] for _, _, some in groups],
        raising=False,
    )

    def response(*texts):
        return Response("x", "A", list(zip(STAGES, texts)))

    problem = Problem("s", "q", ("x", "y"), "A")
    found = scorer.rewards(
        [problem, problem],
        [[response("a", "b"), response()], [response("c"), response("b", "b", "b", "a")]],
    )
    sigmoid = {0.0: 0.5, 2.0: 0.880797, -1.0: 0.268941}
    assert found[0] == pytest.approx([(sigmoid[0.0] + sigmoid[2.0]) / 2, 0.0], abs=1e-6)
    assert found[1] == pytest.approx([sigmoid[-1.0], (3 * sigmoid[2.0] + 0.5) / 4], abs=1e-6)


def test_equal_segments_are_scored_once_and_scores_are_centred(scorer, monkeypatch):
    content = load_content_model(TINY_CONTENT)
    seen, plain = [], rewards.segment_scores
    monkeypatch.setattr(
        rewards,
        "segment_scores",
        lambda m, batch: (seen.append(sum(len(s) for _, s in batch)), plain(m, batch))[1],
    )
    a, b = (STAGES[0], "Anna noticed the box."), (STAGES[1], "Anna thinks the ball is in the box.")
    groups = [
        ("Anna put the ball in the box.", "Where?", [a, b]),
        ("Ben left.", "Why?", [a]),
        ("", "", []),
    ]
    scores = content.score(groups)
    assert seen == [3] and scores[2] == []
    # a group's responses share a story, and some share a segment: a, b and a again are two texts
    problem = Problem(*groups[0][:2], ("x", "y"), "A")
    responses = [Response("x", "A", stages) for stages in ([a, b], [a], [])]
    (found,) = content.rewards([problem], [responses])
    means = [rewards.content_reward(values) for values in (scores[0], scores[0][:1], [])]
    assert seen == [3, 2] and found == pytest.approx(means, abs=1e-6)
    apart = [content.score([group], token_budget=1)[0] for group in groups]
    for x, y in zip(scores, apart):
        assert x == pytest.approx(y, abs=1e-5)  # a score does not depend on the batch
    centre, content.centre = (
        content.centre,
        content.centre | {STAGES[0]: content.centre[STAGES[0]] + 1},
    )
    assert (
        content.score(groups)[1] == pytest.approx([scores[1][0] - 1], abs=1e-6)
        and content.score(groups)[0][1] == scores[0][1]
    )
    assert centre == content.model.config.raw["content_centre"] and list(centre) == list(STAGES)


HOSTILE = [
    "",
    " ",
    "\0",
    "<|im_end|>" * 50,
    "<think>",
    "é" * 9999,
    "漢" * 3000,
    "a" * 1_000_000,
    "\ud7ff\ue000\U0010ffff",
    "half a pair \ud83d",
    "A. B) (C)\n" * 400,
]


def test_any_text_has_a_score_and_a_story_beyond_the_context_says_so():
    content = load_content_model(TINY_CONTENT)
    scores = content.score([("Anna left.", "Where?", [(STAGES[0], text) for text in HOSTILE])])[0]
    assert len(scores) == len(HOSTILE) and all(map(math.isfinite, scores))
    with pytest.raises(ValueError, match="a story takes [0-9]+ of the content model's 1024 tokens"):
        content.score([("Anna left. " * 2000, "Where?", [(STAGES[0], "x")])])


# -------------------------------------------------------------------------------------------- pairs


def test_corruptions_of_a_story_by_hand():
    hard, control = generate_stories(2, seed=0)
    names = dict(hard.cast)
    assert hard.problem.ability == "belief" and hard.twist == "unseen change"
    gold, x, m = gold_stages(hard), names["x"], names["m"]
    found = corruptions(hard, control, random.Random(0))
    assert list(found) == list(KINDS) and all(
        gold[i] != text for some in found.values() for i, text in some
    )
    assert (0, gold[0].replace(x, m)) in found["wrong person"] and found[
        "goal of somebody else"
    ] == [(2, gold[2].replace(x, m))]
    assert found["unseen event treated as seen"] == [
        (0, gold_stages(control)[0])
    ]  # the twin came back in time, and saw it
    assert [i for i, _ in found["reality reported as belief"]] == [1, 3]
    for i, text in found["invented cue"]:
        (word,) = set(text.replace(".", "").replace(":", "").split()) - set(
            gold[i].replace(".", "").replace(":", "").split()
        )
        assert word.strip(",") not in hard.problem.story


def test_what_would_be_true_all_the_same_is_no_corruption():
    stories = generate_stories(600, seed=7)
    for i, story in enumerate(stories):
        found = corruptions(story, stories[i ^ 1], random.Random(i))
        world, cast, ability = replay(story), story.cast, story.problem.ability
        x, m = cast["x"], cast["m"]
        if (
            ability in ("belief", "desire", "emotion", "intention")
            and story.twist != "second order"
        ):
            exchanged = {stage for stage, _ in found["wrong person"]}
            assert (0 in exchanged) == (
                world.views[x] != world.views[m]
            )  # else the other saw the very same
            if ability in ("belief", "emotion"):
                assert (
                    (1 in exchanged)
                    == (3 in exchanged)
                    == (believed(world.views[x]) != believed(world.views[m]))
                )
            if ability == "intention":  # M goes where M plans to go
                assert (3 in exchanged) == (believed(world.views[x]) != world.value)
        if ability == "emotion":  # that a present pleases somebody is true whoever knows of it
            assert 2 not in {stage for stage, _ in found["reality reported as belief"]}
        if ability == "intention":  # to meet is mutual
            assert all(m in text and x not in text for _, text in found["goal of somebody else"])


PAIRS = story_pairs(3000, seed=3)


def test_kinds_are_balanced_and_pairs_reproducible():
    assert Counter(pair.kind for pair in PAIRS) == {kind: 500 for kind in KINDS}
    assert {pair.stage for pair in PAIRS} == set(STAGES) and all(
        pair.chosen != pair.rejected for pair in PAIRS
    )
    assert story_pairs(60, seed=3) == PAIRS[:60] and story_pairs(60, seed=4) != PAIRS[:60]
    test = story_pairs(500, 3, "test")
    assert not {pair.story for pair in PAIRS} & {pair.story for pair in test}


def test_no_bag_of_words_and_no_length_tells_true_from_false():
    words = {
        word: i
        for i, word in enumerate(
            sorted({w for p in PAIRS for t in (p.chosen, p.rejected) for w in t.split()})
        )
    }

    def features(text):
        counts = torch.zeros(len(words) + 2)
        for word in text.split():
            counts[words[word]] += 1
        counts[-2], counts[-1] = len(text.split()), len(text) / 20
        return counts

    x = torch.stack([features(p.chosen) - features(p.rejected) for p in PAIRS])
    train, test = x[:2000], x[2000:]
    weight = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.softplus(-train @ weight).mean() + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    margins = (test @ weight).detach()
    assert float((margins > 0).float().mean() + (margins == 0).float().mean() / 2) < 0.6
    for kind in KINDS[:-1]:
        sizes = [(len(p.chosen.split()), len(p.rejected.split())) for p in PAIRS if p.kind == kind]
        assert abs(sum(a < b for a, b in sizes) - sum(a > b for a, b in sizes)) < 0.05 * len(sizes)
        right = [float(margin > 0) for margin, p in zip(margins, PAIRS[2000:]) if p.kind == kind]
        assert sum(right) / len(right) < 0.6, kind


def test_whole_stories_are_held_out():
    pairs = [Pair(f"s{i // 4}", f"q{i}", STAGES[0], "a", "b") for i in range(400)]
    rest, kept = hold_out(pairs, seed=0)
    assert (len(rest), len(kept)) == (360, 40) and not {p.story for p in rest} & {
        p.story for p in kept
    }
    assert len(hold_out(pairs * 100, seed=0)[1]) <= 2000
    with pytest.raises(ValueError, match="4 pairs of one story: too few to hold some out"):
        hold_out(pairs[:4], seed=0)


def test_a_true_segment_has_all_the_sentences_and_no_other():
    (story,) = [s for s in generate_stories(30, seed=0) if s.problem.ability == "knowledge"][:1]
    gold = gold_stages(story)[1]  # two sentences
    first, second = gold.split(". ")
    assert facts(gold) == facts(gold.upper().rstrip(".")) == facts(f"{second} {first}.")
    for text in ("Nothing of it.", f"{first}.", f"{gold} So A.", ""):
        assert facts(text) != facts(gold)


def test_segments_of_a_stage_are_paired_as_the_judge_says():
    problem = Problem("s", "q", ("x", "y"), "A")
    told = [
        [(STAGES[0], "true"), (STAGES[1], "false")],
        [(STAGES[0], "false"), (STAGES[1], "worse")],
        [(STAGES[0], "true, too"), (STAGES[0], "true")],
        [(STAGES[0], "worse"), (STAGES[3], "true")],
        [(STAGES[0], "false")],
    ]
    responses = [Response("x", "A", stages) for stages in told]
    pairs = segment_pairs(problem, responses, lambda stage, text: text.startswith("true"))
    # of the second stage nothing is true, and of the last nothing false
    assert pairs == [
        Pair("s", "q", STAGES[0], "true", "false", "rollout"),
        Pair("s", "q", STAGES[0], "true", "worse", "rollout"),
    ]


def test_pairs_from_rollouts_set_what_is_true_against_what_is_not():
    stories = generate_stories(8, seed=5)
    pairs = rollout_pairs(load_model(TINY), Tokenizer(TINY), stories, samples=4, seed=0)
    by_text = {story.problem.story: story for story in stories}
    assert len(pairs) >= 4 and {pair.stage for pair in pairs} <= set(STAGES)
    for pair in pairs:
        true = facts(gold_stages(by_text[pair.story])[STAGES.index(pair.stage)])
        assert facts(pair.chosen) == true != facts(pair.rejected)


# ---------------------------------------------------------------------------------- training, files


def untrained():
    return ContentModel(with_scalar_head(load_model(TINY), seed=0), Tokenizer(TINY))


def test_training_follows_the_pairs_and_not_the_micro_batches():
    pairs = [
        Pair(
            f"Anna put the {a} in the box.",
            "What?",
            STAGES[0],
            f"Anna noticed the {a}.",
            f"Anna noticed the {b}.",
            "thing",
        )
        for a, b in (("ball", "key"), ("key", "ring"), ("ring", "ball"), ("coin", "hat"))
    ]
    results = []
    for budget in (10**6, 60):
        scorer = untrained()
        train_content_model(
            scorer, pairs, ContentConfig(epochs=12, batch=4, lr=1e-3, token_budget=budget)
        )
        results.append(examine(scorer, pairs))
    whole, pieces = results
    assert (
        whole["accuracy"] == 1.0
        and whole["by_kind"] == {"thing": 1.0}
        and whole["by_stage"] == {STAGES[0]: 1.0}
    )
    assert pieces["centre"] == pytest.approx(whole["centre"], abs=1e-3)


def test_an_epoch_is_one_pass_over_whole_stories(monkeypatch):
    """10 stories of 3 pairs, at most 8 pairs in an update: 2 stories in each of 5."""
    pairs = [Pair(f"s{i // 3}", "q", STAGES[0], f"a{i}", f"b{i}") for i in range(30)]
    seen, plain = [], rewards.pair_scores
    monkeypatch.setattr(
        rewards, "pair_scores", lambda s, batch, n: (seen.append(batch), plain(s, batch, n))[1]
    )
    train_content_model(untrained(), pairs, ContentConfig(epochs=2, batch=8, lr=1e-4))
    assert [sum(map(len, batch)) for batch in seen] == [6] * 10
    for epoch in (seen[:5], seen[5:]):
        groups = list(itertools.chain(*epoch))
        assert sorted(groups, key=lambda group: group[0].story) == by_question(pairs)
    assert seen[:5] != seen[5:]  # in another order


def test_examine_counts_and_centres(monkeypatch):
    pairs = [Pair("s", "q", STAGES[i % 2], "a", "b", "k" if i else "") for i in range(4)]
    monkeypatch.setattr(
        rewards, "segment_scores", lambda *_: torch.tensor([1.0, 0, 0, 3, 2, 2, 5, 1])
    )  # right, wrong, tie, right
    result = examine(untrained(), pairs)
    # by_question keeps the pairs in their order
    assert result["accuracy"] == 0.5 and result["pairs"] == 4
    assert result["centre"] == {
        STAGES[0]: (0.5 + 2) / 2,
        STAGES[1]: (1.5 + 3) / 2,
        STAGES[2]: 0,
        STAGES[3]: 0,
    }
    assert result["by_stage"] == {STAGES[0]: 0.5, STAGES[1]: 0.5} and result[
        "by_kind"
    ] == pytest.approx({"(no kind given)": 1, "k": 1 / 3})


def test_content_models_are_checkpoints_of_sequence_classifiers(tmp_path, scorer):
    save_model(scorer, tmp_path / "scorer")
    tokens = torch.tensor([[5, 9, 2, 3]])
    ours = segment_scores(load_model(tmp_path / "scorer", scalar=True), [([5, 9], [[2, 3]])])
    assert ours.tolist() == segment_scores(scorer, [([5, 9], [[2, 3]])]).tolist()
    with pytest.raises(
        ValueError, match=r"is a language model; expected a content model \(with a scalar head\)"
    ):
        load_content_model(TINY)
    with pytest.raises(
        ValueError, match=r"is a content model \(with a scalar head\); expected a language model"
    ):
        load_model(tmp_path / "scorer")
    save_model(scorer, tmp_path / "foreign")
    for file in TINY.glob("*token*"):
        (tmp_path / "foreign" / file.name).write_bytes(file.read_bytes())
    for centre in (None, 1.0, dict.fromkeys(STAGES, "x"), dict.fromkeys(STAGES, math.nan)):
        (tmp_path / "foreign" / "config.json").write_text(
            json.dumps(RAW | {"content_centre": centre})
        )
        with pytest.raises(
            ValueError, match="content_centre is .*; expected a number for each stage"
        ):
            load_content_model(tmp_path / "foreign")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "scorer", dtype=torch.float32
    )
    assert float(theirs(tokens).logits.detach()[0, 0]) == pytest.approx(
        float(ours[0].detach()), abs=1e-4
    )


def test_the_shipped_content_model_judges_stories_it_never_saw():
    result = examine(load_content_model(TINY_CONTENT), story_pairs(500, 11, "test"))
    assert result["accuracy"] >= 0.85, result
    assert sum(file.stat().st_size for file in TINY_CONTENT.iterdir()) < 1_500_000


def test_pair_files_are_read_and_their_mistakes_named(tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = dict(story="s", question="q", stage=STAGES[2], chosen="a", rejected="b")
    file.write_text(
        "\n" + json.dumps(row) + "\n" + json.dumps(row | {"kind": "k"}) + "\n", encoding="utf-8-sig"
    )
    assert read_pairs(file) == [
        Pair("s", "q", STAGES[2], "a", "b"),
        Pair("s", "q", STAGES[2], "a", "b", "k"),
    ]
    for text, message in [
        ("", "no pairs in it"),
        ("{", "pairs.jsonl:1: not JSON"),
        ("[1]", "pairs.jsonl:1: expected a JSON object, got list"),
        (
            json.dumps(row) + "\n" + json.dumps(row | {"chosen": 7}),
            "pairs.jsonl:2: expected the texts story, question",
        ),
        (json.dumps(row | {"rejected": " "}), "pairs.jsonl:1: expected the texts"),
        (json.dumps(row | {"rejected": "a"}), "the same text twice"),
        (json.dumps(row | {"story": "\ud83d"}), "half a surrogate pair"),
        (
            json.dumps(row | {"stage": "Thinking"}),
            "pairs.jsonl:1: stage 'Thinking'; expected Cue Encoding",
        ),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_pairs(file)
    with pytest.raises(ValueError, match="none.jsonl: No such file"):
        read_pairs(tmp_path / "none.jsonl")


def test_the_command_line(tmp_path, command):
    pairs, held_out = tmp_path / "pairs.jsonl", tmp_path / "held_out.jsonl"
    pairs.write_text("\n".join(json.dumps(asdict(pair)) for pair in PAIRS[:100]))
    code, out, err = command(
        rewards.main, "--pairs", pairs, "--out", tmp_path / "content", "--batch", "32"
    )
    assert code == 0, err
    assert f"next: python grpo.py --content {tmp_path / 'content'}" in out
    assert "  wrong person" in out and "  Cue Encoding" in out and " 12 held out" in out
    trained = load_content_model(tmp_path / "content")
    assert all(trained.centre.values()) and (tmp_path / "content" / "tokenizer.json").exists()
    held_out.write_text("\n".join(json.dumps(asdict(pair)) for pair in PAIRS[100:130]))
    arguments = (
        "--pairs",
        pairs,
        "--held-out",
        held_out,
        "--model",
        tmp_path / "content",
        "--lr",
        "1e-6",
    )
    code, out, err = command(rewards.main, *arguments, "--out", tmp_path / "again")
    assert code == 0, err
    assert "100 pairs to learn from, 30 held out" in out
    for arguments, message in [
        ((), "required: --pairs"),
        (("--pairs", tmp_path / "none"), "none: No such file"),
        (("--pairs", pairs, "--held-out", tmp_path / "none"), "none: No such file"),
        (("--pairs", pairs, "--model", tmp_path / "none"), "no such model folder"),
        (("--pairs", pairs, "--out", tmp_path), "exists already, and nothing is overwritten"),
        (("--pairs", pairs, "--lr", "0"), "--lr 0"),
        (("--pairs", pairs, "--epochs", "0"), "--epochs 0"),
    ]:
        code, out, err = command(rewards.main, *arguments)
        assert code == 2 and err.startswith("error: ") and message in err, (arguments, err)
        assert err.count("\n") == 1, err
    again = load_content_model(tmp_path / "again")
    assert examine(again, PAIRS[100:130])["centre"] == pytest.approx(again.centre, abs=1e-4)


def test_make_pairs_writes_files_that_rewards_reads(tmp_path, command):
    out = tmp_path / "pairs"
    code, said, err = command(make_pairs.main, "--out", out, "--count", "61", "--seed", "3")
    assert code == 0, err
    assert (
        f"next: python rewards.py --pairs {out}/train.jsonl --held-out {out}/held_out.jsonl" in said
    )
    train, held_out = read_pairs(out / "train.jsonl"), read_pairs(out / "held_out.jsonl")
    assert train == PAIRS[:60] and held_out == story_pairs(60, 3, "test")
    arguments = ("--from-rollouts", TINY, "--problems", "8", "--samples", "5", "--out", out)
    code, said, err = command(make_pairs.main, *arguments)
    assert code == 0, err
    train, held_out = read_pairs(out / "train.jsonl"), read_pairs(out / "held_out.jsonl")
    assert len(train) >= 4 and {pair.kind for pair in train + held_out} == {"rollout"}
    assert not {pair.story for pair in train} & {pair.story for pair in held_out}
    for arguments, message in [
        (("--count", "1"), "--count 1: expected at least 6"),
        (("--from-rollouts", TINY_CONTENT), "expected a language model"),
    ]:
        code, _, err = command(make_pairs.main, *arguments)
        assert code == 2 and err.startswith("error: ") and message in err, (arguments, err)
