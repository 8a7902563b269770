"""The pieces of `make gpu`, in the order in which they run: the headline first, then what is right,
then the rest of what is fast. The command reads this table and imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "CERA_TRAIN_GPU_TESTS"
"""The environment variable that lets the tests of tests/gpu run on another device than CUDA."""


SECONDS = 540
"""The time limit of a piece."""


@dataclass(frozen=True)
class Place:
    """Where a piece runs."""

    device: str
    """cuda or cpu."""
    size: str
    """full or tiny."""
    output: Path
    """The folder of all sizes and devices, which share models."""

    @property
    def folder(self) -> Path:
        """Results, logs, rows and runs of this size on this device."""
        return self.output / f"{self.size}_{self.device}"

    def result(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def rows(self, name: str) -> Path:
        return self.folder / "rows" / f"{name}.jsonl"


@dataclass(frozen=True)
class Piece:
    """A part of the acceptance that runs in a separate process."""

    name: str
    work: str
    """The function of benchmarks.gpu.work that measures its figures."""
    expected: int
    """Seconds that it should take: it starts where so many are left."""
    settings: dict[str, Any] = field(default_factory=dict)
    takes_all_gpus: bool = False
    """Else it sees the first one only: several would split its work."""


def group_of_tests(group: str, expected: int, takes_all_gpus: bool = False) -> Piece:
    settings = {"group": group}
    return Piece(f"tests_{group}", "run_tests", expected, settings, takes_all_gpus)


def race(contestant: str, name: str, work: str) -> Piece:
    settings = {"contestant": contestant, "work": work}
    return Piece(f"race_{name}_{work}", "lap", 60, settings)


PIECES = [
    Piece("weights", "make_weights", 60),
    Piece("nemo_cera", "nemo", 200, {"kind": "cera"}),
    Piece("nemo_lora", "nemo", 100, {"kind": "lora"}),
    Piece("nemo_trl", "lap", 120, {"contestant": "TRL + LoRA, best", "work": "nemo"}),
    group_of_tests("attention", 60),
    group_of_tests("precision", 150),
    group_of_tests("training", 150),
    group_of_tests("answers", 60),
    group_of_tests("processes", 150, takes_all_gpus=True),
    Piece("math_r64", "recipe", 120, {"name": "math_r64"}),
    Piece("math_r64_nf4", "recipe", 120, {"name": "math_r64_nf4"}),
    race("ours with CeRA", "cera", "bfloat16"),
    race("ours with CeRA, compiled", "cera_compiled", "bfloat16"),
    race("ours with LoRA", "lora", "bfloat16"),
    race("TRL + LoRA, best", "trl", "bfloat16"),
    race("ours with CeRA, compiled", "cera_compiled", "nf4"),
    race("TRL + LoRA, best", "trl", "nf4"),
    Piece("decoding", "decoding", 100),
]
BY_NAME = {piece.name: piece for piece in PIECES}
