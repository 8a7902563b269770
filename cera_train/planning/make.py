"""Makes the plan of a run. Facts give the size of the data, or it is refused, before torch is
imported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.libraries import heavy_imports
from cera_train.common.settings import require
from cera_train.planning.data_size import check_prompts, count_problems, data_size, takes_tokenizer
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


def tokenizer_of(config: PlanRun) -> Any:
    """The model's tokenizer if it counts the rows, else None. Raises UserError where it is
    missing."""
    if config.plan.tokens_per_row is not None or not takes_tokenizer(config.data):
        return None
    with heavy_imports():
        from cera_train.model.folder import load_tokenizer

    folder = Path(config.model.path)
    use = f"which counts the tokens of {config.data.title}"
    # transformers makes an empty tokenizer of some folders without one.
    require(
        not folder.is_dir() or any(folder.glob("tokenizer*")),
        f"model.path={folder}: the folder has no tokenizer, {use}. Copy it there, or set "
        "plan.tokens_per_row.",
    )
    try:
        return load_tokenizer(config.model)
    except UserError as error:
        raise UserError(f"{error} Or set plan.tokens_per_row for the tokenizer, {use}.") from error


def _plan(config: PlanRun, is_alone: bool) -> RunPlan:
    require(
        config.plan.on_gpu or config.plan.gpus == 1,
        f"plan.gpus={config.plan.gpus} with plan.gpu=cpu: there is one CPU, and a run takes "
        "all its threads. Leave plan.gpus at 1.",
    )
    check_prompts(config.data)
    tokenizer = tokenizer_of(config)
    data = data_size(config.data, config.plan.tokens_per_row, tokenizer, config.asks)
    problems = {name: count_problems(name, config, data) for name in config.train.tasks}
    with heavy_imports():
        from cera_train.planning.estimate import estimate

    return estimate(config, data, problems, is_alone)
