"""Whether a change makes an update cheaper: `python -m benchmarks.update --against COMMIT` trains
the same config on the same rows at that commit and in this tree, each in a process of its own with
one thread. They make one update each, in turn: compare the ratios of their CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

TREE = Path(__file__).parents[1]
WARM_UP = 2
COMPARED = 10
"""Updates whose losses are compared."""
COMMON = (
    "train.tasks=[]",
    "train.tasks_every=null",
    "train.task_settings=null",
    "train.samples=0",
    "train.eval_every=null",
    "train.save_every=null",
    "train.patience=null",
    "data.eval_rows=2",
    "train.max_updates=200",
    "name=measured",
)
WORKS = {
    "quickstart": ("+recipe=quickstart",),
    "gsm8k": (
        "model=smollm2_135m_pypi",
        "adapter.r=64",
        "adapter.dropout=0.1",
        "adapter.target_modules=[q_proj,v_proj]",
        "data.max_length=512",
        "data.allow_overlap=true",
        "train.batch_size=8",
    ),
}
"""The command lines, beside COMMON: the quickstart, and 8 sequences of GSM8K an update."""


def start(tree: Path, folder: Path, words: Sequence[str]) -> subprocess.Popen:
    """The process that trains one of the two trees."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", __file__, "--train", *words, f"output_dir={folder}"]
    return subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def update(process: subprocess.Popen) -> dict[str, float]:
    """Runs one update: CPU seconds, and the most bytes of memory so far."""
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "measured" / "metrics.jsonl").read_text().splitlines()
    return [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]


def train_in_turn(words: Sequence[str]) -> None:
    """A tree's process: every line of the input runs an update, until the input ends."""
    from cera_train.cli.compose import compose
    from cera_train.training import train as training

    answers = sys.stdout
    update = training.update

    def measured_update(*args: Any) -> Any:
        if not sys.stdin.readline():
            raise SystemExit
        started = time.process_time()
        result = update(*args)
        seconds = time.process_time() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "memory": memory}), file=answers, flush=True)
        return result

    with (
        contextlib.redirect_stdout(io.StringIO()),
        patch.object(training, "update", measured_update),
    ):
        training.train(compose(*words))


@contextlib.contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The files of a commit, in a temporary folder."""
    archive = subprocess.run(
        ["git", "archive", commit], cwd=TREE, stdout=subprocess.PIPE, check=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


def compare(trees: dict[str, Path], words: Sequence[str], updates: int) -> str:
    """One line: the CPU time of an update in both trees, their memory and their losses."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in trees}
        sides = {name: start(tree, folders[name], words) for name, tree in trees.items()}
        for _ in range(WARM_UP + updates):
            for name, process in sides.items():
                measured[name].append(update(process))
        for process in sides.values():
            process.communicate()
        before, now = (losses_of(folder)[:COMPARED] for folder in folders.values())
    seconds = [[each["seconds"] for each in taken[WARM_UP:]] for taken in measured.values()]
    quartiles = [statistics.quantiles(taken, n=4)[0] for taken in seconds]
    ratio = statistics.median(new / old for old, new in zip(*seconds, strict=True))
    memory = [taken[-1]["memory"] / 1e9 for taken in measured.values()]
    largest = max(abs(new - old) for old, new in zip(before, now, strict=True))
    return (
        f"{quartiles[0]:.3f} -> {quartiles[1]:.3f} s (lower quartiles), "
        f"{quartiles[1] / quartiles[0]:.3f} of it; median of {updates} ratios {ratio:.3f}; "
        f"{memory[0]:.2f} -> {memory[1]:.2f} GB; losses of {len(now)} updates differ by at most "
        f"{largest:.2g}, mean {statistics.mean(now) - statistics.mean(before):+.2g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="COMMIT", default="HEAD")
    parser.add_argument("--rows", type=Path, help="GSM8K's: jsonl with question and answer")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_in_turn(options.train)
        return
    works = {"quickstart": WORKS["quickstart"]}
    if options.rows:
        rows = f"data.train_files=[{options.rows.absolute()}]"
        works["gsm8k"] = (*WORKS["gsm8k"], rows)
    with tree_of(options.against) as tree:
        trees = {"before": tree, "now": TREE}
        for name, words in works.items():
            for dtype in options.dtypes:
                line = compare(trees, [*words, *COMMON, f"model.dtype={dtype}"], options.updates)
                print(f"{name}, {dtype}: {line}", flush=True)


if __name__ == "__main__":
    main()
