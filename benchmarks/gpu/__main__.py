"""Acceptance on a CUDA machine: tests, recipes, the race and decoding, in pieces of at most ten
minutes.

A piece that has a result is not run again unless it failed: a command that was cut goes on where it
was. The end is one Markdown block. Remove the folder of results after a change of code or machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import WITHOUT_GPUS
from benchmarks.gpu.pieces import BY_NAME, ROOT, Piece, Place

PACKAGES = ("torch", "triton", "bitsandbytes", "transformers", "peft", "accelerate", "trl")

Result = dict[str, Any]
"""The state of a piece, its reason and its figures."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a piece failed, 2 where there is no GPU."""
    started = time.monotonic()
    options = parser().parse_args(arguments)
    place = Place(options.device, options.size, options.output.resolve())
    if place.device == "cuda" and not gpus():
        print(
            "no CUDA GPU here: --device=cpu --size=tiny runs the same in miniature", file=sys.stderr
        )
        return 2
    deadline = math.inf if options.minutes is None else started + 60 * options.minutes
    results = {name: read_result(place, name) for name in options.piece}
    new = [name for name, result in results.items() if result is None]
    failed = [name for name, result in results.items() if result and result["state"] == "failed"]
    left = []
    for name in [*new, *failed]:  # one that always fails takes no other's time
        piece = BY_NAME[name]
        room = deadline - time.monotonic()
        if piece.expected <= room:
            print(f"{name} ... ", end="", flush=True)
            results[name] = result = run(piece, place, min(piece.seconds, room))
            print(f"{result['state']} {result['reason'][:160]}" if result else "cut", flush=True)
        if piece.expected > room or result is None:
            left.append(name)
    known = {name: result for name, result in results.items() if result is not None}
    print("\n" + block(known))
    if left:
        print(f"\n{len(left)} pieces are left: {', '.join(left)}. The same command goes on.")
    return int(any(result["state"] == "failed" for result in known.values()))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0]
    )
    names = list(BY_NAME)
    parser.add_argument(
        "--piece", nargs="+", default=names, choices=names, metavar="PIECE", help="default: all"
    )
    parser.add_argument(
        "--minutes", type=float, help="end within so many minutes, and leave what does not fit"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--size", default="full", choices=["full", "tiny"], help="tiny: the same in miniature"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu")
    return parser


def gpus() -> str:
    """Names, memory and driver. Asking torch would take memory of the GPU."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else ""


def result_file(place: Place, name: str) -> Path:
    return place.folder / f"{name}.json"


def read_result(place: Place, name: str) -> Result | None:
    """None where it has not run."""
    file = result_file(place, name)
    return json.loads(file.read_text()) if file.is_file() else None


def run(piece: Piece, place: Place, seconds: float) -> Result | None:
    """Runs a piece in a process that ends within so many seconds. Returns None where they were over
    before the piece's own time limit."""
    log = place.folder / "logs" / f"{piece.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    file = result_file(place, piece.name)
    file.unlink(missing_ok=True)
    environment = os.environ | (WITHOUT_GPUS if place.device == "cpu" else {})
    if place.device == "cuda" and not piece.takes_all_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    command = [sys.executable, "-m", "benchmarks.gpu.work", piece.name]
    command += [place.device, place.size, str(place.output)]
    with log.open("w") as lines:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=lines,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    status = None
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):  # and what it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not file.is_file() and (status is not None or seconds == piece.seconds):
        ended = f"time limit of {seconds:g} s"
        if status is not None:
            ended = f"{error_in(log)}, status {status}"
        result = {"state": "failed", "reason": f"{ended}; see {log}", "figures": {}}
        file.write_text(json.dumps(result, indent=2) + "\n")
    return read_result(place, piece.name)


def error_in(log: Path) -> str:
    """The last error that a piece, or a process of it, printed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def block(results: dict[str, Result]) -> str:
    """Results as Markdown: the machine, the outcomes, and a table for the pieces that measured the
    same figures."""
    installed = {
        package.metadata["Name"]: package.version for package in importlib.metadata.distributions()
    }
    versions = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    states = [result["state"] for result in results.values()]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in ("passed", "failed", "skipped")
    )
    lines = [f"Machine: {gpus() or 'no GPU'}; {versions}.", f"Pieces: {counts}."]
    tables: dict[tuple[str, ...], list[str]] = {}
    for name, result in results.items():
        if figures := result["figures"]:
            cells = [
                f"{value:,.4g}" if isinstance(value, float) else str(value)
                for value in figures.values()
            ]
            tables.setdefault(tuple(figures), []).append(f"| {name} | {' | '.join(cells)} |")
    for columns, rows in tables.items():
        rule = "|---" * (len(columns) + 1) + "|"
        lines += ["", f"| piece | {' | '.join(columns)} |", rule, *rows]
    reasons = [
        f"- {name}: {result['state']}: {result['reason']}"
        for name, result in results.items()
        if result["reason"]
    ]
    return "\n".join([*lines, "", *reasons])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the piece too
    sys.exit(main())
