"""A run's plan, made once for runs that differ in seed or learning rate. Making it imports
torch."""

from dataclasses import replace

from cera_train.common.libraries import heavy_imports
from cera_train.common.settings import require
from cera_train.planning.plan import RunPlan
from cera_train.settings.run import PlanRun
from cera_train.settings.training import ObjectiveKind
from cera_train.training.rewards import import_reward

PLANS: dict[str, RunPlan] = {}
"""Plans of this process by what they depend on: runs that differ in seed or learning rate have one
plan."""


def make_plan(config: PlanRun) -> RunPlan:
    """Plans a run. Raises UserError where it cannot be planned, or the run would refuse it."""
    require(
        config.plan.on_gpu or config.plan.gpus == 1,
        f"plan.gpus={config.plan.gpus} with plan.gpu=cpu: there is one CPU, and a run takes "
        "all its threads. Leave plan.gpus at 1.",
    )
    if config.train.objective == ObjectiveKind.grpo:
        for path in config.grpo.rewards:  # which nothing else of a plan reads
            import_reward(path)
    train = replace(config.train, seed=0)
    sections = [config.model, config.adapter, config.data, train, config.work, config.grpo]
    key = repr([*sections, config.optimizer.kind, config.distributed, config.plan])
    if key not in PLANS:
        with heavy_imports():
            from cera_train.planning.estimate import estimate

        PLANS[key] = estimate(config)
    return replace(PLANS[key], config=replace(config, model=PLANS[key].config.model))
