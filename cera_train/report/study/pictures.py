"""The pictures of a study: differences, outcomes against the rank, why, and failures apart. An arm has the same colour
and marker in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cera_train.common.drawing import BACKGROUND, COLORS, TEXT, Picture, shortened, styles_of
from cera_train.report.study.cells import CellResult, Outcome
from cera_train.report.study.contrasts import Comparison, RankLine
from cera_train.report.study.failures import Difficulty, ending_shares
from cera_train.report.study.words import gain_interval
from cera_train.runs.results import ENDINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.42  # inches of one contrast, or of one bar
MARGIN = 0.9  # inches above and below them

ENDING_COLORS = dict(zip(ENDINGS, (COLORS[name] for name in ("cera", "base", "lora", "other", "dora")), strict=True))

Styles = dict[str, dict[str, Any]]
"""By the name of an arm."""


def arm_styles(cells: Sequence[CellResult]) -> Styles:
    return styles_of({own.arm: own.kind for own in cells})


# --- differences -----------------------------------------------------------------------------------------------------


def differences(comparisons: Sequence[Comparison], styles: Styles) -> Picture:
    """A row for every contrast of one outcome, with the band of differences that do not matter."""
    outcome = comparisons[0].outcome

    def draw(axes: Axes) -> None:
        if outcome.matters is not None:
            ends = (-outcome.scale * outcome.matters, outcome.scale * outcome.matters)
            axes.axvspan(*ends, color=COLORS["base"], alpha=0.15, linewidth=0, label="would not matter")
        axes.axvline(0, color=TEXT, linewidth=0.8)
        for row, own in enumerate(comparisons):
            style, found = styles[own.second.arm], own.contrast
            color, fill = style["color"], style["color"] if own.is_shown else BACKGROUND
            middle, lower, upper = (outcome.scale * each for each in (found.difference, found.lower, found.upper))
            if own.is_possible:
                axes.plot([lower, upper], [row, row], color=color, linewidth=1.8)
            seeds = [outcome.scale * each for each in own.by_seed]
            axes.plot(seeds, [row + 0.2] * len(seeds), linestyle="none", marker="|", markersize=4, color=color)
            axes.plot(middle, row, **style | {"linestyle": "none", "markersize": 7, "markerfacecolor": fill})
        labels = [f"{own.arms}\n{own.condition}" if own.condition else own.arms for own in comparisons]
        axes.set_yticks(range(len(comparisons)), labels, fontsize=8.5)
        axes.set_ylim(len(comparisons) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"difference in {outcome.unit}")

    better = "Left" if outcome.is_loss else "Right"
    title = f"Differences in {outcome.title}"
    shown = "; ".join(f"{own.name}: {outcome.signed(own.contrast.difference)} ({own.verdict})" for own in comparisons)
    caption = (
        f"{better} of zero the first-named arm is better. Lines: 95 % intervals over seeds and problems; strokes: "
        "seeds; filled: a difference is shown."
    )
    height = MARGIN + ROW * len(comparisons)
    return Picture(f"differences-{outcome.name}", title, f"{title}. {shown}.", caption, draw, height)


# --- against the rank ------------------------------------------------------------------------------------------------


def against_rank(lines: Sequence[RankLine], styles: Styles) -> Picture | str:
    """The primary outcome of every arm by its rank, on a logarithmic axis; the reason where ranks are no condition."""
    if not lines:
        return "the rank is no condition of this study"
    outcome = lines[0].outcome
    ranks = sorted({rank for line in lines for rank in line.ranks})

    def draw(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        for line in lines:
            style = styles[line.arm]
            for rank, seeds in zip(line.ranks, line.slope.values, strict=True):
                dots = style | {"linestyle": "none", "markersize": 3, "alpha": 0.6}
                axes.plot([rank] * len(seeds), [outcome.scale * value for value in seeds], **dots)
            label = shortened(f"{line.name}: {gain_interval(outcome, line.slope.overall)}")
            axes.plot(line.ranks, [outcome.scale * mean for mean in line.means], **style, label=label)
        axes.set_xticks(ranks, [f"{rank:,}" for rank in ranks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="rank r", ylabel=f"{outcome.title}, {'nats' if outcome.is_loss else '%'}")
        axes.margins(y=0.15)

    title = f"{outcome.heading} against rank"
    texts = []
    for line in lines:
        means = (f"{outcome.mean(mean)} at {rank}" for rank, mean in zip(line.ranks, line.means, strict=True))
        texts.append(f"{line.name}: {', '.join(means)}")
    caption = "Small: seeds; lines: their means; in the legend: 95 % intervals of the gain per doubling of r."
    return Picture("outcome-rank", title, f"{title}. {'; '.join(texts)}.", caption, draw)


# --- why -------------------------------------------------------------------------------------------------------------


def why(comparisons: Sequence[Comparison], styles: Styles) -> Picture | str:
    """The gain over the baseline in the primary outcome, against effective rank and linear share.

    Args:
        comparisons: those with the baseline in the primary outcome.
    """
    quantities = {"effective_rank_mean": "effective rank", "linear_share_mean": "linear share, %"}
    scales = {"effective_rank_mean": 1, "linear_share_mean": 100}
    measured = [own for own in comparisons if all(own.second.spectrum(name) is not None for name in quantities)]
    if not measured:
        return "no arm has an effective rank and a linear share"
    outcome, baseline = measured[0].outcome, measured[0].first.arm
    baselines = {id(own.first): own.first for own in measured}.values()

    def draw(*panels: Axes) -> None:
        for axes, (name, label) in zip(panels, quantities.items(), strict=True):
            axes.axhline(0, color=TEXT, linewidth=0.8)
            for own in measured:
                gain, *ends = (
                    outcome.scale * outcome.gain(value)
                    for value in (own.contrast.difference, own.contrast.lower, own.contrast.upper)
                )
                bars = [[gain - min(ends)], [max(ends) - gain]] if own.is_possible else None
                style = styles[own.second.arm] | {"linestyle": "none"}
                axes.errorbar(scales[name] * own.second.spectrum(name), gain, yerr=bars, elinewidth=1, **style)
            for own in baselines:
                if (value := own.spectrum(name)) is not None:
                    axes.plot(scales[name] * value, 0, **styles[own.arm] | {"linestyle": "none"})
            axes.set_xlabel(label)
            axes.locator_params(axis="x", nbins=4)
            axes.margins(x=0.15)
        for arm in [baseline, *dict.fromkeys(own.second.arm for own in measured)]:
            panels[0].plot([], [], **styles[arm] | {"linestyle": "none"}, label=shortened(arm))
        panels[0].set_ylabel(f"gain over {baseline}, {outcome.unit}")

    title = f"Why: gain over {baseline} against effective rank and linear share"
    shown = "; ".join(
        f"{own.second.name}: {outcome.signed(outcome.gain(own.contrast.difference))}, rank "
        f"{own.second.spectrum('effective_rank_mean'):.1f}, share {own.second.spectrum('linear_share_mean'):.0%}"
        for own in measured
    )
    caption = (
        f"{outcome.heading}; higher is better. Bars: 95 % intervals. What "
        "moves with the gain may explain it; it need not be its cause."
    )
    return Picture("why", title, f"{title}. {shown}.", caption, draw, panels=2)


# --- failures --------------------------------------------------------------------------------------------------------


def failures(cells: Sequence[CellResult], outcome: Outcome) -> Picture:
    """How the answers of every cell end, stacked to 100 %."""
    shares = {own.name: ending_shares(own, outcome.name) for own in cells}
    shown = [ending for ending in ENDINGS if any(share[ending] for share in shares.values())]

    def draw(axes: Axes) -> None:
        left = [0.0] * len(shares)
        for ending in shown:
            widths = [100 * share[ending] for share in shares.values()]
            style = {"color": ENDING_COLORS[ending], "edgecolor": BACKGROUND, "linewidth": 0.8, "label": ending}
            axes.barh(range(len(shares)), widths, left=left, height=0.7, **style)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(shares)), [name.replace(", ", "\n", 1) for name in shares], fontsize=8.5)
        axes.set_ylim(len(shares) - 0.4, -0.6)
        axes.set(xlim=(0, 100), xlabel="share of the answers, %")
        axes.grid(visible=False)

    title = f"Failures apart: {outcome.title}"
    texts = [f"{name}: {', '.join(f'{own[ending]:.1%} {ending}' for ending in shown)}" for name, own in shares.items()]
    caption = "How the answers of all seeds end."
    height = MARGIN + ROW * len(shares)
    return Picture(f"failures-{outcome.name}", title, f"{title}. {'; '.join(texts)}.", caption, draw, height)


def difficulties(difficulty: Difficulty, cells: Sequence[CellResult], baseline: str, styles: Styles) -> Picture | str:
    """The gain over the baseline in each part of the tokens; an arm has a line for every condition. The reason where
    the baseline has not run.

    Args:
        baseline: the name of the arm in `study.arms`.
    """
    baselines = {own.condition: own for own in cells if own.cell.arm == baseline}
    if not baselines:
        return f"no run of the baseline, {baseline}"
    gains = {}
    for own in (own for own in cells if own.cell.arm != baseline):
        pairs = zip(difficulty.losses[baselines[own.condition].name], difficulty.losses[own.name], strict=True)
        gains[own.name] = [first - second for (first, _), (second, _) in pairs]
    arms, conditions, parts = {own.name: own.arm for own in cells}, list(baselines), range(len(difficulty.base))
    strengths = {own.name: (1 + conditions.index(own.condition)) / len(conditions) for own in cells}

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=TEXT, linewidth=0.8)
        for name, gain in gains.items():
            label = {"label": shortened(arms[name])} if strengths[name] == 1 else {}
            axes.plot(parts, gain, **styles[arms[name]] | {"alpha": strengths[name]} | label)
        axes.set_xticks(parts, [f"{loss:.3g}" for loss in difficulty.base])
        axes.set(xlabel="mean loss of the untouched base model, nats", ylabel=f"gain over {label_of_baseline}, nats")

    label_of_baseline = next(iter(baselines.values())).arm
    title = "Gain by the difficulty of a token" + f": {difficulty.task}" * bool(difficulty.task)
    shown = "; ".join(f"{name}: {gain[0]:.3g} to {gain[-1]:.3g}" for name, gain in gains.items())
    caption = f"Loss of {label_of_baseline} minus an arm's in {len(parts)} equal parts of the held-out tokens."
    caption += f" The strongest line is at {conditions[-1]}." * (len(conditions) > 1)
    name = f"difficulty-{difficulty.task}".rstrip("-")
    return Picture(name, title, f"{title}. {shown}.", caption, draw)
