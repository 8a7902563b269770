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


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    tokens: int
    r: int
    dtype: torch.dtype = torch.float32


SHAPES = [
    Shape("tiny", 64, 96, 8, 2, tokens=256, r=8),
    Shape("tiny, many experts", 64, 32, 64, 8, tokens=256, r=8),
    Shape("medium", 512, 768, 8, 2, tokens=2048, r=16),
    Shape("medium, many experts", 512, 256, 32, 4, tokens=1024, r=16),
    Shape("medium, one sequence", 512, 768, 8, 2, tokens=128, r=16),
]


class Layer(nn.Module):
    """What PEFT wants around the experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_local_experts=shape.experts
        )
        config._experts_implementation = "grouped_mm"  # transformers' choice
        self.experts = MixtralExperts(config).to(shape.dtype)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(x, index, weights)


def contestants(shape: Shape) -> dict[str, nn.Module]:
    r, targets = shape.r, {"target_modules": [], "target_parameters": PARAMETERS}
    configs = {
        "lora": LoraConfig(r=r, lora_alpha=r, **targets),
        "cera": CeraConfig(r=r, dropout=0.1, **targets),
        "cera without dropout": CeraConfig(r=r, dropout=0.0, **targets),
    }
    return {name: get_peft_model(Layer(shape), config).train() for name, config in configs.items()}


def race(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of a pass by contestant, one for each round. They take turns, and each round begins with another."""
    models = contestants(shape)
    x = torch.randn(shape.tokens, shape.hidden, dtype=shape.dtype, requires_grad=True)
    index = torch.stack([torch.randperm(shape.experts)[: shape.experts_per_token] for _ in range(shape.tokens)])
    weights = torch.rand(index.shape, dtype=shape.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-2, rounds):  # two for warming up
        names = list(models)
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            started = time.perf_counter()
            models[name](x, index, weights).square().mean().backward()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
            models[name].zero_grad()
            x.grad = None
    return seconds


def measure(rounds: int) -> tuple[list[Target], dict[str, Any]]:
    """The targets, and the seconds behind them by shape and contestant."""
    torch.manual_seed(0)
    found = {shape.name: race(shape, rounds) for shape in SHAPES}
    targets = [
        Target(f"{name} / LoRA, experts, {shape}", ratios(seconds[name], seconds["lora"]), BOUND, is_least=False)
        for shape, seconds in found.items()
        for name in ("cera", "cera without dropout")
    ]
    return targets, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    print_targets(measure(parser.parse_args().rounds)[0])


if __name__ == "__main__":
    main()
