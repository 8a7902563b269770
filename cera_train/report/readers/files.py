"""How strangers' files are read: none outside their folder, none larger than memory, a line at a
time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from cera_train.common.errors import UserError, error_text
from cera_train.common.files import cut_name, read_parsed
from cera_train.common.settings import require
from cera_train.common.trust import clean

LARGEST_FILE = 100_000_000  # bytes of a file that is read whole
LONGEST_LINE = 20_000_000  # bytes
LEAVE_OUT = "Restore it, or leave it out."


def files_in(folder: Path, pattern: str) -> list[Path]:
    """The regular files that match. Raises UserError for a link that leads out of the folder."""
    files = sorted(file for file in folder.glob(pattern) if file.is_file())
    for file in files:
        require(
            file.resolve().is_relative_to(folder.resolve()),
            f"{file} is a link to a file outside {folder}: copy what it should be.",
        )
    return files


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file."""
    size = path.stat().st_size
    require(
        size <= LARGEST_FILE,
        f"{path} has {size:,} bytes, and at most {LARGEST_FILE:,} are read. {LEAVE_OUT}",
    )
    return read_parsed(path, from_json, LEAVE_OUT)  # json takes deeper nesting than we do


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON object of each line, with its place FILE:LINE."""
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(LONGEST_LINE), b"")
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            try:
                tree = from_json(line)
            except ValueError as error:
                reason = error_text(error)
                if len(line) == LONGEST_LINE:
                    reason = f"a line of more than {LONGEST_LINE:,} bytes"
                raise UserError(f"{place} is broken: {reason}. {LEAVE_OUT}") from error
            if not isinstance(tree, dict):
                kind = type(tree).__name__
                raise UserError(
                    f"{place} is broken: expected names and values, got {kind}. {LEAVE_OUT}"
                )
            yield place, tree


def safe_name(text: str) -> str:
    """A name in a stranger's file: on one line, and part of no path."""
    return cut_name(clean(" ".join(text.split()))).replace("/", "_")


def is_score(value: Any) -> bool:
    """Whether this is a number from 0 to 1, or true or false."""
    return isinstance(value, float | int) and 0 <= value <= 1
