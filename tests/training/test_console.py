"""What a run prints before it starts, and the picture that it leaves."""

import json

import matplotlib.image
import pytest

from cera_train.model.attention import BY_SEQUENCE, VARLEN
from cera_train.model.loss import Allowed, SupervisedLoss
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.data import BatchLayout
from cera_train.training.console import describe_adapter, describe_speed
from cera_train.training.picture import draw_run


@pytest.mark.parametrize(
    ("wanted", "is_flat", "allowed", "expected"),
    [
        ("auto", True, Allowed(attention=BY_SEQUENCE), "attention by sequence, no padding"),
        ("auto", True, Allowed(attention=VARLEN), "attention by sequence in one kernel, no padding"),
        ("flat", True, Allowed(), "no padding, no attention by sequence"),
        ("auto", False, Allowed(flattens=True), "padding (costs less here than a mask over one long row)"),
        ("padded", False, Allowed(flattens=True), "padding (train.batch_layout=padded)"),
        ("auto", False, Allowed(), "padding (this model mixes sequences that share a row)"),
    ],
)
def test_the_layout_comes_with_what_kept_a_faster_one_away(tiny_llama, wanted, is_flat, allowed, expected):
    loss = SupervisedLoss(tiny_llama, tiny_llama)
    loss.allowed, loss.is_flat = allowed, is_flat
    text = describe_speed(BatchLayout(wanted), loss)
    assert text.startswith(expected)
    assert text.endswith("; not compiled (train.compile=false)")
    loss.is_compiled = True
    assert describe_speed(BatchLayout(wanted), loss).endswith("; compiled layers")


def test_an_adapter_is_described_with_its_places():
    def places(**settings) -> str:
        return describe_adapter(AdapterConfig(r=8, **settings)).removeprefix("cera r=8, silu, dropout 0, on ")

    assert places() == "all-linear"
    assert places(target_modules=["q_proj", "v_proj"]) == "q_proj v_proj"
    vera = AdapterConfig(kind="peft", method="VERA", r=None, alpha=None, target_modules=None)
    assert describe_adapter(vera) == "VERA r=256, dropout 0"  # PEFT's default
    assert places(experts=True, expert_r=2) == "all-linear and all experts at r=2"
    assert places(target_modules=[], target_parameters=["experts.down_proj"]) == "experts.down_proj at r=8"


@pytest.mark.parametrize(("spectrum", "figures"), [([], {}), ([0.6, 0.3, 0.1], {"gsm8k/exact": 0.5})])
def test_each_panel_is_drawn_where_it_has_something_to_show(tmp_path, spectrum, figures):
    lines = [
        {"update": 0, "epoch": 0, "eval/loss": 2.0, "eval/perplexity": 7.4, **figures},
        {"update": 1, "epoch": 0, "train/loss": 1.5, "train/perplexity": 4.5},
        {"update": 2, "epoch": 0, "train/loss": None, "train/perplexity": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    modules = {"q_proj": {"singular_values": spectrum}} if spectrum else {}
    (tmp_path / "spectrum.json").write_text(json.dumps(modules))
    picture = matplotlib.image.imread(draw_run(tmp_path, "run"))
    assert picture.shape[1] == max(2, 1 + bool(spectrum) + bool(figures)) * 5 * 150
    assert picture.std() > 0
