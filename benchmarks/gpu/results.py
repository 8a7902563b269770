"""Results of pieces on disk: one JSON file each, whole or not at all, with what they belong to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.place import ROOT
from cera_train.common.files import write_text

MEASURED = ("cera_train", "conf", "recipes", "benchmarks")
TESTED = (*MEASURED, "tests")
"""Folders whose files decide what a piece finds."""

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Found:
    """What a piece comes to."""

    state: str = PASSED
    reason: str = ""
    """One line: why it failed or was skipped."""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a piece came to, where, and by which code."""

    piece: str
    found: Found
    seconds: float
    identity: dict[str, Any]
    """Code, size, device and machine."""

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.piece}.json", json.dumps(asdict(self), indent=2) + "\n")


def read_result(folder: Path, piece: str) -> Result | None:
    """The result of a piece; None: there is none."""
    file = folder / f"{piece}.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    return Result(**content | {"found": Found(**content["found"])})


def code_version(folders: tuple[str, ...], root: Path = ROOT) -> str:
    """A digest of the files in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".yaml", ".json"):
                digest.update(f"{file.relative_to(root)} ".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
