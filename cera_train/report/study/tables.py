"""The tables of a study's page, as columns of texts: for HTML, Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cera_train.common.terminal import duration
from cera_train.report.study.cells import CellResult, Outcome
from cera_train.report.study.contrasts import Comparison
from cera_train.report.study.failures import Difficulty, ending_shares, pass_at
from cera_train.report.study.words import sizes
from cera_train.report.table import QUALITY, Cell, Column, figure_cell, p_text
from cera_train.runs.results import ENDINGS


@dataclass(frozen=True)
class StudyTable:
    title: str
    first: str  # the header of the names
    names: list[str]
    columns: list[Column]
    caption: str


def table_of(
    title: str, first: str, names: Sequence[str], columns: dict[str, Sequence[Cell]], caption: str
) -> StudyTable:
    """Without the columns that have nothing."""
    shown = [Column(label, QUALITY, list(cells)) for label, cells in columns.items() if any(c.value for c in cells)]
    return StudyTable(title, first, list(names), shown, caption)


# --- contrasts -------------------------------------------------------------------------------------------------------


def contrast_table(comparisons: Sequence[Comparison], named: Sequence[str]) -> StudyTable:
    """A row for every contrast in every outcome.

    Args:
        named: what the study's contrasts ask, those with the baseline aside.
    """
    has_many = len({own.outcome.name for own in comparisons}) > 1
    columns = {
        "asked": [Cell(own.asked if named else None) for own in comparisons],
        "outcome": [Cell(own.outcome.title if has_many else None) for own in comparisons],
        "means": [_means(own) for own in comparisons],
        "difference": [_difference(own) for own in comparisons],
        "p after Holm": [Cell(p_text(own.p_value) if own.is_possible else None) for own in comparisons],
        "verdict": [_verdict(own) for own in comparisons],
        "smallest that could be shown": [_detectable(own) for own in comparisons],
        "would show it": [Cell(sizes(own) if own.is_possible and not own.is_shown else None) for own in comparisons],
    }
    caption = (
        "A difference is the first-named arm minus the second, seed by seed and problem by problem, with its 95 % "
        "interval for other seeds and problems. p is corrected by Holm over the contrasts of an outcome, and decides "
        "at 5 %. Smallest that could be shown: by this design, with power 80 %. Would show it: seeds, or problems, "
        "with which the observed difference would be shown as often."
    )
    return table_of("Contrasts", "contrast", [own.name for own in comparisons], columns, caption)


def _means(own: Comparison) -> Cell:
    second, first = (cell.mean(own.outcome) for cell in (own.second, own.first))
    return Cell(f"{own.outcome.mean(second)} and {own.outcome.mean(first)}")


def _difference(own: Comparison) -> Cell:
    outcome, found = own.outcome, own.contrast
    interval = f"{outcome.signed(found.lower)} to {outcome.signed(found.upper)}"
    return Cell(f"{outcome.signed(found.difference)} {outcome.unit}", (interval,) if own.is_possible else ())


def _verdict(own: Comparison) -> Cell:
    if not own.is_possible:
        test = own.contrast.mcnemar
        few = own.contrast.reason.partition(":")[0]
        return Cell(own.verdict, (few, *([f"these two runs: McNemar's p {p_text(test.p_value)}"] if test else [])))
    return Cell(own.verdict, ("less than what matters",) if own.is_too_small else ())


def _detectable(own: Comparison) -> Cell:
    if not own.is_possible:
        return Cell(None)
    return Cell(f"{own.outcome.number(own.detectable)} {own.outcome.unit}" if own.can_show else "none")


# --- cells -----------------------------------------------------------------------------------------------------------


def cell_table(cells: Sequence[CellResult], outcomes: Sequence[Outcome]) -> StudyTable:
    """A row for every arm under every condition."""
    columns = {
        "chosen": [
            Cell("\n".join(f"{key.rpartition('.')[2]} = {value}" for key, value in own.cell.chosen.items()))
            for own in cells
        ],
        "seeds": [Cell(f"{len(own.runs)}") for own in cells],
        **{outcome.title: [_mean(own, outcome) for own in cells] for outcome in outcomes},
        "parameters": [figure_cell(own.figure("trainable_parameters"), "{:,.0f}") for own in cells],
        "time of a run": [figure_cell(own.figure("seconds"), duration) for own in cells],
        "effective rank": [figure_cell(own.spectrum("effective_rank_mean"), "{:.1f}") for own in cells],
        "manifold dimension": [figure_cell(own.spectrum("manifold_dimension_mean"), "{:.1f}") for own in cells],
        "linear share": [figure_cell(own.spectrum("linear_share_mean"), "{:.1%}") for own in cells],
        "gamma": [figure_cell(own.spectrum("gamma"), "{:.2f}") for own in cells],
    }
    caption = (
        "Means over seeds of the runs at the chosen values; below an outcome, its standard deviation over seeds. "
        "Effective rank, manifold dimension and linear share are means over modules. Linear share: the share of a "
        "branch's variance that the best affine map explains, 100 % for a LoRA."
    )
    return table_of("Cells", "arm", [own.name for own in cells], columns, caption)


def _mean(own: CellResult, outcome: Outcome) -> Cell:
    spread = own.spread(outcome)
    return Cell(
        outcome.mean(own.mean(outcome)), () if spread is None else (f"± {outcome.number(spread)} {outcome.unit}",)
    )


# --- failures --------------------------------------------------------------------------------------------------------


def failure_tables(cells: Sequence[CellResult], outcomes: Sequence[Outcome]) -> list[StudyTable]:
    """How answers end, and pass@k where there are several answers to a problem."""
    tables = []
    for outcome in (own for own in outcomes if not own.is_loss):
        shares = [ending_shares(own, outcome.name) for own in cells]
        columns = {
            ending: [Cell(f"{share[ending]:.1%}") for share in shares]
            for ending in ENDINGS
            if any(share[ending] for share in shares)
        }
        caption = (
            "Shares of the answers of all seeds. Loop: the text repeats itself to its end. Truncated: cut by the "
            "length allowed. Collapsed: the state stands still where the true one moves."
        )
        title = f"Failures apart: {outcome.title}"
        tables.append(table_of(title, "arm", [own.name for own in cells], columns, caption))
        if (passed := [pass_at(own, outcome.name) for own in cells]) and all(passed):
            columns = {
                f"pass@{own.k}": [
                    Cell(
                        f"{row[place].value:.1%}",
                        (f"{100 * row[place].interval[0]:.1f} to {row[place].interval[1]:.1%}",),
                    )
                    for row in passed
                ]
                for place, own in enumerate(passed[0])
            }
            caption = "Problems that one of k answers solves: the mean over seeds, its 95 % interval over problems."
            tables.append(table_of(f"pass@k: {outcome.title}", "arm", [own.name for own in cells], columns, caption))
    return tables


def difficulty_table(difficulty: Difficulty) -> StudyTable:
    """A row for the untouched base model and every cell, a column for every part of the tokens."""
    columns = {}
    for part, (lowest, highest) in enumerate(difficulty.ranges):
        base = Cell(f"{difficulty.base[part]:.4f}")
        found = [losses[part] for losses in difficulty.losses.values()]
        notes = [() if error is None else (f"± {error:.4f}",) for _, error in found]
        columns[f"{lowest:.3g} to {highest:.3g} nats"] = [
            base,
            *(Cell(f"{mean:.4f}", note) for (mean, _), note in zip(found, notes, strict=True)),
        ]
    caption = (
        f"Mean loss, in nats, of the held-out tokens in {len(columns)} equal parts, by the loss that the untouched "
        "base model had on each. Below: the standard error over seeds."
    )
    title = "Loss by the difficulty of a token" + f": {difficulty.task}" * bool(difficulty.task)
    return table_of(title, "arm", ["untouched base model", *difficulty.losses], columns, caption)
