"""What a study found, in sentences: the verdict, the plateau, and what would change the verdict."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cera_train.common.terminal import spanned
from cera_train.evaluation.slope import Estimate
from cera_train.report.comparison import shown
from cera_train.report.study.cells import CellResult, Outcome
from cera_train.report.study.contrasts import Comparison, RankLine, SlopeGap
from cera_train.settings.sweep import LOSS, SCORE, StudyConfig

ONE_SEED = "one seed cannot be generalised from"
EQUAL_WITHIN = 0.1
"""The share by which times may differ and count as the same."""


# --- the verdict -----------------------------------------------------------------------------------------------------


def verdicts(comparisons: Sequence[Comparison], named: Collection[str]) -> list[str]:
    """A sentence for every two arms in every outcome.

    Args:
        named: what the study's contrasts ask, those with the baseline aside.
    """
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for own in comparisons:
        groups.setdefault((own.outcome.name, own.first.arm, own.second.arm), []).append(own)
    return [_sentence(own, own[0].asked if own[0].asked in named else "") for own in groups.values()]


def _sentence(own: Sequence[Comparison], asked: str) -> str:
    """The verdict on two arms under all conditions."""
    one = own[0]
    first, second, outcome = one.first.arm, one.second.arm, one.outcome
    lead = f"{asked}: " * bool(asked)
    lead += "" if outcome.name in (LOSS, SCORE) else f"On {outcome.title}, "
    if not one.is_possible:
        return f"{lead}{second} against {first}: not shown: {one.contrast.reason}."
    clauses = []
    for word in ("better", "worse"):
        if shown := [each for each in own if each.verdict == word]:
            than = "" if clauses else f" than {first}"
            clauses.append(f"{word}{than} {listed([f'{_at(each)} {_by(each)}'.strip() for each in shown])}")
    hidden = [each for each in own if not each.is_shown]
    limit = f": {_limit(hidden)}" if hidden else ""
    if not clauses:
        where = listed(list(map(_at, hidden)))
        return f"{lead}{second} is not shown to be better or worse than {first}{f' {where}' * bool(where)}{limit}."
    if hidden:
        clauses.append(f"not shown {listed(list(map(_at, hidden)))}")
    return f"{lead}{second} is {', '.join(clauses)}{limit}."


def _at(own: Comparison) -> str:
    """Where two arms are compared: on sums at r = 16."""
    task, choices = own.first.cell.task, own.first.choices
    return " ".join([*([f"on {task}"] if task else []), *([f"at {choices}"] if choices else [])])


def _by(own: Comparison) -> str:
    outcome, measured = own.outcome, own.contrast
    ends = sorted(map(outcome.gain, (measured.lower, measured.upper)))
    if own.verdict == "worse":
        ends = [-end for end in reversed(ends)]
    size = (
        f"by {outcome.number(abs(measured.difference))} {outcome.unit} (95 % {' to '.join(map(outcome.number, ends))}"
    )
    if outcome.matters is not None and abs(measured.difference) < outcome.matters:
        size += f", less than the {outcome.number(outcome.matters)} that would matter"
    return f"{size})"


def _limit(hidden: Sequence[Comparison]) -> str:
    outcome = hidden[0].outcome
    smallest = sorted({outcome.number(own.detectable) for own in hidden if own.can_show}, key=float)
    if not smallest:
        return f"no difference could be shown with {hidden[0].seeds} seeds"
    text = (
        f"the smallest difference this design could show is {' to '.join(dict.fromkeys((smallest[0], smallest[-1])))}"
    )
    text += f" {outcome.unit}"
    if all(own.is_too_small for own in hidden):
        text += f", and any difference is less than the {outcome.number(outcome.matters)} that would matter"
    return text


# --- the plateau -----------------------------------------------------------------------------------------------------


def plateau(lines: Iterable[RankLine], gaps: Iterable[SlopeGap]) -> list[str]:
    """A sentence for every arm, then for every contrast."""
    return [*map(_slope, lines), *map(_gap, gaps)]


def _slope(own: RankLine) -> str:
    outcome, found = own.outcome, own.slope
    if math.isinf(found.overall.lower):
        return f"{own.name}: {slope_text(outcome, found.overall)}; {ONE_SEED}."
    if found.plateau is None:
        end = f"it changes up to r = {own.ranks[-1]:,}"
    else:
        end = f"from r = {found.plateau:,} on no change is shown"
        if outcome.matters is not None and found.is_flat(outcome.matters):
            end += f", and there is none of {outcome.number(outcome.matters)}, which would matter"
    return f"{own.name}: {slope_text(outcome, found.overall)}; {end}."


def _gap(own: SlopeGap) -> str:
    outcome = own.first.outcome
    shown = " (not shown to differ)" if own.difference.includes_zero else ""
    return f"{own.second.name} against {own.first.arm}: {slope_text(outcome, own.difference)}{shown}."


def slope_text(outcome: Outcome, own: Estimate) -> str:
    """The gain with every doubling of the rank, in words."""
    interval = "" if math.isinf(own.lower) else f" (95 % {gain_interval(outcome, own)})"
    return f"gains {outcome.signed(outcome.gain(own.value))} {outcome.unit} per doubling{interval}"


def gain_interval(outcome: Outcome, own: Estimate) -> str:
    """Such as +0.0050 to +0.0150."""
    ends = sorted(map(outcome.gain, (own.lower, own.upper)))
    return " to ".join(map(outcome.signed, ends))


# --- what would change it --------------------------------------------------------------------------------------------


def changes(comparisons: Sequence[Comparison], cells: Sequence[CellResult], tune: Mapping[str, Sequence[Any]],
            scope: str) -> list[str]:  # fmt: skip
    """What would change the verdict in the primary outcome.

    Args:
        tune: `study.tune`.
        scope: the model, rows and length that all cells share.
    """
    primary = [own for own in comparisons if own.outcome == comparisons[0].outcome]
    lines = [f"{own.name}: {_change_of(own)}." for own in primary if own.is_possible]
    reasons = dict.fromkeys(own.contrast.reason for own in primary if not own.is_possible)
    lines += [f"{reason[0].upper()}{reason[1:]}." for reason in reasons]
    if edges := list(_edges(cells, tune)):
        lines.append(f"A wider grid of tuned values: the value chosen is the last one tried for {'; '.join(edges)}.")
    return [*lines, f"Another setting: nothing here tells about other models, rows or lengths than {scope}."]


def _change_of(own: Comparison) -> str:
    outcome = own.outcome
    same = sum(difference * own.contrast.difference > 0 for difference in own.by_seed)
    sign = f"{same} of {own.seeds} seeds have the sign of the mean"
    if own.is_shown:
        nearest = min(abs(own.contrast.lower), abs(own.contrast.upper))
        return f"shown; its interval ends {outcome.number(nearest)} {outcome.unit} from zero, and {sign}"
    return (
        f"the observed {outcome.signed(own.contrast.difference)} {outcome.unit} would be shown by {sizes(own)}; {sign}"
    )


def sizes(own: Comparison) -> str:
    """The seeds, or the problems, that would show the observed difference."""
    seeds, problems = own.needed
    texts = []
    if seeds is not None:
        texts.append(f"{seeds:,} seeds on {own.problems:,} {own.outcome.problems}")
    if problems is not None:
        texts.append(f"{problems:,} {own.outcome.problems} with {own.seeds:,} seeds")
    return " or ".join(texts) or f"no number of seeds or {own.outcome.problems} alone"


def _edges(cells: Sequence[CellResult], tune: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """The cells whose chosen value is the smallest or the largest of several numbers."""
    for key, tried in tune.items():
        numbers = [value for value in map(_number, tried) if value is not None]
        if len(set(numbers)) < 2 or len(numbers) < len(tried):
            continue
        for own in cells:
            chosen = own.cell.chosen.get(key)
            if chosen is not None and _number(chosen) in (min(numbers), max(numbers)):
                yield f"{own.name} ({key.rpartition('.')[2]} = {chosen})"


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


# --- protocol --------------------------------------------------------------------------------------------------------


def protocol(config: StudyConfig, runs: int) -> list[str]:
    """How the study was made."""
    tuned = "; ".join(f"{key}: {', '.join(map(shown, values))}" for key, values in config.tune.items())
    choosing = spanned(range(config.tune_seeds), "seed")
    same = {"none": "Arms have nothing the same but their other settings"}
    equal = same.get(config.equal, f"Arms of one condition have the same {config.equal}")
    return [
        f"Arms: {', '.join(config.arms)}; the baseline is {config.baseline}. {equal}.",
        f"Tuned for each arm under each condition, on {choosing}: {tuned}. Those of higher held-out loss stop, one in "
        f"{config.factor} goes on.",
        f"Then {config.seeds} seeds at the chosen values, {choosing} among them: {runs} runs on this page. The "
        "held-out rows that chose the values are those of the outcome, for every arm alike.",
        f"Primary outcome: {config.outcomes[0]}; what would matter: {config.matters:g}. "
        + (f"Others: {', '.join(config.outcomes[1:])}." if config.outcomes[1:] else "There is no other."),
    ]


def unequal_times(cells: Sequence[CellResult]) -> str:
    """The first condition under which arms took unequal times, and the times; empty where there is none."""
    for condition in dict.fromkeys(own.condition for own in cells):
        seconds = {own.arm: own.figure("seconds") for own in cells if own.condition == condition}
        seconds = {arm: value for arm, value in seconds.items() if value}
        if seconds and max(seconds.values()) > (1 + EQUAL_WITHIN) * min(seconds.values()):
            texts = ", ".join(f"{arm} {value:,.0f} s" for arm, value in seconds.items())
            return f"{f'at {condition} ' * bool(condition)}the runs took {texts}"
    return ""


# --- helpers ---------------------------------------------------------------------------------------------------------


def listed(texts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))
