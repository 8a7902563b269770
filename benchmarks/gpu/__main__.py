"""Acceptance on a CUDA machine: tests, recipes, the race and decoding, in pieces of at most ten minutes.

A piece that has a result is not run again, unless it failed, or the code or the machine is another one: a command that
was cut goes on where it was. The end is one Markdown block.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.pieces import Piece, all_pieces
from benchmarks.gpu.place import ROOT, SIZES, Place
from benchmarks.gpu.report import block
from benchmarks.gpu.results import FAILED, Found, Result, code_version, read_result
from benchmarks.training import WITHOUT_GPUS

BLOCK_SECONDS = 15
"""Kept for the block, of the minutes that a command has."""

PROVABLE = ["-m", "pytest", "-m", "provable", "-p", "no:cacheprovider"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a piece failed."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    place = Place(options.device, options.size, options.output.resolve())
    if options.report:
        print(block(_results(place.folder, options.piece)))
        return 0
    here = machine.ask()
    if place.device == "cuda" and not here["gpus"]:
        return prove_without_a_gpu()
    deadline = math.inf if options.minutes is None else started + 60 * options.minutes - BLOCK_SECONDS
    pieces = missing([all_pieces()[name] for name in options.piece], place, here, options.keep)
    left = []
    for number, piece in enumerate(pieces, start=1):
        room = deadline - time.monotonic()
        if piece.expected > room:
            left.append(piece.name)
            continue
        print(f"{number}/{len(pieces)} {piece.name}: {piece.shows} ... ", end="", flush=True)
        result = run(piece, place, identity_of(piece, place, here), min(piece.seconds, room))
        if result is None:
            print("cut", flush=True)
            left.append(piece.name)
            continue
        result.write(place.folder)
        print(f"{result.found.state} in {result.seconds:.0f} s {result.found.reason[:160]}".rstrip(), flush=True)
    results = _results(place.folder, options.piece)
    print("\n" + block(results))
    if left:
        print(f"\n{len(left)} pieces are left: {', '.join(left)}. The same command goes on.")
    return int(any(result.found.state == FAILED for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    names = list(all_pieces())
    parser.add_argument("--piece", nargs="+", default=names, choices=names, metavar="PIECE", help="default: all")
    parser.add_argument("--minutes", type=float, help="end within so many minutes, and leave what does not fit")
    parser.add_argument("--report", action="store_true", help="print the block of what there is, and run nothing")
    parser.add_argument("--keep", action="store_true", help="run only what failed or is missing, whatever the code")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="full", choices=SIZES, help="tiny: the same in miniature")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu")
    return parser


def prove_without_a_gpu() -> int:
    """What can be proven of a GPU run here."""
    pieces = all_pieces().values()
    print(
        f"no CUDA GPU here: on one, this runs {len(pieces)} pieces of at most ten minutes (tests, recipes on random "
        "weights, the race, decoding) and prints one Markdown block. Without one: pytest -m provable.",
        flush=True,
    )
    return subprocess.call([sys.executable, *PROVABLE], cwd=ROOT)


def missing(pieces: Sequence[Piece], place: Place, here: dict[str, Any], keep: bool) -> list[Piece]:
    """The pieces to run: those without a result, then those that failed, so that one which always fails takes no
    other's time."""
    new, failed = [], []
    for piece in pieces:
        known = read_result(place.folder, piece.name)
        if known is not None and known.found.state == FAILED:
            failed.append(piece)
        elif known is None or not (keep or known.identity == identity_of(piece, place, here)):
            new.append(piece)
    return [*new, *failed]


def identity_of(piece: Piece, place: Place, here: dict[str, Any]) -> dict[str, Any]:
    """What a result belongs to."""
    return {"code": code_version(piece.sources), "device": place.device, "size": place.size_name, "machine": here}


def run(piece: Piece, place: Place, identity: dict[str, Any], seconds: float) -> Result | None:
    """Runs a piece in a separate process, for at most so many seconds. What it prints lies in logs/PIECE.log.

    Returns:
        None where it was cut before its own time limit.
    """
    log = place.folder / "logs" / f"{piece.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as lines:
        output = Path(scratch) / "found.json"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.gpu.work"),
                *(piece.name, place.device, place.size_name, str(place.output), str(output), str(os.getpid())),
            ],
            cwd=ROOT, env=_environment(piece, place.device),
            stdout=lines, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_session(process)
        if output.is_file() and status == 0:
            found = Found(**json.loads(output.read_text()))
        elif status is None and seconds < piece.seconds:
            return None
        elif status is None:
            found = Found(FAILED, f"ended after its time limit of {piece.seconds} s; see {log}")
        else:
            found = Found(FAILED, f"{error_in(log)} (status {status}; see {log})")
    return Result(piece.name, found, time.monotonic() - started, identity)


def _environment(piece: Piece, device: str) -> dict[str, str]:
    """One GPU for a piece that is about one: several would split its work."""
    if device == "cpu":
        return os.environ | WITHOUT_GPUS
    if piece.takes_all_gpus:
        return dict(os.environ)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return os.environ | {"CUDA_VISIBLE_DEVICES": first}


def _end_session(process: subprocess.Popen) -> None:
    """Ends a piece and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def error_in(log: Path) -> str:
    """The last error that a piece, or a process of it, printed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def _results(folder: Path, names: Sequence[str]) -> list[Result]:
    return [result for name in names if (result := read_result(folder, name)) is not None]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the piece too
    sys.exit(main())
