"""How strangers' files are found and named: none outside their folder, each on one line."""

from pathlib import Path
from typing import Any

from cera_train.common.files import cut_name
from cera_train.common.settings import require
from cera_train.common.trust import clean


def files_in(folder: Path, pattern: str) -> list[Path]:
    """The regular files that match. Raises UserError for a link that leads out of the folder."""
    files = sorted(file for file in folder.glob(pattern) if file.is_file())
    for file in files:
        require(
            file.resolve().is_relative_to(folder.resolve()),
            f"{file} is a link to a file outside {folder}: copy what it should be.",
        )
    return files


def safe_name(text: str) -> str:
    """A name in a stranger's file: on one line, and part of no path."""
    return cut_name(clean(" ".join(text.split()))).replace("/", "_")


def is_score(value: Any) -> bool:
    """Whether this is a number from 0 to 1, or true or false."""
    return isinstance(value, float | int) and 0 <= value <= 1
