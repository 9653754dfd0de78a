"""Readers on rows written for these tests in the formats of the original files, and the measures by hand."""

import json
import os
import re
import shutil
import subprocess
import sys

from pathlib import Path

import numpy as np
import pytest
import torch

import eval
from eval import (
    compare_rows,
    contamination_note,
    estimate,
    evaluate,
    interval,
    lenient_answer,
    measure,
    read_benchmark,
    read_all,
    read_files,
    split_sentences,
    read_result,
    report_page,
    spread_problems,
    summarise,
    aligned,
    table_rows,
)
from model import Tokenizer, generate, generate_stream, load_model
from rewards import RewardConfig, load_content_model
from socialr1 import TINY, TINY_CONTENT, Problem, build_messages, generate_problems


def write(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path):
    problems, notes = read_files(path, None, "en", set())
    return {problem.source.partition("/")[0] for problem in problems}, problems, notes


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------- one column for each part


def tombench_row(**changes):
    row = {
        "能力\nABILITY": "Belief: Content false beliefs ",
        "序号\nINDEX": 1,
        "故事": "小李把球放进盒子。",
        "问题": "球在哪里？",
        "选项A": "A. 盒子",
        "选项B": "B.袋子",
        "选项C": "C: 罐子",
        "选项D": "D.  桌上",
        "STORY": " Li put a ball in the box. ",
        "QUESTION": "Where is the ball? ",
        "OPTION-A": "A. Box",
        "OPTION-B": "B.Bag",
        "OPTION-C": "C: Jar",
        "OPTION-D": "(D) Table",
        "答案\nANSWER": "A",
    }
    return json.dumps(row | changes, ensure_ascii=False)


def test_tombench_in_both_languages(tmp_path):
    nan = float("nan")
    rows = [
        tombench_row(),
        "",
        tombench_row(
            **{
                "选项C": nan,
                "选项D": nan,
                "OPTION-C": nan,
                "OPTION-D": nan,
                "答案\nANSWER": "B. ",
                "类型": nan,
            }
        ),
        tombench_row(
            **{"选项C": nan, "选项D": nan}
        ),  # four options in English only: that question belongs to another story
    ]
    path = write(tmp_path, "False Belief Task.jsonl", "\n".join(rows))
    names, problems, notes = read(path)
    assert names == {"tombench"} and sorted(notes) == [
        f"{path}: 1 left out: its English question may belong to another story: the Chinese one is yes or no (row 4)",
        f"{path}: 1 repaired: more than a letter as answer (row 3)",
        f"{path}: 2 repaired: a letter before an option's text (rows 1, 3)",
        f"{path}: 2 repaired: blanks around a text (rows 1, 3)",
    ]
    assert problems == read_benchmark(path)
    assert problems[0] == Problem(
        "Li put a ball in the box.",
        "Where is the ball?",
        ("Box", "Bag", "Jar", "Table"),
        "A",
        "belief",
        "tombench/False Belief Task",
        "False Belief Task:1",
    )
    assert (problems[1].options, problems[1].answer, problems[1].id) == (
        ("Box", "Bag"),
        "B",
        "False Belief Task:3",
    )
    chinese = read_benchmark(path, lang="zh")
    assert [len(p.options) for p in chinese] == [4, 2, 2]
    assert (
        chinese[0].options == ("盒子", "袋子", "罐子", "桌上")
        and chinese[0].story == "小李把球放进盒子。"
    )


def test_our_jsonl_and_folders(tmp_path):
    row = {
        "story": "s",
        "question": "q",
        "options": ["A. a b", "B. c"],
        "answer": "b",
        "ability": "desire",
        "source": "x",
        "id": "7",
        "variant": "hard",
    }
    write(tmp_path, "one.jsonl", b"\xef\xbb\xbf" + json.dumps(row).encode())
    write(
        tmp_path,
        "below/two.jsonl",
        json.dumps(row | {"answer": "a b", "options": ["a b", "B. c"]}) + "\n",
    )
    write(tmp_path, "notes.txt", "no benchmark")
    write(tmp_path, "settings.json", '{"a": 1}')
    names, problems, notes = read(tmp_path)
    assert sorted(p.answer for p in problems) == ["A", "B"] and names == {"x"}
    assert f"{tmp_path}/settings.json: left out: no rows; expected one problem a row" in notes
    assert Problem("s", "q", ("a b", "c"), "B", "desire", "x", "7", "hard") in problems
    unnamed = {key: row[key] for key in ("story", "question", "options", "answer")}
    (problem,) = read_benchmark(write(tmp_path, "three.jsonl", lines(unnamed)))
    assert (problem.source, problem.id) == ("problems/three", "three:1")


def test_tombench_hard_csv(tmp_path):
    text = '\ufeffStory,QUESTION,Option_A,option-b,OPTION C,"Option\nD",Answer,Category\n"s\nt",q,A. a,B) b,nan,,"b",Belief\n'
    (problem,) = read_benchmark(write(tmp_path, "hard.csv", text))
    assert (problem.story, problem.options, problem.answer, problem.ability) == (
        "s\nt",
        ("a", "b"),
        "B",
        "belief",
    )
    assert problem.source == "tombench-hard/hard"
    same = 'STORY,QUESTION,OPTION-A,OPTION-B,OPTION-C,OPTION-D,"答案\nANSWER",source\ns,q,A.I. is clever,NaN,no,nan,A,annotator 7\n'
    (problem,) = read_benchmark(
        write(tmp_path, "val.csv", same.replace("NaN", "yes"))
    )  # not ToMBench, and the annotator is no benchmark
    assert (problem.source, problem.options) == (
        "tombench-hard/val",
        ("A.I. is clever", "yes", "no"),
    )
    ours = "story,question,options,answer,id,trace\ns,q,\"['x', 'y']\",B,7,because\n"
    (problem,) = read_benchmark(write(tmp_path, "ours.csv", ours))
    assert (problem.source, problem.id, problem.trace) == ("problems/ours", "7", "because")
    listed = (
        "context,question,choices,label\n" + "s,q,\"['x', 'y']\",1\n" + "s,q,\"['x', 'y']\",0\n"
    )
    assert [p.answer for p in read_benchmark(write(tmp_path, "list.csv", listed))] == [
        "B",
        "A",
    ]  # a 0 stands in the file


def test_socialiqa_with_labels_beside_it_or_in_the_row(tmp_path):
    row = {
        "context": "Ann helped Bo.",
        "question": "Why?",
        "answerA": "to be kind",
        "answerB": "to win",
        "answerC": "no reason",
    }
    path = write(tmp_path, "dev.jsonl", lines(row, row, row))
    with pytest.raises(ValueError, match="no column for answer; the columns are: 'context'"):
        read_benchmark(path)
    labels = write(tmp_path, "dev-labels.lst", "3\n1\n2\n")
    names, problems, _ = read(path)
    assert names == {"socialiqa"} and [p.answer for p in problems] == ["C", "A", "B"]
    assert (
        problems[0].options == ("to be kind", "to win", "no reason")
        and problems[0].story == "Ann helped Bo."
    )
    labels.write_text("3\n1\n")
    with pytest.raises(ValueError, match="2 answers for 3 rows"):
        read_benchmark(path)
    hub = write(tmp_path, "hub.jsonl", lines(row | {"label": "1\n"}, row | {"label": "3"}))
    assert [p.answer for p in read_benchmark(hub)] == ["A", "C"]
    zero_based = write(tmp_path, "zero.jsonl", lines(row | {"label": 0}, row | {"label": 2}))
    assert [p.answer for p in read_benchmark(zero_based)] == ["A", "C"]
    as_csv = write(
        tmp_path, "rows.csv", "context,question,answerA,answerB,answerC,label\ns,q,x,y,z,3\n"
    )
    assert [(p.source, p.answer) for p in read_benchmark(as_csv)] == [("socialiqa/rows", "C")]
    letters = write(tmp_path, "v14.jsonl", lines(row | {"correct": "B"}))
    assert [p.answer for p in read_benchmark(letters)] == ["B"]
    write(tmp_path, "whole/dev.jsonl", lines(row | {"label": "1"}))
    train, tests = (
        write(tmp_path, "whole/train.jsonl", lines(row | {"label": "2"})),
        write(tmp_path, "whole/test.jsonl", lines(row)),
    )
    _, problems, notes = read(tmp_path / "whole")
    assert [p.answer for p in problems] == ["A"] and read_benchmark(train)[0].answer == "B"
    columns = "'context', 'question', 'answerA', 'answerB', 'answerC'"
    assert notes == [
        f"{tests}: left out: no column for answer; the columns are: {columns}",
        f"{train}: left out: the training split; name the file to read it",
    ]


# ------------------------------------------------------------------------------------------------------- formats of their own


def gold(problem):
    return problem.options["ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(problem.answer)]


def test_emobench(tmp_path):
    eu = {
        "qid": "7",
        "language": "en",
        "coarse_category": "emotional_cues",
        "finegrained_category": "x",
        "scenario": "Ann lost a cup.\n",
        "subject": "Ann",
        "emotion_choices": ["Joy", "Anger", "Joy & Anger", "Fear", "Pride", "Guilt"],
        "emotion_label": "Joy & Anger",
        "cause_choices": ["The cup, old, was gone", "No cup", "A cup", "Her cup"],
        "cause_label": "A cup",
    }
    zh = eu | {"language": "zh", "subject": "安"}
    names, problems, notes = read(write(tmp_path, "EU.jsonl", lines(eu, zh)))
    assert names == {"emobench"} and len(problems) == 2
    emotion, cause = problems
    assert (
        gold(emotion) == "Joy & Anger"
        and gold(cause) == "A cup"
        and set(cause.options) == set(eu["cause_choices"])
    )
    assert (
        emotion.joint == cause.joint == "EU:en:7"
        and emotion.id != cause.id
        and emotion.story == "Ann lost a cup."
    )
    assert "Ann" in emotion.question and "Ann" in cause.question
    assert f"{tmp_path}/EU.jsonl: 1 left out: in the other language (row 2)" in notes
    assert "安" in read_benchmark(tmp_path / "EU.jsonl", lang="zh")[0].question
    many = [
        eu | {"qid": str(i), "cause_label": "The cup, old, was gone"} for i in range(200)
    ]  # always the first, as in the Chinese file
    letters = [
        p.answer
        for p in read_benchmark(write(tmp_path, "many.jsonl", lines(*many)))
        if p.id.endswith("cause")
    ]
    assert all(25 <= letters.count(letter) <= 75 for letter in "ABCD")
    ea = {
        "qid": "7",
        "language": "en",
        "category": "Social-Self",
        "question type": "Action",
        "scenario": "Ann lost a cup.",
        "subject": "Ann",
        "choices": ["Run", "Call, then wait", "Sing", "Sleep"],
        "label": "Call, then wait",
    }
    (problem,) = read_benchmark(write(tmp_path, "EA.jsonl", lines(ea)))
    assert (
        gold(problem) == "Call, then wait"
        and problem.joint == ""
        and problem.source == "emobench/EA"
    )


def test_motivebench(tmp_path):
    row = {"idx": 3}
    for place, kind in enumerate(("Motivation", "Behavior", "Motivation and Behavior"), start=1):
        row |= {
            f"{kind} Reasoning Question": f"Ann runs {place}. She sweats. What is it?"
            if place < 3
            else "Ann runs 3.",
            f"Options {place}": [f"{letter}. text {letter}. more" for letter in "ABCDEF"],
            f"Correct Answer {place}": "BCF"[place - 1],
        }
    names, problems, _ = read(write(tmp_path, "Blog_questions.json", json.dumps([row], indent=4)))
    assert names == {"motivebench"} and [gold(p) for p in problems] == [
        "text B. more",
        "text C. more",
        "text F. more",
    ]
    assert [(p.story, p.question) for p in problems] == [
        ("Ann runs 1. She sweats.", "What is it?"),
        ("Ann runs 2. She sweats.", "What is it?"),
        ("Ann runs 3.", "What is the most likely motivation and behavior?"),
    ]
    assert [p.ability for p in problems] == ["motivation", "behavior", "motivation and behavior"]


def test_hitom_reads_the_trustworthy_half(tmp_path):
    options = ", ".join(f"{letter}. {letter.lower()}_box" for letter in "ABCDEFGHIJKLMNO")
    row = dict(
        prompting_type="CoTP",
        deception=False,
        story_length=1,
        question_order=2,
        sample_id=0,
        question="Where?",
        choices=options,
        answer="c_box",
        story="1 Ann entered the hall.\n2 Ann left.\n***\n\n",
    )
    repeat = row | {
        "prompting_type": "VP",
        "sample_id": 300,
        "answer": "d_box",
        "story": "Read the following story.\n" + row["story"],
    }
    names, problems, notes = read(
        write(tmp_path, "Hi-ToM_data.json", json.dumps({"data": [row, repeat]}))
    )
    assert names == {"hitom"} and len(problems) == 1
    assert (
        problems[0].story == "1 Ann entered the hall.\n2 Ann left."
        and len(problems[0].options) == 15
        and problems[0].answer == "C"
    )
    assert (
        problems[0].ability == "order 2" and "Note:" in problems[0].question
    )  # questions on deception need the assumptions
    assert (
        f"{tmp_path}/Hi-ToM_data.json: 1 left out: repeats a CoTP row, some with a wrong answer (row 2)"
        in notes
    )


def test_tactfultom(tmp_path):
    def ask(name, question, right, wrong):
        return {
            "question": question,
            "question_type": "x",
            "correct_answer": right,
            "wrong_answer": wrong,
            "q_id": name,
        }

    row = {
        "full_context": "**Ann**: Hi.\n\n**Bo**: Hi.",
        "characters": {"liar": "Ann"},
        "comprehensionQA": [ask("c", "True?", "No", "Yes")],
        "justificationQA": [ask("j", "Why?", "Because, well, so", ["no", "yes", "or"])],
        "fact_reasonQA": [],
        "fact_truthQA": [],
        "lieabilityQAs": [ask("l", "Choose:", "x", ["y", "z", "w"])],
        "beliefQAs": [
            ask(
                "b0",
                "What does Ann believe about 'it'?",
                "Ann believes it",
                ["Ann is unaware", "Ann asks", "Ann forgot"],
            ),
            ask(
                "b1",
                "What does Bo believe about 'it'?",
                "Cy believes that Bo said it",
                ["Cy is unaware", "Cy asks", "Cy forgot"],
            ),
            ask(
                "b2",
                "What does Ann believe about Bo's belief?",
                "Ann believes so",
                "Ann is unaware",
            ),
        ],
    }
    names, problems, notes = read(write(tmp_path, "Tactful_conv_set_0.json", json.dumps([row])))
    assert names == {"tactfultom"} and {p.id: gold(p) for p in problems} == {
        "j": "Because, well, so",
        "l": "x",
        "b0": "Ann believes it",
        "b2": "Ann believes so",
    }
    assert {p.id: len(p.options) for p in problems} == {"j": 4, "l": 4, "b0": 4, "b2": 2}
    assert notes == [
        f"{tmp_path}/Tactful_conv_set_0.json: 1 left out: asks about one person, and all options speak of another (row 1)",
        f"{tmp_path}/Tactful_conv_set_0.json: 1 left out: yes/no, or a list of names: no options to choose from (row 1)",
    ]


def test_simpletom(tmp_path):
    rows = [
        {
            "id": f"cup_sev1_{kind}",
            "story": "The cup leaks. Ann buys it.",
            "question": "And then? ",
            "scenario_name": "x",
            "choices": {"text": ["Yes", "No"], "label": ["A", "B"]},
            "answerKey": "B",
        }
        for kind in ("aware", "action", "judge")
    ]
    for folder, row in zip(("mental-state-qa", "behavior-qa", "judgment-qa"), rows):
        write(tmp_path, f"{folder}/test.jsonl", lines(row))
    names, problems, _ = read(tmp_path)
    assert names == {"simpletom"} and all(gold(p) == "No" for p in problems)
    assert sorted(p.source for p in problems) == [
        "simpletom/behavior",
        "simpletom/judgment",
        "simpletom/mental state",
    ]
    many = lines(
        *({**rows[0], "id": f"{i}_aware"} for i in range(200))
    )  # the gold is always No, here always B
    letters = [p.answer for p in read_benchmark(write(tmp_path, "many.jsonl", many))]
    assert 70 <= letters.count("A") <= 130


def test_options_are_shuffled_by_the_item_and_not_by_its_place(tmp_path):
    row = {
        "qid": "1",
        "language": "en",
        "category": "c",
        "question type": "Action",
        "scenario": "s",
        "subject": "Ann",
        "choices": list("wxyz"),
        "label": "x",
    }
    first = read_benchmark(
        write(tmp_path, "one.jsonl", lines(row, row | {"qid": "2"}, row | {"qid": "3"}))
    )
    second = read_benchmark(write(tmp_path, "two.jsonl", lines(row | {"qid": "3"}, row)))
    assert [first[2].options, first[0].options] == [p.options for p in second]


GOOD = '{"story": "s", "question": "q", "options": ["a", "b"], "answer": "A"}\n'


def golds(tmp_path, *rows):
    """Read rows (options, answer) of our JSONL -> letters and options."""
    given = [
        dict(story=f"s{i}", question="q", options=options.split("|"), answer=answer)
        for i, (options, answer) in enumerate(rows)
    ]
    problems = read_benchmark(write(tmp_path, "x.jsonl", lines(*given)))
    return "".join(p.answer for p in problems), [p.options for p in problems]


@pytest.mark.parametrize(
    "rows, letters",
    [
        ((("1|2|3|4", 0), ("1|2|3|4", 2)), "AC"),  # a 0 is no text: places from 0
        ((("2|3", "1"), ("2|3", "2")), "AB"),  # a 1 is no text, two options: places from 1
        ((("a|b|c", 1), ("a|b|c", 3)), "AC"),
        ((("a|b|c", "1.0"), ("a|b|c", "0.0")), "BA"),  # as pandas writes whole numbers
        ((("10|20|30", "20"), ("10|20|30", "10")), "BA"),
        ((("a|b|c", "b"), ("b|a|c", "c")), "BC"),  # letters in order, and letters only
        ((("x|y", "B. y"), ("x|y", "(a)"), ("x|y", "b.")), "BAB"),
        ((("x|A. Smith", "A. Smith"), ("y|z", "z")), "BB"),
        ((("nan|mum|dad", "nan"), ("mum|nan", "nan")), "AB"),  # a word
        ((("A. yes|B. no", "A. yes"), ("box|bag", "bag")), "AB"),  # texts, as they stand
    ],
)
def test_what_answers_are_is_decided_for_the_whole_file(tmp_path, rows, letters):
    assert golds(tmp_path, *rows)[0] == letters


@pytest.mark.parametrize(
    "rows, message",
    [
        # from 0 or from 1: neither a 0 nor a 3 says so
        (
            (("a|b|c", 1), ("a|b|c", 2)),
            "x.jsonl:1: answers may be a place, counted from 1, or a place, counted from 0, which "
            "differ in rows [1, 2]; write them as letters",
        ),
        # the letter B, or the text "B" of option A
        (
            (("A|B|C", "C"), ("B|A|C", "B")),
            "x.jsonl:2: answers may be one letter or the text of exactly one option which differ",
        ),
        (
            (("sad|glad|sad", "glad"), ("sad|glad|sad", "sad")),
            "x.jsonl:2: answer 'sad' is the text of 2",
        ),
        (
            (("x|y", "B"), ("x|y", "A"), ("x|y", "y")),
            "x.jsonl:3: answer 'y' has no option: expected one letter of AB",
        ),
        ((("x|y", 0), ("x|y", 2)), "x.jsonl:"),  # three places for two options
        ((("2|2|4", "2"), ("1|3|4", "3")), "x.jsonl:1: answer '2' is the text of 2 options"),
    ],
)
def test_answers_that_stay_unclear_are_errors(tmp_path, rows, message):
    with pytest.raises(ValueError) as error:
        golds(tmp_path, *rows)
    assert message in str(error.value)


def test_options_lose_their_letters_all_or_none(tmp_path):
    rows = ("A. Smith|Jones", "A. x|(B) y|C) z", "A. A. Smith|B. B. Jones", "Ａ．是|Ｂ．不是")
    rows += ("A.M. x|B.C. y",)
    assert golds(tmp_path, *((options, "A") for options in rows))[1] == [
        ("A. Smith", "Jones"),
        ("x", "y", "z"),
        ("A. Smith", "B. Jones"),
        ("是", "不是"),
        ("A.M. x", "B.C. y"),
    ]


def test_a_bilingual_table_with_gaps(tmp_path):
    header = "故事,问题,选项A,选项B,STORY,QUESTION,OPTION-A,OPTION-B,答案\n"
    rows = [
        "一,问,甲,乙,one,q,x,y,A",
        ",,,,two,q,x,y,B",
        "三,问,甲,乙,,,,,B",
        "四,问,,,four,q,x,y,A",
    ]
    # ToMBench-Hard's CSV has four options
    header = header.replace("选项B", "选项B,选项C,选项D").replace(
        "OPTION-B", "OPTION-B,OPTION-C,OPTION-D"
    )
    rows = [r.replace("甲,乙", "甲,乙,丙,丁").replace("x,y", "x,y,nan,w") for r in rows]
    rows[1], rows[2] = ",," + rows[1], rows[2].replace(",,,,,", ",,,,,,,")
    rows[3] = rows[3].replace("问,,", "问,,,,")
    path = write(tmp_path, "hard.csv", header + "\n".join(rows) + "\n")
    problems, notes = read_files(path, None, "en", set())
    assert [p.story for p in problems] == ["one", "two", "four"]
    assert problems[0].options == ("x", "y", "nan", "w")
    assert notes == [f"{path}: 1 left out: has no question in 'en' (row 4)"]
    problems, notes = read_files(path, None, "zh", set())
    assert [p.story for p in problems] == ["一", "三"]
    assert notes == [f"{path}: 2 left out: has no question in 'zh' (rows 3, 5)"]


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Ann met Mr. Hale. Will he go?", ["Ann met Mr. Hale.", "Will he go?"]),
        ("It ends. What will Mr. Hale do?", ["It ends.", "What will Mr. Hale do?"]),
        ("J. R. Smith left. Why?", ["J. R. Smith left.", "Why?"]),
        ("He met Dr. Wu, e.g. at St. Ann's. Why?", ["He met Dr. Wu, e.g. at St. Ann's.", "Why?"]),
        ("A man. What makes “Mr. Hale” go?", ["A man.", "What makes “Mr. Hale” go?"]),
        ('A man. Who says "Help! My Dog"?', ["A man.", 'Who says "Help! My Dog"?']),
        ("A man. Will MR. HALE see Maj. Wu?", ["A man.", "Will MR. HALE see Maj. Wu?"]),
        ("One! Two?  Three.", ["One!", "Two?", "Three."]),
        ("At 7 a.m. What now?", ["At 7 a.m. What now?"]),  # unclear: nothing is cut
        ("", [""]),
    ],
)
def test_where_sentences_end(text, sentences):
    assert split_sentences(text) == sentences


def test_links_hide_no_file(tmp_path):
    row = lines(dict(story="s", question="q", options=["a", "b"], answer="A"))
    write(tmp_path, "hub/blobs/abc123", row)
    snapshots = tmp_path / "hub" / "snapshots"
    snapshots.mkdir()
    (snapshots / "test.jsonl").symlink_to("../blobs/abc123")  # as Hugging Face's cache has them
    assert [p.source for p in read_benchmark(tmp_path / "hub")] == ["problems/test"]
    folder = tmp_path / "siqa"
    row = dict(context="s", question="q", answerA="a", answerB="b", answerC="nan")
    write(folder, "z/dev.jsonl", lines(row))
    write(folder, "z/dev-labels.lst", "3\n")
    (folder / "a_train.jsonl").symlink_to("z/dev.jsonl")
    (problem,) = read_benchmark(folder)
    assert problem.answer == "C" and problem.options[2] == "nan"
    write(tmp_path, "alone/hard.csv", "narrative,q\ns,q\n")
    with pytest.raises(ValueError, match="hard.csv: left out: no column for story.*'narrative'"):
        read_benchmark(tmp_path / "alone")


def test_folders_as_people_have_them(tmp_path):
    row = lines(dict(story="s", question="q", options=["a", "b"], answer="A"))
    data, other = tmp_path / "data", tmp_path / "other"
    for name in (".git/x.jsonl", ".ipynb_checkpoints/x.jsonl", "__MACOSX/x.jsonl", "._one.jsonl"):
        write(data, name, "no JSON")
    write(data, "one.jsonl", row)
    write(data, "list.json", '["a"]')
    write(data, "broken.json", "{")
    write(data, "old.jsonl.gz", b"\x1f\x8b")
    write(data, "table.parquet", b"PAR1")
    write(other, "two.jsonl", row)
    (data / "linked").symlink_to(other)
    (data / "again.jsonl").symlink_to(data / "one.jsonl")
    (other / "loop").symlink_to(data)
    (data / "nowhere.jsonl").symlink_to(tmp_path / "nothing")
    problems, notes = read_files(data, None, "en", set())
    assert sorted(p.source for p in problems) == ["problems/one", "problems/two"]
    notes = [note for note in notes if "again.jsonl: read already" not in note]
    left_out = {note.partition(": left out: ")[0].rpartition("/")[2]: note for note in notes}
    names = {"list.json", "broken.json", "old.jsonl.gz", "table.parquet", "nowhere.jsonl"}
    assert set(left_out) == names
    assert left_out["broken.json"].endswith(
        f"broken.json: left out: {data}/broken.json:1: not JSON: Expecting property "
        "name enclosed in double quotes"
    )
    assert left_out["table.parquet"].endswith("make .jsonl, .json or .csv of it")
    # reached twice: by two arguments
    assert len(read_all([other / "two.jsonl", data, data, data / "one.jsonl"], "en")) == 2
    # a benchmark's file that breaks off is an error, in a folder too
    write(data, "one.jsonl", row + "{")
    with pytest.raises(ValueError, match="one.jsonl:2: not JSON"):
        read_files(data, None, "en", set())
    with pytest.raises(ValueError, match="old.jsonl.gz:1: not UTF-8"):
        read_files(data / "old.jsonl.gz", None, "en", set())


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.jsonl", GOOD + "{broken\n", "x.jsonl:2: not JSON: Expecting"),
        (
            "x.jsonl",
            GOOD + GOOD.replace('"A"', '"C"'),
            "x.jsonl:2: answer 'C' has no option: expected one letter of AB",
        ),
        ("x.jsonl", GOOD + "[1]", "x.jsonl:2: expected a JSON object, got list"),
        ("x.jsonl", GOOD.encode() + b'{"story": "\xff"}', "x.jsonl:2: not UTF-8"),
        ("x.jsonl", "[" * 100_000, "x.jsonl:1: "),
        (
            "x.jsonl",
            GOOD.replace('["a", "b"]', '["a"]'),
            "x.jsonl:1: a problem needs 2 to 26 options, got 1",
        ),
        ("x.jsonl", GOOD.replace('["a", "b"]', '["a", "", "c"]'), "x.jsonl:1: option B is empty"),
        ("x.jsonl", GOOD.replace('"q"', '""'), "x.jsonl:1: the story or the question is empty"),
        ("x.jsonl", GOOD.replace('"s"', '"\\ud800"'), "x.jsonl:1: 'utf-8' codec can't encode"),
        (
            "x.jsonl",
            GOOD.replace('["a", "b"]', json.dumps(["o"] * 27)),
            "x.jsonl:1: a problem needs 2 to 26 options, got 27",
        ),
        ("x.jsonl", "", "x.jsonl: no rows"),
        (
            "x.csv",
            "Story,QUESTION,Gold Answer\ns,q,A\n",
            "no column for options, answer; the columns are: 'Story', 'QUESTION', 'Gold Answer'",
        ),
        (
            "x.csv",
            "story,question,a,b,answer\ns,q,x,y,A,too many\n",
            "x.csv:2: more cells than the 5 columns",
        ),
        (
            "x.csv",
            "story,question,a,b,c,opt d,answer\ns,q,x,y,z,w,A\n",
            "no column for options; the columns are: 'story', 'question', 'a', 'b', 'c', 'opt d'",
        ),
        (
            "x.jsonl",
            GOOD.replace('["a", "b"]', '{"a": 1}'),
            "x.jsonl:1: a problem needs 2 to 26 options, got 0",
        ),
        ("x.json", "[1, 2]", "x.json:1: expected a JSON object, got int"),
        ("x.json", "[\n{,", "x.json:2: not JSON: Expecting"),
        ("x.json", '{"qid": 1}', "x.json: no rows"),
        (
            "x.jsonl",
            '{"qid": "1", "language": "en", "emotion_choices": 5, "cause_choices": 5}',
            "x.jsonl:1: not a row of emobench: KeyError",
        ),
        (
            "x.json",
            '[{"full_context": 1, "beliefQAs": 3, "characters": {}}]',
            "x.json:1: not a row of tactfultom: TypeError",
        ),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, text, message):
    with pytest.raises(ValueError) as error:
        read_benchmark(write(tmp_path, name, text))
    assert message in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------------- measures

WHOLE = "Cue Encoding: x\nCue Interpretation: y\nGoal Clarification: z\nResponse Generation: w"


def answered(letter, think="Cue Encoding: x"):
    return f"<think>{think}</think><Answer>{letter}</Answer>"


def test_measures_by_hand():
    hard, control = (
        Problem(v, "q", ("a", "b"), "A", "belief", variant=v) for v in ("hard", "control")
    )
    records = [
        measure(hard, answered("A", WHOLE), 10),  # right
        measure(hard, answered("B", f"Option B.\n{WHOLE}"), 20),  # wrong, and named an option first
        measure(control, answered("A"), 30),  # right, one stage
        measure(control, answered("A") + " so", 40),  # right, but not well-formed
        measure(control, "no idea", 50),  # nothing to read: wrong
    ]
    result = summarise(records)
    assert result["by_ability"] == {"belief": 0.6} and len(result["responses"]) == 5
    expected = {
        "n": 5,
        "questions": 5,
        "accuracy": 0.6,
        "parse_rate": 0.8,
        "hard": 0.5,
        "control": 2 / 3,
        "shortcut_gap": 2 / 3 - 0.5,
        "stage_order": 0.4,
        "option_early": 0.2,
        "length": 30.0,
    }
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    expected = {"coverage": (1 + 1 + 0.25 + 0.25 + 0) / 5, "well_formed": 0.6, "length": 30}
    expected["first_option"] = 0.0  # of the one that names one, at the very beginning
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    assert re.search(
        r"shortcut gap +5 +0\.167", aligned(table_rows({"before": result, "after": result}))
    )
    only = summarise(records[:1])
    assert only["control"] is None and only["shortcut_gap"] is None


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B. the drawer", "B"),
        ("The answer is C.", "C"),
        ("(A) or (B)?\nI think it is option B, because he left.", "B"),
        ("A. the box\n\nthe drawer", "B"),  # an option's text, alone
        ("Option A, then option B.", None),  # two letters in one line
        ("Answer: B or C", None),
        ("Option B, I think", "B"),  # no letter of three options
        ("The answer is A, B or C", None),
        ("Option A is tempting.\nSince she left, A cannot be: the answer is B.", "B"),  # no list
        ("Either **A** or **B**: the answer is B", None),
        ("So \\boxed{B}", "B"),
        ("Option A.\nOption A, then option B.", "A"),  # so the line before it counts
        ("<think>x <answer>b</answer>", "B"),
        ("I do not know.", None),
        ("", None),
        ("\n" * 100_000, None),
    ],
)
def test_a_lenient_reading_takes_the_last_line_that_holds_one_answer(text, letter):
    problem = Problem("s", "q", ("the box", "the drawer", "the bag"), letter or "A")
    assert lenient_answer(text, problem) == letter
    record = measure(problem, text, 5)
    assert record["lenient"] == (letter is not None)
    assert record["correct"] == ("<answer>" in text)


def test_failures_are_counted_by_cause():
    problem = Problem("s", "q", ("a", "b"), "A")
    records = [
        measure(problem, answered("A"), 5) | {"item": 0},
        measure(problem, "A", 5) | {"item": 1},
        measure(problem, "<think> and so", 9, finished=False) | {"item": 2},
        measure(problem, answered("A"), 9, finished=False) | {"item": 3},  # at its very end
    ]
    result = summarise(records)
    found = {key: value for key, value in result["overall"].items() if key.startswith("fault")}
    assert {key: value for key, value in found.items() if value} == {
        "fault, cut off": 0.25,
        "fault, no think block": 0.25,
    }
    assert result["overall"]["lenient"] == 0.75 and result["accuracy"] == 0.5
    shown = {row[0]: row[2] for row in table_rows({"x": result})}
    assert shown["fault, cut off"] == "0.250" and "fault, two answers" not in shown
    assert shown["lenient"] == "0.750"
    counts = {row[0]: row[1] for row in table_rows({"x": result})}
    assert counts["accuracy"] == counts["length"] == "4"


def test_a_measure_counts_the_problems_that_have_it():
    problem = Problem("s", "q", ("the box", "the bag"), "A")
    texts = [
        answered("A"),
        answered("A"),
        "<think>Cue Encoding: option A</think><answer>A</answer>",
    ]
    result = summarise([measure(problem, text, 5) | {"item": i} for i, text in enumerate(texts)])
    rows = {row[0]: row[1:] for row in table_rows({"x": result})}
    assert rows["first option"][0] == "1" and rows["option early"] == ["3", "0.333"]


def test_where_an_option_is_first_named():
    problem = Problem("s", "q", ("a b c d", "no"), "A")
    think = "Cue Encoding: she saw it\nCue Interpretation: 'A, B! c d' it is\nResponse Generation: option B"
    assert measure(problem, answered("A", think), 1)["first_option"] == think.index("A, B!") / len(
        think
    )
    late = "Cue Encoding: she saw it\nResponse Generation: option B"
    assert measure(problem, answered("A", late), 1)["first_option"] == late.index("option B") / len(
        late
    )


def test_questions_that_only_count_together():
    def records(joint, *answers):
        return [
            measure(
                Problem("s", f"q{i}", ("a", "b"), "A", id=f"{joint}{i}", joint=joint),
                answered(a),
                5,
            )
            for i, a in enumerate(answers)
        ]

    result = summarise(
        records("one", "A", "A")
        + records("two", "A", "B")
        + records("three", "B", "B")
        + records("", "A")
    )
    assert (
        result["n"] == 4 and result["questions"] == 7 and result["accuracy"] == 0.5
    )  # one and the single question


def test_the_accuracy_of_samples_is_their_mean():
    problems = [Problem(f"s{i}", "q", ("a", "b", "c"), "A", id=str(i)) for i in range(3)]
    records = []
    for i, letters in enumerate(("AAB", "ABB", "xBA")):  # x: unreadable
        for k, letter in enumerate(letters):
            record = measure(problems[i], answered(letter), 5)
            records.append(record | {"item": i, "sample": k})
    result = summarise(records)
    assert (result["n"], result["questions"]) == (3, 3)
    assert result["accuracy"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    joint = [record | {"joint": "all"} for record in records]
    assert summarise(joint)["accuracy"] == 0.0  # in no sample are all three right


def test_macro_mean_over_benchmarks():
    right, wrong = (
        measure(Problem("s", "q", ("a", "b"), "A", source=source), answered(letter), 5)
        for source, letter in (("x/1", "A"), ("y/1", "B"))
    )
    result = summarise([right, right, right, wrong])
    assert (
        result["accuracy"] == 0.75
        and result["macro"] == 0.5
        and result["by_benchmark"] == {"x": 1.0, "y": 0.0}
    )


def test_bootstrap_draws_whole_stories():
    # Ten stories of ten questions, five all right and five all wrong: the mean of ten coins, standard error .158, as if there
    # were ten questions. Drawing questions instead would give .05.
    stories = [str(i) for i in range(10) for _ in range(10)]
    values = [float(i < 5) for i in range(10) for _ in range(10)]
    drawn = estimate(stories, values, [1] * 100)
    means = drawn[1:]
    assert drawn[0] == 0.5
    assert means.std() == pytest.approx(
        np.sqrt(0.25 / 10), rel=0.06
    ) and means.mean() == pytest.approx(0.5, abs=0.02)
    low, high = interval(drawn)
    assert (low, high) == (
        pytest.approx(0.2, abs=0.01),
        pytest.approx(0.8, abs=0.01),
    )  # quantiles of Binomial(10, 1/2) / 10
    assert interval(estimate(["a", "a"], [1.0, 0.0], [1, 1])) == [
        0.5,
        0.5,
    ]  # one story: nothing to draw from


def test_paired_differences():
    problems = [
        Problem(
            f"story {'abcdefghij'[i % 10]} {'abcdefgh'[i // 10]}",
            "q",
            ("a", "b"),
            "A",
            "belief",
            "x/1",
            str(i),
        )
        for i in range(80)
    ]

    def result(letters):
        return summarise(
            [measure(problem, answered(letter), 5) for problem, letter in zip(problems, letters)]
        )

    before, after = (
        result("A" * 40 + "B" * 40),
        result("A" * 30 + "B" * 10 + "A" * 40),
    )  # of 80, ten lost and forty won
    rows = {row[0]: row[1:] for row in compare_rows(before, after, ("before", "after"))}
    assert rows["accuracy"][:3] == ["80", "0.500", "0.875"] and rows["accuracy"][3].startswith(
        "0.375 ["
    )
    low, high = map(float, re.findall(r"-?\d\.\d+", rows["accuracy"][3])[1:])
    margin = 1.96 * np.sqrt(
        (50 / 80 - 0.375**2) / 80
    )  # of a paired difference; unpaired it would be 1.96 * .067 = .131
    assert (low, high) == (
        pytest.approx(0.375 - margin, abs=0.015),
        pytest.approx(0.375 + margin, abs=0.015),
    )
    half = result("A" * 40)  # of the first forty only
    assert {row[0]: row[1] for row in compare_rows(before, half, ("a", "b"))}["accuracy"] == "40"
    with pytest.raises(ValueError, match="a and b have no problem in common"):
        compare_rows(
            before, summarise([measure(Problem("s", "q", ("a", "b"), "A"), "", 1)]), ("a", "b")
        )


def test_the_macro_mean_of_benchmarks_is_less_uncertain_than_each():
    problems = [
        Problem(
            f"{'abcd'[i // 100]} {'abcdefghij'[i // 10 % 10] * 3} {'abcdefghij'[i % 10]}",
            "q",
            ("a", "b"),
            "A",
            source=f"{'wxyz'[i // 100]}/1",
        )
        for i in range(400)
    ]
    for order in ("ABABABAB", "ABBABAAB"):  # right ones at the same places, and at others
        records = [
            measure(problem, answered(order[i // 50]), 5) for i, problem in enumerate(problems)
        ]
        low, high = summarise(records)["intervals"]["overall"]["macro"]
        margin = 1.96 * np.sqrt(0.25 / 400)  # four means of a hundred each
        assert (low, high) == (
            pytest.approx(0.5 - margin, abs=0.006),
            pytest.approx(0.5 + margin, abs=0.006),
        )


def test_fewer_problems_keep_together_what_counts_together():
    pairs = [
        Problem(f"s{i // 2}", f"q{i % 2}", ("a", "b"), "A", source="x", joint=str(i // 2))
        for i in range(40)
    ]
    some = spread_problems(pairs, 10)
    assert (
        len(some) == 10 and [p.question for p in some] == ["q0", "q1"] * 5 and some[0] == pairs[0]
    )
    single = [Problem(f"s{i}", "q", ("a", "b"), "A") for i in range(7)]
    assert (
        spread_problems(single, 3) == [single[0], single[2], single[4]]
        and spread_problems(single, 99) == single
    )
    result = [
        summarise([measure(problem, answered("A"), 5) for problem in of])
        for of in (pairs, pairs[:1])
    ]  # half a pair is another question
    with pytest.raises(ValueError, match="no problem in common"):
        compare_rows(*result, ("a", "b"))


def test_stored_results_are_read_with_care(tmp_path):
    record = measure(
        Problem("s", "q", ("a", "b"), "A", "belief", "x/1", "7"),
        answered("A", "Cue Encoding: x"),
        5,
    )
    after = {
        "test": {"responses": [record]},
        "shift": {"responses": [record | {"text": answered("B")}]},
    }
    result = read_result(write(tmp_path, "after.json", json.dumps(after)))
    assert (result["n"], result["questions"], result["accuracy"]) == (2, 2, 0.5)
    for broken, message in [
        ({}, "no responses in it"),
        ({"responses": []}, "no responses in it"),
        ({"responses": 5}, "not a result"),
        ({"a": 5}, "not a result"),
        *(
            ({"responses": [record | {key: value}]}, "not a result of eval.py")
            for key, value in [
                ("gold", "<script>"),
                ("length", None),
                ("text", 5),
                ("story", None),
                ("options", [1, 2]),
                ("id", ["x"]),
                ("content", [5]),
            ]
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            read_result(write(tmp_path, "broken.json", json.dumps(broken)))
    with pytest.raises(ValueError, match="no such file; expected a result of eval.py"):
        read_result(tmp_path / "none.json")
    evil = record | {
        "answer": "<script>alert(1)</script>"
    }  # whatever stands there is found anew in the response
    assert "<script" not in report_page(
        {"a": read_result(write(tmp_path, "evil.json", json.dumps({"responses": [evil]})))}, []
    )


def test_contamination_sees_through_numbers_marks_and_case():
    seen = Problem("1 Ann LEFT,\n2 the hall.", "q", ("a", "b"), "A", source="x", id="7")
    other = Problem("Bo left the hall.", "q", ("a", "b"), "A")
    evaluation = [Problem("Ann left the hall", "another question", ("c", "d"), "B")]
    assert (
        contamination_note([seen, other], evaluation)
        == "WARNING: 1 of 2 training problems have a story of the evaluation data, as has x 7"
    )
    assert (
        contamination_note([other], evaluation)
        == "no story of the 1 training problems stands in the evaluation data"
    )


# ---------------------------------------------------------------------------------------------------------- whole evaluations


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY), Tokenizer(TINY)


def test_samples_are_those_of_generate_and_stages_are_scored(tiny):
    problems = generate_problems(6, 0, "test")
    result = evaluate(
        *tiny,
        problems,
        temperature=1.0,
        samples=2,
        max_new_tokens=120,
        seed=3,
        content=load_content_model(TINY_CONTENT),
    )
    prompts = [tiny[1].chat(build_messages(problem)) for problem in problems]
    groups = generate(tiny[0], prompts, 2, 120, 1.0, stop_ids=tiny[1].stop_ids, seed=3)
    expected = [
        tiny[1].completion_text(prompt, c.tokens)
        for prompt, group in zip(prompts, groups)
        for c in group
    ]
    assert [r["text"] for r in result["responses"]] == expected
    scorer = load_content_model(TINY_CONTENT)
    record = result["responses"][0]
    assert set(record["content"]) == {
        name for name, _ in eval.parse_response(record["text"], problems[0]).stages
    }
    rewards = scorer.rewards([problems[0]], [[eval.parse_response(record["text"], problems[0])]])
    assert np.mean(list(record["content"].values())) == pytest.approx(rewards[0][0], abs=1e-5)
    assert 0 < result["content, Cue Encoding"] < 1


def test_an_interrupted_evaluation_goes_on(tiny, tmp_path, monkeypatch):
    problems, journal = generate_problems(10, 0, "test"), tmp_path / "out.json.part"
    settings = dict(temperature=1.0, max_new_tokens=60, token_budget=400)
    whole = evaluate(*tiny, problems, **settings)
    calls = []

    def stream(model, prompts, **sampling):
        for prompt, completions in generate_stream(model, prompts, **sampling):
            calls.append(prompt)
            if len(calls) == 6:
                raise KeyboardInterrupt
            yield prompt, completions

    monkeypatch.setattr(eval, "generate_stream", stream)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*tiny, problems, **settings, journal=journal)
    with open(journal, "a") as file:
        file.write('[["torn')
    asked = set(calls[:5])
    entries = journal.read_text().splitlines(keepends=True)
    journal.write_text(
        "".join((*entries[:-1][::-1], entries[0], entries[-1]))
    )  # whatever the order, and twice
    resumed = evaluate(*tiny, problems, **settings | {"token_budget": 300}, journal=journal)
    assert resumed["responses"] == whole["responses"] and len(calls) == 5 + 1 + 5
    assert asked.isdisjoint(calls[6:])  # what was done is not done again
    settings["token_budget"] = 32768  # decides nothing but the pace
    for changes in (
        {"temperature": 0.5},
        {"seed": 1},
    ):  # what was asked otherwise is no answer to this
        calls.clear()
        expected = evaluate(*tiny, problems[:4], **settings | changes)
        calls.clear()
        other = evaluate(*tiny, problems[:4], **settings | changes, journal=journal)
        assert len(calls) == 4 and other["responses"] == expected["responses"]
    calls.clear()
    other = load_model(TINY)
    with torch.no_grad():
        other.embed_tokens.weight[7, 3] += 1e-3  # one weight of many
    evaluate(other, tiny[1], problems[:4], **settings, journal=journal)
    assert len(calls) == 4
    names = [
        eval.fingerprint(load_model(TINY, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert (
        eval.fingerprint(tiny[0]) == names[0] != names[1]
    )  # the same weights, in another precision
    calls.clear()
    assert (
        evaluate(*tiny, problems, **settings, journal=journal)["responses"] == whole["responses"]
        and not calls
    )
    first = entries[0]
    for line in ("no journal", "5", "[]", '[[["evil"]]]', '["name", [["text", "length"]]]'):
        journal.write_text(f"{first}{line}\n")
        with pytest.raises(ValueError, match="not an evaluation's journal"):
            evaluate(*tiny, problems, **settings, journal=journal)


def test_an_evaluation_that_goes_on_another_day_asks_the_same_questions(tiny, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%j') }} " + tiny[1].template)
    tokenizers, journal = [Tokenizer(folder) for _ in range(2)], tmp_path / "out.json.part"
    tokenizers[0].moment, tokenizers[1].moment = 0.0, 86400.0  # days 001 and 002
    problems = generate_problems(4, 0, "test")
    first = evaluate(tiny[0], tokenizers[0], problems, max_new_tokens=40, journal=journal)
    size = journal.stat().st_size
    again = evaluate(tiny[0], tokenizers[1], problems, max_new_tokens=40, journal=journal)
    assert again == first and journal.stat().st_size == size
    assert tokenizers[1].render([]).startswith("001")


def test_files_are_written_although_the_terminal_cannot_show_them(tmp_path):
    story = {"story": "s", "question": "q", "options": ["a", "b"], "answer": "A", "ability": "愿望"}
    write(tmp_path, "数据.jsonl", lines(story))
    names = [tmp_path / name for name in ("数据.jsonl", "out.json", "out.html")]
    flags = ("--data", names[0], "--json", names[1], "--report", names[2], "--max-new-tokens", "9")
    run = subprocess.run(
        [sys.executable, str(Path(eval.__file__)), *map(str, flags)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr
    assert b"?" in run.stdout and names[1].exists() and names[2].exists()


def test_a_result_carries_the_settings_of_its_rewards(tiny, tmp_path):
    problems = generate_problems(2, 0, "test")
    reward_config = RewardConfig(w_out=3.0, without="len,struct")
    result = evaluate(*tiny, problems, max_new_tokens=100, reward_config=reward_config)
    again = read_result(write(tmp_path, "a.json", json.dumps(result)))
    right, wrong = sorted(result["responses"], key=lambda record: record["correct"], reverse=True)
    assert (right["correct"], wrong["correct"]) == (True, False)  # the control and the hard story
    assert (right["reward"], wrong["reward"]) == (3.0, 0.0) and right["terms"]["fmt"] == 1.0
    assert [r["reward"] for r in again["responses"]] == [r["reward"] for r in result["responses"]]
    assert again["reward"] == result["reward"] == 1.5
    page = report_page({"a": again}, [])
    assert "<span>R 3.00</span><span>fmt 1.00</span>" in page


def test_other_instructions_are_asked_with(tiny):
    asked = []

    class Recorder:
        def __getattr__(self, name):
            return getattr(tiny[1], name)

        def chat(self, messages, thinking=True):
            asked.append(messages[0]["content"])
            return tiny[1].chat(messages, thinking)

    evaluate(
        tiny[0], Recorder(), generate_problems(1, 0), max_new_tokens=2, instructions="Be brief."
    )
    assert asked == ["Be brief."]


def test_the_page_is_text_and_nothing_else(tmp_path):
    evil = "<script>alert(1)</script> & <img src=x onerror=alert(2)> {{ names }}"
    problem = Problem(
        f"story {evil}",
        f"question {evil}",
        (f"option {evil}", "b"),
        "B",
        "belief",
        "x/<b>",
        f"id {evil}",
        "",
    )
    think = f"Cue Encoding: option A it is {evil}\nGoal Clarification: one two three four one two three four"
    before, after = (
        summarise([measure(problem, text, 40)])
        for text in (answered("A", think), f"not well-formed {evil}")
    )
    page = report_page({f"before {evil}": before, "after": after}, [table_rows({"before": before})])
    assert (
        "<script" not in page
        and "<img" not in page
        and "src=" not in page.replace("src=x onerror", "")
    )
    assert page.count("&lt;script&gt;") >= 6 and "http" not in page
    assert "<mark class=early>option A</mark>" in page
    assert "<mark class=again>one two three four</mark>" in page
    assert (
        page.index("before") < page.index("after") and 'class="s1"' in page and 'class="s3"' in page
    )
    assert page.count("<details") == page.count("</details") == 1
    lines = {f"reward{evil}": [(1, 0.5), (3, 1.5)], "absent": []}
    page = report_page({}, [], {"a chart": lines, "an empty one": {"kl": []}}, title="Run x")
    assert page.count("<polyline") == 1 and "an empty one" not in page and "<script" not in page
    # The x axis goes from 0 to the last step, the y axis from 0 to the largest value.
    assert 'points="33.33,66.67 33.33,66.67 100.00,0.00 "' in page
    assert "<h1>Run x</h1>" in page and "Trajectories" not in page and "http" not in page
    said = "Cue Encoding: he put the red ball away\nCue Interpretation: he put the red ball away\nGoal Clarification: 小明把红球放好。小明把红球放好。"
    page = report_page({"x": summarise([measure(problem, answered("B", said), 40)])}, [])
    assert (
        "<mark class=again>he put the red ball away</mark>" in page
        and "<mark class=again>小明把红球放好</mark>" in page
    )


def test_the_command_line(tmp_path, command):
    result, page = tmp_path / "a.json", tmp_path / "a.html"
    run = ["--limit", "4", "--json", result, "--max-new-tokens", "60"]
    code, out, _ = command(eval.main, *run, "--report", page)
    assert (
        code == 0
        and re.search(r"accuracy +4 +\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", out)
        and "content" not in out
    )
    assert len(json.loads(result.read_text())["responses"]) == 4 and "</html>" in page.read_text()
    assert not (tmp_path / "a.json.part").exists()
    code, out, _ = command(eval.main, "--compare", result, result, "--report", page)
    assert code == 0 and "0.000 [0.000, 0.000]" in out and page.read_text().count("<article>") == 8
    code, out, _ = command(eval.main, "--limit", "2", "--samples", "3", "--max-new-tokens", "60")
    assert code == 0 and re.search(r"accuracy +2 +\d\.\d{3} \[", out)
    story = generate_problems(1, 0, "test")[0].story.upper()
    row = {"story": story, "question": "q", "options": ["a", "b"], "answer": "A"}
    code, out, _ = command(eval.main, *run, "--train", write(tmp_path, "train.jsonl", lines(row)))
    assert code == 0 and "WARNING: 1 of 1 training problems have a story of the" in out


def test_the_command_line_fails_in_one_line(tmp_path, command):
    bad = write(tmp_path, "bad.jsonl", "{")
    for arguments, message in [
        (["--bogus"], "error: unrecognized arguments: --bogus; see --help"),
        (["--sample", "3"], "error: unrecognized arguments: --sample 3"),  # not --samples 3
        (["--model", str(tmp_path / "none")], f"error: {tmp_path}/none: no such model folder"),
        (["--data", str(bad)], f"error: {bad}:1: not JSON"),
        (["--data", str(tmp_path / "none.jsonl")], f"error: {tmp_path}/none.jsonl: No such file"),
        (["--samples", "0"], "error: --samples 0: expected a whole number, at least 1"),
        (["--dtype", "int8"], "error: argument --dtype: invalid choice: 'int8'"),
        (
            ["--report", str(tmp_path / "no" / "x.html")],
            f"error: {tmp_path}/no/x.html: expected the name of a file in a folder that exists",
        ),
        (["--compare", str(bad), str(bad)], f"error: {bad}: not readable as JSON"),
    ]:
        code, _, err = command(eval.main, *arguments)
        assert code == 2 and err.startswith(message) and err.count("\n") == 1, err
