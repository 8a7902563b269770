"""A run from a stranger, with links in it, has nothing written outside its folder.

The attacks are real: what could write does so `elsewhere`.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from hostile_runs import write_run

from cera_train.common.files import write_text
from cera_train.runs.card import write_card
from cera_train.runs.evaluation_folder import EvaluationFolder
from cera_train.runs.folder import RunFolder
from cera_train.runs.results import AccuracyResult, RunResult


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder that nothing may be written to, with a file that nothing may be written over."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    return folder


def assert_untouched(elsewhere: Path) -> None:
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    assert (elsewhere / "precious").read_text() == "precious"


RUN_LINKS = [
    *("metrics.jsonl", ".lock", "tracker-ids.json", "checkpoints", "best", "wandb", "adapter", ".writing-run.png"),
    *("losses_before.safetensors", "grades"),
]
FOLDERS = ("checkpoints", "best", "wandb", "adapter", "grades")


@pytest.mark.parametrize("name", RUN_LINKS)
@pytest.mark.parametrize("kind", ["there", "dangling", "relative"])
def test_a_run_writes_through_no_link_that_leads_out(tmp_path, elsewhere, name, kind):
    run = tmp_path / "run"
    run.mkdir()
    target = (
        elsewhere / {"there": "" if name in FOLDERS else "precious", "dangling": "new", "relative": "x/../.."}[kind]
    )
    (run / name).symlink_to(Path("..") / "elsewhere" / "new" if kind == "relative" else target)
    with pytest.raises(ValueError, match=rf"run/{re.escape(name)} is a link that leads out of .*run, to .*elsewhere"):
        RunFolder(run, {}).__enter__()
    assert_untouched(elsewhere)


@pytest.mark.parametrize("name", ["eval", "eval/gsm8k", "eval/gsm8k/generations.jsonl", "eval/gsm8k/.lock"])
def test_an_evaluation_writes_through_no_link_that_leads_out(tmp_path, elsewhere, name):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    is_file = name.endswith((".jsonl", ".lock"))
    (run / name).symlink_to(elsewhere / "precious" if is_file else elsewhere)
    with pytest.raises(ValueError, match=rf"run/{re.escape(name)} is a link that leads out of .*run, to .*elsewhere"):
        EvaluationFolder(run / "eval" / "gsm8k").__enter__()
    assert_untouched(elsewhere)


def test_a_card_is_written_through_no_link_that_leads_out(tmp_path, tiny_config, elsewhere):
    run = write_run(tmp_path / "run", tiny_config())
    shutil.rmtree(run / "adapter")
    (run / "adapter").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="run/adapter is a link that leads out"):
        write_card(run, RunResult.read(run / "result.json"))
    assert_untouched(elsewhere)


def test_a_file_is_written_in_the_place_of_a_link_not_through_it(tmp_path, elsewhere):
    for name in ("result.json", f".writing-{os.getpid()}-result.json"):
        (tmp_path / name).symlink_to(elsewhere / "precious")
    write_text(tmp_path / "result.json", "{}")
    assert (tmp_path / "result.json").read_text() == "{}"
    assert not (tmp_path / "result.json").is_symlink()
    assert_untouched(elsewhere)


def test_links_within_a_run_and_to_a_run_are_fine(tmp_path):
    run = tmp_path / "disk" / "run"
    (run / "wandb" / "run-1").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (run / "wandb" / "run-1" / "debug-core.log").symlink_to(tmp_path)  # W&B's, to a log in the user's cache
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    with RunFolder(tmp_path / "outputs" / "run", {}) as folder:
        folder.append_metrics({"update": 1})
    with EvaluationFolder(tmp_path / "outputs" / "run" / "eval" / "gsm8k") as opened:
        opened.write_result(AccuracyResult())
    assert (run / "metrics.jsonl").exists()
