"""`cera-report` of a study that was really run, on the tiny model."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from made_sweeps import cera_train, make_study_file

from cera_train.cli.report import main as main_report

FILE = {
    "study": {
        "question": "Is CeRA better than LoRA?",
        "arms": {"lora": ["adapter=lora"], "cera": ["adapter=cera"]},
        "baseline": "lora",
        "conditions": {"adapter.r": [2, 4]},
        "tune": {"optimizer.lr": [1e-3, 1e-2]},
        "first": 2,
        "seeds": 2,
    },
    "data": {"max_length": 256, "train_rows": 64, "eval_rows": 12},
    "train": {"batch_size": 8, "max_updates": 4, "eval_every": None, "save_every": None},
}


def cera_report(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cera-report", *map(str, arguments)])
    try:
        main_report()
    except SystemExit as error:
        return error.code
    return 0


@pytest.mark.slow
def test_a_study_is_run_and_gets_its_page(tmp_path: Path, tiny_folder: Path, monkeypatch, capfd) -> None:
    command = make_study_file(tmp_path, FILE | {"model": {"path": str(tiny_folder), "dtype": "float32"}})
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    assert cera_report(monkeypatch, "outputs/which") == 0
    assert "CeRA is " in capfd.readouterr().out
    results = json.loads(Path("report/study_results.json").read_text())
    assert [own["condition"] for own in results["contrasts"]] == ["r = 2", "r = 4"]
    assert len(results["plateau"]) == 2
    text = Path("report/report.md").read_text()
    assert "goes on" in text

    by_hand = results["commands"]["each cell alone"]["CeRA, r = 4"]
    assert cera_train(monkeypatch, tmp_path, *shlex.split(by_hand)[1:]) == 0
    repeated = sorted(Path("outputs/which_by_hand").glob("*/result.json"))
    assert len(repeated) == 2
    for path in repeated:
        runs = [json.loads(own.read_text()) for own in (path, Path("outputs/which", *path.parts[-2:]))]
        assert runs[0]["eval/perplexity"] == runs[1]["eval/perplexity"]

    for seed in Path("outputs/which").glob("*train.seed=1"):
        (seed / "result.json").unlink()
    assert cera_report(monkeypatch, "outputs/which") == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("cera-report: outputs/which is an unfinished study: lora, adapter.r=2: no result of seed 1")
    assert re.search(r"cera-train -m .*\+study=which goes on; cera-sweep outputs/which shows", line)
