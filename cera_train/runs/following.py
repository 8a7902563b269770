"""A run's folder, followed while another process writes to it. It is only read: no file is made, changed or held.

Lines come as the run writes them. A line that cannot be read is counted and left out; half a line is read when it is
whole. A run that resumes replaces a file by its first lines: what comes after them is new.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Generic, TypeVar

from cera_train.common.errors import UserError
from cera_train.common.files import is_locked
from cera_train.common.records import Record
from cera_train.runs.results import Environment, EvaluationMetrics, MetricsLine, RunResult, Sample, UpdateMetrics

PACE_UPDATES = 100
"""Updates over which the pace is taken."""

PACE_SECONDS = 10.0
"""A pace that was observed for so long is preferred: evaluations count in it too."""

MOST_UPDATES = 10**12
"""More than any run has: a number beyond it is damage."""

Line = TypeVar("Line")


class RunState(StrEnum):
    running = "running"
    finished = "finished"
    cut = "cut"  # it began, did not end, and no process holds its folder


class GrowingFile:
    """A file that grows by lines, and may be replaced or cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end, self._last = 0, b""  # the bytes that are read, and the last line of them

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether the file has another content than at the last call, and its new lines: of another content, all."""
        if not self.path.is_file():  # not there yet, or removed
            is_other = self._end > 0
            self._end, self._last = 0, b""
            return is_other, []
        with self.path.open("rb") as file:
            file.seek(self._end - len(self._last))
            is_other = file.read(len(self._last)) != self._last
            if is_other:
                self._end, self._last = file.seek(0), b""
            content = file.read()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        if lines:
            self._end, self._last = self._end + sum(map(len, lines)), lines[-1]
        return is_other, lines


class FollowedLines(Generic[Line]):
    """The records of a file that grows by lines."""

    def __init__(self, path: Path, kind: type[Record]) -> None:
        self._file, self.kind = GrowingFile(path), kind
        self.lines: list[Line] = []
        self.broken = 0

    def look(self) -> list[Line]:
        """The records that have come since the last look."""
        is_other, raw = self._file.read()
        read, broken = self._parse(raw)
        if not is_other:
            self.lines += read
            self.broken += broken
            return read
        pairs = enumerate(zip(self.lines, read, strict=False))
        known = next((number for number, (old, new) in pairs if old != new), min(len(self.lines), len(read)))
        self.lines, self.broken = read, broken
        return read[known:]

    def _parse(self, raw: Iterable[bytes]) -> tuple[list[Line], int]:
        read, broken = [], 0
        for line in raw:
            try:
                record = self.kind.from_json(json.loads(line), self._file.path)
            except (ValueError, RecursionError):  # a UserError is a ValueError
                record = None
            if record is None or not 0 <= record.update < MOST_UPDATES:
                broken += 1
            else:
                read.append(record)
        return read, broken


class FollowedRun:
    """What is known of a run so far. `look` reads on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = FollowedLines(folder / "metrics.jsonl", MetricsLine)
        self._samples = FollowedLines(folder / "samples.jsonl", Sample)
        self._seen: list[tuple[float, int]] = []  # when which update was seen: the first and the last
        self.state, self.total, self.result = RunState.cut, None, None
        self.updates: list[UpdateMetrics] = []
        self.evaluations: list[EvaluationMetrics] = []
        self.pace: float | None = None  # seconds an update

    def look(self) -> list[UpdateMetrics | EvaluationMetrics | Sample]:
        """Reads what has come since the last look; raises UserError where the folder holds no run."""
        self.state = self._find_state()  # first: a run that has ended writes nothing more
        self.result = RunResult.read(self.folder / "result.json") if self.state == RunState.finished else None
        environment = self.folder / "environment.json"
        self.total = Environment.read(environment).updates if environment.is_file() else None
        before = self.update
        new = [*self._metrics.look(), *self._samples.look()]
        if new or self.update < before:
            lines = self._metrics.lines
            self.updates = [line for line in lines if isinstance(line, UpdateMetrics)]
            self.evaluations = [line for line in lines if isinstance(line, EvaluationMetrics)]
        if self.update < before:
            self._seen.clear()
        if self.update != before or not self._seen:
            self._seen[1:] = [(time.monotonic(), self.update)]
        self.pace = self._find_pace()
        return new

    def _find_state(self) -> RunState:
        if is_locked(self.folder):
            return RunState.running
        if (self.folder / "result.json").is_file():
            return RunState.finished
        if not any((self.folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            what = "holds no run" if self.folder.is_dir() else "does not exist (yet)"
            raise UserError(
                f"{self.folder} {what}: expected the folder of a run or of a sweep, such as outputs/quickstart, which "
                "is there when cera-train prints its first line."
            )
        return RunState.cut

    def _find_pace(self) -> float | None:
        """Seconds an update, as observed; before that, as the run measured its last updates."""
        (first, start), (last, end) = self._seen[0], self._seen[-1]
        if last - first >= PACE_SECONDS and end > start:
            return (last - first) / (end - start)
        timed = [line for line in self.updates[-PACE_UPDATES:] if line.seconds is not None]
        if not timed:
            return None
        seconds, updates = timed[-1].seconds, timed[-1].update
        if updates > timed[0].update:
            seconds, updates = seconds - timed[0].seconds, updates - timed[0].update
        return seconds / updates if updates > 0 else None

    @property
    def update(self) -> int:
        """Updates done."""
        return self._metrics.lines[-1].update if self._metrics.lines else 0

    @property
    def best(self) -> EvaluationMetrics | None:
        """The evaluation of the lowest perplexity."""
        measured = [line for line in self.evaluations if line.perplexity is not None]
        return min(measured, key=lambda line: line.perplexity, default=None)

    @property
    def samples(self) -> list[Sample]:
        """Those of the last evaluation that has some."""
        lines = self._samples.lines
        return [line for line in lines if line.update == lines[-1].update]

    @property
    def broken(self) -> int:
        """Lines that cannot be read."""
        return self._metrics.broken + self._samples.broken

    def seconds_left(self, update: int | None = None) -> float | None:
        """Time that the updates after `update` take at the present pace. None where it is not known."""
        if self.pace is None or self.total is None or self.total > MOST_UPDATES:
            return None
        seconds = max(0.0, self.pace * (self.total - (self.update if update is None else update)))
        return seconds if seconds < MOST_UPDATES else None  # also of what is no number
