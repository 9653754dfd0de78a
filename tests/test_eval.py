"""Readers on rows written for these tests in the benchmarks' formats (shared/data/FORMATS.md), and the measures by hand."""
import json
import re
from pathlib import Path

import pytest

import eval
from eval import measure, read_benchmark, read_files, summarise, table
from socialr1 import Problem


def tombench_row(**changes):
    row = {
        "能力\nABILITY": "Belief: Content false beliefs ", "序号\nINDEX": 1, "故事": "小李把球放进盒子。", "问题": "球在哪里？",
        "选项A": "A. 盒子", "选项B": "B.袋子", "选项C": "C: 罐子", "选项D": "D.  桌上",
        "STORY": " Li put a ball in the box. ", "QUESTION": "Where is the ball? ",
        "OPTION-A": "A. Box", "OPTION-B": "Bag", "OPTION-C": "Jar", "OPTION-D": "Table", "答案\nANSWER": "A",
    }  # fmt: skip
    return json.dumps(row | changes, ensure_ascii=False)


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_tombench_in_both_languages(tmp_path):
    nan = float("nan")
    rows = [
        tombench_row(),
        "",
        tombench_row(**{"选项C": nan, "选项D": nan, "OPTION-C": nan, "OPTION-D": nan, "答案\nANSWER": "B. ", "类型": nan}),
        tombench_row(**{"选项C": nan, "选项D": nan}),  # four options in English only: that question belongs to another story
    ]
    path = write(tmp_path, "False Belief Task.jsonl", "\n".join(rows))
    names, problems, notes = read_files(path)
    assert names == {"tombench"} and notes == [f"{path}:4: left out: its English question belongs to another story"]
    assert problems == read_benchmark(path)
    assert problems[0] == Problem(
        "Li put a ball in the box.", "Where is the ball?", ("Box", "Bag", "Jar", "Table"), "A", "belief",
        "tombench/False Belief Task", "False Belief Task:1",
    )  # fmt: skip
    assert (problems[1].options, problems[1].answer, problems[1].id) == (("Box", "Bag"), "B", "False Belief Task:3")
    chinese = read_benchmark(path, lang="zh")
    assert [len(p.options) for p in chinese] == [4, 2, 2]
    assert chinese[0].options == ("盒子", "袋子", "罐子", "桌上") and chinese[0].story == "小李把球放进盒子。"


def test_our_jsonl_and_folders(tmp_path):
    row = {"story": "s", "question": "q", "options": ["a b", "B. c"], "answer": "b", "ability": "desire", "source": "x", "id": "7", "variant": "hard"}
    write(tmp_path, "one.jsonl", b"\xef\xbb\xbf" + json.dumps(row).encode())
    write(tmp_path, "two.jsonl", json.dumps(row | {"answer": "a b"}) + "\n")
    write(tmp_path, "notes.txt", "no benchmark")
    problems = read_benchmark(tmp_path)
    assert problems[0] == Problem("s", "q", ("a b", "c"), "B", "desire", "x", "7", "hard")
    assert problems[1].answer == "A"


def test_tombench_hard_csv(tmp_path):
    text = '\ufeffStory,QUESTION,Option_A,option-b,OPTION C,"Option\nD",Answer,Category\n"s\nt",q,A. a,b,nan,,"b",Belief\n'
    (problem,) = read_benchmark(write(tmp_path, "hard.csv", text))
    assert (problem.story, problem.options, problem.answer, problem.ability) == ("s\nt", ("a", "b"), "B", "belief")
    listed = "context,question,choices,label\n" + "s,q,\"['x', 'y']\",1\n" + "s,q,\"['x', 'y']\",0\n"
    assert [p.answer for p in read_benchmark(write(tmp_path, "list.csv", listed))] == ["B", "A"]  # a 0 stands in the file


GOOD = '{"story": "s", "question": "q", "options": ["a", "b"], "answer": "A"}\n'


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.jsonl", GOOD + "{broken\n", "x.jsonl:2: not JSON, at column 2"),
        ("x.jsonl", GOOD + GOOD.replace('"A"', '"C"'), "x.jsonl:2: answer 'C' has no option: expected one letter of AB"),
        ("x.jsonl", GOOD + "[1]", "x.jsonl:2: expected a JSON object, got list"),
        ("x.jsonl", GOOD.encode() + b'{"story": "\xff"}', "x.jsonl:2: not UTF-8"),
        ("x.jsonl", "[" * 100_000, "x.jsonl:1: "),
        ("x.jsonl", GOOD.replace('["a", "b"]', '["a"]'), "x.jsonl:1: a problem needs 2 to 26 options, got 1"),
        ("x.jsonl", GOOD.replace('["a", "b"]', '["a", "", "c"]'), "x.jsonl:1: option B is empty"),
        ("x.jsonl", GOOD.replace('"q"', '""'), "x.jsonl:1: the story or the question is empty"),
        ("x.jsonl", GOOD.replace('"s"', '"\\ud800"'), "x.jsonl:1: 'utf-8' codec can't encode"),
        ("x.jsonl", GOOD.replace('["a", "b"]', json.dumps(["o"] * 27)), "x.jsonl:1: 27 options"),
        ("x.jsonl", "", "x.jsonl: no rows"),
        ("x.csv", "Story,QUESTION,Gold Answer\ns,q,A\n", "no column for options, answer; the columns are: 'Story', 'QUESTION', 'Gold Answer'"),
        ("x.csv", "story,question,a,b,answer\ns,q,x,y,A,too many\n", "x.csv:2: more cells than the 5 columns"),
    ],
)  # fmt: skip
def test_broken_files_are_named_with_their_line(tmp_path, name, text, message):
    with pytest.raises(ValueError) as error:
        read_benchmark(write(tmp_path, name, text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_measures_by_hand():
    hard, control = (Problem("s", "q", ("a", "b"), "A", "belief", variant=v) for v in ("hard", "control"))
    whole = "Cue Encoding: x\nCue Interpretation: y\nGoal Clarification: z\nResponse Generation: w"
    records = [
        measure(hard, f"<think>{whole}</think><Answer>A</Answer>", 10),  # right
        measure(hard, f"<think>Option B.\n{whole}</think><Answer>B</Answer>", 20),  # wrong, and named an option first
        measure(control, "<think>Cue Encoding: x</think><Answer>A</Answer>", 30),  # right, one stage
        measure(control, "<think>Cue Encoding: x</think><Answer>A</Answer> so", 40),  # right, but not well-formed
        measure(control, "no idea", 50),  # nothing to read: wrong
    ]
    result = summarise(records)
    assert result.pop("by_ability") == {"belief": 0.6} and len(result.pop("responses")) == 5
    assert result == pytest.approx({
        "n": 5, "accuracy": 0.6, "parse_rate": 0.6, "hard": 0.5, "control": 2 / 3,
        "shortcut_gap": 2 / 3 - 0.5, "stage_order": 0.4, "option_early": 0.2, "length": 30.0,
    })  # fmt: skip
    assert re.search(r"shortcut gap +0\.167\n", table({"before": summarise(records)}))
    only = summarise(records[:1])
    assert only["control"] is None and only["shortcut_gap"] is None


def test_the_command_line_fails_in_one_line(tmp_path, command):
    bad = write(tmp_path, "bad.jsonl", "{")
    for arguments, message in [
        (["--bogus"], "error: unrecognized arguments: --bogus; see --help"),
        (["--model", str(tmp_path / "none")], f"error: {tmp_path}/none: no such model folder"),
        (["--data", str(bad)], f"error: {bad}:1: not JSON"),
        (["--data", str(tmp_path / "none.jsonl")], f"error: {tmp_path}/none.jsonl: No such file"),
    ]:
        code, _, err = command(eval.main, *arguments)
        assert code == 2 and err.startswith(message) and err.count("\n") == 1, err
