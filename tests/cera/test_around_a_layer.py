"""What the code around a CeRA layer relies on: hooks, other base layers, torch's transforms, PEFT's helpers."""

from __future__ import annotations

import copy

import pytest
import torch
from cera_models import IDS, WARNINGS, adapted, cera, cera_layers, logits
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from cera_train.cera import CeraConfig, CeraLayer, create_loraplus_optimizer

pytestmark = WARNINGS


def make_layer(base: nn.Module | None = None, **settings) -> CeraLayer:
    base = nn.Linear(6, 5, dtype=torch.float64) if base is None else base
    settings = {"r": 3, "init_weights": False, "dropout": 0.0} | settings
    return CeraLayer(base.requires_grad_(False), "default", CeraConfig(**settings))


def x_of(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 6, dtype=dtype)


# --- what else holds the base layer's output -------------------------------------------------------------------------


@pytest.mark.parametrize("in_grad_mode", [True, False])
def test_a_hook_on_the_base_layer_keeps_the_base_layers_output(in_grad_mode):
    layer, x, seen = make_layer(), x_of(), []
    expected = layer.base_layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.set_grad_enabled(in_grad_mode):
        y = layer(x)
    assert torch.equal(seen[0], expected)
    torch.testing.assert_close(y, expected + layer.branch(x, "default"))


class Tanh(nn.Linear):
    """Needs its output in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def test_a_subclass_of_linear_may_need_its_output_in_backward():
    layer, x = make_layer(Tanh(6, 5, dtype=torch.float64)), x_of().requires_grad_()
    expected = layer.base_layer(x) + layer.branch(x, "default")
    torch.testing.assert_close(layer(x), expected)
    gradients = (torch.autograd.grad(y.square().sum(), x) for y in (layer(x), expected))
    torch.testing.assert_close(*gradients)


# --- train and eval --------------------------------------------------------------------------------------------------


def test_an_adapter_over_a_model_in_eval_mode_answers_the_same_every_time():
    model = get_peft_model(make_tiny_llama().eval(), cera(dropout=0.9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
        model.add_adapter("second", cera(dropout=0.9, target_modules=["k_proj"]))
        model.set_adapter("second")
        assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
        model.train()
        assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


# --- torch's transforms ----------------------------------------------------------------------------------------------


def test_torch_func_differentiates_a_model():
    layer, x = make_layer(), x_of()
    weights = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, x).square().sum()

    got = torch.func.grad(loss)(weights, x)
    layer(x).square().sum().backward()
    for name in ("cera_A.default.weight", "cera_B.default.weight"):
        torch.testing.assert_close(got[name], layer.get_parameter(name).grad)
    by_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x[:, None])
    torch.testing.assert_close(by_row["cera_A.default.weight"].sum(0), got["cera_A.default.weight"])


def test_a_model_on_the_meta_device_runs():
    with torch.device("meta"):
        model = get_peft_model(make_tiny_llama(), cera(dropout=0.1)).train()
    output = model(input_ids=IDS.to("meta"), labels=IDS.to("meta"))
    output.loss.backward()
    assert output.logits.is_meta
    assert all(p.grad.is_meta for name, p in model.named_parameters() if "cera_" in name)


# --- PEFT's helpers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [{}, {"mix": "learned"}], ids=["plain", "learned"])
def test_loraplus_trains_b_faster(gate):
    model = adapted(**gate)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, weight_decay=0.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name: rates[id(p)] for name, p in trained.items()} == {
        name: 16e-4 if ".cera_B." in name else 1e-4 for name in trained
    }
    lora = get_peft_model(make_tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    optimizer = create_loraplus_optimizer(lora, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    assert {group["lr"]: len(group["params"]) for group in optimizer.param_groups if group["params"]} == {
        1e-4: 2,
        16e-4: 2,
    }


# --- several adapters over all linears -------------------------------------------------------------------------------


def test_all_linear_means_the_same_for_every_adapter():
    model = adapted(name="first", target_modules=["q_proj"])
    model.add_adapter("second", cera(target_modules="all-linear"))
    model.add_adapter("third", cera(target_modules="all-linear"))
    expected = set(cera_layers(adapted(target_modules="all-linear")))
    for name in ("second", "third"):
        found = {key for key, layer in model.named_modules() if isinstance(layer, CeraLayer) and name in layer.cera_A}
        assert {key.removeprefix("base_model.model.") for key in found} == expected, name
        model.set_adapter(name)
        trained = copy.deepcopy(logits(model))
        with model.disable_adapter():
            assert not torch.allclose(trained, logits(model))
