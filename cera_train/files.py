"""Files and folders that appear whole or not at all: written under another name, flushed to the disk and renamed."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

WRITING = ".writing-"
"""Prefix of what is not whole yet."""


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    part = path.with_name(f"{WRITING}{os.getpid()}-{path.name}")  # two processes may write the same file
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def finite(tree: Any) -> Any:
    """Nested dicts and lists with null for every number that JSON has not: infinity and not-a-number."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder by `write` and puts it in the place of `path`. Where `write` fails, nothing is left of it."""
    part, old = path.with_name(WRITING + path.name), path.with_name(f"{WRITING}old-{path.name}")
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
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    sync_folder(part)
    if path.exists():
        path.rename(old)
    part.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder so that a cut leaves none that looks whole."""
    old = path.with_name(f"{WRITING}old-{path.name}")
    path.rename(old)
    shutil.rmtree(old)


def sync_folder(path: Path) -> None:
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_folder(folder, write)
    return folder
