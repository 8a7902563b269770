"""The variants of the adapter, each against its line of mathematics in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from cera_models import WARNINGS, adapted, cera, gradients, logits
from conftest import make_tiny_llama
from peft import PeftModel
from torch import nn
from torch.nn.functional import silu

from cera_train.cera import CeraConfig, CeraLayer
from cera_train.cera.branch import seeded_dropout

pytestmark = WARNINGS

VARIANTS = {
    "as published": {},
    "uniform": {"init": "kaiming_uniform"},
    "dropout on x": {"dropout_on": "input"},
    "mix": {"mix": "learned"},
    "rslora": {"use_rslora": True, "alpha": 6},
    "all": {
        "init": "kaiming_uniform",
        "dropout_on": "input",
        "mix": "learned",
        "activation": "gelu",
        "use_rslora": True,
        "alpha": 6,
    },
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)

GATES = {"silu": silu, "gelu": nn.functional.gelu, "identity": lambda z: z}


def make_layer(dtype: torch.dtype = torch.float64, **settings) -> CeraLayer:
    base = nn.Linear(6, 5, dtype=dtype).requires_grad_(False)
    return CeraLayer(base, "default", CeraConfig(**{"r": 3, "init_weights": False, "dropout": 0.0} | settings))


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*(shape or (4, 7)), 6, dtype=dtype)


def by_hand(layer: CeraLayer, x: torch.Tensor, config: CeraConfig, mask_x=1.0, mask_h=1.0) -> torch.Tensor:
    """W0 x + s B (m_h hidden(A (m_x x))), as CeraConfig's docstring has it."""
    A, B, gate = layer.cera_A["default"].weight, layer.cera_B["default"].weight, layer.cera_gate["default"]
    z = (mask_x * x) @ A.T
    h = GATES[config.activation](z)
    if config.mix == "learned":
        h = z + gate.gamma * (h - z)
    scale = 1.0 if config.alpha is None else config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return layer.base_layer(x) + scale * (mask_h * h) @ B.T


def leaves(layer: CeraLayer, x: torch.Tensor) -> list[torch.Tensor]:
    return [x, *(parameter for name, parameter in layer.named_parameters() if "cera_" in name)]


# --- the mathematics -------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_output_and_gradients_equal_the_mathematics(settings, shape):
    layer, x = make_layer(**settings).train(), x_of(*shape).requires_grad_()
    config = CeraConfig(r=3, **settings)
    y, expected = layer(x), by_hand(layer, x, config)
    torch.testing.assert_close(y, expected)
    assert "AddBranch" in str(y.grad_fn)
    upstream = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(value, leaves(layer, x), upstream) for value in (y, expected))
    torch.testing.assert_close(got, wanted)
    assert all(gradient.abs().max() > 0 for gradient in got)


@every_variant
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_first_and_second_derivatives_equal_finite_differences(settings, dropout):
    layer, x = make_layer(**settings, dropout=dropout).train(), x_of(2).requires_grad_()

    def ours(x: torch.Tensor, *_) -> torch.Tensor:
        torch.manual_seed(1)  # one mask
        return layer(x)

    assert torch.autograd.gradcheck(ours, leaves(layer, x))
    assert torch.autograd.gradgradcheck(ours, leaves(layer, x))


@every_variant
def test_dropout_stands_where_the_variant_puts_it(settings):
    layer, x = make_layer(**settings, dropout=0.4).train(), x_of()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    seed = int(torch.randint(2**63 - 1, ()))
    config = CeraConfig(r=3, **settings)
    on_input = config.dropout_on == "input"
    mask = seeded_dropout(torch.ones(28, 6 if on_input else 3, dtype=x.dtype), 0.4, seed).view(4, 7, -1)
    assert (mask == 0).any()
    expected = by_hand(layer, x, config, mask_x=mask) if on_input else by_hand(layer, x, config, mask_h=mask)
    torch.testing.assert_close(y, expected)
    layer.eval()
    torch.testing.assert_close(layer(x), by_hand(layer, x, config))


@every_variant
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_16_bits_stay_near_double_precision(settings, dtype, autocast):
    layer, x = make_layer(dtype, **settings).train(), x_of(dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, plain = layer(x), layer.base_layer(x) + layer.branch(x, "default")
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    assert {parameter.dtype for parameter in leaves(layer, x)[1:]} == {torch.float32}
    upstream = torch.randn_like(y)
    for one, other in zip(
        (y, *torch.autograd.grad(y, leaves(layer, x), upstream)),
        (plain, *torch.autograd.grad(plain, leaves(layer, x), upstream.to(plain.dtype))),
        strict=True,
    ):
        assert (one.float() - other.float()).norm() <= 4e-2 * other.float().norm()


@every_variant
def test_the_start_is_the_base_layer_and_everything_but_b_waits(settings):
    layer, x = make_layer(**settings, init_weights=True).train(), x_of()
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).square().sum().backward()
    moved = {name for name, value in layer.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved == {"cera_B.default.weight"}


def test_a_learned_mix_starts_linear_and_reaches_the_gate_at_one():
    settings = {"init_weights": True, "mix": "learned"}
    layer, x = make_layer(**settings).eval(), x_of()
    nn.init.normal_(layer.cera_B["default"].weight)
    A, B = layer.cera_A["default"].weight, layer.cera_B["default"].weight
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ A.T @ B.T)
    nn.init.ones_(layer.cera_gate["default"].gamma)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), silu(x @ A.T) @ B.T)


@pytest.mark.parametrize(
    ("init", "deviation", "fourth_moment"),
    [("kaiming_normal", math.sqrt(2 / 1024), 3), ("kaiming_uniform", math.sqrt(1 / (3 * 1024)), 1.8)],
)
def test_a_is_drawn_as_init_has_it(init, deviation, fourth_moment):
    layer = CeraLayer(nn.Linear(1024, 16), "default", CeraConfig(r=256, init=init))
    A = layer.cera_A["default"].weight
    assert A.std().item() == pytest.approx(deviation, rel=0.01)
    assert (A.pow(4).mean() / deviation**4).item() == pytest.approx(fourth_moment, rel=0.05)


# --- in a model ------------------------------------------------------------------------------------------------------


@every_variant
def test_a_compiled_layer_is_one_graph_and_equals_the_layer(settings):
    layer, x = make_layer(torch.float32, **settings).train(), x_of(dtype=torch.float32).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    upstream = torch.randn(4, 7, 5)
    got, expected = (torch.autograd.grad(one(x), leaves(layer, x), upstream) for one in (compiled, layer))
    torch.testing.assert_close(got, expected)


@every_variant
def test_an_adapter_is_saved_and_loaded_whole(settings, tmp_path):
    model = adapted(**settings)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {"A.default.weight", "B.default.weight"}
    kinds |= {"gate.default.gamma"} if settings.get("mix") == "learned" else set()
    assert {name.rpartition(".cera_")[2] for name in trained} == kinds
    assert {name for name, _ in gradients(model).items()} == trained


def test_a_checkpoint_without_gamma_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = cera(mix="learned")
    with pytest.raises(ValueError, match="4 tensors missing .*cera_gate.default.gamma"):
        PeftModel.from_pretrained(make_tiny_llama(), tmp_path, config=config)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "xavier"}, "init must be one of kaiming_normal, kaiming_uniform, got 'xavier'"),
        ({"dropout_on": "output"}, "dropout_on must be one of hidden, input"),
        ({"mix": "fixed"}, "mix must be one of none, learned"),
        ({"bias": "lora_only"}, "bias must be one of none, all, cera_only"),
        ({"mix": "learned", "activation": "identity"}, "activation must not be 'identity'"),
        ({"use_rslora": True}, "use_rslora divides alpha by sqrt"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be a positive integer, got 0"),
        ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\] must be positive, got -1"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern\['\('\] is no name or regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\] must be positive, got None"),
    ],
    ids=str,
)
def test_a_contradiction_is_refused_with_a_reason(settings, message):
    with pytest.raises(ValueError, match=message):
        CeraConfig(**settings)
