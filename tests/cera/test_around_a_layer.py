"""What the code around a CeRA layer relies on: hooks, other base layers, torch's transforms, PEFT's helpers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cera_models import IDS, WARNINGS, adapted, cera, cera_layers, logits
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
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


class Remembering(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = super().forward(x)
        return self.last


def test_a_subclass_of_linear_may_need_its_output_in_backward():
    layer, x = make_layer(Tanh(6, 5, dtype=torch.float64)), x_of().requires_grad_()
    expected = layer.base_layer(x) + layer.branch(x, "default")
    torch.testing.assert_close(layer(x), expected)
    gradients = (torch.autograd.grad(y.square().sum(), x) for y in (layer(x), expected))
    torch.testing.assert_close(*gradients)


def test_a_subclass_of_linear_may_keep_its_output():
    layer, x = make_layer(Remembering(6, 5, dtype=torch.float64)), x_of()
    layer(x)
    torch.testing.assert_close(layer.base_layer.last, nn.functional.linear(x, layer.weight, layer.bias))


def test_the_output_of_a_plain_linear_is_written_to():
    layer, x = make_layer(), x_of()
    pointers, linear = [], nn.Linear.forward

    def remember(module, x):
        output = linear(module, x)
        pointers.append(output.data_ptr())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", remember)
        assert layer(x).data_ptr() == pointers[0]


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


def test_an_adapter_over_a_model_in_train_mode_drops():
    model = get_peft_model(make_tiny_llama().train(), cera(dropout=0.9))
    assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


# --- derivatives of derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_on", ["hidden", "input"])
def test_a_gradient_penalty_has_the_plain_formulas_gradient(dropout_on):
    layer = make_layer(dropout=0.4, dropout_on=dropout_on).train()
    x = x_of().requires_grad_()
    leaves = [x, layer.cera_A["default"].weight, layer.cera_B["default"].weight]

    def penalty_gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaves)

    def fused(*_) -> torch.Tensor:
        torch.manual_seed(3)
        return layer(x)

    got = penalty_gradients(fused())
    assert all(gradient.abs().max() > 0 for gradient in got)
    # by finite differences of the first derivative
    step = 1e-6
    for leaf, gradient in zip(leaves, got, strict=True):
        direction = torch.randn_like(leaf)
        values = []
        for sign in (1, -1):
            leaf.data.add_(sign * step * direction)
            values.append(torch.autograd.grad(fused().sum(), x)[0].square().sum())
            leaf.data.sub_(sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


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


def test_forward_mode_derivatives_equal_those_of_backward():
    layer, x = make_layer(), x_of()
    direction = torch.randn_like(x)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torch's, of its own modules
        _, slope = torch.func.jvp(layer, (x,), (direction,))
    jacobian = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(slope, torch.einsum("nmkd,kd->nm", jacobian, direction))


def test_a_traced_layer_equals_the_layer():
    layer, x = make_layer().eval(), x_of()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        traced = torch.jit.trace(layer, (x,))
    other = x_of()
    torch.testing.assert_close(traced(other), layer(other))


def test_a_model_on_the_meta_device_runs():
    with torch.device("meta"):
        model = get_peft_model(make_tiny_llama(), cera(dropout=0.1)).train()
    output = model(input_ids=IDS.to("meta"), labels=IDS.to("meta"))
    output.loss.backward()
    assert output.logits.is_meta
    assert all(p.grad.is_meta for name, p in model.named_parameters() if "cera_" in name)


# --- PEFT's helpers --------------------------------------------------------------------------------------------------


def test_casting_of_the_input_can_be_disabled():
    layer, x = make_layer(nn.Linear(6, 5, dtype=torch.bfloat16)), x_of(torch.bfloat16)
    layer.cera_A["default"].register_forward_pre_hook(lambda module, args: (args[0].float(),))
    seen = []
    layer.cera_dropout["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    expected = layer(x)
    with disable_input_dtype_casting(layer):
        torch.testing.assert_close(layer(x), expected)  # the hook casts
        assert not layer.cast_input_dtype_enabled
    assert layer.cast_input_dtype_enabled

    layer = make_layer(nn.Linear(6, 5, dtype=torch.bfloat16))
    with disable_input_dtype_casting(layer), pytest.raises(RuntimeError, match="dtype"):
        layer(x)  # nothing casts: as under PEFT's LoRA


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x=x) if isinstance(self.linear, CeraLayer) else self.linear(input=x)


def test_names_of_rows_reach_a_layer_that_is_called_by_keyword():
    model = get_peft_model(ByKeyword(), CeraConfig(target_modules=["linear"], r=3, init_weights=False)).eval()
    x = x_of(torch.float32)
    y = model(x, adapter_names=["default", "__base__", "default", "__base__"])
    torch.testing.assert_close(y[::2], model(x)[::2])
    with model.disable_adapter():
        torch.testing.assert_close(y[1::2], model(x)[1::2])


def test_unmerging_changes_nothing():
    model = adapted()
    before = logits(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


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
