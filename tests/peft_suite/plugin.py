"""A pytest plugin that runs PEFT's parametrised tests on CeRA alone.

In every list of configs that has LoRA's, CeRA's take the place of all. `failures.txt` lists the
tests that fail, each group with its reason: an unlisted failure fails, and so does a listed test
that passes.
"""

import contextlib
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest

from cera_train.cera import CeraConfig

VARIED = {
    "init": "kaiming_uniform",
    "dropout_on": "input",
    "mix": "learned",
    "alpha": 16,
    "use_rslora": True,
}
ROWS = {
    ("config_cls", "config_kwargs"): {
        "cera": {"r": 8, "dropout": 0.05},
        "cera-varied": VARIED | {"r": 8, "dropout": 0.05},
        "cera-tokens": {"r": 8, "trainable_token_indices": [0, 1, 3]},
    },
    ("test_name", "model_id", "config_cls", "config_kwargs"): {
        "cera-4": ("MLP", {"target_modules": ["lin0", "lin1"]}),
        "cera-5": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        "cera-7": (
            "MLP",
            {
                "target_modules": ["lin0", "lin1"],
                "rank_pattern": {"lin1": 2},
                "alpha_pattern": {"lin1": 4},
            },
        ),
        "cera-varied": ("MLP", {"target_modules": ["lin0", "lin1"]} | VARIED),
        "cera-conv1d": ("EmbConv1D", {"target_modules": ["conv1d"]}),
        "cera-tokens": (
            "EmbConv1D",
            {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
        ),
        "cera-norm": ("MLP_LayerNorm", {"target_modules": ["lin0"]}),
    },
}
"""Parameters of a test -> the rows that CeRA has there."""

TWICE = {
    "cera-same": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    "cera-different": ({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    "cera-tokens": (
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
}


def pytest_configure() -> None:
    """Stands in for diffusers, of which the tests that run here use one name, in an isinstance."""
    if importlib.util.find_spec("diffusers") is None:
        diffusers = types.ModuleType("diffusers")
        diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = diffusers


def pytest_collectstart(collector: pytest.Collector) -> None:
    """The models are there already: nothing goes online for the first use of a name."""
    from peft_tests import testing_utils

    testing_utils.hub_online_once = lambda model_id: contextlib.nullcontext()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0]
        rows = mark.args[1]
        names = (
            tuple(name.strip() for name in names.split(","))
            if isinstance(names, str)
            else tuple(names)
        )
        if {"config_cls", "config_class", "config"} & {*names} and is_for_lora(rows):
            object.__setattr__(mark, "args", (mark.args[0], cera_rows(names, rows)))
            mark.kwargs.pop("ids", None)  # those of the rows that are replaced


def is_for_lora(rows: Iterable) -> bool:
    """Whether LoRA's config is in one of the rows: its class, or an instance."""
    values = []
    for row in rows:
        values += row if isinstance(row, tuple | list) else [row]
    return peft.LoraConfig in values or any(type(value) is peft.LoraConfig for value in values)


def cera_rows(names: tuple[str, ...], rows: Sequence) -> list:
    """CeRA's rows for a test of these parameters; none for one that is not known here."""
    if names == ("config_cls",):
        return [CeraConfig]
    if names == ("config_class", "mandatory_kwargs"):
        return [pytest.param(CeraConfig, {}, id="cera")]
    if names == ("config",):
        return [
            pytest.param(CeraConfig(), id="cera"),
            pytest.param(CeraConfig(**VARIED), id="cera-varied"),
        ]
    if names == ("config_cls", "config_kwargs"):
        task = {"task_type": rows[0][1]["task_type"], "target_modules": None}
        return [
            pytest.param(CeraConfig, task | settings, id=id) for id, settings in ROWS[names].items()
        ]
    if names in ROWS:
        return [
            pytest.param(id, model, CeraConfig, settings, id=id)
            for id, (model, settings) in ROWS[names].items()
        ]
    if names[-2:] == ("config_kwargs_1", "config_kwargs_2"):
        start = {"init_weights": False}
        return [
            pytest.param(*row_start(names, id), start | one, start | other, id=id)
            for id, (one, other) in TWICE.items()
        ]
    return []


def row_start(names: tuple[str, ...], id: str) -> tuple[Any, ...]:
    values = {
        "test_name": id,
        "config_cls": CeraConfig,
        "tuner_method": "lora+trainable_tokens"
        if "tokens" in id
        else "cera",  # the test chooses its model by it
    }
    return tuple(values[name] for name in names[:-2])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if is_for_cera(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(ours)])
    items[:] = ours
    for pattern, reason in listed_failures():
        for item in ours:
            if pattern.fullmatch(item.nodeid.removeprefix("peft_tests/")):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


def is_for_cera(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    return any(value is CeraConfig or isinstance(value, CeraConfig) for value in parameters)


def listed_failures() -> list[tuple[re.Pattern, str]]:
    """Patterns of node ids, `*` for anything, each with the reason: the last line before it that
    starts with `#`."""
    failures = []
    reason = ""
    for line in (Path(__file__).parent / "failures.txt").read_text().splitlines():
        if line.startswith("#"):
            reason = line.removeprefix("#").strip()
        elif line.strip():
            failures.append(
                (re.compile(".*".join(map(re.escape, line.strip().split("*")))), reason)
            )
    return failures
