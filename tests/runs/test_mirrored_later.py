"""What is measured after a run's end reaches its W&B run: evaluations, answers, reports. And no failure comes back."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from evaluation_files import QUESTIONS
from made_runs import add_evaluation, make_run
from wandb_files import read_offline_run

from cera_train.evaluation.evaluate import evaluate
from cera_train.report.page import mirror_report, write_report
from cera_train.runs import tracking
from cera_train.runs.tracking import LONGEST_NAME, Guarded, Tracker, WandbTracker, send_to_run

pytest_plugins = ("evaluated_runs",)


class Recording(Tracker):
    """Keeps what it gets, with the name of the run that it belongs to."""

    def __init__(self, name: str, calls: list[tuple]) -> None:
        self.name, self.calls = name, calls

    def log(self, metrics, update):
        self.calls.append((self.name, "log", metrics, update))

    def table(self, name, rows, update):
        self.calls.append((self.name, name, rows, update))

    def page(self, name, path, update):
        self.calls.append((self.name, name, path.read_text(), update))


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """What trackers get."""
    calls: list[tuple] = []
    monkeypatch.setattr(tracking, "start_tracker", lambda config, tree, name, *_, **__: Recording(name, calls))
    return calls


DATA = {"data.prompt": "{question}", "data.completion": "{answer}"}


def track(run: Path) -> Path:
    """Makes a finished run one that W&B tracks."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["tracker"] = {"kind": "wandb"}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    (run / tracking.WANDB_ID).write_text("0123456789ab")
    return run


def test_an_evaluation_sends_figures_and_answers_once(eval_config, compose, run, calls):
    track(run)
    result = evaluate(eval_config())
    (_, _, figures, update), (name, table, rows, _) = calls
    assert (name, table, update) == ("run", "gsm8k/answers", 6)
    assert figures["gsm8k/exact/pass@1"] == result["exact/pass@1"]
    assert figures["gsm8k/problems"] == 8
    assert not [key for key in figures if "interval" in key or "kind" in key]
    assert [row["question"] for row in rows] == [question["question"] for question in QUESTIONS]
    assert [row["gold"] for row in rows] == ["3", "7", "15", "4", "15", "1001", "6", "18"]
    answers = [json.loads(line) for line in (run / "eval/gsm8k/generations.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [answer["text"] for answer in answers]
    assert sum(row["exact"] for row in rows) / 8 == result["exact/pass@1"]
    evaluate(eval_config())  # its result stands
    assert len(calls) == 2
    evaluate(compose(f"grade={run / 'eval' / 'gsm8k'}", command="eval"))
    assert len(calls) == 4


def test_the_best_adapter_is_measured_at_its_update(eval_config, run, calls):
    track(run)
    best = json.loads((run / "best" / "metrics.json").read_text())["update"]
    result = evaluate(eval_config(run=run / "best", task="perplexity"))
    ((_, _, figures, update),) = calls
    assert figures["perplexity-best/perplexity"] == result["perplexity"]
    assert update == best


def test_a_run_that_is_not_tracked_or_unfinished_gets_nothing(eval_config, run, calls, capsys):
    evaluate(eval_config())
    assert calls == []
    assert "wandb" not in capsys.readouterr().out
    track(run)
    (run / "result.json").unlink()
    evaluate(eval_config(run=run / "best"))
    assert calls == []
    assert f"{run} is unfinished: the evaluation gsm8k-best stays in its folder." in capsys.readouterr().out


class Failing(Tracker):
    finished: ClassVar[int] = 0

    def log(self, metrics, update):
        raise ConnectionError("the server is\ngone")

    def finish(self):
        Failing.finished += 1


@pytest.mark.parametrize("fails", ["W&B", "folder", "lock"])
def test_a_mirror_that_fails_leaves_the_evaluation_as_it_is(eval_config, run, monkeypatch, capsys, fails):
    expected = evaluate(eval_config(task="perplexity"))
    track(run)
    monkeypatch.setattr(tracking, "start_tracker", lambda config, *_, **__: Guarded(config.kind, Failing))
    if fails == "folder":
        (run / "wandb").symlink_to("/tmp")
    if fails == "lock":
        monkeypatch.setattr(tracking, "LOCK_SECONDS", 0)
        held = tracking.lock_folder(run, "run")
    result = evaluate(eval_config("name=again", task="perplexity"))
    assert result["perplexity"] == expected["perplexity"]
    assert (run / "eval" / "again" / "result.json").is_file()
    (line,) = capsys.readouterr().err.splitlines()
    assert {
        "W&B": "wandb failed and is left out (the server is gone)",
        "folder": "the evaluation again does not reach W&B (",
        "lock": "another run is writing to",
    }[fails] in line
    if fails == "lock":
        held.release()
    if fails == "W&B":
        assert Failing.finished == 1  # so that the process can open the run again


def test_a_report_reaches_every_tracked_run_in_it(tmp_path, calls):
    first, second, third = (make_run(tmp_path / name, **DATA) for name in ("first", "second", "third"))
    add_evaluation(first)
    for run in (first, third):
        track(run)
    mirror_report(write_report([first, second, third], tmp_path / "report"))
    assert [(name, kind, update) for name, kind, _, update in calls] == [
        ("first", "report", 100),
        ("third", "report", 100),
    ]
    assert calls[0][2] == (tmp_path / "report" / "report.html").read_text()
    assert not list(tmp_path.rglob(".lock"))


def test_long_names_are_cut_for_wandb_and_stay_apart():
    names = [f"{'adapter.r=4,' * 12}{ending}" for ending in ("a", "b")]
    short = [tracking._short(name) for name in names]
    assert {len(name) for name in short} == {LONGEST_NAME}
    assert len(set(short)) == 2
    assert tracking._short("adapter.r=4") == "adapter.r=4"


def test_every_tracker_takes_what_is_sent_later():
    for name in ("log", "page", "table"):
        assert {name} <= vars(WandbTracker).keys() & vars(Guarded).keys() & vars(Tracker).keys()
    send_to_run(Path("nowhere"), "nothing", lambda tracker: pytest.fail("there is no run"))


COMMANDS = """
import shlex, sys
from cera_train.cli import evaluate, report, train
for line in sys.argv[1:]:
    sys.argv = shlex.split(line)
    {"cera-train": train, "cera-eval": evaluate, "cera-report": report}[sys.argv[0]].main()
"""


@pytest.mark.slow
def test_wandb_has_a_sweep_as_a_group_and_what_came_after_its_runs(tiny_folder, tmp_path):
    """Offline, in a process of its own: W&B starts a service that outlives a test."""
    settings = f"model.path={tiny_folder} model.dtype=float32 data.max_length=256 train.max_updates=2 tracker=wandb"
    run = "outputs/grid/adapter.r=4"
    lines = [
        f"cera-train -m adapter.r=2,4 name=grid hydra/launcher=together {settings}",
        f"cera-eval {shlex.quote(f'run={run}')} task=logistic_map task.limit=4 task.max_new_tokens=4",
        "cera-report outputs/grid",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *lines],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    other, mirrored = (read_offline_run(tmp_path / "outputs" / "grid" / f"adapter.r={r}") for r in (2, 4))
    for r, read in ((2, other), (4, mirrored)):
        assert (read.names, read.groups, read.job_types) == ({f"adapter.r={r}"}, {"grid"}, {"train"})
        assert read.config["adapter"]["r"] == r
        assert len(read.ids) == 1
    assert other.ids != mirrored.ids
    assert [len(read.folders) for read in (other, mirrored)] == [2, 3]  # training, evaluation, report
    assert done.stdout.count("wandb sync --include-online") == 5

    result = json.loads((tmp_path / run / "eval" / "logistic_map" / "result.json").read_text())
    (row,) = [row for row in mirrored.rows if "logistic_map/problems" in row]
    assert row["update"] == 2
    assert row["logistic_map/exact/pass@1"] == result["exact/pass@1"]
    assert mirrored.summary["logistic_map/exact/pass@1"] == result["exact/pass@1"]
    assert mirrored.summary["eval/perplexity"] == pytest.approx(
        json.loads((tmp_path / run / "result.json").read_text())["eval/perplexity"]
    )
    (row,) = [row for row in mirrored.rows if "logistic_map/answers/path" in row]
    table = json.loads(mirrored.file({"path": row["logistic_map/answers/path"]}).read_text())
    assert table["columns"][:4] == ["problem", "sample", "question", "answer"]
    answers = (tmp_path / run / "eval" / "logistic_map" / "generations.jsonl").read_text().splitlines()
    assert [row[3] for row in table["data"]] == [json.loads(answer)["text"] for answer in answers]
    assert not any("logistic_map/problems" in row for row in other.rows)
    for read in (other, mirrored):
        (row,) = [row for row in read.rows if "report/path" in row]
        page = read.file({"path": row["report/path"]})
        assert page.read_bytes() == (tmp_path / "report" / "report.html").read_bytes()
