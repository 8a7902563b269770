"""Arms of studies between LoRA and CeRA: each is LoRA up to a single change.
tests/cera/test_model.py has that an identity gate is LoRA."""

import pytest
from conftest import make_tiny_llama

from cera_train.adapters import build
from cera_train.cera import CeraLinear


@pytest.mark.parametrize(
    ("arm", "variance", "drops_units"),
    [("lora_kaiming", 2, False), ("lora_dropout_hidden", 1 / 3, True)],
)
def test_it_differs_from_lora_in_its_start_or_in_the_place_of_dropout(
    compose, arm, variance, drops_units
):
    config = compose(f"adapter={arm}", "adapter.r=64", "adapter.dropout=0.5").adapter
    model = build.build(make_tiny_llama().requires_grad_(False), config)
    layer = next(module for module in model.modules() if isinstance(module, CeraLinear))
    A, _, gate, dropout_x, dropout = layer.parts("default")
    assert gate(A.weight) is A.weight
    assert A.weight.var().item() * layer.in_features == pytest.approx(variance, rel=0.1)
    assert (dropout.p, dropout_x.p) == ((0.5, 0) if drops_units else (0, 0.5))
