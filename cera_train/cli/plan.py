"""`cera-plan`: what a run would need, or with -m the runs of a sweep."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cera_train.cli.composition import Composition, to_config
from cera_train.cli.start import errors_in_one_line, hydra_command, start
from cera_train.common.errors import UserError
from cera_train.config import PlanRun
from cera_train.sweep.folder import refuse_grid_of_one

PLAN = Composition(PlanRun, "cera-plan")

JOBS: list[Any] = []
"""The plans of a sweep's jobs, which Hydra runs one after the other in this process."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # Hydra leaves a multirun.yaml of a sweep
        start(PLAN, plan, f"hydra.sweep.dir={folder}")
    if JOBS:
        from cera_train.planning.table import print_sweep_plans

        print_sweep_plans(JOBS)


@hydra_command("plan")
def plan(composed: DictConfig) -> None:
    """One plan; in a sweep, the plan of one job."""
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
            JOBS.append(make_plan(config, with_remedies=False))
        else:
            print_plan(make_plan(config))
