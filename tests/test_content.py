"""The content model: scores that do not depend on the batch, pairs that only the story can tell apart, training, files."""
import json
import math
import random
from collections import Counter
from dataclasses import asdict

import pytest
import torch

import rewards
from model import ModelConfig, Tokenizer, Transformer, load_model, save_model
from rewards import (
    KINDS,
    ContentConfig,
    ContentModel,
    Pair,
    agreement,
    by_story,
    corruptions,
    examine,
    hold_out,
    load_content_model,
    read_pairs,
    rollout_pairs,
    segment_scores,
    story_pairs,
    train_content_model,
    whole_stories,
    with_scalar_head,
    within_budget,
)
from socialr1 import STAGES, TINY, TINY_CONTENT, Problem, Response, believed, generate_stories, gold_stages, replay

RAW = dict(
    model_type="qwen3", architectures=["Qwen3ForSequenceClassification"], vocab_size=61, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=64,
    id2label={"0": "grounded"}, label2id={"grounded": 0},
)  # fmt: skip


@pytest.fixture
def scorer():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_json(RAW))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


# ---------------------------------------------------------------------------------------------------------------------- scores


def test_a_score_is_that_of_the_plain_forward_whatever_else_is_in_the_batch(scorer):
    prompts = [[5, 9, 2], [7, 7, 3, 11, 30, 8], [1]]
    segments = [[[3, 4], [9]], [], [[8, 8, 8, 6], [2]]]
    plain = []
    for prompt, some in zip(prompts, segments):
        for segment in some:
            whole = torch.tensor([prompt + segment])
            hidden = scorer.hidden(whole, rewards.Sequences(torch.ones_like(whole, dtype=torch.bool)))
            plain.append(float((hidden[0, -1] @ scorer.score.weight[0]).detach()))
    assert segment_scores(scorer, list(zip(prompts, segments))).tolist() == pytest.approx(plain, abs=1e-5)
    assert len(set(plain)) == 4 and scorer.score.weight.shape == (1, 32)


def test_batches_keep_the_budget_and_hold_every_prompt_once():
    prompts = [[0] * n for n in (5, 50, 5, 5, 5)]
    segments = [[[0] * 4] * 3, [[0] * 10], [], [[0] * 30], [[0] * 2] * 2]
    items = list(zip(prompts, segments))
    batches = list(within_budget(items, 70))
    assert sum(batches, []) == [item for item in items if item[1]] and len(batches) == 4
    for batch in batches:
        rows = [segment for _, some in batch for segment in some]
        assert len(batch) * max(len(p) for p, _ in batch) + len(rows) * max(map(len, rows)) <= 70 or len(batch) == 1
    assert list(within_budget([], 70)) == [] == list(within_budget([([1], []), ([2], [])], 70))


def test_r_content_is_the_mean_sigmoid_of_the_present_stages(monkeypatch):
    scorer = ContentModel.__new__(ContentModel)
    scores = {"a": 0.0, "b": 2.0, "c": -1.0}
    monkeypatch.setattr(scorer, "score", lambda groups: [[scores[text] for _, text in some] for _, _, some in groups], raising=False)

    def response(*texts):
        return Response("x", "A", True, list(zip(STAGES, texts)))

    problem = Problem("s", "q", ("x", "y"), "A")
    found = scorer.rewards([problem, problem], [[response("a", "b"), response()], [response("c"), response("b", "b", "b", "a")]])
    sigmoid = {0.0: 0.5, 2.0: 0.880797, -1.0: 0.268941}
    assert found[0] == pytest.approx([(sigmoid[0.0] + sigmoid[2.0]) / 2, 0.0], abs=1e-6)
    assert found[1] == pytest.approx([sigmoid[-1.0], (3 * sigmoid[2.0] + 0.5) / 4], abs=1e-6)


def test_equal_segments_are_scored_once_and_scores_are_centred(scorer, monkeypatch):
    content = load_content_model(TINY_CONTENT)
    seen, plain = [], rewards.segment_scores
    monkeypatch.setattr(rewards, "segment_scores", lambda m, batch: (seen.append(sum(len(s) for _, s in batch)), plain(m, batch))[1])
    a, b = (STAGES[0], "Anna noticed the box."), (STAGES[1], "Anna thinks the ball is in the box.")
    groups = [("Anna put the ball in the box.", "Where?", [a, b, a]), ("Ben left.", "Why?", [a]), ("", "", [])]
    scores = content.score(groups)
    assert seen == [3] and scores[0][0] == scores[0][2] and scores[2] == []
    apart = [content.score([group], token_budget=1)[0] for group in groups]
    for x, y in zip(scores, apart):
        assert x == pytest.approx(y, abs=1e-5)  # a score does not depend on the batch
    centre, content.centre = content.centre, content.centre | {STAGES[0]: content.centre[STAGES[0]] + 1}
    assert content.score(groups)[1] == pytest.approx([scores[1][0] - 1], abs=1e-6) and content.score(groups)[0][1] == scores[0][1]
    assert centre == content.model.config.raw["content_centre"] and list(centre) == list(STAGES)


HOSTILE = ["", " ", "\0", "<|im_end|>" * 50, "<think>", "é" * 9999, "漢" * 3000, "a" * 1_000_000, "\ud7ff\ue000\U0010ffff", "half a pair \ud83d", "A. B) (C)\n" * 400]


def test_any_text_has_a_score_and_a_story_beyond_the_context_says_so():
    content = load_content_model(TINY_CONTENT)
    scores = content.score([("Anna left.", "Where?", [(STAGES[0], text) for text in HOSTILE])])[0]
    assert len(scores) == len(HOSTILE) and all(map(math.isfinite, scores))
    with pytest.raises(ValueError, match="a story takes [0-9]+ of the 1024 tokens of the content model's context"):
        content.score([("Anna left. " * 2000, "Where?", [(STAGES[0], "x")])])


# ----------------------------------------------------------------------------------------------------------------------- pairs


def test_corruptions_of_a_story_by_hand():
    hard, control = generate_stories(2, seed=0)
    names = dict(hard.cast)
    assert hard.problem.ability == "belief" and hard.twist == "unseen change"
    gold, x, m = gold_stages(hard), names["x"], names["m"]
    found = corruptions(hard, control, random.Random(0))
    assert list(found) == list(KINDS) and all(gold[i] != text for some in found.values() for i, text in some)
    assert (0, gold[0].replace(x, m)) in found["wrong person"] and found["goal of somebody else"] == [(2, gold[2].replace(x, m))]
    assert found["unseen event treated as seen"] == [(0, gold_stages(control)[0])]  # the twin came back in time, and saw it
    assert [i for i, _ in found["reality reported as belief"]] == [1, 3]
    for i, text in found["invented cue"]:
        (word,) = set(text.replace(".", "").replace(":", "").split()) - set(gold[i].replace(".", "").replace(":", "").split())
        assert word.strip(",") not in hard.problem.story


def test_what_would_be_true_all_the_same_is_no_corruption():
    stories = generate_stories(600, seed=7)
    for i, story in enumerate(stories):
        found = corruptions(story, stories[i ^ 1], random.Random(i))
        world, cast, ability = replay(story), story.cast, story.problem.ability
        x, m = cast["x"], cast["m"]
        if ability in ("belief", "desire", "emotion", "intention") and story.twist != "second order":
            exchanged = {stage for stage, _ in found["wrong person"]}
            assert (0 in exchanged) == (world.views[x] != world.views[m])  # else the other saw the very same
            if ability in ("belief", "emotion"):
                assert (1 in exchanged) == (3 in exchanged) == (believed(world.views[x]) != believed(world.views[m]))
            if ability == "intention":  # M goes where M plans to go
                assert (3 in exchanged) == (believed(world.views[x]) != world.value)
        if ability == "emotion":  # that a present pleases somebody is true whoever knows of it
            assert 2 not in {stage for stage, _ in found["reality reported as belief"]}
        if ability == "intention":  # to meet is mutual
            assert all(m in text and x not in text for _, text in found["goal of somebody else"])


PAIRS = story_pairs(3000, seed=3)


def test_kinds_are_balanced_and_pairs_reproducible():
    assert Counter(pair.kind for pair in PAIRS) == {kind: 500 for kind in KINDS}
    assert {pair.stage for pair in PAIRS} == set(STAGES) and all(pair.chosen != pair.rejected for pair in PAIRS)
    assert story_pairs(60, seed=3) == PAIRS[:60] and story_pairs(60, seed=4) != PAIRS[:60]
    test = story_pairs(500, 3, "test")
    assert not {pair.story for pair in PAIRS} & {pair.story for pair in test}


def test_no_bag_of_words_and_no_length_tells_true_from_false():
    words = {word: i for i, word in enumerate(sorted({w for p in PAIRS for t in (p.chosen, p.rejected) for w in t.split()}))}

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
    assert (len(rest), len(kept)) == (360, 40) and not {p.story for p in rest} & {p.story for p in kept}
    assert len(hold_out(pairs * 100, seed=0)[1]) <= 2000
    with pytest.raises(ValueError, match="4 pairs of 1 stories: too few to hold some out"):
        hold_out(pairs[:4], seed=0)


def test_agreement_is_f1_of_sentences():
    (story,) = [s for s in generate_stories(30, seed=0) if s.problem.ability == "knowledge"][:1]
    gold = gold_stages(story)[1]  # two sentences
    first = gold.split(". ")[0] + "."
    assert agreement(story, STAGES[1], gold) == 1.0 and agreement(story, STAGES[1], "Nothing of it.") == 0.0
    assert agreement(story, STAGES[1], gold.upper().rstrip(".")) == 1.0
    assert agreement(story, STAGES[1], first) == pytest.approx(2 / 3) and agreement(story, STAGES[1], gold + " So A.") == pytest.approx(4 / 5)


def test_pairs_from_rollouts_set_what_is_true_against_what_is_not():
    stories = generate_stories(8, seed=5)
    pairs = rollout_pairs(load_model(TINY), Tokenizer(TINY), stories, samples=4, seed=0)
    by_text = {story.problem.story: story for story in stories}
    assert len(pairs) >= 4 and {pair.stage for pair in pairs} <= set(STAGES)
    for pair in pairs:
        better, worse = (agreement(by_text[pair.story], pair.stage, text) for text in (pair.chosen, pair.rejected))
        assert better == 1 > worse


# -------------------------------------------------------------------------------------------------------------- training, files


def untrained():
    return ContentModel(with_scalar_head(load_model(TINY), seed=0), Tokenizer(TINY))


def test_training_follows_the_pairs_and_not_the_micro_batches():
    pairs = [Pair(f"Anna put the {a} in the box.", "What?", STAGES[0], f"Anna noticed the {a}.", f"Anna noticed the {b}.", "thing")
             for a, b in (("ball", "key"), ("key", "ring"), ("ring", "ball"), ("coin", "hat"))]  # fmt: skip
    results = []
    for budget in (10**6, 60):
        scorer = untrained()
        train_content_model(scorer, pairs, ContentConfig(epochs=12, batch=4, lr=1e-3, token_budget=budget))
        results.append(examine(scorer, pairs))
    whole, pieces = results
    assert whole["accuracy"] == 1.0 and whole["by_kind"] == {"thing": 1.0} and whole["by_stage"] == {STAGES[0]: 1.0}
    assert pieces["centre"] == pytest.approx(whole["centre"], abs=1e-3)


def test_an_epoch_is_one_pass_over_whole_stories():
    groups = by_story([Pair(f"s{i // 3}", "q", STAGES[0], "a", "b") for i in range(30)])
    batches = whole_stories(groups, 8)
    assert [sum(map(len, batch)) for batch in batches] == [9, 9, 9, 3] and sum(batches, []) == groups


def test_examine_counts_and_centres(monkeypatch):
    pairs = [Pair("s", "q", STAGES[i % 2], "a", "b", "k" if i else "") for i in range(4)]
    monkeypatch.setattr(rewards, "segment_scores", lambda *_: torch.tensor([1.0, 0, 0, 3, 2, 2, 5, 1]))  # right, wrong, tie, right
    result = examine(untrained(), pairs)
    assert result["accuracy"] == 0.5 and result["pairs"] == 4
    assert result["centre"] == {STAGES[0]: (0.5 + 2) / 2, STAGES[1]: (1.5 + 3) / 2, STAGES[2]: 0, STAGES[3]: 0}
    assert result["by_stage"] == {STAGES[0]: 0.5, STAGES[1]: 0.5} and result["by_kind"] == pytest.approx({"(no kind given)": 1, "k": 1 / 3})


def test_content_models_are_checkpoints_of_sequence_classifiers(tmp_path, scorer):
    save_model(scorer, tmp_path / "scorer")
    tokens = torch.tensor([[5, 9, 2, 3]])
    ours = segment_scores(load_model(tmp_path / "scorer", scalar=True), [([5, 9], [[2, 3]])])
    assert ours.tolist() == segment_scores(scorer, [([5, 9], [[2, 3]])]).tolist()
    with pytest.raises(ValueError, match=r"is a language model; expected a content model \(with a scalar head\)"):
        load_content_model(TINY)
    with pytest.raises(ValueError, match=r"is a content model \(with a scalar head\); expected a language model"):
        load_model(tmp_path / "scorer")
    for prompts in ([([], [[1]])], [([1], [[2], []])], [([1], [])]):
        with pytest.raises(ValueError, match="nothing to score"):
            segment_scores(scorer, prompts)
    save_model(scorer, tmp_path / "foreign")
    for file in TINY.glob("*token*"):
        (tmp_path / "foreign" / file.name).write_bytes(file.read_bytes())
    for centre in (None, 1.0, dict.fromkeys(STAGES, "x"), dict.fromkeys(STAGES, math.nan)):
        (tmp_path / "foreign" / "config.json").write_text(json.dumps(RAW | {"content_centre": centre}))
        with pytest.raises(ValueError, match="content_centre is .*; expected a number for each stage"):
            load_content_model(tmp_path / "foreign")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer", dtype=torch.float32)
    assert float(theirs(tokens).logits.detach()[0, 0]) == pytest.approx(float(ours[0].detach()), abs=1e-4)


def test_the_shipped_content_model_judges_stories_it_never_saw():
    result = examine(load_content_model(TINY_CONTENT), story_pairs(500, 11, "test"))
    assert result["accuracy"] >= 0.85, result
    assert sum(file.stat().st_size for file in TINY_CONTENT.iterdir()) < 1_500_000


def test_pair_files_are_read_and_their_mistakes_named(tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = dict(story="s", question="q", stage=STAGES[2], chosen="a", rejected="b")
    file.write_text("\n" + json.dumps(row) + "\n" + json.dumps(row | {"kind": "k"}) + "\n", encoding="utf-8-sig")
    assert read_pairs(file) == [Pair("s", "q", STAGES[2], "a", "b"), Pair("s", "q", STAGES[2], "a", "b", "k")]
    for text, message in [
        ("", "no pairs in it"),
        ("{", "pairs.jsonl:1: not JSON"),
        ("[1]", "pairs.jsonl:1: expected a JSON object, got list"),
        (json.dumps(row) + "\n" + json.dumps(row | {"chosen": 7}), "pairs.jsonl:2: expected the texts story, question"),
        (json.dumps(row | {"rejected": " "}), "pairs.jsonl:1: expected the texts"),
        (json.dumps(row | {"rejected": "a"}), "chosen and rejected are the same"),
        (json.dumps(row | {"story": "\ud83d"}), "half a surrogate pair"),
        (json.dumps(row | {"stage": "Thinking"}), "pairs.jsonl:1: stage 'Thinking'; expected one of Cue Encoding"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_pairs(file)
    with pytest.raises(ValueError, match="none.jsonl: No such file"):
        read_pairs(tmp_path / "none.jsonl")


def test_the_command_line(tmp_path, command):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(asdict(pair)) for pair in PAIRS[:100]))
    code, out, err = command(rewards.main, "--pairs", str(pairs), "--out", str(tmp_path / "content"), "--batch", "32")
    assert code == 0, err
    assert f"next: python grpo.py --content {tmp_path / 'content'}" in out and "  wrong person" in out and "  Cue Encoding" in out
    trained = load_content_model(tmp_path / "content")
    assert all(trained.centre.values()) and (tmp_path / "content" / "tokenizer.json").exists()
    code, out, err = command(rewards.main, "--from-rollouts", str(TINY), "--problems", "8", "--samples", "5", "--out", str(tmp_path / "rolled"))
    assert code == 0, err
    assert "  rollout" in out and len(read_pairs(tmp_path / "rolled.pairs.jsonl")) >= 4
    for arguments, message in [
        (("--pairs", str(tmp_path / "none")), "none: No such file"),
        (("--pairs", str(pairs), "--from-rollouts", str(TINY)), "exclude each other"),
        (("--model", str(tmp_path / "none")), "no such model folder"),
        (("--out", str(tmp_path)), "is no checkpoint folder"),
        (("--lr", "0"), "--lr above 0"),
        (("--count", "1"), "--count 1: expected at least 6"),
        (("--from-rollouts", str(TINY_CONTENT)), "expected a language model"),
    ]:
        code, out, err = command(rewards.main, *arguments)
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, (arguments, err)
