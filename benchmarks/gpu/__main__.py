"""Acceptance on a CUDA machine: tests, recipes, the race and decoding, in pieces of at most ten
minutes.

A piece that has a result is not run again unless it failed: a command that was cut goes on where it
was. The end is one Markdown block. Remove the folder of results after a change of code or machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import WITHOUT_GPUS
from benchmarks.gpu.pieces import BY_NAME, ROOT, SECONDS, Piece, Place

PACKAGES = ("torch", "bitsandbytes", "transformers", "peft", "accelerate", "trl")

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
    deadline = started + 60 * options.minutes
    known = {name: result for name in options.piece if (result := read_result(place, name))}
    new = [name for name in options.piece if name not in known]
    failed = [name for name, result in known.items() if result["state"] == "failed"]
    left = []
    for name in [*new, *failed]:  # one that always fails takes no other's time
        result = run(BY_NAME[name], place, deadline - time.monotonic())
        if result is None:
            left.append(name)
        else:
            known[name] = result
            print(f"{name} {result['state']} {result['reason'][:160]}", flush=True)
    print("\n" + block(known))
    if left:
        print(f"\n{len(left)} pieces are left: {', '.join(left)}. The same command goes on.")
    return int(any(result["state"] == "failed" for result in known.values()))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--piece",
        nargs="+",
        default=[*BY_NAME],
        choices=BY_NAME,
        metavar="PIECE",
        help="default: all",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="end within so many minutes, and leave what does not fit",
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
    return done.stdout.strip().replace("\n", "; ") if done.returncode == 0 else ""


def read_result(place: Place, name: str) -> Result | None:
    """None where it has not run."""
    file = place.result(name)
    return json.loads(file.read_text()) if file.is_file() else None


def run(piece: Piece, place: Place, room: float) -> Result | None:
    """Runs a piece in a process that ends within `room` seconds. Returns None where it does not fit
    in, or they were over before the piece's own time limit."""
    if piece.expected > room:
        return None
    print(f"{piece.name} ...", flush=True)
    seconds = min(SECONDS, room)
    log = place.folder / "logs" / f"{piece.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    file = place.result(piece.name)
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
    if not file.is_file() and (status is not None or seconds == SECONDS):
        ended = f"time limit of {seconds:g} s"
        if status is not None:
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            ended = f"{last[:300]}, status {status}"
        result = {"state": "failed", "reason": f"{ended}; see {log}", "figures": {}}
        file.write_text(json.dumps(result, indent=2) + "\n")
    return read_result(place, piece.name)


def block(results: dict[str, Result]) -> str:
    """Results as Markdown: the machine, the outcomes, and the figures of each piece."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    states = [result["state"] for result in results.values()]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in ("passed", "failed", "skipped")
    )
    lines = [f"Machine: {gpus() or 'no GPU'}; {versions}.", f"Pieces: {counts}.", ""]
    for name, result in results.items():
        parts = [result["state"], result["reason"]]
        parts += [
            f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in result["figures"].items()
        ]
        lines.append(f"- {name}: {'; '.join(filter(None, parts))}")
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the piece too
    sys.exit(main())
