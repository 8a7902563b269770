"""One forward and backward pass of a layer of experts: CeRA against PEFT's LoRA on the same parameters.

`python -m benchmarks.experts` measures both in turn, with the same weights, tokens and routing, and prints how many
times as long as LoRA's pass CeRA's takes. Set OMP_NUM_THREADS=1 on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.targets import Target, print_targets, ratios
from cera_train.cera import CeraConfig

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
BOUND = 1.25
ROUND_S = 0.1
"""Seconds of a contestant's turn at least: shorter passes are repeated."""


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    tokens: int
    r: int


SHAPES = [
    Shape("tiny", 64, 96, 8, 2, tokens=256, r=8),
    Shape("tiny, many", 64, 32, 64, 8, tokens=256, r=8),
    Shape("medium", 512, 768, 8, 2, tokens=2048, r=16),
    Shape("medium, many", 512, 256, 32, 4, tokens=1024, r=16),
    Shape("medium, few tokens", 512, 768, 8, 2, tokens=128, r=16),
]


class Layer(nn.Module):
    """What PEFT wants around the experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_local_experts=shape.experts
        )
        config._experts_implementation = "grouped_mm"  # transformers' choice
        self.experts = MixtralExperts(config)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(x, index, weights)


def contestants(shape: Shape) -> dict[str, nn.Module]:
    r, targets = shape.r, {"target_modules": [], "target_parameters": PARAMETERS}
    configs = {
        "LoRA": LoraConfig(r=r, lora_alpha=r, **targets),
        "CeRA": CeraConfig(r=r, dropout=0.1, **targets),
        "CeRA without dropout": CeraConfig(r=r, dropout=0.0, **targets),
    }
    return {name: get_peft_model(Layer(shape), config).train() for name, config in configs.items()}


def race(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of a pass by contestant, one for each round. They take turns, and each round begins with another."""
    models = contestants(shape)
    x = torch.randn(shape.tokens, shape.hidden, requires_grad=True)
    index = torch.stack([torch.randperm(shape.experts)[: shape.experts_per_token] for _ in range(shape.tokens)])
    weights = torch.rand(index.shape)

    def seconds_of(model: nn.Module, passes: int) -> float:
        started = time.perf_counter()
        for _ in range(passes):
            model(x, index, weights).square().mean().backward()
            model.zero_grad()
            x.grad = None
        return (time.perf_counter() - started) / passes

    for model in models.values():
        seconds_of(model, 2)  # a warm-up
    passes = max(1, round(ROUND_S / min(seconds_of(model, 2) for model in models.values())))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds):
        names = list(models)
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            seconds[name].append(seconds_of(models[name], passes))
    return seconds


def measure(rounds: int) -> tuple[list[Target], dict[str, Any]]:
    """The targets, and the seconds behind them by shape and contestant."""
    torch.manual_seed(0)
    found = {shape.name: race(shape, rounds) for shape in SHAPES}
    targets = [
        Target(f"{name} / LoRA, {shape}", ratios(seconds[name], seconds["LoRA"]), BOUND, is_least=False)
        for shape, seconds in found.items()
        for name in ("CeRA", "CeRA without dropout")
    ]
    return targets, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    print_targets(measure(parser.parse_args().rounds)[0])


if __name__ == "__main__":
    main()
