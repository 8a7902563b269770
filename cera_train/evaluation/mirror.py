"""An evaluation in the W&B run of the run that it measured: its figures, and a table of its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cera_train.common.records import fits
from cera_train.runs.evaluation_folder import EvaluationFolder, GradedAnswers
from cera_train.runs.results import AccuracyResult, EvaluationMetrics, RunResult, read_evaluation_result
from cera_train.runs.tracking import Tracker, send_to_run


def mirror_evaluation(folder: EvaluationFolder) -> None:
    """Sends a finished evaluation, RUN/eval/NAME, to the W&B run of RUN, if W&B tracks it: figures as NAME/FIGURE, such
    as math/exact/pass@1, at the update after which the adapter was saved; answers as NAME/answers."""
    path = folder.path if len(folder.path.parts) > 2 else folder.path.absolute()  # grade=. has no parents
    run, name = path.parent.parent, path.name

    def send(tracker: Tracker) -> None:
        result = read_evaluation_result(path / "result.json")
        update = update_of(run, Path(folder.config().run))
        rows = answer_rows(path) if isinstance(result, AccuracyResult) else []
        tracker.log({f"{name}/{key}": value for key, value in result.to_json().items() if fits(value, float)}, update)
        if rows:
            tracker.table(f"{name}/answers", rows, update)

    send_to_run(run, f"the evaluation {name}", send)


def update_of(run: Path, adapter: Path) -> int:
    """The update after which an adapter of a run was saved: its best, a checkpoint's or the final one."""
    if adapter.name == "best":
        return EvaluationMetrics.read(run / "best" / "metrics.json").update
    if adapter.parent.name == "checkpoints":
        return int(adapter.name)
    return RunResult.read(run / "result.json", needs=["updates"]).updates


def answer_rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each answer, in the task's order."""
    answers = GradedAnswers(folder)
    rows = []
    for grade in (grade for grades in answers.grades.values() for grade in grades):
        problem = answers.problems[grade.problem]
        rows.append(
            {
                "problem": problem.id,
                "sample": grade.sample,
                "question": problem.question,
                "answer": answers.texts[grade.problem, grade.sample],
                "extracted": None if grade.answer is None else str(grade.answer),
                "gold": problem.gold,
                "exact": grade.exact,
                "verified": grade.verified,
                "ending": grade.ending,
            }
        )
    return rows
