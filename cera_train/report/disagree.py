"""`cera-report disagree A B`: the problems that one run solves and the other does not, side by side."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.common.terminal import print_line, terminal_width
from cera_train.common.trust import clean
from cera_train.evaluation.tasks.task import display_name
from cera_train.report.comparison import compare, graded, scores_by_problem
from cera_train.report.runs import Run, read_runs

GAP = " | "


def disagree(first: Path, second: Path, task: str | None = None) -> None:
    """Prints the counts, the paired test, and every problem on which two runs differ in a task: None for the one that
    both have."""
    for folder in (first, second):
        if len(inside := read_runs([folder])) > 1:
            raise UserError(
                f"{folder} is a folder of {len(inside)} runs: disagree takes one run on each side, such as "
                f"{inside[0].folder}."
            )
    runs = read_runs([first, second])  # with names that tell them apart
    if len(runs) == 1:
        runs *= 2  # a run beside itself
    task = _common_task(runs, task)
    evaluations = [run.evaluations[task] for run in runs]
    test, width = compare(*runs, task), terminal_width()
    first_scores, second_scores = (scores_by_problem(evaluation, test.grader) for evaluation in evaluations)
    pairs = {name: (score, second_scores[name]) for name, score in first_scores.items()}
    different = [name for name, (one, other) in pairs.items() if one != other]

    print_line("task", f" {display_name(task)}, {test.problems:,} problems, grader: {test.grader}")
    for letter, run, mean in zip("AB", runs, test.means, strict=True):
        print_line(letter, f" {run.name}: {run.method}{f' r={run.rank}' * bool(run.rank)}, {mean:.1%} right")
    for label, pair in {"both right": (1, 1), "only A": (1, 0), "only B": (0, 1), "neither": (0, 0)}.items():
        if test.mcnemar is not None:
            print_line(label, f" {list(pairs.values()).count(pair):,}")
    for label in ("difference, points", "95 % interval", "p", "verdict"):
        print_line(label.partition(",")[0], f" {test.row[label]}")
    for settings in test.other_settings:
        print_line("not alike", f" {settings}")
    if not different:
        print("\nThe two runs solve the same problems.")
    for number, name in enumerate(different, start=1):
        problem = evaluations[0].answers.problems[name]
        print(f"\n{f'--- {number} of {len(different)}: {clean(name)} ':-<{width}}")
        print("\n".join([*wrap(problem.question, width), clean(f"gold: {problem.gold}")]))
        half = (width - len(GAP)) // 2
        sides = (_column(run, letter, task, name, test.grader, half) for run, letter in zip(runs, "AB", strict=True))
        for left, right in zip_longest(*sides, fillvalue=""):
            print(f"{left:<{half}}{GAP}{right}".rstrip())


def _common_task(runs: list[Run], task: str | None) -> str:
    first, second = (run.name for run in runs)
    common = [name for name in runs[0].evaluations if len(graded(runs, name)) == 2]
    listed = ", ".join(common) or "none"
    if task is not None and task not in common:
        raise UserError(f"task {task} has no finished answers of both {first} and {second}; common tasks: {listed}.")
    if task is None and len(common) != 1:
        mend = "choose one with --task" if common else "evaluate both with cera-eval run=DIR task=TASK"
        raise UserError(f"{first} and {second} have {len(common)} tasks in common ({listed}): {mend}.")
    return task or common[0]


def _column(run: Run, letter: str, task: str, problem: str, grader: str, width: int) -> list[str]:
    """The lines of one side: verdicts, answers and generations of one run."""
    evaluation, lines = run.evaluations[task], []
    answers, task_kind = evaluation.answers, evaluation.task
    for grade in answers.grades[problem]:
        value = task_kind.paired_value(grade, grader)
        verdict = f"{value:.0%} of {grader} right" if task_kind.score_name else "right" if value else "wrong"
        sample = f", sample {grade.sample}" * (len(answers.grades[problem]) > 1)
        answer = "no answer found" if grade.answer is None else f"answer: {grade.answer}"
        failure = f" ({grade.failure})" * bool(grade.failure)
        text = answers.texts.get((problem, grade.sample), "(the generation is not on record)")
        lines += wrap(f"{letter}, {verdict}{sample}: {run.name}\n{answer}{failure}\n\n{text.strip()}\n", width)
    return lines[:-1]


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`, keeping the text's line breaks."""
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(clean(line), width, replace_whitespace=False, drop_whitespace=False) or [""]
    return lines
