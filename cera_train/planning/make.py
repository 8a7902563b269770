"""Makes the plan of a run. The size of the data is known, or refused, before torch is imported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cera_train.common.libraries import heavy_imports
from cera_train.common.settings import require
from cera_train.data.chats import may_use_template
from cera_train.model.path import PYPI
from cera_train.planning.data_size import check_prompts, count_problems, data_size
from cera_train.planning.plan import RunPlan
from cera_train.settings.run import PlanRun

PLANS: dict[str, RunPlan] = {}
"""Plans of this process by what they depend on: runs that differ in seed or learning rate have one
plan."""


def make_plan(config: PlanRun, is_alone: bool = False) -> RunPlan:
    """Plans a run. Raises UserError where it cannot be planned.

    Args:
        is_alone: also plans a full micro-batch, by a second dry run.
    """
    train = replace(config.train, seed=0)
    sections = [config.model, config.adapter, config.data, train, config.work]
    key = repr([*sections, config.optimizer.kind, config.distributed, config.plan, is_alone])
    if key not in PLANS:
        PLANS[key] = _plan(config, is_alone)
    return replace(PLANS[key], config=replace(config, model=PLANS[key].config.model))


def tokenizer_at_hand(config: PlanRun) -> Any:
    """The tokenizer of a model on this disk, if a chat template may write the rows. None where the
    folder has only a config.json."""
    path = config.model.path
    has_chats = any(may_use_template(part) for _, part in config.data.parts())
    has_tokenizer = path.startswith(PYPI) or any(Path(path).glob("tokenizer*"))
    if not (has_chats and has_tokenizer):
        return None
    with heavy_imports():
        from cera_train.model.folder import load_tokenizer

    return load_tokenizer(config.model)


def _plan(config: PlanRun, is_alone: bool) -> RunPlan:
    require(
        config.plan.on_gpu or config.plan.gpus == 1,
        f"plan.gpus={config.plan.gpus} with plan.gpu=cpu: there is one CPU, and a run takes "
        "all its threads. Leave plan.gpus at 1.",
    )
    check_prompts(config.data)
    tokenizer = tokenizer_at_hand(config)
    data = data_size(config.data, config.plan.tokens_per_row, tokenizer, config.asks)
    problems = {name: count_problems(name, config, data) for name in config.train.tasks}
    with heavy_imports():
        from cera_train.planning.estimate import estimate

    return estimate(config, data, problems, is_alone)
