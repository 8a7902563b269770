"""What an evaluation prints: its progress and its result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cera_train.common.terminal import ProgressBar, duration, print_fields, print_table
from cera_train.evaluation.tasks.task import Task
from cera_train.runs.results import AccuracyResult, PerplexityResult


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


def print_evaluation(task: Task, result: AccuracyResult | PerplexityResult, folder: Path) -> None:
    """Prints the result of an evaluation, and the tables that the task adds."""
    if isinstance(result, AccuracyResult):
        lines = _accuracy_lines(result) | task.lines(result.details) | _count_lines(result)
        tables = task.tables(result.details)
    else:
        lines, tables = _perplexity_lines(result), []
    print()
    print_fields(lines | {"folder": str(folder)})
    for table in tables:
        print(f"\n{table.title}")
        print_table(table.header, table.rows)


def _accuracy_lines(result: AccuracyResult) -> dict[str, str]:
    is_sampled = result.samples > 1
    lines = {"problems": f"{result.problems:,}" + f", {result.samples:,} answers each" * is_sampled}
    for found in result.accuracies.found:
        sure = "no 95 % interval: the same for every problem"
        if interval := result.interval(found):
            sure = f"95 % interval {interval[0]:.1%} to {interval[1]:.1%}"
        lines[found.key.replace("/", " ") if is_sampled else found.grader] = f"{found.value:.1%}  ({sure})"
    return lines


def _count_lines(result: AccuracyResult) -> dict[str, str]:
    shares = result.endings.by_name
    lines = {"answers": ", ".join(f"{name} {share:.1%}" for name, share in shares.items())} if shares else {}
    lines |= {"no answer": f"{result.no_answer:,}", "grader failed": f"{result.grader_failures:,}"}
    if result.tokens_per_s:
        lines["speed"] = f"{result.tokens_per_s:,.0f} tokens/s"
    return lines


def _perplexity_lines(result: PerplexityResult) -> dict[str, str]:
    lines = {"perplexity": f"{result.perplexity:.3f}"}
    if result.perplexity_base is not None:
        lines["without adapter"] = f"{result.perplexity_base:.3f}"
    if result.spectrum.effective_rank_mean is not None:
        spectrum = result.spectrum
        lines["effective rank"] = f"{spectrum.effective_rank_mean:.1f} mean, {spectrum.effective_rank_max:.1f} max"
    lines["tokens"] = f"{result.tokens:,} predicted, in {result.rows:,} rows"
    return lines | {"time": duration(result.seconds)}
