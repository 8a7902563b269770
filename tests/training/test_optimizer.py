"""Schedules follow their formulas, and a config gets the optimizer that it names."""

import pytest
import torch
from conftest import make_tiny_llama
from moe_models import make_mixture
from peft.optimizers import create_loraplus_optimizer
from transformers import Qwen2Config

from cera_train.adapters.build import build, parameter_groups
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.training import ObjectiveKind, OptimizerConfig, Schedule
from cera_train.training.optimizer import (
    auto_rate,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)


def rates(schedule: Schedule, warmup_ratio: float) -> list[float]:
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_ratio=warmup_ratio)
    return [learning_rate(config, update, 10) for update in range(11)]


def test_a_constant_rate_rises_to_its_peak_in_equal_steps():
    assert rates(Schedule.constant, 0.0) == [2.0] * 11
    assert rates(Schedule.constant, 0.4) == pytest.approx([0.5, 1.0, 1.5] + [2.0] * 8)


@pytest.mark.parametrize(
    ("schedule", "quarter"), [(Schedule.linear, 1.5), (Schedule.cosine, 1 + 2**-0.5)]
)
def test_decay_starts_at_the_peak_and_would_reach_zero_after_the_last_update(schedule, quarter):
    decay = rates(schedule, 0.2)[2:]
    assert decay[::2] == pytest.approx([2.0, quarter, 1.0, 2 - quarter, 0.0])
    assert decay == sorted(decay, reverse=True)


def test_b_learns_faster_than_the_rest_by_its_ratio():
    config = AdapterConfig("cera", 4, b_lr_ratio=16, experts=True)
    model = build(make_mixture().requires_grad_(False), config)
    B = {id(parameter) for name, parameter in model.named_parameters() if "cera_B" in name}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    optimizer = build_optimizer(
        parameter_groups(model, config), OptimizerConfig(lr=1e-3), torch.device("cpu")
    )
    rest, fast = optimizer.param_groups
    assert {id(parameter) for parameter in fast["params"]} == B
    assert {id(parameter) for parameter in rest["params"]} == trained - B
    assert (rest["lr"], fast["lr"]) == (1e-3, pytest.approx(16e-3))
    set_learning_rate(optimizer, 5e-4)  # as the schedule does
    assert (rest["lr"], fast["lr"]) == (5e-4, pytest.approx(8e-3))


def test_the_parts_that_learn_faster_are_those_of_pefts_loraplus():
    targets = ["q_proj", "embed_tokens"]
    config = AdapterConfig("dora", 4, target_modules=targets, b_lr_ratio=16)
    model = build(make_tiny_llama().requires_grad_(False), config)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    ours = parameter_groups(model, config)

    def fast(groups, rate: str, highest: float) -> set[int]:
        return {id(weight) for each in groups if each[rate] == highest for weight in each["params"]}

    assert fast(ours, "lr_ratio", 16) == fast(theirs.param_groups, "lr", 16e-3)


@pytest.mark.parametrize(
    ("words", "factor"),
    [
        ("adapter=loraplus", 1 / 4),
        ("adapter=cera", 2),
        ("adapter=full", 1 / 10),
    ],
)
def test_the_automatic_rate_is_the_formula_times_the_adapters_factor(
    compose, tiny_folder, words, factor
):
    config = compose(f"model.path={tiny_folder}", words)
    choice = auto_rate(config.model, config.adapter, ObjectiveKind.sft)
    assert choice.value == pytest.approx(7.5e-4 * (2000 / 32) ** 0.781 * factor, rel=0.05)
    assert f"x {factor:g} for " in choice.why
    assert auto_rate(config.model, config.adapter, ObjectiveKind.grpo).value == pytest.approx(
        choice.value / 10, rel=0.05
    )


def test_the_automatic_rate_of_qwen_and_of_a_method_without_a_factor(compose, tmp_path):
    Qwen2Config(hidden_size=5120, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    config = compose(f"model.path={tmp_path}", "adapter=hira")
    choice = auto_rate(config.model, config.adapter, ObjectiveKind.sft)
    assert choice.value == 7e-4
    assert choice.why.endswith("7.5e-4 (2000 / 5120)^0.0775, LoRA's: no factor is known for HiRA")
