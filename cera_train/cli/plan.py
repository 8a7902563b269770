"""`cera-plan`: what a run would need, or with -m the runs of a sweep."""

from __future__ import annotations

import functools
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from cera_train.cli.start import (
    announce_imports,
    check_trust,
    errors_in_one_line,
    start_hydra,
    to_config,
    without_hydra,
)
from cera_train.planning.plan import make_plan
from cera_train.planning.table import name_jobs, print_plan, print_plans
from cera_train.settings.run import PlanRun
from cera_train.study.design import StudySweeper
from cera_train.study.plan import plan_study
from cera_train.sweep.grid import grid, job_composer

PLAN = "cera-plan"


def main() -> None:
    plans = []

    def plan(composed: DictConfig) -> None:
        """Prints the plan of a run; keeps that of a sweep's job, which Hydra makes one after the other."""
        check_trust(composed, HydraConfig.get().overrides.task)
        config = to_config(composed, PlanRun)
        announce_imports()
        plans.append(make_plan(config))
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            print_plan(plans.pop())

    start_hydra(PLAN, plan, {"StudySweeper": PlannedStudy})
    if plans:
        print_plans("job", name_jobs(plans))


class PlanSweep(Callback):
    """Hydra's hook at the start of a sweep. conf/plan.yaml names it."""

    @errors_in_one_line(PLAN)
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        grid(config)  # refuses what a grid cannot hold


class PlannedStudy(StudySweeper):
    """Stands in the place of the sweeper of a study: plans its runs instead of running them."""

    def sweep(self, arguments: list[str]) -> None:
        announce_imports()
        plan_study(self.config, job_composer(self.config, functools.partial(without_hydra, schema=PlanRun)))
