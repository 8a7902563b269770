"""Files and folders that appear whole or not at all: written under another name, flushed to the disk and renamed; and
the checksums that tell whether they are still as they were written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

WRITING = ".writing-"
"""Prefix of what is not whole yet."""

OLD = f"{WRITING}old-"
"""Prefix of a whole folder whose place another is about to take."""

CHECKSUMS = "checksums.json"
"""The SHA-256 of every other file of a folder."""


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    part = path.with_name(f"{WRITING}{os.getpid()}-{path.name}")  # two processes may write the same file
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def finite(tree: Any) -> Any:
    """Nested dicts and lists with null for every number that JSON has not: infinity and not-a-number."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder by `write` and puts it in the place of `path`. Where `write` fails, nothing is left of it."""
    part, old = path.with_name(WRITING + path.name), path.with_name(OLD + path.name)
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for file in part.rglob("*"):
        if file.is_file():
            sync(file)
    sync(part)
    if path.exists():
        path.rename(old)  # a cut between these two lines leaves no `path`: see clean_folder
    part.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean_folder(path: Path) -> None:
    """Removes what cut writes left in a folder, and puts back what one had taken away without a replacement."""
    for old in path.glob(f"{OLD}*"):
        if not (replaced := path / old.name.removeprefix(OLD)).exists():
            old.rename(replaced)
    for leftover in path.glob(f"{WRITING}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def remove_folder(path: Path) -> None:
    """Removes a folder so that a cut leaves none that looks whole."""
    part = path.with_name(WRITING + path.name)
    path.rename(part)
    shutil.rmtree(part)


def write_checksums(folder: Path) -> None:
    """Leaves the checksum of every file in a folder, for `find_damage`."""
    sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2))


def find_damage(folder: Path) -> str | None:
    """The first file that is not as `write_checksums` saw it, and why; None where all are, or nothing was left."""
    if not (folder / CHECKSUMS).exists():
        return None
    try:
        sums: dict[str, str] = json.loads((folder / CHECKSUMS).read_bytes())
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS}: {error}"
    for name, written in sums.items():
        try:
            if _sha256(folder / name) != written:
                return f"{name}: checksum differs"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(path: Path, writer: str) -> FileLock:
    """Makes a folder where there is none, and locks it by a file `.lock` in it. The holder unlinks that file before it
    releases it: another writer then opens a file of its own.

    Args:
        writer: what writes there, for messages: a run, an evaluation.

    Raises:
        ValueError: the folder cannot be made, or another such writer has it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"cannot make the {writer}'s folder {path}: {error.strerror}. Set output_dir to another folder."
        ) from error
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another {writer} is writing to {path}: wait for it, or choose another name=...") from None
    return lock


def cache_dir() -> Path:
    """Where tokenised rows and converted weights lie: $CERA_TRAIN_CACHE, else the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CERA_TRAIN_CACHE") or Path(user_cache) / "cera-train")


def cached_folder(name: str, write: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by `write` the first time. Processes that want it together wait for one of them."""
    folder = cache_dir() / name
    if folder.is_dir():  # whole, and readable also where nothing may be written
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_folder(folder, write)
    return folder
