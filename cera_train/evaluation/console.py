"""What an evaluation prints: its progress and its result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cera_train.common.terminal import ProgressBar, duration, print_fields, print_table
from cera_train.runs.results import interval_of
from cera_train.tasks.endings import EndingShares
from cera_train.tasks.task import AnswerTask, Task


class EvaluationProgress(ProgressBar):
    """The answers of this process that are done, the share that is right so far by the exact rule, the time left."""

    def __init__(self, total: int, visible: bool, processes: int) -> None:
        super().__init__("answer", total, 0, visible)
        self.others, self.correct, self.started = processes - 1, 0, time.perf_counter()

    def count(self, correct: Sequence[bool]) -> None:
        """Counts a batch of answers."""
        self.correct += sum(correct)
        answered = self.done + len(correct)
        seconds_left = (time.perf_counter() - self.started) / answered * (self.total - answered)
        sharing = f" in this process, {self.others} more at work" if self.others else ""
        self.step(f"exact {self.correct / answered:.1%}{sharing}  {duration(seconds_left)} left", len(correct))


def print_evaluation(task: Task, result: Mapping[str, Any], folder: Path) -> None:
    """Prints the result of an evaluation, and the tables that the task adds."""
    lines = task.lines(result)
    if isinstance(task, AnswerTask):
        lines = _accuracy_lines(result) | lines | _count_lines(result)
    print()
    print_fields(lines | {"folder": str(folder)})
    for table in task.tables(result):
        print(f"\n{table.title}")
        print_table(table.header, table.rows)


def _accuracy_lines(result: Mapping[str, Any]) -> dict[str, str]:
    is_sampled = result["samples"] > 1
    lines = {"problems": f"{result['problems']:,}" + f", {result['samples']:,} answers each" * is_sampled}
    for name, value in result.items():
        if "/pass@" in name and not name.endswith("/interval"):
            interval = interval_of(value, tuple(result[f"{name}/interval"]), result["problems"])
            label = name.replace("/", " ") if is_sampled else name.split("/")[0]
            sure = "no 95 % interval: the same for every problem"
            if interval is not None:
                sure = f"95 % interval {interval[0]:.1%} to {interval[1]:.1%}"
            lines[label] = f"{value:.1%}  ({sure})"
    return lines


def _count_lines(result: Mapping[str, Any]) -> dict[str, str]:
    shares = EndingShares.from_json(result, "result.json").by_name
    lines = {"answers": ", ".join(f"{name} {share:.1%}" for name, share in shares.items())} if shares else {}
    lines |= {
        "no answer": f"{result['no_answer']:,}",
        "grader failed": f"{result['grader_failures']:,}",
    }
    if result.get("tokens_per_s"):
        lines["speed"] = f"{result['tokens_per_s']:,.0f} tokens/s"
    return lines
