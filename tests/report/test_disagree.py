"""The problems on which two runs disagree."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_runs import add_evaluation, make_run, two_runs

from cera_train.report.disagree import disagree


def test_it_shows_counts_and_every_problem_that_one_run_solves(tmp_path: Path, capsys) -> None:
    disagree(*two_runs(tmp_path))
    shown = capsys.readouterr().out
    for line in (
        "only A      12",
        "only B      9",
        "A           cera_64: CeRA r=64",
    ):
        assert line in shown
    assert "verdict     not shown" in shown
    assert re.findall(r"^--- \d+ of 21: (id\d+) ", shown, re.MULTILINE) == [f"id{n:03}" for n in range(10, 31)]
    assert max(map(len, shown.splitlines())) <= 100
    block = shown.split("id010 ")[1].split("---\n")[1]
    assert block.splitlines()[:3] == [
        "What is 10 + 1?",
        "gold: 11",
        f"{'A, right: cera_64':<48} | B, wrong: lora_512",
    ]
    assert f"{'answer: 11':<48} | answer: 7" in block
    assert f"{'#### 11':<48} | #### 7" in block


def test_long_generations_are_wrapped_into_their_columns(tmp_path: Path, capsys) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    words = " ".join(["a rather long line of reasoning"] * 10) + " {n}\n" + "x" * 200
    add_evaluation(first, solved={0}, problems=1, text=words, question="why " * 60 + "{n}")
    add_evaluation(second, solved=set(), problems=1, text="short {n}", question="why " * 60 + "{n}")
    disagree(first, second)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    left = " ".join(line[:48].strip() for line in shown.splitlines() if line[48:50] == " |")
    assert left.count("rather long line") == 10
    assert left.count("x") >= 200


def test_a_task_must_be_chosen_where_there_are_several(tmp_path: Path, capsys) -> None:
    first, second = two_runs(tmp_path)
    for run in (first, second):
        add_evaluation(run, "gsm8k", solved={1})
    for task in (None, "mmlu"):
        with pytest.raises(
            ValueError, match="answers of both cera_64 and lora_512: gsm8k, math: choose one with --task"
        ):
            disagree(first, second, task)
    disagree(first, second, "gsm8k")
    assert "only A      0" in capsys.readouterr().out


def test_a_folder_of_several_runs_is_refused(tmp_path: Path) -> None:
    two_runs(tmp_path / "sweep")
    with pytest.raises(ValueError, match="hold 3 runs: disagree takes two, one on each side"):
        disagree(tmp_path / "sweep", make_run(tmp_path / "third"))


def test_what_a_model_wrote_does_not_steer_the_terminal(tmp_path: Path, capsys) -> None:
    first, second = make_run(tmp_path / "a\x1b[31m"), make_run(tmp_path / "b")
    add_evaluation(first, solved={0}, problems=1, text="\x1b[2J\x07 {n}\r", question="\x1b[1mWhat? {n}")
    add_evaluation(second, problems=1, text="{n}", question="\x1b[1mWhat? {n}")
    grades = first / "eval/gsm8k/grades.jsonl"
    grades.write_text(json.dumps(json.loads(grades.read_text()) | {"answer": "\x1b]0;title\x07"}) + "\n")
    disagree(first, second)
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", capsys.readouterr().out) is None
