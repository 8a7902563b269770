"""Schedules against their formulas; the optimizers of a config are those it names."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from conftest import make_tiny_llama

from cera_train.adapters.build import build, parameter_groups
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.training import OptimizerConfig, OptimizerKind, Schedule
from cera_train.training.optimizer import build_optimizer, learning_rate, set_learning_rate


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


# --- LoRA+ -----------------------------------------------------------------------------------------------------------


def groups_of(config: AdapterConfig):
    model = build(make_tiny_llama().requires_grad_(False), config)
    return model, parameter_groups(model, config)


@pytest.mark.parametrize("kind", [AdapterKind.lora, AdapterKind.dora, AdapterKind.cera])
def test_b_learns_faster_than_the_rest_by_its_ratio(kind):
    model, groups = groups_of(AdapterConfig(kind, 4, b_lr_ratio=16))
    B = {id(parameter) for name, parameter in model.named_parameters() if "lora_B" in name or "cera_B" in name}
    optimizer = build_optimizer(groups, OptimizerConfig(lr=1e-3), torch.device("cpu"))
    rest, fast = optimizer.param_groups
    assert {id(parameter) for parameter in fast["params"]} == B
    assert not {id(parameter) for parameter in rest["params"]} & B
    assert (rest["lr"], fast["lr"]) == (1e-3, pytest.approx(16e-3))
    set_learning_rate(optimizer, 5e-4)  # as the schedule does
    assert (rest["lr"], fast["lr"]) == (5e-4, pytest.approx(8e-3))
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
