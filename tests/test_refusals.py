"""Every mistake of refusals.yaml gets one line and status 2: the place and the fix. What is refused
only after more than a command, files or a finished run has a test of its own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_files import change_json, write_lines
from tiny_runs import folder_of

REFUSALS = yaml.safe_load(Path(__file__).with_name("refusals.yaml").read_text())
WORDS = {
    "LOOK": "cera-train --look model.path=MODEL data.train_files=[x.jsonl] data.eval_rows=1 "
    "data.max_length=128",
    "GRPO": "cera-train model.path=MODEL data.train_files=[x.jsonl] data.eval_rows=1 "
    "data.max_length=64 train.objective=grpo",
    "PLAN": "cera-plan +recipe=logistic_map model.path=MODEL plan.gpu=h100",
    "TRAIN": "cera-train +recipe=logistic_map model.path=MODEL",
    "TOO-LONG": "x" * 300,
}


def write_files(files: dict[str, Any], folders: dict[str, Path]) -> None:
    """The name of a folder is a copy of it, a list is JSONL, a mapping changes a JSON file, null
    removes a file."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        match content:
            case None:
                path.unlink()
            case str() if content in folders:
                shutil.copytree(folders[content], path)
            case dict():
                change_json(path, content)
            case list():
                write_lines(path, content)
            case bytes():
                path.write_bytes(content)
            case str():
                path.write_text(content)


def files_in(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


CUDA = "No CUDA runtime is found"
"""A line of torch, where there is a compiler of CUDA and no GPU."""


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal["run"])
def test_a_mistake_gets_one_line_and_status_2(
    refusal, run_command, tiny_folder, finished_config, monkeypatch, capfd
):
    text = refusal["run"]
    for word, meaning in WORDS.items():
        text = text.replace(word, meaning)
    run = folder_of(finished_config)
    folders = {"MODEL": tiny_folder, "RUN": run, "ADAPTER": run / "adapter"}
    for word, folder in folders.items():
        text = text.replace(word, str(folder))
    # What is not refused trains nothing.
    monkeypatch.setattr("cera_train.training.train.evaluate", None)
    write_files(refusal.get("files", {}), folders)
    before = files_in(Path(), run)
    capfd.readouterr()
    program, *arguments = text.split(" ")
    assert run_command(program, *arguments) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if CUDA not in line]
    (line,) = said
    assert line.startswith(f"{program}: ")
    assert [part for part in refusal["line"] if part not in line] == [], line
    assert files_in(Path(), run) == before
