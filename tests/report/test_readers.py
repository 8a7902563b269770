"""Results of other programs: what is read of them, compared, and refused by name."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from made_files import write_json
from made_runs import HOSTILE, make_run, write_lines

from cera_train.common.errors import UserError
from cera_train.report.comparison import paired_tests
from cera_train.report.page import compare_runs
from cera_train.report.readers import read_runs
from cera_train.report.readers.own import mean_spectrum

DATE = "2026-11-01T10-00-00.000001"


def lm_eval_folder(
    folder: Path, solved: set[int], filters: tuple[str, ...] = ("none",), **changes: Any
) -> Path:
    """A folder of lm-eval with 20 problems. `changes` are those of its results, and `prompts`,
    `dates`, `lines`."""
    prompts = changes.pop("prompts", "p")
    more = changes.pop("lines", {})
    date = changes.pop("date", DATE)
    place = folder / "org__model"
    rows = [
        {
            "doc_id": number,
            "filter": filter_name,
            "metrics": ["exact_match"],
            "doc_hash": f"{number:064}",
            "prompt_hash": prompts * 64,
            "target_hash": "t" * 64,
            "exact_match": float(number in solved),
        }
        | more
        for filter_name in filters
        for number in range(20)
    ]
    write_lines(place / f"samples_sums_{date}.jsonl", rows)
    results = {"results": {}, "n-shot": {"sums": 5}, "versions": {"sums": 1}} | changes
    write_json(place / f"results_{date}.json", results)
    return folder


def scores_file(path: Path, scores: dict[Any, Any]) -> Path:
    return write_lines(path, [{"problem": name, "score": score} for name, score in scores.items()])


# --- lm-eval --------------------------------------------------------------------------------------


def test_folders_of_lm_eval_are_paired_by_problem(tmp_path):
    folders = [
        lm_eval_folder(tmp_path / "a", {0, 1, 2}, ("strict", "flexible")),
        lm_eval_folder(tmp_path / "b", {2, *range(8, 16)}, ("flexible", "strict")),
    ]
    (test,), notes = paired_tests(read_runs(folders))
    assert notes == []
    assert (test.task, test.grader, test.problems) == ("sums exact_match", "strict", 20)
    assert test.only == (2, 8)
    assert test.difference == pytest.approx(6 / 20)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"n-shot": {"sums": 0}}, "shots differ: 5 and 0"),
        ({"versions": {"sums": 2}}, "versions of the task differ: 1 and 2"),
        ({"filters": ("flexible",)}, "the rules that graded them differ: none and flexible"),
        ({"lines": {"target_hash": "u" * 64}}, "different problems (20 and 20, 0 of them shared)"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(tmp_path, changes, note):
    folders = [
        lm_eval_folder(tmp_path / "a", {1}),
        lm_eval_folder(tmp_path / "b", {2}, **changes),
    ]
    tests, notes = paired_tests(read_runs(folders))
    assert not tests
    assert len(notes) == 1
    assert note in notes[0]


def test_other_prompts_are_a_caution(tmp_path):
    """Two models may have chat templates of their own."""
    folders = [
        lm_eval_folder(tmp_path / "a", {1}),
        lm_eval_folder(tmp_path / "b", {2}, prompts="q"),
    ]
    page = compare_runs(folders)
    assert len(page.tables[1].rows) == 1
    assert any("sums exact_match differ in prompts" in note for note in page.notes)


def test_the_newest_of_two_evaluations_counts(tmp_path):
    folder = lm_eval_folder(tmp_path / "a", set())
    lm_eval_folder(folder, set(range(10)), date="2026-11-02T10-00-00.000001")
    [run] = read_runs([folder])
    assert run.evaluations["sums exact_match"].figures.popitem()[1].value == 0.5


def test_metrics_that_are_no_scores_are_left_out_by_name(tmp_path):
    lines = {"metrics": ["bleu", "exact_match", "error"], "bleu": 37.5, "error": 0.5}
    directions = {"sums": {"bleu": True, "exact_match": True, "error": False}}
    folder = lm_eval_folder(tmp_path / "a", {1}, lines=lines, higher_is_better=directions)
    [run] = read_runs([folder])
    assert [*run.evaluations] == ["sums exact_match"]
    assert run.notes[0].endswith("better where it is higher: bleu, error.")


# --- scores by problem ----------------------------------------------------------------------------


def test_scores_of_any_program_are_paired_by_problem(tmp_path):
    first = scores_file(tmp_path / "a" / "sums.jsonl", {1: 0, "x": 0.5, "y": True})
    second = scores_file(tmp_path / "b" / "sums.jsonl", {"y": 1, "x": 1, "1": 0})
    (test,), notes = paired_tests(read_runs([first.parent, second.parent]))
    assert notes == []
    assert (test.first, test.second, test.task, test.grader) == ("a", "b", "sums", "score")
    assert test.difference == pytest.approx(1 / 6)


# --- bad input ------------------------------------------------------------------------------------


def test_a_file_too_deep_is_not_read(tmp_path):
    (tmp_path / f"samples_sums_{DATE}.jsonl").write_text("")
    (tmp_path / f"results_{DATE}.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is broken: recursion limit exceeded"):
        read_runs([tmp_path])


def test_a_bad_byte_is_named_by_its_line(tmp_path):
    (tmp_path / "scores.jsonl").write_bytes(b'{"problem": "\xe2\x80\xa8", "score": 1}\n"\xff"\n')
    with pytest.raises(UserError, match="scores.jsonl:2 is broken: .* byte 0xff"):
        read_runs([tmp_path])


def test_links_out_of_a_folder_and_pipes_are_not_followed(tmp_path):
    secret = scores_file(tmp_path / "secret" / "secret.jsonl", {"password": 1})
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(UserError, match="holds no results"):
        read_runs([folder])
    (folder / "sums.jsonl").symlink_to(secret)
    with pytest.raises(UserError, match="is a link to a file outside"):
        read_runs([folder])


def test_a_folder_of_several_formats_holds_several_runs(tmp_path):
    lm_eval_folder(tmp_path / "harness", {1})
    scores_file(tmp_path / "own" / "sums.jsonl", {1: 1, 2: 0})
    (tmp_path / "notes.txt").write_text("of no format")
    make_run(tmp_path / "cera")
    page = compare_runs([tmp_path])
    assert [row["run"] for row in page.tables[0].rows] == ["cera", "harness", "own"]
    assert page.tables[1].rows == []


def test_hostile_names_stay_text_inside_the_report(tmp_path, capsys):
    hostile = f"{HOSTILE}\x1b[31m/../../x"
    lines = {"metrics": [hostile], hostile: 1.0, "filter": hostile, "resps": [[hostile]]}
    folders = [lm_eval_folder(tmp_path / name, {1}, lines=lines) for name in "ab"]
    folders[1] = folders[1].rename(tmp_path / "<b>bold\x1b[1m\n")
    lm_eval_folder(folders[0], {1}, lines=lines, model_name=hostile)
    assert not any("/" in task for run in read_runs(folders) for task in run.evaluations)
    page = compare_runs(folders)
    page.write(tmp_path / "report")
    page.print(tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text()
    assert len(page.tables[1].rows) == 1
    assert not re.search("<b>|<script", html)
    assert "\x1b" not in html + capsys.readouterr().out


def test_the_mean_spectrum_is_over_modules_of_any_rank(tmp_path):
    path = tmp_path / "spectrum.json"
    path.write_text(
        '{"q_proj": {"singular_values": [3.0, 1.0]}, "v_proj": {"singular_values": [2.0]}}'
    )
    assert mean_spectrum(path) == [(0.75 + 1) / 2, 0.25 / 2]
