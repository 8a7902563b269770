"""The files of a report, what the terminal shows, and what the report refuses to compare."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from made_runs import add_evaluation, cells, make_run, two_runs

from cera_train.report.page import compare_runs, print_report, write_report


@pytest.mark.slow
def test_the_same_runs_give_the_same_report_byte_for_byte(tmp_path: Path) -> None:
    runs = two_runs(tmp_path / "runs")
    for name in ("one", "other"):
        write_report(runs, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_the_terminal_shows_table_tests_and_notes_as_plain_text(tmp_path: Path, capsys) -> None:
    runs = [*two_runs(tmp_path), make_run(tmp_path / "unfinished", finished=False)]
    print_report(write_report(runs, tmp_path / "report"), tmp_path / "report")
    shown = capsys.readouterr().out
    assert re.search(r"cera_64 +CeRA +64 +27,262,976 +1\.850 +55\.0%", shown)
    assert re.search(r"lora_512 - cera_64 +MATH, verified +not shown +-7\.5 +-\d+\.\d to \+\d+\.\d +0\.66", shown)
    assert "unfinished is unfinished (update 50)." in shown
    assert f"report      {tmp_path}/report/report.html" in shown
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 100
    assert "\x1b" not in shown
    assert not any(line.endswith(" ") for line in shown.splitlines())


def test_a_report_of_real_runs(tiny_config, tmp_path: Path) -> None:
    from cera_train.training.train import train

    for kind in ("cera", "lora"):
        train(tiny_config(f"adapter={kind}", "adapter.r=4", f"name={kind}", "train.max_updates=4"))
    report = write_report([tmp_path / "outputs"], tmp_path / "report")
    table = cells(tmp_path / "outputs")
    for index, kind in enumerate(("cera", "lora")):
        result = json.loads((tmp_path / "outputs" / kind / "result.json").read_text())
        assert table["perplexity"][index].startswith(f"{result['eval/perplexity']:.3f}")
        assert table["parameters"][index].startswith(f"{result['trainable_parameters']:,}")
    assert report.tables[-1].rows == [{"setting": "adapter.kind", "cera": "cera", "lora": "lora"}]


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(ValueError, match="expected a folder"):
        write_report([make_run(tmp_path / "a")], tmp_path / "report")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/opt/bin/cera-train", "data.prompt=Q: {q}"], "cera-train 'data.prompt=Q: {q}'"),
        (["/src/cera_train/__main__.py", "name=a"], "python -m cera_train name=a"),
        (None, "not on record"),
    ],
)
def test_the_command_of_a_run_is_shown(tmp_path: Path, words: list[str] | None, command: str) -> None:
    run = make_run(tmp_path / "a")
    (run / "environment.json").write_text(json.dumps({"command": words} if words else {}))
    write_report([run], tmp_path / "report")
    assert f"<code>{command}</code>" in unescape((tmp_path / "report/report.html").read_text())


# --- what stands in the way of a comparison --------------------------------------------------------------------------


def two(folder: Path, **changes: object) -> list[Path]:
    """Two runs; `changes` are settings of the second."""
    return [make_run(folder / "a"), make_run(folder / "b", **changes)]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"data.loss_on": "completion"}, "evaluation rows or tokens (data.loss_on), and cannot be ranked: a | b."),
        ({"model.quantization": "nf4"}, "base models: a: meta-llama/Llama-3.1-8B, bfloat16; b: meta-llama/Llama-3.1-8B,"
                                        " bfloat16, nf4."),
        ({"train.probe_tokens": 2048}, "Spectra are taken on probes of different size: a | b."),
    ],
)  # fmt: skip
def test_what_cannot_be_ranked_is_named(tmp_path: Path, changes: dict, note: str) -> None:
    assert compare_runs(two(tmp_path, **changes)).notes[0].endswith(note)


@pytest.mark.parametrize("changes", [{"data.train_rows": 1000}, {"data.later_key": None}, {"optimizer.lr": 1e-3}])
def test_what_changes_no_evaluation_row_needs_no_note(tmp_path: Path, changes: dict) -> None:
    assert len(compare_runs(two(tmp_path, **changes)).notes) == 1  # that no run has an evaluation


def test_machines_and_settings_of_evaluations_that_differ_are_named(tmp_path: Path) -> None:
    runs = two(tmp_path)
    for run, gpus in zip(runs, ([], ["NVIDIA H100"]), strict=True):
        (run / "environment.json").write_text(json.dumps({"gpus": gpus, "cpu_threads": 2, "processes": 1}))
    add_evaluation(runs[0])
    add_evaluation(runs[1], **{"task.max_new_tokens": 256})
    machines, settings = compare_runs(runs).notes
    assert machines.endswith("a: CPU, 2 threads, 1 process; b: NVIDIA H100, 1 process.")
    assert settings == "Evaluations on GSM8K differ in their settings: task.max_new_tokens 512 and 256."


def test_accuracies_on_different_problems_are_named_and_not_tested(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run, problems in zip(runs, (40, 30, 40), strict=True):
        add_evaluation(run, problems=problems)
    notes = compare_runs(runs).notes
    assert notes[0] == "Accuracies on GSM8K are of different problems: a, c | b."
    assert "GSM8K, a and b: evaluated on different problems (40 and 30, 30 of them shared)" in notes[1]


def test_perplexities_of_a_task_on_different_rows_are_named(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run, window in zip(runs, (1024, 512, 1024), strict=True):
        folder = run / "eval/forgetting"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"task: {{kind: text, name: forgetting, window: {window}}}\n")
        (folder / "result.json").write_text('{"task": "forgetting", "kind": "perplexity", "perplexity": 12.0}')
    (note,) = compare_runs(runs).notes
    assert note.startswith("The perplexities of task forgetting are on different rows")
    assert note.endswith("a, c | b.")


@pytest.mark.parametrize("name", ["problems.jsonl", "grades.jsonl"])
def test_a_broken_file_of_an_evaluation_stops_its_test_and_is_named(tmp_path: Path, name: str) -> None:
    first, second = two_runs(tmp_path)
    for content in ("null\n", "{}\n", ""):
        (first / "eval/math" / name).write_text(content)
        report = compare_runs([first, second])
        assert [table.title for table in report.tables] == ["Runs", "Settings"]
        assert any(re.search(rf"{name}:1 is broken|has no grades for", note) for note in report.notes)
