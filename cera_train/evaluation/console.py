"""What an evaluation prints: how far it is, and its result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cera_train.common.terminal import ProgressBar, print_fields
from cera_train.common.text import duration
from cera_train.common.trust import clean


class EvaluationProgress:
    """Answers done, how many are right so far by the exact rule, and the time left.

    Args:
        total: answers of this process.
        processes: that share the answers; the others are as fast as this one.
    """

    def __init__(self, total: int, visible: bool, processes: int) -> None:
        self.total, self.others = total, processes - 1
        self.answered, self.correct, self.started = 0, 0, time.perf_counter()
        self.bar = ProgressBar("answer", total, 0, visible)

    def step(self, correct: Sequence[bool]) -> None:
        """A batch of answers."""
        self.answered += len(correct)
        self.correct += sum(correct)
        seconds_left = (time.perf_counter() - self.started) / self.answered * (self.total - self.answered)
        sharing = f" of this process's, {self.others} more at work" if self.others else ""
        self.bar.step(f"exact {self.correct / self.answered:.1%}{sharing}  {duration(seconds_left)} left", len(correct))

    def close(self) -> None:
        self.bar.close()


def say_evaluation(result: dict[str, Any], folder: Path) -> None:
    """The table at the end of an evaluation."""
    rows = _perplexity_rows(result) if result["kind"] == "perplexity" else _accuracy_rows(result)
    print()
    print_fields(rows | {"folder": str(folder)})
    if case := result.get("paper_case"):
        print("\nr = 3.5, x0 = 0.4")
        print("step    truth   answer")
        for step, (true, answer) in enumerate(zip(case["truth"], case["answer"], strict=True), start=1):
            print(clean(f"x{step:<4}{true:>8}{answer or '-':>9}"))


def _accuracy_rows(result: dict[str, Any]) -> dict[str, str]:
    answers = result["problems"] * result["samples"] - result["missing"]
    rows = {"problems": f"{result['problems']:,}, {result['samples']:,} answers each"}
    if result["samples"] == 1:
        rows["problems"] = f"{result['problems']:,}"
    for name, value in result.items():
        if "/pass@" in name and not name.endswith("/interval"):
            lower, upper = result[f"{name}/interval"]
            label = name.replace("/", " ") if result["samples"] > 1 else name.split("/")[0]
            # Resampling problems that came out alike gives a point, which is not how sure the figure is.
            interval = f"95 % interval {lower:.1%} to {upper:.1%}" if lower < upper else "all alike: no interval"
            rows[label] = f"{value:.1%}  ({interval})"
    if "step_accuracy" in result:
        rows["by step"] = "  ".join(f"{value:.0%}" for value in result["step_accuracy"])
        for growth, own in result["by_growth"].items():
            error = "none given" if own["absolute_error/mean"] is None else f"{own['absolute_error/mean']:.4f}"
            rows[f"r = {growth}"] = (
                f"steps right {own['step_accuracy/mean']:.1%}, absolute error {error}, "
                f"state collapse {own['state_collapse']:.1%}"
            )
    rows["truncated"] = f"{result['truncated']:,} of {answers:,} answers"
    rows["no answer"] = f"{result['no_answer']:,}"
    rows["grader failed"] = f"{result['grader_failures']:,}"
    if result.get("tokens_per_s"):
        rows["speed"] = f"{result['tokens_per_s']:,.0f} tokens/s"
    return rows


def _perplexity_rows(result: dict[str, Any]) -> dict[str, str]:
    rows = {"perplexity": f"{result['perplexity']:.3f}"}
    if "perplexity_base" in result:
        rows["without adapter"] = f"{result['perplexity_base']:.3f}"
    if "spectrum/effective_rank/mean" in result:
        rows["effective rank"] = (
            f"{result['spectrum/effective_rank/mean']:.1f} mean, {result['spectrum/effective_rank/max']:.1f} max"
        )
    return rows | {
        "tokens": f"{result['tokens']:,} predicted, in {result['rows']:,} rows",
        "time": duration(result["seconds"]),
    }
