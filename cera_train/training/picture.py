"""The picture of a run: loss over updates, and the spectrum of its adapter."""

from __future__ import annotations

import io
import json
from pathlib import Path

from cera_train.common.files import write_bytes

BLUE, ORANGE, GREY = "#2563a8", "#d9730d", "#8a8a8a"


def draw_run(folder: Path, spectrum: list[float], title: str) -> Path:
    """Writes run.png from metrics.jsonl and the mean normalised singular values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [(line["update"], line["train/loss"]) for line in lines if "train/loss" in line]
    evaluation = [(line["update"], line["eval/loss"]) for line in lines if "eval/loss" in line]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left.plot(*zip(*train, strict=True), color=BLUE, linewidth=1, label="training")
    left.plot(*zip(*evaluation, strict=True), color=ORANGE, marker="o", markersize=4, label="evaluation")
    left.set(xlabel="update", ylabel="loss (nats per supervised token)", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(range(1, len(spectrum) + 1), spectrum, color=BLUE, marker=".", label="mean over modules")
    right.axhline(1 / len(spectrum), color=GREY, linewidth=1, linestyle=":", label="all directions alike")
    right.set(xlabel="direction", ylabel="share of the singular values", ylim=(0, None))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "run.png"
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    pyplot.close(figure)
    write_bytes(path, picture.getvalue())
    return path
