"""`hydra/sweeper=halving`: Hydra's sweeper that runs a grid rung by rung, by any launcher. Imports no torch.

A rung is a pause of its jobs at an update (`train.stop_at`): the schedule is that of the whole run, so that a job which
goes on ends with the result of a run alone. What is decided stands in halving.json and what is trained in the jobs'
folders: the same command repeats neither.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf

from cera_train.common.files import locked
from cera_train.common.settings import require
from cera_train.common.terminal import counted, print_line
from cera_train.distributed.processes import is_main_process
from cera_train.settings.run import Config
from cera_train.sweep.folder import WRITER, ComposeJob, begin, record_of
from cera_train.sweep.record import RECORD, SweepRecord
from cera_train.sweep.rungs import (
    Decision,
    Group,
    HalvingRecord,
    Rules,
    check_grid,
    decide,
    groups_of,
    loss_at,
)
from cera_train.sweep.table import State, job_status


def is_halving(config: DictConfig) -> bool:
    """Whether a sweep is by `Halving`. `config` has Hydra's section."""
    return config.hydra.sweeper._target_.endswith(f".{Halving.__name__}")


def rules_of(config: DictConfig) -> Rules:
    sweeper = config.hydra.sweeper
    tune = OmegaConf.to_container(sweeper.tune) if isinstance(sweeper.tune, ListConfig) else [sweeper.tune]
    return Rules([str(name) for name in tune if name is not None], sweeper.first, sweeper.factor)


def halving_record(config: DictConfig) -> SweepRecord:
    """`record_of` a halving. Raises UserError where what is tuned has one value."""
    record = record_of(config)
    check_grid(list(record.overrides.values()), rules_of(config))
    return record


def begin_halving(
    config: DictConfig,
    compose: ComposeJob[Config],
    rules: Rules | None = None,
    make_record: Callable[[DictConfig], SweepRecord] = halving_record,
) -> None:
    """`begin` for a halving: first refuses rules that this grid or what the folder holds cannot follow.

    Args:
        rules: None: those of `hydra.sweeper`.
        make_record: the content of sweep.json; raises UserError for jobs that cannot be.
    """
    rules = rules or rules_of(config)
    held = HalvingRecord.read(Path(config.hydra.sweep.dir))
    require(
        not config.launch.detach,
        "launch.detach=true: a halving waits for its jobs, to decide between rungs. Leave it out.",
    )
    require(
        not config.train.extend,
        "train.extend=true: a halving decides between jobs of one length. Leave it out, and extend the jobs that are "
        "left without hydra/sweeper=halving.",
    )

    def checked_record(config: DictConfig) -> SweepRecord:
        record = make_record(config)
        if held is not None:
            held.check(rules, groups_of(record, rules.tune), Path(config.hydra.sweep.dir))
        return record

    begin(config, lambda overrides: rules.check_run(compose(overrides)), checked_record, held.stops() if held else ())


class Halving(Sweeper):
    """Successive halving. conf/hydra/sweeper/halving.yaml has its settings, and `begin_halving` has checked them."""

    def __init__(self, **_: Any) -> None:
        """Hydra passes the settings, which `sweep` reads from the config."""

    def find_rules(self) -> Rules:
        return rules_of(self.config)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Holds the folder, and runs the sweep. Of several processes that run it, the main one holds."""
        self.folder, self.rules, self.launched = Path(self.config.hydra.sweep.dir), self.find_rules(), 0
        with locked(self.folder, WRITER) if is_main_process() else contextlib.nullcontext():
            self.run()

    def run(self) -> None:
        """Runs every group rung by rung, then what is left of each to its end."""
        self.record = HalvingRecord.read(self.folder) or HalvingRecord(self.rules, [])
        groups = groups_of(SweepRecord.read(self.folder / RECORD), self.rules.tune)
        for rung in itertools.count(1):
            racing = [group for group in groups if self.has_rung(group, rung)]
            if not racing:
                break
            self.train_to(rung, racing)
            for group in racing:
                if self.has_rung(group, rung) and not self.settle(group, rung):
                    groups.remove(group)
        self.launch("last", "the end", [job for group in groups for job in group.jobs.values()])

    def has_rung(self, group: Group, rung: int) -> bool:
        """Whether a group has several candidates before this rung, and a job that trains beyond it."""
        totals = [job_status(self.folder, job).total for job in group.jobs]
        return len(group.candidates) > 1 and any(total is None or total > self.rules.update(rung) for total in totals)

    def train_to(self, rung: int, groups: Sequence[Group]) -> None:
        """Trains the jobs of undecided groups to the update of a rung, but for those that have come so far.

        Raises:
            UserError: a job has gone past the rung without an evaluation there.
        """
        update, jobs = self.rules.update(rung), []
        for group in groups:
            if self.record.decision(group.name, rung) is not None:
                continue
            for name, overrides in group.jobs.items():
                if loss_at(self.folder / name, update) is None:
                    require(
                        (job_status(self.folder, name).done or 0) <= update,
                        f"{self.folder / name} is beyond update {update}, and was not evaluated there: it cannot be "
                        f"compared at this rung. Choose another {self.rules.SECTION}.first=..., or another name=...",
                    )
                    jobs.append([*overrides, f"train.stop_at={update}"])
        self.launch(f"rung {rung}", f"update {update:,}", jobs)

    def settle(self, group: Group, rung: int) -> bool:
        """Leaves in a group the candidates that go on beyond a rung. False: a job was cut before it, so that nothing
        can be decided yet."""
        decision = self.record.decision(group.name, rung) or self.decide(group, rung)
        if decision is None:
            return False
        going = {outcome.name for outcome in decision.candidates if outcome.goes_on}
        group.candidates = [candidate for candidate in group.candidates if candidate.name in going]
        return True

    def decide(self, group: Group, rung: int) -> Decision | None:
        """Decides a rung and writes it down. None: a job has neither come so far nor failed, or all have failed."""
        update, label = self.rules.update(rung), f"rung {rung}"
        losses = {job: loss_at(self.folder / job, update) for job in group.jobs}
        for job in [job for job, loss in losses.items() if loss is None]:
            if (state := job_status(self.folder, job).state) != State.failed:
                why = "is trained by another command" if state == State.running else "was cut"
                self.announce(label, f"undecided: {job} {why}. The same command goes on.")
                return None
            losses[job] = math.inf
        decision = decide(group, rung, update, losses, self.rules.factor)
        if not any(outcome.goes_on for outcome in decision.candidates):
            self.announce(label, "undecided: every candidate failed. The same command tries them again.")
            return None
        self.record.decisions.append(decision)
        self.record.write(self.folder)
        self.announce(label, decision.describe())
        return decision

    def launch(self, label: str, goal: str, jobs: Sequence[list[str]]) -> None:
        """Runs jobs by the launcher of the sweep, and waits for them."""
        if not jobs:
            return
        self.announce(label, f"{counted(len(jobs), 'job')} to {goal}")
        for job in self.launcher.launch(jobs, initial_job_idx=self.launched):
            _ = job.return_value  # raises what the job did not catch
        self.launched += len(jobs)

    def announce(self, label: str, text: str) -> None:
        if is_main_process():
            print()
            print_line(label, text)
