"""Runs on one base at once against the same runs one after the other, as whole commands: `python -m
benchmarks.together --rows train.jsonl` for rows of GSM8K, without for the quickstart's logistic maps.

A grid of so many learning rates by Hydra's own launcher, which takes its jobs in turn in one process, and by
hydra/launcher=together: seconds from the command to its end, and the peak of resident memory. They take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAUNCHERS = {"in turn": "basic", "together": "together"}
GSM8K = ["data=gsm8k", "data.path=null", "data.subset=null", "data.eval_rows=20", "data.max_length=512"]


def run(arguments: list[str], folder: str) -> tuple[float, int]:
    """Seconds and peak bytes of one command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cera_train", "-m", *arguments], cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{arguments} failed: {errors[-2000:]}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def race(settings: list[str], arms: int) -> dict[str, tuple[float, int]]:
    """Seconds and peak bytes by launcher, of a grid of so many learning rates."""
    rates = ",".join(f"{1e-3 * 1.2**number:.3g}" for number in range(arms))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, launcher in LAUNCHERS.items():
            grid = [*settings, f"optimizer.lr={rates}", f"hydra/launcher={launcher}", f"name={launcher}"]
            found[name] = run(grid, folder)
    return found


def draw(found: dict[int, dict[str, Any]], path: Path) -> None:
    """Seconds and memory against the number of runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from cera_train.common.drawing import COLORS, MARKERS

    figure, panels = pyplot.subplots(1, 2, figsize=(6.4, 2.8), layout="constrained")
    for place, (axes, label, scale) in enumerate(zip(panels, ("seconds", "peak memory, GB"), (1, 1e-9), strict=True)):
        for name, kind in zip(LAUNCHERS, ("lora", "cera"), strict=True):
            values = [each[name][place] * scale for each in found.values()]
            axes.plot(list(found), values, color=COLORS[kind], marker=MARKERS[kind], label=name)
        axes.set_xlabel("runs")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.set_xticks(list(found))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=Path, help="rows of GSM8K, as JSON lines")
    parser.add_argument("--arms", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench/together.json"))
    parser.add_argument("--picture", type=Path, default=Path("outputs/bench/together.png"))
    arguments = parser.parse_args()
    settings = ["+recipe=quickstart"]
    if arguments.rows is not None:
        settings += [*GSM8K, f"data.train_files=[{arguments.rows.resolve()}]"]
    settings += [f"model.dtype={arguments.dtype}", f"train.max_updates={arguments.updates}", "train.eval_every=null"]
    found: dict[int, dict[str, Any]] = {}
    print(f"{'runs':<6}{'in turn':>10}{'together':>10}{'ratio':>8}{'in turn':>12}{'together':>10}{'of one':>8}")
    for arms in arguments.arms:
        found[arms] = race(settings, arms)
        (turn, one), (joint, several) = (found[arms][name] for name in LAUNCHERS)
        alone = found[arguments.arms[0]]["in turn"][1]
        print(
            f"{arms:<6}{turn:>8.1f} s{joint:>8.1f} s{joint / turn:>8.2f}{one / 1e9:>9.2f} GB{several / 1e9:>7.2f} GB"
            f"{several / alone:>8.2f}",
            flush=True,
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    draw(found, arguments.picture)


if __name__ == "__main__":
    main()
