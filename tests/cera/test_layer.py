"""One CeRA layer: every variant against its formula, dropout, number formats, base layers, and what
other code relies on."""

import math

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu
from transformers.pytorch_utils import Conv1D

from cera_train.cera import CeraConfig, CeraLinear, for_inference
from cera_train.cera.branch import seeded_dropout

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",  # torch's
)

GATES = {"silu": silu, "relu": relu, "gelu": gelu, "tanh": torch.tanh, "identity": lambda z: z}

VARIANTS = {
    "as published": {},
    "relu": {"activation": "relu", "alpha": 1.5},
    "dropout on x": {"dropout_on": "input", "activation": "identity"},
    "mix": {"mix": "learned"},
    "odd and steep": {"activation": "tanh", "init_scale": 3},
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


def make_layer(base: nn.Module | None = None, **settings) -> CeraLinear:
    """A layer with random A and B over a float64 linear of 6 inputs and 5 outputs."""
    base = nn.Linear(6, 5, dtype=torch.float64) if base is None else base
    config = CeraConfig(**{"r": 3, "init_weights": False, "dropout": 0.0} | settings)
    return CeraLinear(base.requires_grad_(False), "default", config)


def x_of(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 7, 6, dtype=dtype)


def leaves(layer: CeraLinear, x: torch.Tensor) -> list[torch.Tensor]:
    return [x, *(parameter for name, parameter in layer.named_parameters() if "cera_" in name)]


def by_hand(
    layer: CeraLinear, x: torch.Tensor, config: CeraConfig, mask_x=1.0, mask_h=1.0
) -> torch.Tensor:
    """W0 x + s B (m_h gate(A (m_x x))), as in CeraConfig's docstring."""
    A = layer.cera_A["default"].weight
    B = layer.cera_B["default"].weight
    gate = layer.cera_gate["default"]
    z = (mask_x * x) @ A.T
    h = GATES[config.activation](z)
    if config.mix == "learned":
        h = z + gate.gamma * (h - z)
    scale = (
        1.0
        if config.alpha is None
        else config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    )
    return layer.base_layer(x) + scale * (mask_h * h) @ B.T


def assert_equal_with_gradients(
    layer: CeraLinear, x: torch.Tensor, y: torch.Tensor, expected: torch.Tensor
) -> None:
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    got, wanted = (
        torch.autograd.grad(value, leaves(layer, x), upstream) for value in (y, expected)
    )
    torch.testing.assert_close(got, wanted)
    assert all(gradient.abs().max() > 0 for gradient in got)


# --- the mathematics ------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_equal_the_mathematics(settings, dropout):
    """Dropout acts where the variant puts it."""
    layer = make_layer(**settings, dropout=dropout).train()
    x = x_of().requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    assert "AddBranch" in str(y.grad_fn)
    torch.manual_seed(1)
    seed = int(torch.randint(2**63 - 1, ()))
    config = CeraConfig(r=3, **settings)
    on_input = config.dropout_on == "input"
    width = 6 if on_input else 3
    mask = seeded_dropout(torch.ones(28, width, dtype=x.dtype), dropout, seed).view(4, 7, -1)
    assert (mask == 0).any() == bool(dropout)
    masks = {"mask_x" if on_input else "mask_h": mask}
    assert_equal_with_gradients(layer, x, y, by_hand(layer, x, config, **masks))
    layer.eval()
    torch.testing.assert_close(layer(x), by_hand(layer, x, config))


@pytest.mark.parametrize("name", ["as published", "all"])
def test_a_compiled_layer_is_one_graph_and_equals_the_layer(name):
    layer = make_layer(nn.Linear(6, 5), **VARIANTS[name]).train()
    x = x_of(torch.float32).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_equal_with_gradients(layer, x, compiled(x), layer(x))


def test_backward_keeps_x_and_z_and_nothing_as_wide_as_the_output():
    layer = make_layer(nn.Linear(6, 50, bias=False), dropout=0.2).train()
    x = torch.randn(7, 6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        layer(x)
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    assert sorted(tuple(value.shape) for value in kept if value.data_ptr() not in weights) == [
        (7, 3),
        (7, 6),
    ]


@every_variant
def test_the_start_is_the_base_layer_and_only_b_has_a_gradient(settings):
    layer = make_layer(**settings, init_weights=True).train()
    x = x_of()
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).square().sum().backward()
    moved = {
        name
        for name, value in layer.named_parameters()
        if value.grad is not None and value.grad.any()
    }
    assert moved == {"cera_B.default.weight"}


@pytest.mark.parametrize(
    ("init", "deviation", "fourth_moment"),
    [
        ("kaiming_normal", math.sqrt(2 / 1024), 3),
        ("kaiming_uniform", math.sqrt(1 / (3 * 1024)), 1.8),
    ],
)
def test_a_is_drawn_as_init_says(init, deviation, fourth_moment):
    layer = make_layer(nn.Linear(1024, 16), r=256, init=init)
    A = layer.cera_A["default"].weight
    assert A.std().item() == pytest.approx(deviation, rel=0.01)
    assert (A.pow(4).mean() / deviation**4).item() == pytest.approx(fourth_moment, rel=0.05)


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.999999])
def test_dropout_drops_its_share_and_keeps_the_mean(p, dtype):
    rows = seeded_dropout(torch.ones(40_000, 5, dtype=dtype), p, seed=3)
    share = (rows == 0).double().mean().item()
    count = rows.numel()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5 + 2e-5)
    assert rows.double().mean().item() == pytest.approx(
        1, abs=5 * (p / (1 - p) / count) ** 0.5 + 4e-3
    )


def test_dropout_rounds_what_it_keeps_once_in_16_bits():
    """1 / 0.9 is 1.1094 in bfloat16: every kept unit and its gradient would be 0.16 % too small."""
    h = torch.randn(100, 5).bfloat16().requires_grad_()
    exact = h.detach().float().requires_grad_()
    dropped, expected = (seeded_dropout(x, 0.1, seed=3) for x in (h, exact))
    assert torch.equal(dropped, expected.bfloat16())
    weights = torch.randn(100, 5).bfloat16()
    (dropped * weights).sum().backward()
    (expected * weights.float()).sum().backward()
    assert torch.equal(h.grad, exact.grad.bfloat16())


# --- number formats -------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_16_bits_stay_near_the_plain_formula(settings, dtype, autocast):
    layer = make_layer(nn.Linear(6, 5, dtype=dtype), **settings).train()
    x = x_of(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
        plain = layer.base_layer(x) + layer.branch(x, "default")
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    assert {parameter.dtype for parameter in leaves(layer, x)[1:]} == {torch.float32}
    upstream = torch.randn_like(y)
    ours = y, *torch.autograd.grad(y, leaves(layer, x), upstream)
    theirs = plain, *torch.autograd.grad(plain, leaves(layer, x), upstream.to(plain.dtype))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).norm() <= 4e-2 * other.float().norm()


# --- base layers ----------------------------------------------------------------------------------

BASES = {
    "linear": lambda: nn.Linear(64, 32),
    "Conv1D": lambda: Conv1D(32, 64),
    "8 bits": lambda: bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"),
    "4 bits": lambda: bitsandbytes.nn.Linear4bit(
        64, 32, quant_type="nf4", compute_dtype=torch.bfloat16
    ).to("cpu"),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("name", BASES)
def test_for_inference_changes_no_bit(name):
    layer = make_layer(BASES[name](), dropout=0.1, alpha=6, mix="learned").eval()
    x = torch.randn(2, 3, 64)
    for dtype, is_on in ((torch.float32, False), (torch.bfloat16, True)):
        if "bits" not in name:
            layer.base_layer.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            base = layer.base_layer(x.to(dtype))
            expected = layer(x.to(dtype))
            torch.testing.assert_close(
                expected, base + layer.branch(x.to(dtype), "default"), rtol=4e-2, atol=4e-2
            )
            assert not torch.equal(expected, base)
            with for_inference(layer):
                assert all(torch.equal(layer(x.to(dtype)), expected) for _ in range(3))


# --- what other code relies on --------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["cera_A", "cera_B"])
def test_a_weight_that_is_fetched_when_its_module_is_called_is_fetched(matrix):
    """As FSDP1, ZeRO-3 and offloading do."""
    layer = make_layer()
    x = x_of()
    expected = layer(x)
    linear = getattr(layer, matrix)["default"]
    weight = linear.weight.detach().clone()
    nn.init.zeros_(linear.weight)

    def fetch(module: nn.Linear, _) -> None:
        module.weight.data.copy_(weight)

    linear.register_forward_pre_hook(fetch)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("in_grad_mode", [True, False])
def test_a_hook_on_the_base_layer_may_keep_its_output(in_grad_mode):
    layer = make_layer()
    x = x_of()
    seen = []
    expected = layer.base_layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.set_grad_enabled(in_grad_mode):
        y = layer(x)
    assert torch.equal(seen[0], expected)
    torch.testing.assert_close(y, expected + layer.branch(x, "default"))
