"""`cera-plan`: what a run would need, or with -m the runs of a sweep."""

from __future__ import annotations

import functools
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from cera_train.cli.start import announce_imports, errors_in_one_line, start_hydra, to_config, without_hydra
from cera_train.settings.run import PlanRun
from cera_train.study.design import StudySweeper
from cera_train.sweep.grid import grid, job_composer

PLAN = "cera-plan"


def main() -> None:
    start_hydra(PLAN, plan, {"StudySweeper": PlannedStudy})


def plan(composed: DictConfig) -> Any:
    """Prints one plan. In a sweep, returns the plan of one job to `PlanSweep`."""
    config = to_config(composed, PlanRun)
    announce_imports()
    from cera_train.planning.plan import make_plan
    from cera_train.planning.table import print_plan

    run_plan = make_plan(config)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_plan
    print_plan(run_plan)


class PlanSweep(Callback):
    """Hydra's hooks of a sweep: collects the jobs' plans, which Hydra makes one after the other in this process, and
    prints them with their sum. conf/plan.yaml names it."""

    def __init__(self) -> None:
        self.plans: list[Any] = []

    @errors_in_one_line(PLAN)
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        grid(config)  # refuses what a grid cannot hold

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return._return_value is not None:
            self.plans.append(job_return.return_value)

    @errors_in_one_line(PLAN)
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        from cera_train.planning.table import name_jobs, print_plans

        if self.plans:
            print_plans("job", name_jobs(self.plans))


class PlannedStudy(StudySweeper):
    """Stands in the place of the sweeper of a study: plans its runs instead of running them."""

    def sweep(self, arguments: list[str]) -> None:
        from cera_train.study.plan import plan_study

        announce_imports()
        plan_study(self.config, job_composer(self.config, functools.partial(without_hydra, schema=PlanRun)))
