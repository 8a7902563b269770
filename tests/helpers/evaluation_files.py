"""What tests of evaluations share: questions, and readers of what an evaluation leaves."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

QUESTIONS = [
    {"question": f"{a} apples and {b} more, how many{'?' * length}", "answer": f"Add them.\n#### {a + b}"}
    for a, b, length in [(1, 2, 1), (3, 4, 9), (10, 5, 3), (2, 2, 30), (7, 8, 5), (1_000, 1, 2), (6, 0, 17), (9, 9, 1)]
]


def tiny_path(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["model"]["path"]


def base_settings(run: Path) -> list[str]:
    """Settings that name the tiny base model, and where an untouched model's evaluations go."""
    return [
        "model=smollm2_135m",
        f"model.path={tiny_path(run)}",
        "model.dtype=float32",
        f"output_dir={run.parent / 'outputs'}",
    ]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
