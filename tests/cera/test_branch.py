"""The branch as one step of autograd: against finite differences, and what it may keep; dropout's share and mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cera_train.cera import CeraConfig, CeraLayer
from cera_train.cera.branch import Hidden, add_branch, seeded_dropout

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("hidden", [Hidden(nn.SiLU(), 0.3, 0.0, 5), Hidden(nn.ReLU(), 0.0, 0.3, 5)], ids=["h", "x"])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_gradients_equal_finite_differences_and_the_plain_formula(hidden, shape):
    shapes = (*shape, 5), (*shape, 6), (3, 6), (5, 3)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in shapes]

    def ours(result, x, A, B):
        return add_branch(result * 1, x, A, B, 0.7, hidden)  # * 1: a leaf cannot be written to

    def plain(result, x, A, B):
        x = seeded_dropout(x, hidden.p_x, hidden.seed)
        return result + 0.7 * seeded_dropout(hidden.gate(x @ A.T), hidden.p, hidden.seed) @ B.T

    assert torch.autograd.gradcheck(ours, inputs)
    torch.testing.assert_close(ours(*inputs), plain(*inputs))
    upstream = torch.randn(*shape, 5, dtype=torch.float64)
    got, expected = (torch.autograd.grad(way(*inputs), inputs, upstream) for way in (ours, plain))
    torch.testing.assert_close(got, expected)


def test_it_keeps_x_and_z_and_nothing_as_wide_as_the_output():
    layer = CeraLayer(nn.Linear(6, 50, bias=False).requires_grad_(False), "default", CeraConfig(r=3, dropout=0.2))
    x, kept = torch.randn(7, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer.train()(x)
    weights = {layer.base_layer.weight.data_ptr(), *(parameter.data_ptr() for parameter in layer.parameters())}
    assert sorted(tuple(value.shape) for value in kept if value.data_ptr() not in weights) == [(7, 3), (7, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.999999])
def test_dropout_drops_its_share_and_keeps_the_mean(p, dtype):
    rows = seeded_dropout(torch.ones(40_000, 5, dtype=dtype), p, seed=3)
    share, count = (rows == 0).double().mean().item(), rows.numel()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5 + 2e-5)
    assert rows.double().mean().item() == pytest.approx(1, abs=5 * (p / (1 - p) / count) ** 0.5 + 4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_rounds_what_it_keeps_once_in_16_bits(dtype):
    """1 / 0.9 is 1.1094 in bfloat16: every kept unit would be 0.16 % too small, and its gradient too."""
    h = torch.randn(100, 5).to(dtype).requires_grad_()
    exact = h.detach().float().requires_grad_()
    dropped, expected = (seeded_dropout(x, 0.1, seed=3) for x in (h, exact))
    assert torch.equal(dropped, expected.to(dtype))
    weights = torch.randn(100, 5).to(dtype)
    (dropped * weights).sum().backward()
    (expected * weights.float()).sum().backward()
    assert torch.equal(h.grad, exact.grad.to(dtype))


def test_training_steps_equal_those_of_the_plain_formula_under_autocast():
    def gradients(dtype: torch.dtype, is_plain: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        base = nn.Linear(16, 12, dtype=dtype).requires_grad_(False)
        layer = CeraLayer(base, "default", CeraConfig(r=4, dropout=0.0, init_weights=False)).train()
        x = torch.randn(5, 16, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer.base_layer(x) + layer.branch(x, "default") if is_plain else layer(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        return [x.grad, layer.cera_A["default"].weight.grad, layer.cera_B["default"].weight.grad]

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        for one, other in zip(gradients(dtype, False), gradients(dtype, True), strict=True):
            assert one.dtype == other.dtype
            assert (one - other).norm() <= tolerance * other.norm()
