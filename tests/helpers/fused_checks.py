"""The fused Triton branch against torch's products around the kernels of gate and dropout, whose masks it shares: on a
GPU as it is compiled, elsewhere under Triton's interpreter. test_kernels.py runs this file in a process of its own.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import nn
from triton.runtime import interpreter

from benchmarks import kernels as benchmark
from cera_train.cera import CeraConfig, CeraLayer, branch, fused, hidden, kernels, layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 2**62 + 12345

DTYPES = torch.float32, torch.bfloat16, torch.float16

SHAPES = [(1, 8, 5, 1), (70, 70, 40, 3), (64, 128, 200, 16), (3, 33, 129, 33)]
"""N, d_in, d_out, r: one of everything; below, at and above a block of rows and columns, and r of no power of two."""


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as integers of 16 bits, and would multiply these."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def widening(self, a, b, *arguments):
        return create_dot(self, widened(a), widened(b), *arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widening)


def tensors_of(N: int, d_in: int, d_out: int, r: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """y, x, A, B."""
    shapes = (N, d_out), (N, d_in), (r, d_in), (d_out, r)
    scales = 1, 1, d_in**-0.5, r**-0.5
    return [
        torch.randn(shape, device=DEVICE).mul(scale).to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def unfused(y, x, A, B, scaling, gate, p, seed):
    return branch.add_branch(y, x, A, B, scaling, functools.partial(kernels.hidden, gate=gate, p=p, seed=seed))


def both_ways(add_branch, tensors, gate, p, upstream):
    result = add_branch(tensors[0] * 1, *tensors[1:], 0.7, gate, p, SEED)
    return result.detach(), *torch.autograd.grad(result, tensors, upstream)


def assert_close(one, other, dtype=None):
    """Up to a few roundings to the dtype that computes, against the length of the whole."""
    assert one.dtype == other.dtype
    difference = (one.double() - other.double()).norm()
    assert difference <= 4 * torch.finfo(dtype or one.dtype).eps * other.double().norm()


def assert_agrees(tensors, gate, p):
    upstream = torch.randn_like(tensors[0])
    for one, other in zip(
        *(both_ways(way, tensors, gate, p, upstream) for way in (fused.add_branch, unfused)), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_branch_and_gradients_equal_the_unfused_ones_with_the_same_mask(shape, dtype, p):
    assert_agrees(tensors_of(*shape, dtype), nn.SiLU(), p)


@pytest.mark.parametrize("gate", hidden.GATES)
def test_every_gate_equals_the_unfused_one(gate):
    assert_agrees(tensors_of(*SHAPES[1]), hidden.GATES[gate](), 0.1)


@pytest.mark.parametrize("r", [64, fused.LARGEST_R])
def test_a_large_rank_equals_the_unfused_one(r):
    assert_agrees(tensors_of(66, 40, 40, r, torch.float16), nn.SiLU(), 0.1)


def test_the_branch_equals_the_plain_formula_in_float64():
    tensors = tensors_of(*SHAPES[1])
    upstream = torch.randn_like(tensors[0])
    kept = kernels.hidden(torch.ones(70, 3, device=DEVICE), nn.Identity(), 0.4, SEED) > 0

    def plain(y, x, A, B, *_):
        return y + 0.7 * (nn.functional.silu(x @ A.T) * kept / 0.6) @ B.T

    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    got, expected = (
        both_ways(fused.add_branch, tensors, nn.SiLU(), 0.4, upstream),
        both_ways(plain, wide, nn.SiLU(), 0.4, upstream.double()),
    )
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other.float())


@pytest.mark.parametrize("gate", ["silu", "gelu"])
def test_gradients_are_slopes_of_the_branch(gate):
    """A step along the gradient of every input changes the branch by the step times the gradient's length."""
    tensors, upstream = tensors_of(5, 9, 7, 3), torch.randn(5, 7, device=DEVICE)
    _, *gradients = both_ways(fused.add_branch, tensors, hidden.GATES[gate](), 0.3, upstream)

    def value(place: int, step: torch.Tensor) -> float:
        moved = [tensor.detach().clone() for tensor in tensors]
        moved[place] += step
        with torch.no_grad():
            return (fused.add_branch(*moved, 0.7, hidden.GATES[gate](), 0.3, SEED) * upstream).sum().item()

    for place, gradient in enumerate(gradients):
        step = 0.01 * gradient / gradient.norm()
        slope = (value(place, step) - value(place, -step)) / 0.02
        assert slope == pytest.approx(gradient.norm().item(), rel=0.02)


def test_the_number_of_programs_changes_no_bit(monkeypatch):
    tensors, upstream = tensors_of(70, 90, 200, 5), torch.randn(70, 200, device=DEVICE)
    several = both_ways(fused.add_branch, tensors, nn.SiLU(), 0.3, upstream)
    monkeypatch.setattr(fused, "PROGRAMS", 1)
    for one, other in zip(several, both_ways(fused.add_branch, tensors, nn.SiLU(), 0.3, upstream), strict=True):
        assert torch.equal(one, other)


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept():
    tensors = tensors_of(7, 20, 30, 4)
    expected = fused.add_branch(tensors[0] * 1, *tensors[1:], 0.7, nn.SiLU(), 0.3, SEED)
    with torch.no_grad():
        result = tensors[0] * 1
        assert fused.add_branch(result, *tensors[1:], 0.7, nn.SiLU(), 0.3, SEED) is result
    assert torch.equal(result, expected)


def test_only_gradients_that_are_wanted_are_computed():
    y, x, A, B = tensors_of(7, 20, 30, 4)
    result = fused.add_branch(y * 1, x.detach(), A, B.detach(), 0.7, nn.SiLU(), 0.3, SEED)
    full = fused.add_branch(y * 1, x, A, B, 0.7, nn.SiLU(), 0.3, SEED)
    assert torch.equal(torch.autograd.grad(result.sum(), A)[0], torch.autograd.grad(full.sum(), A)[0])


def test_layouts_that_are_not_contiguous_and_empty_batches():
    y, x, A, B = tensors_of(6, 10, 12, 4)
    expected = fused.add_branch(y * 1, x, A, B, 1, nn.SiLU(), 0.3, SEED)
    strided = x.T.contiguous().T, A.T.contiguous().T, B.T.contiguous().T
    result = fused.add_branch(y * 1, *strided, 1, nn.SiLU(), 0.3, SEED)
    assert torch.equal(result, expected)
    ones = torch.ones((), device=DEVICE).expand(6, 12)
    torch.testing.assert_close(
        *(torch.autograd.grad(r, x, u)[0] for r, u in ((result, ones), (expected, ones.clone())))
    )
    empty = fused.add_branch(y[:0] * 1, x[:0], A, B, 1, nn.SiLU(), 0.3, SEED)
    assert torch.autograd.grad(empty.sum(), A)[0].eq(0).all()


def test_what_is_not_a_number_is_not_hidden_and_stays_in_its_row():
    y, x, A, B = tensors_of(6, 10, 12, 4)
    with torch.no_grad():
        x[2, 3] = torch.nan
        result = fused.add_branch(y * 1, x, A, B, 1, nn.ReLU(), 0.5, SEED)
    assert result.isnan().any(1).tolist() == [row == 2 for row in range(6)]


def test_a_second_derivative_is_refused():
    y, x, A, B = tensors_of(6, 10, 12, 4)
    result = fused.add_branch(y * 1, x, A, B, 1, nn.SiLU(), 0.1, SEED)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(result.sum(), x, create_graph=True)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_a_layer_with_two_adapters_computes_the_same_by_the_fused_kernel(monkeypatch, is_checkpointed, is_autocast):
    """Two branches on one output, the second on top of the first; x of three dimensions."""
    dtype = torch.bfloat16 if is_autocast else torch.float32
    config = CeraConfig(r=3, dropout=0.4, init_weights=False)
    adapted = CeraLayer(nn.Linear(20, 12, dtype=dtype, device=DEVICE), "one", config).train()
    adapted.update_layer("two", CeraConfig(r=5, dropout=0.2, activation="gelu", init_weights=False))
    adapted.set_adapter(["one", "two"])
    adapted.kernels = "triton"
    x = torch.randn(2, 4, 20, device=DEVICE, dtype=dtype, requires_grad=True)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    upstream = torch.randn(2, 4, 12, device=DEVICE, dtype=dtype)

    def output_and_gradients():
        torch.manual_seed(5)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=is_autocast):
            if is_checkpointed:
                result = torch.utils.checkpoint.checkpoint(adapted, x, use_reentrant=False)
            else:
                result = adapted(x)
        return result.detach(), *torch.autograd.grad(result, [x, *trained], upstream)

    calls = []
    monkeypatch.setattr(hidden, "fits_triton", lambda like, units, gate: True)  # the interpreter's are on a CPU
    monkeypatch.setattr(layer, "fits_one_kernel", lambda x, r, gate: False)
    expected = output_and_gradients()
    monkeypatch.setattr(layer, "fits_one_kernel", lambda x, r, gate: calls.append(r) or True)
    for one, other in zip(output_and_gradients(), expected, strict=True):
        assert_close(one, other, dtype)
    assert calls == [3, 5] * (1 + is_checkpointed)


def test_the_race_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", [benchmark.Shape(name, 20, 30) for name in ("q_proj", "v_proj")])
    few = ["--tokens", "3", "--rounds", "1", "--repeats", "1", "--dtype", "float32"]
    names = ["--shapes", "v_proj", "--ranks", "2", "--ways", "fused", "torch"]
    benchmark.main([*few, *names])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| projection | r | pass | fused, ms | torch, ms | fused, GB/s | TFLOP/s |"
    assert [line.split("|")[1:4] for line in lines] == [
        [" v_proj ", " 2 ", f" {name} "] for name in ("forward", "forward and backward")
    ]


def test_the_race_ends_where_the_fused_branch_computes_something_else():
    ways = benchmark.ways([])
    ways["fused"] = lambda y, x, A, B: ways["unfused"](y, x, 1.001 * A, B)
    y, *inputs = tensors_of(7, 20, 30, 4)
    with pytest.raises(AssertionError, match="of the fused branch is .* off"):
        benchmark.check(ways, y.detach(), inputs, torch.randn_like(y))


def test_the_race_counts_each_wide_tensor_once():
    shape = benchmark.Shape("", 10, 20)
    assert benchmark.work(shape, 2, 100, 2, "forward") == pytest.approx((100 * 50 * 2e-9, 2 * 100 * 2 * 30e-12))
    both = (100 * (50 + 40) * 2e-9, 6 * 100 * 2 * 30e-12)
    assert benchmark.work(shape, 2, 100, 2, "forward and backward") == pytest.approx(both)
