"""`cera-report disagree A B`: the problems that one run solves and the other does not, side by side."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.common.terminal import print_line, terminal_width
from cera_train.common.trust import clean
from cera_train.report.comparison import compare, graded, scores_by_problem
from cera_train.report.runs import Run, read_runs

GAP = " | "


def disagree(first: Path, second: Path, task: str | None = None) -> None:
    """Prints the paired test of two runs and every problem on which they differ.

    Args:
        task: an evaluation that both have. None: the only one.
    """
    runs = read_runs([first, second])
    if len(runs) != 2:
        raise UserError(f"{first} and {second} hold {len(runs)} runs: disagree takes two, one on each side.")
    task = _common_task(runs, task)
    evaluations = [run.evaluations[task] for run in runs]
    test, width = compare(*runs, task), terminal_width()
    first_scores, second_scores = (scores_by_problem(evaluation, test.grader) for evaluation in evaluations)
    different = [name for name, score in first_scores.items() if score != second_scores[name]]

    print_line("task", f" {task}, {test.problems:,} problems, grader: {test.grader}")
    for letter, run, mean in zip("AB", runs, test.means, strict=True):
        print_line(letter, f" {run.name}: {run.method}{f' r={run.rank}' * bool(run.rank)}, {mean:.1%} right")
    if test.mcnemar is not None:
        print_line("only A", f" {test.mcnemar.only_first:,}")
        print_line("only B", f" {test.mcnemar.only_second:,}")
    for label in ("difference, points", "95 % interval", "p", "verdict"):
        print_line(label.partition(",")[0], f" {test.row[label]}")
    for number, name in enumerate(different, start=1):
        problem = evaluations[0].answers.problems[name]
        print(f"\n{f'--- {number} of {len(different)}: {clean(name)} ':-<{width}}")
        print("\n".join([*wrap(problem.question, width), clean(f"gold: {problem.gold}")]))
        half = (width - len(GAP)) // 2
        sides = (_column(run, letter, task, name, test.grader, half) for run, letter in zip(runs, "AB", strict=True))
        for left, right in zip_longest(*sides, fillvalue=""):
            print(f"{left:<{half}}{GAP}{right}".rstrip())


def _common_task(runs: list[Run], task: str | None) -> str:
    common = [name for name in runs[0].evaluations if len(graded(runs, name)) == 2]
    if task in common or (task is None and len(common) == 1):
        return task or common[0]
    mend = "choose one with --task" if common else "evaluate both with cera-eval run=DIR task=TASK"
    listed = ", ".join(common) or "none"
    raise UserError(f"tasks with finished answers of both {runs[0].name} and {runs[1].name}: {listed}: {mend}.")


def _column(run: Run, letter: str, task: str, problem: str, grader: str, width: int) -> list[str]:
    """The lines of one side: verdicts, answers and generations of one run."""
    evaluation, lines = run.evaluations[task], []
    for grade in evaluation.answers.grades[problem]:
        value = evaluation.task.paired_value(grade, grader)
        verdict = f"{value:.0%} of {grader} right" if evaluation.task.score_name else "right" if value else "wrong"
        answer = "no answer found" if grade.answer is None else f"answer: {grade.answer}"
        text = evaluation.answers.texts.get((problem, grade.sample), "(the generation is not on record)")
        lines += wrap(f"{letter}, {verdict}: {run.name}\n{answer}\n\n{text.strip()}\n", width)
    return lines[:-1]


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`, keeping the text's line breaks."""
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(clean(line), width, replace_whitespace=False, drop_whitespace=False) or [""]
    return lines
