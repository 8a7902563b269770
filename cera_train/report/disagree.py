"""`cera-report disagree A B`: the problems that one run solves and the other does not, side by side."""

from __future__ import annotations

import shutil
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.trust import clean
from cera_train.report.comparison import check_same_problems, compare, is_graded, name_of
from cera_train.report.runs import STEPS, Run, read_runs

PIPE_WIDTH = 100
"""Columns of an output that is not a terminal."""
GAP = " | "


def disagree(first: Path, second: Path, task: str | None = None) -> None:
    """Prints the counts, the paired test, and every problem on which the two runs differ.

    Args:
        first: the folder of a run, or of another that has evaluations.
        second: likewise.
        task: the evaluation to look at. None: the one that both have.

    Raises:
        ValueError: a folder is not that of one run, there is no such common task, or it was evaluated on different
            problems.
    """
    runs = [_one_run(first), _one_run(second)]
    if runs[0].folder.resolve() != runs[1].folder.resolve():
        runs = read_runs([run.folder for run in runs])  # with names that tell them apart
    task = _common_task(*runs, task)
    a, b = (run.evaluations[task] for run in runs)
    check_same_problems(a, b)
    test = compare(*runs, task)
    width = terminal_width()
    shares = {name: tuple(own.share_right(name, test.grader) for own in (a, b)) for name in a.grades}
    different = [name for name, (one, other) in shares.items() if one != other]

    print(clean(f"task        {name_of(task)}, {test.problems:,} problems, grader: {test.grader}"))
    for letter, run, mean in zip("AB", runs, test.means, strict=True):
        print(clean(f"{letter}           {run.name}: {run.method}{_rank(run)}, {mean:.1%} right"))
    if test.mcnemar is not None:
        counts = {"both right": (1, 1), "only A": (1, 0), "only B": (0, 1), "neither": (0, 0)}
        for label, pair in counts.items():
            print(f"{label:<12}{sum(share == pair for share in shares.values()):,}")
    print(clean(textwrap.fill(f"{test.verdict}: {test.evidence}", width, initial_indent="test        ",
                              subsequent_indent=" " * 12)))  # fmt: skip
    for settings in test.other_settings:
        print(clean(f"not alike   {settings}"))
    if not different:
        print("\nThe two runs solve the same problems.")
    for number, name in enumerate(different, start=1):
        problem = a.problems[name]
        print(f"\n{f'--- {number} of {len(different)}: {clean(name)} ':-<{width}}")
        for line in wrap(problem["question"], width):
            print(line)
        print(clean(f"gold: {problem['gold']}"))
        print(
            _side_by_side(
                _column(runs[0], "A", a, name, test.grader), _column(runs[1], "B", b, name, test.grader), width
            )
        )


def _one_run(folder: Path) -> Run:
    runs = read_runs([folder])
    if len(runs) > 1:
        raise UserError(
            f"{folder} is a folder of {len(runs)} runs: disagree takes one run on each side, such as {runs[0].folder}."
        )
    return runs[0]


def _common_task(first: Run, second: Run, task: str | None) -> str:
    common = [
        name for name, own in first.evaluations.items() if is_graded(own) and is_graded(second.evaluations.get(name))
    ]
    listed = ", ".join(common) or "none"
    if task is not None and task not in common:
        raise UserError(
            f"task {task} has no finished answers of both {first.name} and {second.name}; common tasks: {listed}."
        )
    if task is None and len(common) != 1:
        mend = "choose one with --task" if common else "evaluate both with cera-eval run=DIR task=TASK"
        raise UserError(f"{first.name} and {second.name} have {len(common)} tasks in common ({listed}): {mend}.")
    return task or common[0]


def _rank(run: Run) -> str:
    return f" r={run.rank}" if run.rank else ""


def _column(run: Run, letter: str, evaluation: Any, name: str, grader: str) -> list[str]:
    """Heading, answers and generations of one run, as paragraphs."""
    paragraphs = []
    for grade in evaluation.grades[name]:
        mark = _mark(grade, grader)
        sample = f", sample {grade['sample']}" if len(evaluation.grades[name]) > 1 else ""
        answer = "no answer found" if grade["answer"] is None else f"answer: {grade['answer']}"
        failure = f" ({grade['failure']})" if grade.get("failure") else ""
        text = evaluation.texts.get((name, grade["sample"]), "(the generation is not on record)")
        paragraphs += [
            f"{letter}, {mark}{sample}: {run.name}",
            f"{answer}{failure}",
            "",
            *text.strip().splitlines(),
            "",
        ]
    return paragraphs[:-1]


def _mark(grade: dict[str, Any], grader: str) -> str:
    if grader == STEPS:
        return f"{sum(grade['matches'])} of {len(grade['matches'])} steps right"
    return "right" if grade[grader] else "wrong"


def _side_by_side(left: list[str], right: list[str], width: int) -> str:
    half = (width - len(GAP)) // 2
    columns = [[line for paragraph in own for line in wrap(paragraph, half)] for own in (left, right)]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(f"{one:<{half}}{GAP}{other}".rstrip() for one, other in rows)


def terminal_width() -> int:
    return shutil.get_terminal_size((PIPE_WIDTH, 24)).columns if sys.stdout.isatty() else PIPE_WIDTH


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`, keeping the text's own line breaks."""
    lines = []
    for line in text.splitlines() or [""]:
        lines += textwrap.wrap(clean(line), width, replace_whitespace=False, drop_whitespace=False) or [""]
    return lines
