"""What README.md and assets/RESULTS.md name exists: functions, flags, files and headings."""

import importlib
import re
from pathlib import Path

import pytest

import eval
import grpo
import rewards

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "assets" / "RESULTS.md").read_text(encoding="utf-8")
MODULES = "socialr1|model|rewards|grpo|eval"


def test_every_function_exists():
    named = set(re.findall(rf"`(?:assets/)?({MODULES})\.([A-Za-z_]\w*)(?:\.(\w+))?", README))
    named = {(module, name, inner) for module, name, inner in named if name != "py"}
    assert len(named) >= 12
    for module, name, inner in named:
        value = getattr(importlib.import_module(module), name)
        assert not inner or hasattr(value, inner), (module, name, inner)


def test_every_flag_exists(command):
    flags = set()
    for module in (grpo, eval, rewards):
        flags |= set(re.findall(r"--[a-z][a-z-]+", command(module.main, "--help")[1]))
    foreign = {"--index-url", "--nproc-per-node", "--from-rollouts", "--smollm2", "--repeats"}
    foreign |= {"--help", "--jobs", "--small"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README + RESULTS)) - foreign
    assert len(named) >= 20 and named <= flags, named - flags


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "RESULTS"])
def test_every_file_and_heading_exists(text):
    for path in re.findall(r"(?:python |`)((?:assets|tests)/[\w./]+\.\w+)", text):
        assert (ROOT / path).exists(), path
    own = re.findall(r"\]\(#([\w-]+)\)", text)
    of_results = re.findall(r"\]\(assets/RESULTS\.md#([\w-]+)\)", text)
    assert own or of_results
    assert set(own) <= headings(text), set(own) - headings(text)
    assert set(of_results) <= headings(RESULTS), set(of_results) - headings(RESULTS)


def headings(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^##+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
