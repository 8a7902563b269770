"""What a run says of itself before it starts."""

from __future__ import annotations

import pytest

from cera_train.model.attention import BY_SEQUENCE, VARLEN
from cera_train.model.loss import Allowed, SupervisedLoss
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.data import BatchLayout
from cera_train.training.console import describe_adapter, describe_speed


@pytest.mark.parametrize(
    ("wanted", "is_flat", "loss", "expected"),
    [
        ("auto", True, {"attention": BY_SEQUENCE, "flattens": True}, "attention by sequence, no padding"),
        ("auto", True, {"attention": VARLEN, "flattens": True}, "attention by sequence in one kernel, no padding"),
        (
            "flat",
            True,
            {"flattens": True},
            "no padding, no attention by sequence (this model's attention is not plain causal sdpa)",
        ),
        ("auto", False, {"flattens": True}, "padding (costs less here than a mask over one long row)"),
        ("padded", False, {"flattens": True, "attention": BY_SEQUENCE}, "padding (train.batch_layout=padded)"),
        ("auto", False, {}, "padding (this model mixes sequences that share a row)"),
    ],
)
def test_the_layout_comes_with_what_kept_a_faster_one_away(tiny_llama, wanted, is_flat, loss, expected):
    supervised = SupervisedLoss(tiny_llama, tiny_llama)
    supervised.allowed, supervised.is_flat = Allowed(**loss), is_flat
    said = describe_speed(BatchLayout(wanted), supervised)
    assert said == f"{expected}; not compiled (train.compile=false)"


def test_compiled_layers_are_said(tiny_llama):
    supervised = SupervisedLoss(tiny_llama, tiny_llama)
    supervised.is_compiled = True
    assert describe_speed(BatchLayout.padded, supervised).endswith("; compiled layers")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "on q_proj v_proj"),
        ({"experts": True}, "on q_proj v_proj and all experts at r=8"),
        ({"experts": True, "expert_r": 2, "target_modules": "all-linear"}, "on all-linear and all experts at r=2"),
        ({"target_modules": [], "target_parameters": ["experts.down_proj"]}, "on experts.down_proj at r=8"),
    ],
)
def test_an_adapter_is_described_with_its_places(settings, expected):
    assert describe_adapter(AdapterConfig(r=8, **settings)) == f"cera r=8, silu, dropout 0.1, {expected}"
