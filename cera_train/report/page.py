"""The page of runs side by side: a row for each run and a column for each figure; paired tests;
settings that differ; pictures and notes."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from cera_train.common.terminal import announce, counted, duration, gigabytes
from cera_train.report.comparison import (
    PairedTest,
    cautions,
    differing_settings,
    paired_tests,
)
from cera_train.report.document import Page, Table
from cera_train.report.forest import Forest, Group, row_of
from cera_train.report.pictures import curves, spectra
from cera_train.report.readers import read_runs
from cera_train.report.runs import Figure, Metric, Run, group_by
from cera_train.runs.results import SPECTRUM_TERMS, describe_linear_share
from cera_train.settings.run import Config

CAPTION = (
    "Exact is the task's published rule, verified mathematical equality by math-verify or exact. "
    "Below an accuracy: its 95 % interval over problems."
)
TESTS = (
    "On the same problems; the verdict is on the first-named run, and beside 'not shown' stands "
    "the difference that is shown with power 80 %. p is McNemar's, or of a sign-flip permutation "
    "test where a problem has several answers or a score, after Holm over the pairs of a task; it "
    "decides at 5 %. The interval is a paired bootstrap's."
)

POINT = 0.01  # of a score
VERDICTS = (
    "The first-named run minus the second, in points (dotted: 1); the axis is linear near zero and "
    "logarithmic far from it. Line: 95 % interval for other problems. Grey: differences that these "
    "problems would miss in more than one of five repeats. The verdict is on these two runs; which "
    "method is better, a study finds out (cera-train -m +study=first_look)."
)


def compare_runs(folders: Sequence[Path]) -> Page:
    """The page of some runs: tables of the runs, of paired tests and of settings in which they
    differ."""
    runs = read_runs(folders)
    announce("comparing", counted(len(runs), "run"))
    tests, notes = paired_tests(runs)
    trained = [run for run in runs if run.is_training]
    tables = [
        table_of_runs(runs),
        Table("Paired tests", [test.row for test in tests], TESTS),
        table_of_costs(runs),
        table_of_settings(trained),
    ]
    title = runs[0].name if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    commands = {run.name: run.environment.command_line or "not on record" for run in trained}
    notes = [*cautions(runs), *notes]
    return Page(
        title,
        tables,
        curves(runs),
        commands,
        notes,
        verdicts=forest_of(tests),
        spectra=spectra(runs),
    )


def table_of_settings(runs: Sequence[Run]) -> Table:
    """What differs between runs."""
    settings = {run.name: run.settings for run in runs}
    differing = differing_settings(settings, Config)
    rows = [
        {"run": name} | {key: words[name] for key, words in differing.items()} for name in settings
    ]
    return Table("Settings", rows if differing else [], "What differs between runs.")


def forest_of(tests: Sequence[PairedTest]) -> Forest | None:
    """The tests by task; None without any."""
    groups = []
    for task, same in group_by(tests, lambda test: test.task).items():
        problems = " or ".join(dict.fromkeys(f"{test.problems:,}" for test in same))
        graders = " or ".join(dict.fromkeys(test.grader for test in same))
        note = f"{graders}, {problems} problems"
        groups.append(Group(task, note, [row_of(test, POINT, test.label) for test in same]))
    return Forest("verdicts", "Which run is better?", VERDICTS, groups) if groups else None


# --- the table of runs ----------------------------------------------------------------------------


def table_of_runs(runs: Sequence[Run]) -> Table:
    """The results that runs have."""
    return Table("Runs", list(map(_row, runs)), CAPTION)


def table_of_costs(runs: Sequence[Run]) -> Table:
    """What runs took, and what their adapters do, where that is known."""
    rows = [{"run": run.name} | costs for run in runs if any((costs := _costs(run)).values())]
    return Table("Cost and spectra", rows, SPECTRUM_TERMS)


def _row(run: Run) -> dict[str, str]:
    figures = run.figures
    share = cell(figures.trainable_share, "{:.2%} of the model")
    return {
        "run": run.name,
        "method": run.method,
        "r": cell(run.rank, "{:,}"),
        "parameters": cell(figures.trainable_parameters, "{:,}", share),
        "perplexity": _perplexity(run),
        **_task_cells(run),
    }


def _costs(run: Run) -> dict[str, str]:
    figures = run.figures
    spectrum = figures.spectrum
    updates = cell(figures.updates, "{:,} updates")
    return {
        "effective rank": cell(spectrum.effective_rank_mean, "{:,.1f}"),
        "manifold dimension": cell(spectrum.manifold_dimension_mean, "{:,.1f}"),
        "linear share": describe_linear_share(figures),
        "tokens/s": cell(figures.tokens_per_s, "{:,.0f}"),
        "peak memory": cell(figures.peak_memory_bytes, gigabytes),
        "time": cell(figures.seconds, duration, updates),
    }


def _task_cells(run: Run) -> dict[str, str]:
    """The figures of its evaluations."""
    return {
        f"{task} {metric.label}": _metric_cell(metric, figure)
        for task, evaluation in run.evaluations.items()
        for metric, figure in evaluation.figures.items()
    }


def _metric_cell(metric: Metric, figure: Figure) -> str:
    interval = ""
    if figure.interval:
        lower, upper = figure.interval
        interval = f"{100 * lower:.1f} to {upper:.1%}"
    return cell(figure.value, "{:.1%}" if metric.is_share else "{:.3f}", interval)


def cell(value: float | None, form: str | Callable[[float], str], *notes: str) -> str:
    """A figure and the notes below it; empty without both."""
    if value is None:
        text = ""
    elif not math.isfinite(value):  # a format for whole numbers refuses it
        text = str(value)
    else:
        text = form(value) if callable(form) else form.format(value)
    notes = list(filter(None, notes))
    return "\n".join([text or "–", *notes]) if notes else text


def _perplexity(run: Run) -> str:
    figures = run.figures
    notes = []
    value = figures.perplexity
    best = figures.best_perplexity
    if run.is_unfinished:
        state = "diverged" if run.has_diverged else "unfinished"
        notes.append(f"{state} at update {run.metrics.last_update:,}")
    if None not in (value, best, figures.best_update) and best < value:
        notes.append(f"best {best:.3f} at update {figures.best_update:,}")
    return cell(value, "{:.3f}", *notes)
