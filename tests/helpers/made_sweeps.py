"""Folders of sweeps as real ones leave them, without training."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from made_files import write_json
from several_processes import popen

from cera_train.sweep.folder import JOBS, RECORD, State, read_sweep

TINY = ["--config-dir", "conf", "-m", "+sweep=tiny"]
"""The sweep of the fixture sweep_here."""

FIXED = [
    "data=jsonl",
    "data.train_files=[rows.jsonl]",
    "data.eval_rows=2",
    "data.completion=' {answer}'",
]
"""Rows of the working folder."""


def make_job(
    sweep: Path,
    name: str,
    perplexity: float | None = None,
    error: str | None = None,
    rows: str = "a",
) -> Path:
    """A job's folder as a run of 20 updates leaves it, unfinished without a perplexity. `rows` is
    the digest of the held-out rows."""
    folder = sweep / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"max_updates": 20}}))
    write_json(folder / "environment.json", {"rows": {"held_out": rows}, "updates": 20})
    lines = [{"update": 0, "eval/perplexity": 9.0}, {"update": 5, "train/loss": 1.0}]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"update": 6, "tr'
    )
    if perplexity is not None:
        write_json(folder / "result.json", {"updates": 20, "eval/perplexity": perplexity})
    if error is not None:
        record_job(sweep, name, error)
    return folder


def record_job(sweep: Path, name: str, error: str | None) -> Path:
    path = sweep / JOBS / f"{name}.json"
    write_json(path, {"error": error})
    return path


def record_sweep(sweep: Path, *names: str) -> None:
    jobs = {name: name.split(",") for name in names}
    write_json(sweep / RECORD, {"swept": [], "jobs": jobs, "fixed": []})


def states(sweep: Path) -> dict[str, State]:
    return {job.name: job.state for job in read_sweep(sweep)}


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    """cera-train in a process."""
    return popen(sys.executable, "-m", "cera_train", *arguments, cwd=cwd)


def content_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }
