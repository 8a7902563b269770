"""`cera-plan`: what a run would need, or with -m the runs of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from cera_train.cli.composition import Composition, to_config
from cera_train.cli.start import errors_in_one_line, start_hydra
from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.config import PlanRun
from cera_train.sweep.folder import grid, refuse_grid_of_one
from cera_train.sweep.halving import is_halving

PLAN = Composition(PlanRun, "cera-plan")


def main() -> None:
    start_hydra(PLAN, "plan", plan)


def plan(composed: DictConfig) -> Any:
    """Prints one plan. In a sweep, returns the plan of one job to `Sum`."""
    with errors_in_one_line(PLAN):
        refuse_grid_of_one(HydraConfig.get())
        config = to_config(composed, PlanRun)
        from cera_train.planning.plan import make_plan
        from cera_train.planning.table import print_measured, print_plan

        is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        if is_sweep and config.plan.compare:
            raise UserError(
                f"plan.compare={[str(kind) for kind in config.plan.compare]} sets other adapters beside one plan; with "
                "-m, sweep them: adapter=cera,lora,dora."
            )
        if config.run is not None:
            print_measured(Path(config.run), config.plan)
        elif is_sweep:
            return make_plan(config, with_advice=False)
        else:
            print_plan(make_plan(config))


class Sum(Callback):
    """Hydra's hooks of a sweep: collects the jobs' plans, which Hydra makes one after the other in this process, and
    prints them with their sum. conf/plan.yaml names it."""

    def __init__(self) -> None:
        self.plans: list[Any] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with errors_in_one_line(PLAN):
            require(not is_halving(config), "hydra/sweeper=halving: a plan is of whole jobs. Leave it out.")
            grid(config)  # refuses what a grid cannot hold

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return._return_value is not None:
            self.plans.append(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        with errors_in_one_line(PLAN):
            from cera_train.planning.table import print_sweep_plans

            if self.plans:
                print_sweep_plans(self.plans)
