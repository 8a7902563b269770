"""Runs in several processes: how torchrun starts them, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("train/loss", line.get("eval/loss")) for line in lines]


def evaluations(folder: Path) -> list[dict[str, float]]:
    """Perplexity and spectra of every evaluation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "epoch"} for line in lines if "eval/loss" in line]


def torchrun(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ONE_THREAD, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
