"""Whether a change makes an update cheaper: `python -m benchmarks.update --against COMMIT` trains
the same config on the same rows at that commit and in this tree, each in a process of its own with
one thread. They make one update each, in turn: compare the ratios of their CPU time.

`--profile` prints where this tree's time goes instead, on one thread, and writes it for `make
pictures`.
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

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


# --- a side ---------------------------------------------------------------------------------------


@dataclass
class Side:
    """The process that trains one of the two trees."""

    process: subprocess.Popen
    folder: Path

    @classmethod
    def start(cls, tree: Path, folder: Path, words: Sequence[str]) -> Side:
        folder.mkdir()
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", __file__, "--train", *words, f"output_dir={folder}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return cls(subprocess.Popen(command, cwd=tree, env=environment, **pipes), folder)

    def update(self) -> dict[str, float]:
        """Runs one update: CPU seconds, and the most bytes of memory so far."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def losses(self) -> list[float]:
        lines = (self.folder / "measured" / "metrics.jsonl").read_text().splitlines()
        return [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]


def train(words: Sequence[str], around_update: Callable[[Callable, tuple], Any]) -> None:
    """Trains by a command line, each update as an argument of `around_update`."""
    from cera_train.cli.compose import compose
    from cera_train.training import train as training

    update = training.update
    config = compose(*words)
    with patch.object(training, "update", lambda *args: around_update(update, args)):
        training.train(config)


def train_in_turn(words: Sequence[str]) -> None:
    """A side's process: every line of the input runs an update, until the input ends."""
    answers = sys.stdout

    def around_update(update: Callable, args: tuple) -> Any:
        if not sys.stdin.readline():
            raise SystemExit
        started = time.process_time()
        result = update(*args)
        seconds = time.process_time() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "memory": memory}), file=answers, flush=True)
        return result

    with contextlib.redirect_stdout(io.StringIO()):
        train(words, around_update)


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
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side.start(tree, Path(folder) / name, words) for name, tree in trees.items()}
        for _ in range(WARM_UP + updates):
            for name, side in sides.items():
                measured[name].append(side.update())
        for side in sides.values():
            side.process.communicate()
        before, now = (side.losses()[:COMPARED] for side in sides.values())
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


# --- where the time goes --------------------------------------------------------------------------


def part_of(module: nn.Module) -> str | None:
    """The part of an update that a module's own operations belong to."""
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "base products"
    if name.startswith("Cera"):
        return "branches"
    for ending, part in (("Norm", "norms"), ("MLP", "gate x up"), ("Attention", "RoPE, reshapes")):
        if name.endswith(ending):
            return part
    return None


FUNCTIONS = {"ShortAttention": "attention", "FrozenHeadCrossEntropy": "head and loss"}
"""Parts by what autograd's functions are called."""


def profile(words: Sequence[str], updates: int) -> Counter[str]:
    """CPU seconds of an update, by part. A backward operation belongs to the part of its forward
    operation, which autograd's sequence number names."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, acc_events=True)  # else 2.11 warns
    done = 0

    def around_update(update: Callable, args: tuple) -> Any:
        nonlocal done
        if done == WARM_UP:
            name_parts(next(each for each in args if hasattr(each, "adapted")).adapted, named)
            profiler.start()
        if done == WARM_UP + updates:
            profiler.stop()
            raise SystemExit
        done += 1
        return update(*args)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
        contextlib.ExitStack() as named,
    ):
        train([*words, f"output_dir={folder}"], around_update)

    events = profiler.events()
    forward = {
        event.sequence_nr: forward_part(event)
        for event in events
        if event.sequence_nr >= 0 and not in_backward(event)
    }
    seconds: Counter[str] = Counter()
    for event in events:
        node = in_backward(event)
        part = forward.get(node.sequence_nr, "rest") if node else forward_part(event)
        seconds[part] += event.self_cpu_time_total / 1e6 / updates
    return seconds


def profile_all(lines: dict[str, list[str]], updates: int, path: Path) -> None:
    """Prints the parts of each work's update, and writes them to a file for `make pictures`."""
    from benchmarks.circumstances import circumstances

    parts = {}
    for name, words in lines.items():
        print(f"{name}, CPU seconds of an update")
        seconds = profile(words, updates)
        for part, taken in seconds.most_common():
            print(f"  {part:<20}{taken:.3f}", flush=True)
        parts[name] = {part: round(taken, 4) for part, taken in seconds.most_common()}
    path.write_text(json.dumps(circumstances() | {"seconds": parts}, indent=2) + "\n")


def name_parts(model: nn.Module, patches: contextlib.ExitStack) -> None:
    """Makes the profiler see the parts. Hooks would turn the fused steps off."""
    for kind in {type(module) for module in model.modules() if part_of(module)}:
        part = part_of(next(module for module in model.modules() if type(module) is kind))

        def named(
            *args: Any, forward: Callable = kind.forward, part: str = part, **kwargs: Any
        ) -> Any:
            with torch.profiler.record_function(f"part: {part}"):
                return forward(*args, **kwargs)

        patches.enter_context(patch.object(kind, "forward", named))


def ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def in_backward(event: Any) -> Any:
    """The node of autograd's graph that runs an operation; None in a forward pass."""
    name = "autograd::engine::evaluate_function"
    return next((each for each in ancestors(event) if each.name.startswith(name)), None)


def forward_part(event: Any) -> str:
    for each in ancestors(event):
        if each.name in FUNCTIONS:
            return FUNCTIONS[each.name]
        if each.name.startswith("Optimizer."):
            return "optimizer"
        if each.name.startswith("part: "):
            outer = {outer.name for outer in ancestors(each)} & FUNCTIONS.keys()
            return FUNCTIONS[outer.pop()] if outer else each.name.removeprefix("part: ")
    return "rest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="COMMIT", default="HEAD")
    parser.add_argument("--rows", type=Path, help="GSM8K's: jsonl with question and answer")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_in_turn(options.train)
        return
    works = {name: list(WORKS[name]) for name in options.works}
    if "gsm8k" in works:
        if options.rows is None:
            parser.error("--rows FILE names GSM8K's rows; --works quickstart needs none.")
        works["gsm8k"].append(f"data.train_files=[{options.rows.absolute()}]")
    lines = {
        f"{name}, {dtype}": [*words, *COMMON, f"model.dtype={dtype}"]
        for name, words in works.items()
        for dtype in options.dtypes
    }
    if options.profile:
        from benchmarks.diagrams import UPDATE

        torch.set_num_threads(1)
        profile_all(lines, options.updates, UPDATE)
        return
    with tree_of(options.against) as tree:
        trees = {"before": tree, "now": TREE}
        for name, words in lines.items():
            print(f"{name}: {compare(trees, words, options.updates)}", flush=True)


if __name__ == "__main__":
    main()
