"""A study that is really run, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

STUDY = {
    "arms": {"lora": ["adapter=lora"], "cera": ["adapter=cera"]},
    "contrasts": {},
    "conditions": {"adapter.r": [2, 4]},
    "tune": {"optimizer.lr": [1e-3, 1e-2]},
}


@pytest.mark.slow
def test_a_study_is_run_gets_its_page_and_notices_edited_rows(
    tiny_folder: Path, run_study, run_report, capfd: pytest.CaptureFixture
) -> None:
    settings = {
        "study": STUDY,
        "model": {"path": str(tiny_folder), "dtype": "float32"},
        "data": {"max_length": 256},
        "train": {"batch_size": 8, "max_updates": 4, "eval_every": None, "save_every": None},
    }
    rows = [{"question": f"{n} + 1", "answer": f"{n + 1}"} for n in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jsonl = ["data=jsonl", "data.train_files=[rows.jsonl]", "data.eval_rows=8", "data.prompt='{question}'"]
    jsonl += ["data.completion=' {answer}'"]
    assert run_study(*jsonl, "hydra/launcher=joblib", **settings) == 0
    assert run_report("outputs/which") == 0
    results = json.loads(Path("report/which/study_results.json").read_text())
    assert [own["condition"] for own in results["contrasts"]] == ["adapter.r=2", "adapter.r=4"]
    assert len(results["slopes"]) == 3

    rows[0]["answer"] = "7"
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_study(*jsonl, "study.seeds=3", **settings) == 0
    assert run_report("outputs/which") == 2
    assert "had different train rows, and cannot be compared" in capfd.readouterr().err
