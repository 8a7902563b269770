"""CeRA's branch by four ways on a GPU, with dropout: one fused Triton kernel each way, Triton for gate and dropout
alone, torch, torch.compile. The shapes are those of Llama-3.1-8B and 3.2-1B.

    python -m benchmarks.kernels                                            # all, in a few minutes
    python -m benchmarks.kernels --shapes "Llama-3.1-8B q_proj" --ranks 64 --ways fused unfused

From Python, `race(shape, r)` measures one shape (seconds, and a minute where torch.compile compiles) and
`markdown(rows)` makes a table of what several calls returned:

    rows = [row for shape in SHAPES for r in RANKS for row in race(shape, r)]
    print(markdown(rows))

`race` first holds the fused branch and its gradients to the unfused ones, which draw the same mask, and raises
AssertionError where they differ by more than rounding. Without a GPU it needs TRITON_INTERPRET=1, and float32 or
float16: that tests this file, and measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cera_train.cera.branch import add_branch
from cera_train.cera.hidden import hidden_by_torch

SCALING, P, SEED = 2.0, 0.1, 12345
RANKS = (16, 64)
TOKENS = 8192
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    name: str
    d_in: int
    d_out: int


SHAPES = [
    Shape("Llama-3.1-8B q_proj", 4096, 4096),
    Shape("Llama-3.1-8B v_proj", 4096, 1024),
    Shape("Llama-3.2-1B q_proj", 2048, 2048),
    Shape("Llama-3.2-1B v_proj", 2048, 512),
]


@dataclass(frozen=True)
class Row:
    """What one way takes for one pass."""

    shape: str
    r: int
    pass_name: str
    way: str
    milliseconds: float
    gigabytes_per_second: float
    """Of the least bytes that a pass can move, whatever this way moves."""
    teraflops_per_second: float


Way = Callable[..., torch.Tensor]
"""(y, x, A, B) -> y with the branch."""


def ways(names: Sequence[str]) -> dict[str, Way]:
    """The ways by name: these, and those that `check` compares."""
    # Here, so that the help and the names need no Triton.
    from cera_train.cera import fused, kernels

    gate = nn.SiLU()
    by_kernels = functools.partial(kernels.hidden, gate=gate, p=P, seed=SEED)
    by_torch = functools.partial(hidden_by_torch, gate=gate, p=P, seed=SEED)

    def plain(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        h = nn.functional.dropout(nn.functional.silu(x @ A.T), P)
        return torch.addmm(y, h, B.T, alpha=SCALING)

    found = {
        "fused": lambda *tensors: fused.add_branch(*tensors, SCALING, gate, P, SEED),
        "unfused": lambda *tensors: add_branch(*tensors, SCALING, by_kernels),
        "torch": lambda *tensors: add_branch(*tensors, SCALING, by_torch),
    }
    if "torch.compile" in names:
        torch.compiler.reset()  # torch keeps eight variants of a function, and runs the ninth uncompiled
        found["torch.compile"] = torch.compile(plain, dynamic=False)
    return found


WAYS = ("fused", "unfused", "torch", "torch.compile")


def race(
    shape: Shape,
    r: int,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
    names: Sequence[str] = WAYS,
    rounds: int = 5,
    repeats: int = 50,
) -> list[Row]:
    """The median of so many rounds, in which the ways take turns; each turn is so many passes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    y, grad_y = (torch.randn(tokens, shape.d_out, device=device).to(dtype) for _ in range(2))
    x = torch.randn(tokens, shape.d_in, device=device).to(dtype).requires_grad_()
    A, B = (
        torch.randn(size, device=device).mul(size[1] ** -0.5).to(dtype).requires_grad_()
        for size in ((r, shape.d_in), (shape.d_out, r))
    )

    def forward(way: Way) -> None:
        with torch.no_grad():
            way(y, x, A, B)

    def forward_and_backward(way: Way) -> None:
        torch.autograd.grad(way(y.detach(), x, A, B), (x, A, B), grad_y)  # y itself would get a graph, ever longer

    all_ways = ways(names)
    check(all_ways, y, (x, A, B), grad_y)
    rows = []
    for pass_name, run in (("forward", forward), ("forward and backward", forward_and_backward)):
        calls = {name: functools.partial(run, all_ways[name]) for name in names}
        for call in calls.values():
            milliseconds(call, 3)  # compiles, and warms up
        times = [{name: milliseconds(call, repeats) for name, call in calls.items()} for _ in range(rounds)]
        for name in names:
            taken = statistics.median(each[name] for each in times)
            gigabytes, teraflops = work(shape, r, tokens, dtype.itemsize, pass_name)
            row = Row(shape.name, r, pass_name, name, taken, gigabytes / taken * 1e3, teraflops / taken * 1e3)
            rows.append(row)
    return rows


def check(all_ways: dict[str, Way], y: torch.Tensor, inputs: tuple[torch.Tensor, ...], grad_y: torch.Tensor) -> None:
    """Raises AssertionError where the fused branch is not the unfused one, up to a few roundings."""
    found = []
    for name in ("fused", "unfused"):
        result = all_ways[name](y.clone(), *inputs)
        found.append((result.detach(), *torch.autograd.grad(result, inputs, grad_y)))
    for name, one, other in zip(("result", "grad_x", "grad_A", "grad_B"), *found, strict=True):
        difference = ((one.double() - other.double()).norm() / other.double().norm()).item()
        assert difference <= 4 * torch.finfo(y.dtype).eps, f"{name} of the fused branch is {difference:.2g} off"


def work(shape: Shape, r: int, tokens: int, itemsize: int, pass_name: str) -> tuple[float, float]:
    """The least GB of a pass, each wide tensor once, and its TFLOP."""
    d_in, d_out = shape.d_in, shape.d_out
    numbers, products = d_in + 2 * d_out, 2  # reads x and y, writes y
    if pass_name != "forward":
        numbers, products = numbers + 2 * d_in + d_out, 6  # reads grad_y and x, writes grad_x
    return tokens * numbers * itemsize / 1e9, products * tokens * r * (d_in + d_out) / 1e12


def milliseconds(call: Callable[[], None], repeats: int) -> float:
    """The mean of so many calls, launches included."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) / repeats * 1e3
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started.record()
    for _ in range(repeats):
        call()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended) / repeats


def markdown(rows: Sequence[Row]) -> str:
    """A table with a line for each shape, rank and pass: milliseconds of each way, GB/s and TFLOP/s of the first."""
    names = list(dict.fromkeys(row.way for row in rows))
    lines = [f"| projection | r | pass | {' | '.join(f'{name}, ms' for name in names)} | {names[0]}, GB/s | TFLOP/s |"]
    lines.append("|" + "---|" * (len(names) + 5))
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.shape, row.r, row.pass_name), []).append(row)
    for (shape, r, pass_name), group in groups.items():
        times, first = [f"{row.milliseconds:.3f}" for row in group], group[0]
        speeds = f"{first.gigabytes_per_second:,.0f} | {first.teraflops_per_second:.1f}"
        lines.append(f"| {shape} | {r} | {pass_name} | {' | '.join(times)} | {speeds} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES])
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=50)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        import triton

        if not triton.knobs.runtime.interpret:
            parser.error("these kernels need a GPU; TRITON_INTERPRET=1 runs them without one, and measures nothing.")
    rows = []
    for shape in (shape for shape in SHAPES if shape.name in chosen.shapes):
        for r in chosen.ranks:
            sizes = chosen.tokens, DTYPES[chosen.dtype], chosen.ways, chosen.rounds, chosen.repeats
            rows += race(shape, r, *sizes)
    print(markdown(rows))


if __name__ == "__main__":
    main()
