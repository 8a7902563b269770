"""y + s dropout(gate(x A^T)) B^T as one Triton kernel, written into y, and the gradients of its rows as another.

    forward, for a block of rows    z = x A^T             h = dropout(gate(z))             y += s h B^T
    backward, for a block of rows   grad_h = s grad_y B   grad_z = grad_h mask gate'(z)    grad_x = grad_z A

Both read one wide matrix, hold [rows, r] on the chip, and write another wide matrix. Products are summed in float32. z
is rounded to the tensors' dtype before the gate, and a mask is drawn from the seed and the element's place in [N, r]:
the numbers of torch's products around `kernels.hidden`, up to the order of sums and to grad_h, which is not rounded.

torch.mm computes grad_A = grad_z^T x and grad_B = grad_y^T s h. These sum over rows, so a kernel of row blocks would
add r d float32 numbers a block by atomics: at r = 64 and 64 rows twice the bytes of the bf16 x or grad_y that it saves
reading again, and in an order that differs from run to run. torch.mm splits the sum itself, in an order that does not.

The base's gradient of x comes from the base's module, so autograd adds grad_x to it.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import FunctionCtx

from .kernels import _gate, _kept

ROWS = 64
"""Rows of a block."""

COLUMN_BYTES = 128
"""Bytes of x or y that a block has of each row."""

STAGES = 4
"""Blocks on their way from memory at once."""

LARGEST_R = 128
"""Beyond it a block's hidden units leave the registers."""

PROGRAMS = 128
"""Programs that keep a GPU busy. Where there are fewer blocks of rows, several programs share the columns of one; each
computes and writes all of z, so their number changes no result."""


def largest_r(device: torch.device) -> int:
    """The largest r whose branch one kernel computes on this GPU, by the shared memory of its architecture."""
    memory = _shared_memory(torch.cuda.current_device() if device.index is None else device.index)
    return max((R for R in (16, 32, 64, LARGEST_R) if shared_bytes(R) <= memory), default=0)


def shared_bytes(R: int) -> int:
    """Bytes of shared memory that a kernel takes at most, for any dtype: blocks of x and A, or of y and B, and 1 KB for
    the barriers of some architectures."""
    return STAGES * (ROWS + R) * COLUMN_BYTES + 1024


def tiling(r: int, itemsize: int) -> dict[str, int]:
    """The sizes that a kernel is compiled for."""
    R = max(16, triton.next_power_of_2(r))  # a product takes no fewer units
    return {
        "R": R,
        "ROWS": ROWS,
        "COLUMNS": COLUMN_BYTES // itemsize,
        "num_warps": 8 if R >= 64 else 4,
        "num_stages": STAGES,
    }


@functools.cache
def _shared_memory(index: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def add_branch(
    result: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    gate: nn.Module,
    p: float,
    seed: int,
) -> torch.Tensor:
    """result + s dropout(gate(x A^T)) B^T, written into `result`.

    Args:
        result: [..., d_out], contiguous. All tensors are of one dtype, of 16 or 32 bits.
        x: [..., d_in].
        A: [r, d_in]. B: [d_out, r].
        gate: nn.SiLU, nn.ReLU, nn.GELU (by erf) or nn.Identity.
        p: the share of hidden units to drop.
        seed: the mask follows from it.
    """
    settings = float(scaling), type(gate).__name__, p, seed
    if torch.is_grad_enabled():
        return _AddBranch.apply(result, x, A, B, *settings)
    _run_forward(result, _rows(x), A, B, None, *settings)
    return result


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        result: torch.Tensor,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        *settings: float | str,
    ) -> torch.Tensor:
        rows = _rows(x)
        z = rows.new_empty(len(rows), len(A))
        _run_forward(result, rows, A, B, z, *settings)
        ctx.save_for_backward(x, z, A, B)
        ctx.settings = settings
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, grad_result: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True. `once_differentiable` notices only gradients with a graph
            raise RuntimeError("CeRA's Triton kernels have first derivatives only: set the layers' kernels to 'torch'.")
        x, z, A, B = ctx.saved_tensors
        grad_y, rows = _rows(grad_result), _rows(x)
        scaled_h, grad_z = torch.empty_like(z), torch.empty_like(z)
        grad_x = torch.empty_like(rows) if ctx.needs_input_grad[1] else None
        _run_backward(grad_x, grad_y, A, B, z, scaled_h, grad_z, *ctx.settings)
        grad_A = grad_z.T @ rows if ctx.needs_input_grad[2] else None
        grad_B = grad_y.T @ scaled_h if ctx.needs_input_grad[3] else None
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_result, grad_x, grad_A, grad_B, None, None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., d] -> [N, d], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _run_forward(
    y: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    z: torch.Tensor | None,
    *settings: float | str,
) -> None:
    """y += s dropout(gate(x A^T)) B^T. Writes z = x A^T too, where there is one."""
    tensors = y, x, A.contiguous(), B.contiguous(), x if z is None else z
    _launch(_forward, tensors, len(x), A, B, len(B), *settings, HAS_Z=z is not None)


def _run_backward(
    grad_x: torch.Tensor | None,
    grad_y: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    z: torch.Tensor,
    scaled_h: torch.Tensor,
    grad_z: torch.Tensor,
    *settings: float | str,
) -> None:
    """Writes s h, grad_z and, where there is one, grad_x."""
    tensors = grad_y if grad_x is None else grad_x, grad_y, A.contiguous(), B.contiguous(), z, scaled_h, grad_z
    columns = 1 if grad_x is None else A.shape[1]
    _launch(_backward, tensors, len(z), A, B, columns, *settings, HAS_GRAD_X=grad_x is not None)


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[torch.Tensor, ...],
    N: int,
    A: torch.Tensor,
    B: torch.Tensor,
    columns: int,
    scaling: float,
    gate: str,
    p: float,
    seed: int,
    **flags: bool,
) -> None:
    """Runs a kernel over N rows, whose programs share so many columns that it writes."""
    (r, d_in), d_out = A.shape, len(B)
    tiles = tiling(r, A.element_size())
    blocks, most = triton.cdiv(N, ROWS), triton.cdiv(columns, tiles["COLUMNS"])
    share = triton.cdiv(most, max(1, PROGRAMS // max(1, blocks))) * tiles["COLUMNS"]
    with torch.cuda.device_of(A):  # Triton launches on the current device, wherever the tensors are
        kernel[(blocks, triton.cdiv(columns, share))](
            *tensors, N, d_in, d_out, r, share, scaling, seed, p=p, GATE=gate, **flags, **tiles
        )


# Without `do_not_specialize`, a number of rows or a seed that 16 divides would have the kernel compiled once more.
@triton.jit(do_not_specialize=["N", "seed"])
def _forward(
    y_ptr, x_ptr, A_ptr, B_ptr, z_ptr, N, d_in, d_out, r, share, scaling, seed,
    p: tl.constexpr, GATE: tl.constexpr, HAS_Z: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, places, is_inside = _block(N, r, R, ROWS)
    z = _shrink(x_ptr, A_ptr, rows, N, d_in, r, d_in, 1, R, ROWS, COLUMNS).to(x_ptr.dtype.element_ty)
    if HAS_Z:
        tl.store(z_ptr + places, z, mask=is_inside)
    h, _ = _gate(z.to(tl.float32), GATE)
    h = (h * _kept(seed, places, p)).to(z.dtype)
    _expand(y_ptr, h, B_ptr, rows, N, d_out, r, 1, r, share, scaling, True, R, COLUMNS)


@triton.jit(do_not_specialize=["N", "seed"])
def _backward(
    grad_x_ptr, grad_y_ptr, A_ptr, B_ptr, z_ptr, h_ptr, grad_z_ptr, N, d_in, d_out, r, share, scaling, seed,
    p: tl.constexpr, GATE: tl.constexpr, HAS_GRAD_X: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, places, is_inside = _block(N, r, R, ROWS)
    grad_h = scaling * _shrink(grad_y_ptr, B_ptr, rows, N, d_out, r, 1, r, R, ROWS, COLUMNS)
    z = tl.load(z_ptr + places, mask=is_inside, other=0.0)
    h, slope = _gate(z.to(tl.float32), GATE)
    kept = _kept(seed, places, p)
    grad_z = (grad_h * kept * slope).to(z.dtype)
    tl.store(h_ptr + places, scaling * h * kept, mask=is_inside)
    tl.store(grad_z_ptr + places, grad_z, mask=is_inside)
    if HAS_GRAD_X:
        _expand(grad_x_ptr, grad_z, A_ptr, rows, N, d_in, r, d_in, 1, share, 1.0, False, R, COLUMNS)


@triton.jit
def _block(N, r, R: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows, [ROWS, 1], the places of their units in [N, r], and which of these there are."""
    rows, units = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, R)[None, :]
    return rows, rows * r + units, (rows < N) & (units < r)


@triton.jit
def _shrink(
    x_ptr, W_ptr, rows, N, d, r, stride_r, stride_d,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x W^T in float32, [ROWS, d] -> [ROWS, R]. W: [r, d], at these strides."""
    units, total = tl.arange(0, R)[None, :], tl.zeros((ROWS, R), tl.float32)
    for first in range(0, d, COLUMNS):
        across, down = first + tl.arange(0, COLUMNS)[None, :], first + tl.arange(0, COLUMNS)[:, None]
        x = tl.load(x_ptr + rows.to(tl.int64) * d + across, mask=(rows < N) & (across < d), other=0.0)
        W = tl.load(W_ptr + units * stride_r + down * stride_d, mask=(units < r) & (down < d), other=0.0)
        total = tl.dot(x, W, total, input_precision="ieee")
    return total


@triton.jit
def _expand(
    y_ptr, h, W_ptr, rows, N, d, r, stride_r, stride_d, share, scaling, ADDS: tl.constexpr,
    R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = s h W, or y += s h W: [ROWS, R] -> this program's share of [ROWS, d]. W: [r, d], at these strides."""
    units, start = tl.arange(0, R)[:, None], tl.program_id(1) * share
    # `num_stages` here has the old y fetched ahead too, which takes no part in a product.
    for first in tl.range(start, min(start + share, d), COLUMNS, num_stages=3):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        W = tl.load(W_ptr + units * stride_r + columns * stride_d, mask=(units < r) & (columns < d), other=0.0)
        places, is_inside = y_ptr + rows.to(tl.int64) * d + columns, (rows < N) & (columns < d)
        y = scaling * tl.dot(h, W, input_precision="ieee")
        if ADDS:
            y += tl.load(places, mask=is_inside, other=0.0)
        tl.store(places, y, mask=is_inside)
