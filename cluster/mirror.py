"""Runs a command, and meanwhile copies outputs/ to a mounted bucket, from which another machine
goes on.

    python cluster/mirror.py /bucket cera-train +recipe=math_r64

A bucket is no file system to write a run to: it takes no appended line and no renamed folder, and
its files appear in any order. So the run writes to the local disk, and this copies whole files,
each after those that it relies on: what is in the bucket resumes, wherever the copying is cut. The
exit status is the command's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

OUTPUTS = Path("outputs")
SECONDS = float(os.environ.get("MIRROR_SECONDS", 60))
"""Between two copies."""
TRIES = 10
"""Of the last copy."""
CHECKSUMS = "checksums.json"
"""The SHA-256 of every other file of a checkpoint."""
RESULT = "result.json"
"""The last file of a run: one that has it is finished."""
WRITING = ".writing-"
"""The start of a name whose file or folder is being written."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Mirror:
    """Keeps a copy of a folder up to date; at first, takes from the copy what the folder lacks and
    is whole."""

    def __init__(self, folder: Path, copy: Path) -> None:
        self.folder, self.copy = folder, copy
        self._copied: dict[Path, tuple[int, int, int]] = {}  # as each file was when it was copied
        for path in _files(copy):
            if not (target := folder / path).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                # Under its own name only when it is whole: the next start would copy a part over
                # the bucket's.
                part = target.with_name(f"{WRITING}{target.name}")
                shutil.copyfile(copy / path, part)
                os.replace(part, target)
                self._copied[path] = _state(target)
        for path in [path for path in self._copied if path.name == CHECKSUMS]:
            if not _is_whole(folder / path.parent):
                print(
                    f"mirror     {copy / path.parent} was cut or damaged: not used",
                    file=sys.stderr,
                    flush=True,
                )
                shutil.rmtree(folder / path.parent)
                self._copied = {
                    other: state
                    for other, state in self._copied.items()
                    if other.parent != path.parent
                }

    def update(self) -> None:
        """Copies what has changed, then removes what is gone."""
        # What a checkpoint or a result relies on was there before it, so it is in a list made
        # after.
        last = [path for path in _files(self.folder) if _place(path) > 0]
        first = [path for path in _files(self.folder) if _place(path) == 0]
        for path in (*first, *sorted(last, key=_place)):
            try:
                self._copy(path)
            except FileNotFoundError:  # replaced or removed by the run meanwhile
                continue
        gone = self._copied.keys() - {*_files(self.folder)}
        for path in sorted(gone, key=_place, reverse=True):
            (self.copy / path).unlink(missing_ok=True)
            del self._copied[path]
            with contextlib.suppress(OSError):  # it holds other files, or a bucket knows no folders
                (self.copy / path).parent.rmdir()

    def _copy(self, path: Path) -> None:
        state = _state(self.folder / path)
        if self._copied.get(path) != state:
            (self.copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / path, self.copy / path)
            self._copied[path] = state


def _files(folder: Path) -> list[Path]:
    """The files below a folder, relative to it, without those that are still being written and
    without locks."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(WRITING)]
        names = [name for name in names if not name.startswith((WRITING, ".lock", ".probe"))]
        found += [Path(place, name).relative_to(folder) for name in names]
    return found


def _place(path: Path) -> int:
    """The place in the order of copying. Part of a checkpoint is seen to be damaged by its
    checksums alone."""
    if path.name == RESULT:
        return 3
    if "checkpoints" not in path.parts:
        return 0
    return 1 if path.name == CHECKSUMS else 2


def _is_whole(checkpoint: Path) -> bool:
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_bytes())
        return all(_sha256(checkpoint / name) == written for name, written in sums.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


def main(bucket: str, *command: str) -> int:
    for word in command:
        key, _, folder = word.lstrip("+").partition("=")
        if key == "output_dir" and Path(folder) != OUTPUTS:
            print(f"mirror: {word}: only {OUTPUTS}/ is copied: leave it out.", file=sys.stderr)
            return 2
    # A bucket that refuses files fails here, before the run costs anything.
    Path(bucket, ".probe").write_text("")
    mirror = Mirror(OUTPUTS, Path(bucket))
    child = subprocess.Popen(command)
    for number in SIGNALS:
        signal.signal(number, lambda number, _: child.send_signal(number))
    while True:
        try:
            status = child.wait(SECONDS)
            break
        except subprocess.TimeoutExpired:
            try:
                mirror.update()
            except OSError as error:
                print(
                    f"mirror     {error}: tried again in {SECONDS:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    for number in range(TRIES):
        try:
            mirror.update()
            break
        except OSError:
            if number == TRIES - 1:
                raise
            time.sleep(SECONDS / TRIES)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
