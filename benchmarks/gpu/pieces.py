"""The pieces of `make gpu`, in the order in which they run: what is right first, then what is
fast."""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.contestants import CONTESTANTS
from benchmarks.gpu import runs
from benchmarks.gpu.place import ROOT, Place, Skipped
from benchmarks.training import WORKS, race, useful_flops

DEVICE = "CERA_TRAIN_GPU_TESTS"
"""The environment variable that lets the tests of tests/gpu run on another device than CUDA."""

RACERS = {
    "cera": "ours with CeRA",
    "cera_compiled": "ours with CeRA, compiled",
    "lora": "ours with LoRA",
    "trl": "TRL + LoRA, best",
    "unsloth": "unsloth + LoRA",
}
"""Contestants by what they are called in the names of pieces."""

TESTS = {  # group: seconds that it should take, and its time limit
    "attention": (60, 180),
    "precision": (150, 300),
    "training": (150, 480),
    "answers": (60, 180),
    "processes": (150, 300),
}


@dataclass(frozen=True)
class Piece:
    """A part of the acceptance that runs in a separate process."""

    name: str
    work: Callable[[Place], dict[str, Any]]
    """Returns the figures that it measured. Raises `Skipped`."""
    expected: int
    """Seconds that it should take: it starts where so many are left."""
    seconds: int
    """Its time limit."""
    takes_all_gpus: bool = False
    """Else it sees the first one only: several would split its work."""


@functools.cache
def all_pieces() -> dict[str, Piece]:
    """By name."""
    pieces = [
        Piece(
            f"tests_{group}",
            functools.partial(run_tests, group=group),
            *limits,
            takes_all_gpus=group == "processes",
        )
        for group, limits in TESTS.items()
    ]
    pieces += of_model("llama3_1_8b", ("bfloat16", "nf4"), (150, 540))
    pieces += [
        Piece(f"nemo_{kind}", functools.partial(runs.nemo, kind=kind), 150, 540)
        for kind in ("lora", "cera")
    ]
    pieces += of_model("llama3_2_1b", ("bfloat16",), (60, 300))
    return {piece.name: piece for piece in pieces}


def of_model(model: str, precisions: Sequence[str], limits: tuple[int, int]) -> list[Piece]:
    """Recipes, race and decoding on one shape."""
    pieces = [Piece(f"weights_{model}", functools.partial(make_weights, model=model), *limits)]
    pieces += [
        Piece(
            f"{recipe}_{model}", functools.partial(runs.recipe, recipe=recipe, model=model), *limits
        )
        for recipe in runs.RECIPES
    ]
    pieces += [
        Piece(
            f"race_{key}_{model}_{precision}",
            functools.partial(lap, contestant=contestant, model=model, precision=precision),
            *limits,
        )
        for precision in precisions
        for key, contestant in RACERS.items()
    ]
    return [*pieces, Piece(f"decoding_{model}", functools.partial(decoding, model=model), *limits)]


def run_tests(place: Place, group: str) -> dict[str, Any]:
    """Runs tests/gpu/test_gpu_GROUP.py, whose log has what failed and why some were skipped."""
    tests = [
        f"tests/gpu/test_gpu_{group}.py",
        "-m",
        "gpu",
        "-v",
        "-rs",
        "--showlocals",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", *tests]
    environment = os.environ | {DEVICE: place.device}
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
    if process.returncode != 0:
        raise RuntimeError(f"{last} (pytest ended with status {process.returncode})")
    if " passed" not in last:
        raise Skipped(last)
    return {"tests": last}


def make_weights(place: Place, model: str) -> dict[str, Any]:
    """Makes the model that other pieces load."""
    place.model(model)
    return {}


def lap(place: Place, contestant: str, model: str, precision: str) -> dict[str, Any]:
    """Updates of one contestant of benchmarks.training, on the rows that all of them get."""
    from transformers import AutoConfig

    package = CONTESTANTS[contestant].PATCHES
    if package is not None and importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is not installed")
    size = place.size
    work = replace(WORKS[f"{model}, {precision}"], device=place.device)
    if place.size_name == "tiny":
        work = replace(work, sequences=4)
    held_out = 1
    rows = (size.rounds + 1) * work.sequences + held_out
    file = place.rows("race", rows, size.row_tokens, ("question", "answer"))
    base = str(place.model(model))
    config = AutoConfig.from_pretrained(base)
    flops, tokens, supervised = useful_flops(
        place.tokenizer, config, file, work.sequences, size.rounds
    )
    measured = race([contestant], work, base, file, supervised)
    seconds = measured["seconds"][contestant]

    def rate(amounts: Sequence[float]) -> float:
        return statistics.median(
            amount / taken for amount, taken in zip(amounts, seconds, strict=True)
        )

    return {
        "tokens/s": rate(tokens),
        "seconds an update": statistics.median(seconds),
        "useful TFLOP/s": rate(flops) / 1e12,
        "peak GB": measured["peak_memory_bytes"][contestant] / 1e9,
    }


def decoding(place: Place, model: str) -> dict[str, Any]:
    """New tokens a second of the base, or LoRA merged into it, and of CeRA, by the rows of a
    batch."""
    from benchmarks import evaluation

    file = evaluation.word_problems(place.folder / "problems.jsonl")
    _, steps = evaluation.decoding(
        file, place.size.rounds, path=str(place.model(model)), device=place.device
    )
    return {
        f"{name}, {rows} rows, tokens/s": rows / statistics.median(seconds)
        for name, taken in steps.items()
        for rows, seconds in taken.items()
    }
