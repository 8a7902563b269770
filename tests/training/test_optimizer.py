"""Schedules against their formulas; the optimizers of a config are those it names."""

from __future__ import annotations

import math

import bitsandbytes
import pytest
import torch

from cera_train.training.config import OptimizerConfig, OptimizerKind, Schedule
from cera_train.training.optimizer import build_optimizer, learning_rate


def test_constant_without_warmup_is_constant():
    config = OptimizerConfig(lr=2.0)
    assert {learning_rate(config, update, 10) for update in range(10)} == {2.0}


def test_warmup_rises_to_the_peak_in_equal_steps():
    config = OptimizerConfig(lr=2.0, warmup_ratio=0.4)
    assert [learning_rate(config, update, 10) for update in range(6)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("schedule", [Schedule.linear, Schedule.cosine])
def test_decay_starts_at_the_peak_and_would_reach_zero_after_the_last_update(schedule):
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_ratio=0.2)
    rates = [learning_rate(config, update, 10) for update in range(11)]
    assert rates[2] == 2.0
    assert rates[10] == pytest.approx(0)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_cosine_halves_half_way():
    config = OptimizerConfig(lr=2.0, schedule=Schedule.cosine)
    assert learning_rate(config, 5, 10) == pytest.approx(1.0)
    assert learning_rate(config, 2, 10) == pytest.approx(1 + math.cos(math.pi * 0.2))


def parameters():
    return [torch.nn.Parameter(torch.ones(128, 128))]


def test_adamw_is_pytorchs_with_the_settings_of_the_config():
    config = OptimizerConfig(lr=2.0, weight_decay=0.5, beta1=0.8, beta2=0.7, eps=1e-3)
    optimizer = build_optimizer(parameters(), config, torch.device("cpu"))
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (2.0, 0.5, (0.8, 0.7), 1e-3)


def test_adamw_8bit_keeps_8_bit_moments_and_steps_on_a_cpu():
    weights = parameters()
    optimizer = build_optimizer(weights, OptimizerConfig(kind=OptimizerKind.adamw_8bit), torch.device("cpu"))
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    weights[0].square().sum().backward()
    optimizer.step()
    assert optimizer.state[weights[0]]["state1"].dtype == torch.uint8
    assert (weights[0] < 1).all()


def test_paged_adamw_is_refused_where_there_is_no_gpu_memory_to_page():
    with pytest.raises(ValueError, match="use optimizer=adamw_8bit"):
        build_optimizer(parameters(), OptimizerConfig(kind=OptimizerKind.paged_adamw_8bit), torch.device("cpu"))
