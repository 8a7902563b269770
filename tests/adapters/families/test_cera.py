"""Arms of studies between LoRA and CeRA: each is one of the two up to a single change."""

import pytest
import torch
from conftest import make_tiny_llama

from cera_train.adapters import build
from cera_train.cera import CeraLinear

IDS = torch.arange(3, 75).view(3, 24)


@pytest.fixture
def model_of(compose):
    """model_of("lora", *overrides) -> its config, and the tiny model with random weights in A and
    B, the same for every arm."""

    def model_of(name: str, *overrides: str):
        config = compose(f"adapter={name}", "adapter.r=4", *overrides).adapter
        torch.manual_seed(1)
        model = build.build(make_tiny_llama().requires_grad_(False), config)
        draw = torch.Generator().manual_seed(2)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
        return config, model

    return model_of


def cera_layers(model) -> list[CeraLinear]:
    return [module for module in model.modules() if isinstance(module, CeraLinear)]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("arm", ["lora_kaiming", "lora_dropout_hidden"])
def test_it_is_a_lora_without_dropout(model_of, arm):
    _, lora = model_of("lora")
    _, other = model_of(arm)
    torch.testing.assert_close(logits(other), logits(lora))


@pytest.mark.parametrize(
    ("arm", "variance", "drops_units"),
    [("lora_kaiming", 2, False), ("lora_dropout_hidden", 1 / 3, True)],
)
def test_it_differs_from_lora_in_its_start_or_in_the_place_of_dropout(
    compose, arm, variance, drops_units
):
    config = compose(f"adapter={arm}", "adapter.r=64", "adapter.dropout=0.5").adapter
    model = build.build(make_tiny_llama().requires_grad_(False), config)
    layer = cera_layers(model)[0]
    A, _, _, dropout_x, dropout = layer.parts("default")
    assert A.weight.var().item() * layer.in_features == pytest.approx(variance, rel=0.1)
    assert (dropout.p, dropout_x.p) == ((0.5, 0) if drops_units else (0, 0.5))
