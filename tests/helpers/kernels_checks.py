"""The Triton kernels against torch's formula: on a GPU as they are compiled, elsewhere under Triton's interpreter.

Triton decides when it is imported whether it interprets, and other libraries import it too: test_kernels.py runs this
file in a process of its own.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from cera_train.cera.branch import add_branch
from cera_train.cera.hidden import GATES, hidden_by_torch
from cera_train.cera.kernels import BLOCK, hidden

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 2**62 + 12345  # of more than 32 bits, as a layer draws it

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-4},
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
}


def z_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).mul(2).to(dtype).requires_grad_()


def both_ways(hidden, z, gate, p, grad_h):
    h = hidden(z, gate, p, SEED)
    return h.detach(), *torch.autograd.grad(h, z, grad_h)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rows", [1, 5, 2 * BLOCK // 8])
def test_h_and_its_gradient_equal_torchs(gate, dtype, rows):
    """Of sizes below a block, and of exactly two blocks; the next test has one block and a part."""
    z, grad_h = z_of(rows, 8, dtype=dtype), z_of(rows, 8, dtype=dtype).detach()
    got, expected = (both_ways(way, z, GATES[gate](), 0.0, grad_h) for way in (hidden, hidden_by_torch))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", GATES)
def test_dropout_multiplies_h_and_its_gradient_by_the_same_mask(gate, dtype):
    p, ones = 0.2, torch.ones(BLOCK // 8 + 3, 9, device=DEVICE, dtype=dtype)
    kept = hidden(ones, nn.Identity(), p, SEED).float()
    assert set(kept.unique().tolist()) == {0, 1.25}
    z, grad_h = z_of(*ones.shape, dtype=dtype), z_of(*ones.shape, dtype=dtype).detach()
    got, expected = (
        both_ways(way, z, GATES[gate](), share, grad_h) for way, share in ((hidden, p), (hidden_by_torch, 0))
    )
    for one, other in zip(got, expected, strict=True):
        exact = other.float() * (kept > 0) / (1 - p)
        torch.testing.assert_close(one.float(), exact, **TOLERANCE[dtype])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    h = hidden(torch.ones(40_000, 5, device=DEVICE), nn.Identity(), p, SEED).double()
    assert (h == 0).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / h.numel()) ** 0.5)
    assert h.mean().item() == pytest.approx(1, abs=5 * (p / (1 - p) / h.numel()) ** 0.5)


def test_dropout_follows_from_its_seed_alone():
    ones = torch.ones(33, 64, device=DEVICE)
    first = hidden(ones, nn.Identity(), 0.5, SEED)
    torch.rand(5)
    assert torch.equal(hidden(ones, nn.Identity(), 0.5, SEED), first)
    for other_seed in (SEED + 1, SEED + 2**32):  # both halves count
        agreement = (hidden(ones, nn.Identity(), 0.5, other_seed) == first).double().mean().item()
        assert agreement == pytest.approx(0.5, abs=5 * (0.25 / ones.numel()) ** 0.5)


def test_neighbours_are_dropped_independently():
    is_kept = (hidden(torch.ones(20_000, 4, device=DEVICE), nn.Identity(), 0.3, SEED) > 0).double()
    torch.testing.assert_close(is_kept.T.corrcoef().cpu(), torch.eye(4).double(), atol=0.036, rtol=0)


def test_layouts_that_are_not_contiguous_and_empty_batches():
    z, grad_h = z_of(6, 10), torch.ones((), device=DEVICE).expand(10, 6)
    for one, other in zip(
        *(both_ways(way, z.T, nn.SiLU(), 0.0, grad_h) for way in (hidden, hidden_by_torch)), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert hidden(z[:0], nn.SiLU(), 0.1, SEED).shape == (0, 10)


@pytest.mark.parametrize("gate", GATES)
def test_what_is_not_a_number_is_not_hidden(gate):
    z = torch.full((3, 4), torch.nan, device=DEVICE, requires_grad=True)
    h, grad_z = both_ways(hidden, z, GATES[gate](), 0.5, torch.ones_like(z))
    assert h.isnan().all()
    assert grad_z.isnan().all() or gate in ("relu", "identity")  # whose slope is a constant, as torch's is


def test_a_second_derivative_is_refused():
    z = z_of(3, 4)
    h = hidden(z, nn.SiLU(), 0.1, SEED)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(h.sum(), z, create_graph=True)


def test_a_branch_with_the_kernels_equals_the_plain_formula():
    result, x, A, B = (
        torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((7, 5), (7, 6), (3, 6), (5, 3))
    )
    fused = functools.partial(hidden, gate=nn.SiLU(), p=0.4, seed=SEED)
    kept = fused(torch.full((7, 3), 1.0, device=DEVICE)) > 0

    def plain(result, x, A, B):
        return result + 0.7 * (nn.functional.silu(x @ A.T) * kept / 0.6) @ B.T

    got, expected = add_branch(result * 1, x, A, B, 0.7, fused), plain(result, x, A, B)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    for one, other in zip(*(torch.autograd.grad(y, (result, x, A, B), upstream) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)
