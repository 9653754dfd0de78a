"""The cold start of the embedded policy runs from nothing and plants the flaws it announces."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "assets"))
import make_tiny  # noqa: E402
from make_tiny import ColdStartConfig, cold_start, flawed_trace  # noqa: E402
from model import Tokenizer, load_model  # noqa: E402
from rewards import early_options  # noqa: E402
from socialr1 import STAGES, generate_stories, parse_response  # noqa: E402


def test_the_cold_start_runs_from_nothing(tmp_path):
    config = ColdStartConfig(lookup_steps=1, clean_steps=1, flawed_steps=1, rows=2)
    cold_start(tmp_path / "tiny", config)
    model, tokenizer = load_model(tmp_path / "tiny"), Tokenizer(tmp_path / "tiny")
    size = model.embed_tokens.weight.shape[0]
    assert model.config.vocab_size == tokenizer.backend.get_vocab_size() == size
    text = "Ünïcode 漢字 <think> Anna </think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_mistakes_on_the_command_line_are_one_line(command, tmp_path):
    for arguments, message in [
        ((tmp_path,), "error: "),  # a folder of somebody else's
        ((), "required: DIR"),
        ((tmp_path / "tiny", "--rows", "0"), "--rows 0: expected a whole number, at least 1"),
    ]:
        (tmp_path / "somebody's.txt").write_text("precious")
        code, _, err = command(make_tiny.main, *arguments)
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert (tmp_path / "somebody's.txt").read_text() == "precious"


def test_flawed_traces_have_flaws_in_the_planted_shares():
    config, rng = ColdStartConfig(), random.Random(0)
    right = {"hard": [], "control": []}
    in_order, early = [], []
    for story in generate_stories(1200, seed=9):
        response = parse_response(flawed_trace(story, rng, config), story.problem)
        assert response.well_formed
        right[story.problem.variant].append(response.answer == story.problem.answer)
        in_order.append([name for name, _ in response.stages] == list(STAGES))
        early.append(any(early_options(response, story.problem)))
    assert sum(right["hard"]) / 600 == pytest.approx(1 - 0.62, abs=0.06)
    assert sum(right["control"]) / 600 == pytest.approx(1 - 0.12, abs=0.06)
    assert sum(in_order) / 1200 == pytest.approx(1 - 0.3, abs=0.05)
    assert sum(early) / 1200 == pytest.approx(0.35, abs=0.06)
