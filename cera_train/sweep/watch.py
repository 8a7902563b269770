"""What `cera-watch` shows: a run or a sweep that goes on, by the files in its folder. In a terminal one picture that is
drawn again and again; elsewhere a line for everything new. Imports no torch."""

from __future__ import annotations

import itertools
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.live import Live
from rich.text import Text

from cera_train.common.curves import curve
from cera_train.common.terminal import console, labelled
from cera_train.common.trust import clean
from cera_train.runs.following import FollowedRun, RunState
from cera_train.runs.lines import describe_evaluation, describe_grade, describe_tasks, describe_update, figure, one_line
from cera_train.runs.results import EvaluationMetrics, Sample, UpdateMetrics
from cera_train.sweep.record import RECORD, SweepRecord
from cera_train.sweep.table import State, read_sweep, sweep_table

PAUSE = 1.0  # seconds between two looks
BUSY_SHARE = 0.1  # of the time, at most, is spent on looking: a sweep of hundreds of jobs takes long to read
CURVE_WIDTH, CURVE_HEIGHT = 100, 8  # at most, of both curves
SIDE_BY_SIDE = 80  # columns from which they stand side by side
UNENDED = (State.running, State.cut, State.waiting)
STYLES = {"running": "cyan", "finished": "green", "cut": "yellow", "failed": "red", "right": "green", "wrong": "red"}


def watch(folder: Path, once: bool = False) -> None:
    """Follows a run or a sweep until it ends, or shows where it stands.

    Raises:
        UserError: the folder holds neither.
    """
    watched = WatchedSweep(folder) if (folder / RECORD).is_file() else WatchedRun(folder)
    watched.look()
    if once:
        console().print(Text("\n").join(watched.picture(console().width)), soft_wrap=True)
    elif sys.stdout.isatty() and not console().is_dumb_terminal:
        follow_in_terminal(watched)
    else:
        follow_in_lines(watched)


class Watched(ABC):
    """What is followed."""

    @abstractmethod
    def look(self) -> Iterable[str]:
        """Reads what is new; yields a line for each thing."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether it had ended at the last look."""

    @abstractmethod
    def lines(self) -> list[str]:
        """Where it stands."""

    @abstractmethod
    def picture(self, width: int, height: int | None = None) -> list[Text]:
        """Where it stands, in lines of a terminal of so many columns and rows."""


def follow_in_terminal(watched: Watched) -> None:
    """Draws the picture until what is watched is over; the last one stays."""
    target = console()
    with Live(console=target, auto_refresh=False) as live:
        while True:
            picture = watched.picture(target.width, target.height - 1)
            live.update(Text("\n").join(picture), refresh=True)
            if watched.is_over:
                return
            look_again(watched)


def follow_in_lines(watched: Watched) -> None:
    """Prints where it stands, then a line for everything new, and at the end where it stands."""
    was_over = watched.is_over
    print_lines(watched.lines())
    while not watched.is_over:
        print_lines(look_again(watched))
    if not was_over:
        print_lines(watched.lines())


def look_again(watched: Watched) -> Iterable[str]:
    """Looks after a pause that is long beside the time it takes."""
    time.sleep(PAUSE)
    started = time.monotonic()
    new = watched.look()
    time.sleep((time.monotonic() - started) * (1 / BUSY_SHARE - 1))
    return new


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(clean(line))
    sys.stdout.flush()


# --- a run -----------------------------------------------------------------------------------------------------------


class WatchedRun(Watched):
    """A run: its loss, its evaluations, its last samples."""

    def __init__(self, folder: Path) -> None:
        self.run = FollowedRun(folder)

    @property
    def is_over(self) -> bool:
        return self.run.state != RunState.running

    def look(self) -> Iterable[str]:
        return map(self._line, self.run.look())

    def _line(self, new: UpdateMetrics | EvaluationMetrics | Sample) -> str:
        if isinstance(new, EvaluationMetrics):
            return "; ".join(filter(None, [describe_evaluation(new), describe_tasks(new.tasks.found)]))
        if isinstance(new, UpdateMetrics):
            return f"update {self._done(new.update)}  {describe_update(new, self.run.seconds_left(new.update))}"
        texts = f"{one_line(new.prompt)} -> {one_line(new.answer)}"
        return f"sample at update {new.update}: {texts} ({describe_grade(new)}, gold {one_line(new.gold)})"

    def _done(self, update: int) -> str:
        total = self.run.total
        return f"{update:,}" if total is None else f"{update:>{len(str(total))}}/{total}"

    def lines(self) -> list[str]:
        run = self.run
        more = ": the same cera-train command goes on with it" if run.state == RunState.cut else ""
        if run.state == RunState.running and not (run.updates or run.evaluations):
            more = ", before its first update"
        lines = [labelled(run.state, f"{run.folder}{more}")]
        if run.updates:
            last, left = run.updates[-1], run.seconds_left() if run.state == RunState.running else None
            lines.append(labelled("update", f"{self._done(last.update).strip()}  {describe_update(last, left)}"))
        if run.evaluations:
            last, best = run.evaluations[-1], run.best
            is_best = best is None or best.update == last.update
            best = "" if is_best else f"; best {figure(best.perplexity)} at update {best.update}"
            lines.append(labelled("eval", describe_evaluation(last).removeprefix("evaluation ") + best))
        if answered := [line for line in run.evaluations if line.tasks.found][-1:]:
            figures = describe_tasks(answered[0].tasks.found)
            lines.append(labelled("tasks", f"at update {answered[0].update}: {figures}"))
        if run.broken:
            lines.append(labelled("note", f"{run.broken:,} lines of metrics.jsonl or samples.jsonl cannot be read"))
        return lines

    def picture(self, width: int, height: int | None = None) -> list[Text]:
        head = [styled(line, width) for line in self.lines()]
        rows = CURVE_HEIGHT if height is None else max(2, min(CURVE_HEIGHT, (height - len(head)) // 3))
        lines = [*head, *self._curves(min(width, CURVE_WIDTH), rows), *self._sample_lines(width)]
        return lines if height is None else lines[:height]

    def _curves(self, width: int, height: int) -> list[Text]:
        """Loss and evaluation perplexity, side by side where there is room."""
        total, run = self.run.total, self.run
        curves = {
            "loss": [(line.update, line.loss) for line in run.updates if line.loss is not None],
            "evaluation perplexity": [
                (line.update, line.perplexity) for line in run.evaluations if line.perplexity is not None
            ],
        }
        curves = {title: points for title, points in curves.items() if len(points) > 1}
        is_pair = len(curves) == 2 and width >= SIDE_BY_SIDE
        each = width // 2 - 1 if is_pair else width
        drawn = [[title, *curve(points, each, height, total or 0)] for title, points in curves.items()]
        lines = list(itertools.chain.from_iterable(drawn))
        if is_pair:
            lines = [f"{one:<{each}}  {other}" for one, other in itertools.zip_longest(*drawn, fillvalue="")]
        return [styled(line, width, "cyan") for line in ["", *lines]] if lines else []

    def _sample_lines(self, width: int) -> list[Text]:
        """Prompt, answer and gold answer of every sample of the last evaluation."""
        samples = self.run.samples
        lines = ["", f"samples at update {samples[0].update}"] if samples else []
        for sample in samples:
            lines.append(labelled("prompt", one_line(sample.prompt)))
            lines.append(labelled(f"  {describe_grade(sample)}", one_line(sample.answer)))
            lines.append(labelled("  gold", one_line(sample.gold)))
        return [styled(line, width) for line in lines]


def styled(line: str, width: int, style: str = "") -> Text:
    """A line, cut at the width, with the states and grades in it in their colours."""
    text = Text(clean(line), style, no_wrap=True)
    for word, style in STYLES.items():
        text.highlight_regex(rf"(^ *|, |  ){word}(?=[ ,:]|$)", style)
    text.truncate(width, overflow="ellipsis")
    return text


# --- a sweep ---------------------------------------------------------------------------------------------------------


class WatchedSweep(Watched):
    """A sweep: the table of its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, []

    @property
    def is_over(self) -> bool:
        """Whether every job has ended. A sweeper that decides as it goes may always have another."""
        return self._is_grid and not any(job.state in UNENDED for job in self.jobs)

    def look(self) -> list[str]:
        """The rows of jobs whose state or figure is another than at the last look; updates alone are no news."""
        before = {job.name: replace(job, done=None) for job in self.jobs}
        self._is_grid = bool(SweepRecord.read(self.folder / RECORD).jobs)
        self.jobs = read_sweep(self.folder)
        rows = zip(self.jobs, sweep_table(self.folder, self.jobs)[1], strict=True)
        return [
            row
            for job, row in rows
            if replace(job, done=None) != before.get(job.name) and (job.name in before or job.state != State.waiting)
        ]

    def lines(self) -> list[str]:
        head, rows, tail = sweep_table(self.folder, self.jobs)
        return [*head, *rows, *tail]

    def picture(self, width: int, height: int | None = None) -> list[Text]:
        head, rows, tail = sweep_table(self.folder, self.jobs)
        room = len(rows) if height is None else height - len(head) - len(tail)
        if len(rows) > room:
            rows = list(self._most_telling(rows, room - 1))
        return [styled(line, width) for line in (*head, *rows, *tail)]

    def _most_telling(self, rows: list[str], room: int) -> Iterator[str]:
        """So many rows, in their order: first those of running jobs, then of others that have begun."""
        states = [job.state for job in self.jobs]
        order = sorted(range(len(rows)), key=lambda n: (states[n] != State.running, states[n] == State.waiting))
        kept = sorted(order[: max(room, 0)])
        yield from (rows[number] for number in kept)
        yield f"... and {len(rows) - len(kept):,} more"
