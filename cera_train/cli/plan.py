"""`cera-plan`: what a run would need, or with -m the runs of a sweep or a study."""

import functools

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cera_train.cli.config import announce_imports, register_plugins, start_hydra, to_config
from cera_train.common.terminal import counted, print_line
from cera_train.planning.plan import RunPlan, make_plan
from cera_train.planning.table import print_plan, print_plans
from cera_train.settings.run import PlanRun
from cera_train.study.cells import Cell
from cera_train.study.design import StudySweeper, check_cells, study_record
from cera_train.study.folder import Study

PLAN = "cera-plan"

EDGES = "the best is at an edge, which allows no verdict: name more, or set study.extend=true"


def main() -> None:
    jobs: dict[str, list[RunPlan]] = {}

    def plan(composed: DictConfig) -> None:
        """Prints the plan of a run; keeps that of a sweep's job, since Hydra runs them one after
        the other."""
        config = to_config(composed, PlanRun)
        announce_imports()
        planned = make_plan(config)
        if HydraConfig.get().mode == RunMode.RUN:
            print_plan(planned)
        else:
            jobs[HydraConfig.get().job.override_dirname] = [planned]

    register_plugins(StudySweeper=PlannedStudy)
    start_hydra(PLAN, plan)
    if jobs:
        print_plans("job", jobs)


class PlannedStudy(StudySweeper):
    """Takes the place of a study's sweeper: plans its runs instead of running them."""

    check = staticmethod(functools.partial(to_config, schema=PlanRun))

    def sweep(self, arguments: list[str]) -> None:
        """Prints the plan of every cell, and their sum."""
        announce_imports()
        study = Study(self.folder, study_record(self.config))
        print_line("study", study.config.question)
        check_cells(self.config, study, self.compose)
        for key, values in study.config.tune.items():
            if len(values) < 3 and not study.config.extend:
                print_line("edges", f"{key} has {counted(len(values), 'value')}: {EDGES}")
        planned: dict[str, list[RunPlan]] = {}
        for cell in study.cells:
            planned[cell.name] = []
            for base in study.bases:
                planned[cell.name] += self._plans_of(cell, base)
        print_plans("cell", planned)

    def _plans_of(self, cell: Cell, base: str | None) -> list[RunPlan]:
        """The plan of every run of a cell on a base."""
        tuning, fresh = (
            [run for run in runs if run.base == base]
            for runs in (cell.tuning_runs, cell.fresh_runs)
        )
        plans = [make_plan(self.compose(cell.overrides(point, tuning[0]))) for point in cell.grid]
        plans.sort(key=lambda plan: plan.seconds)
        # Which values will be chosen is unknown: count the most expensive ones.
        return plans * len(tuning) + plans[-1:] * len(fresh)
