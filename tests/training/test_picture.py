"""The picture of a run has a panel for what the run has."""

from __future__ import annotations

import json

import matplotlib.image
import pytest

from cera_train.training.picture import draw_run


@pytest.mark.parametrize(("spectrum", "figures"), [([], {}), ([0.6, 0.3, 0.1], {"gsm8k/exact": 0.5})])
def test_each_panel_is_drawn_where_it_has_something_to_show(tmp_path, spectrum, figures):
    lines = [
        {"update": 0, "epoch": 0, "eval/loss": 2.0, "eval/perplexity": 7.4, **figures},
        {"update": 1, "epoch": 0, "train/loss": 1.5, "train/perplexity": 4.5},
        {"update": 2, "epoch": 0, "train/loss": None, "train/perplexity": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = matplotlib.image.imread(draw_run(tmp_path, spectrum, "run"))
    assert picture.shape[1] == max(2, 1 + bool(spectrum) + bool(figures)) * 5 * 150
    assert picture.std() > 0
