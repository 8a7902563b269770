"""The picture of a run: loss or reward over updates, the spectrum of its adapter, and the figures of its tasks."""

from __future__ import annotations

import io
from pathlib import Path

from cera_train.common.files import write_bytes
from cera_train.common.pages import COLORS, GRID
from cera_train.runs.results import METRICS, SPECTRUM, mean_spectrum, read_metrics


def draw_run(folder: Path, title: str) -> Path:
    """Writes run.png from metrics.jsonl and spectrum.json, which may be missing."""
    from matplotlib.figure import Figure

    metrics, spectrum = read_metrics(folder / METRICS), mean_spectrum(folder / SPECTRUM)
    tasks = [(line.update, line.tasks) for line in metrics.evaluations if line.tasks]
    count = 1 + bool(spectrum) + bool(tasks)
    figure = Figure(figsize=(max(10, 5 * count), 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    [panels] = figure.subplots(1, count, squeeze=False)
    updates, evaluations = (
        ([line.update for line in lines], [line.loss for line in lines])
        for lines in (metrics.updates, metrics.evaluations)
    )
    rewards = [line.details.get("train/reward") for line in metrics.updates]
    if any(reward is not None for reward in rewards):
        panels[0].plot(updates[0], rewards, color=COLORS["cera"], linewidth=1, label="training")
        panels[0].set(xlabel="update", ylabel="reward")
    else:
        panels[0].plot(*updates, color=COLORS["cera"], linewidth=1, label="training")
        panels[0].plot(*evaluations, color=COLORS["lora"], marker="o", markersize=4, label="evaluation")
        panels[0].set(xlabel="update", ylabel="loss (nats per supervised token)")
    if spectrum:
        directions = range(1, len(spectrum) + 1)
        panels[1].plot(directions, spectrum, color=COLORS["cera"], marker=".", label="mean over modules")
        panels[1].axhline(1 / len(spectrum), color=GRID, linewidth=1, linestyle=":", label="all directions alike")
        panels[1].set(xlabel="direction", ylabel="share of the singular values")
    if tasks:
        for key in tasks[-1][1]:
            points = [(update, figures.get(key)) for update, figures in tasks]
            panels[-1].plot(*zip(*points, strict=True), marker="o", markersize=4, label=key)
        panels[-1].set(xlabel="update", ylabel="share")
    for axes in panels:
        axes.set_ylim(0, None)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_bytes(folder / "run.png", picture.getvalue())
    return folder / "run.png"
