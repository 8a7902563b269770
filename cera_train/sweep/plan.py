"""What a halving or a study needs before it runs: its runs, each as far as it trains. Imports no torch.

A rung is decided by losses that nobody knows yet. So candidates that differ in cost are taken to stop in its order, the
dearest last, without ties and failures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from cera_train.common.terminal import counted, print_line, print_table
from cera_train.planning.plan import RunPlan, make_plan, shape_of
from cera_train.planning.table import JOB_HEADS, describe_data, job_cells, model_of, print_device, print_missing_price
from cera_train.settings.run import PlanRun
from cera_train.settings.sweep import StudyConfig
from cera_train.sweep.folder import ComposeJob
from cera_train.sweep.halving import halving_record, rules_of
from cera_train.sweep.rungs import Candidate, Course, Group, groups_of
from cera_train.sweep.study import check_cells, is_study, place_of, study_of, study_record, study_rules


@dataclass(frozen=True)
class PlannedGroup:
    """A group of a halving, or an arm of a study under one condition."""

    arm: str
    """Empty without a study."""
    condition: str
    whole: RunPlan
    """Its dearest candidate, trained to the end."""
    courses: list[Course]
    runs: list[RunPlan]
    """Every run, as far as it trains."""

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.arm, self.condition)))


def plan_groups(config: DictConfig, compose: ComposeJob[PlanRun]) -> list[PlannedGroup]:
    """Plans the groups of a halving or a study, each shape of a run once.

    Args:
        config: what Hydra composed for the sweep, with its own section.
    """
    if is_study(config):
        study, rules, record = study_of(config), study_rules(config), study_record(config)
        check_cells(config, record, compose)
    else:
        study, rules, record = None, rules_of(config), halving_record(config)
    plans: dict[str, RunPlan] = {}

    def plan_candidate(candidate: Candidate) -> RunPlan:
        run = rules.check_run(compose(next(iter(candidate.jobs.values()))))
        if (shape := shape_of(run)) not in plans:
            plans[shape] = make_plan(run, with_advice=False)
        return plans[shape]

    def plan_group(group: Group) -> PlannedGroup:
        whole = sorted(map(plan_candidate, group.candidates), key=lambda plan: plan.seconds)
        courses = rules.courses(len(whole), whole[-1].totals.updates)
        each = [course for course in courses for _ in range(course.candidates)]
        runs = [plan.until(course.rungs, course.is_whole) for plan, course in zip(whole, each, strict=True)]
        runs *= len(group.candidates[0].jobs)  # seeds
        if study is None:
            return PlannedGroup("", group.name, whole[-1], courses, runs)
        return PlannedGroup(
            *place_of(group, study), whole[-1], courses, runs + [whole[-1]] * (study.seeds - study.tune_seeds)
        )

    return [plan_group(group) for group in groups_of(record, rules.tune)]


def print_groups(groups: Sequence[PlannedGroup], study: StudyConfig | None) -> None:
    """The table of all groups with their sum."""
    plan = groups[0].whole
    if study is not None:
        print_line("study", study.question)
    for model in dict.fromkeys(model_of(group.whole) for group in groups):
        print_line("model", model)
    for label, text in dict.fromkeys(itertools.chain.from_iterable(map(_describe_data, groups))):
        print_line(label, text)
    print_device(plan)
    for text in dict.fromkeys(describe_runs(group, study) for group in groups):
        print_line("each", text)
    print()
    runs = [run for group in groups for run in group.runs]
    total = [counted(len(groups), "cell" if study else "group"), "", f"{len(runs):,}", *job_cells(runs), ""]
    heads = ["cell" if study else "group", "trainable", "runs", *JOB_HEADS, ""]
    print_table(heads, [*map(_row, groups), total], right=range(1, 8))
    print()
    print_missing_price(plan)


def describe_runs(group: PlannedGroup, study: StudyConfig | None) -> str:
    """How far the runs of a group train, such as `4 candidates: 2 to update 25, 1 to 50, 1 to its end at 467`."""
    ends = [
        f"{course.candidates:,} to its end at {group.whole.totals.updates:,}"
        if course.is_whole
        else f"{course.candidates:,} to update {course.rungs[-1]:,}"
        for course in group.courses
    ]
    count = sum(course.candidates for course in group.courses)
    text = f"{counted(count, 'candidate')}: {', '.join(ends)}"
    if study is None:
        return text
    further = study.seeds - study.tune_seeds
    return (
        text
        + f", each on {counted(study.tune_seeds, 'seed')}" * (study.tune_seeds > 1)
        + f"; then the best on {counted(further, 'more seed')}" * (further > 0)
    )


def _describe_data(group: PlannedGroup) -> list[tuple[str, str]]:
    """Labels and texts, under the study's name for the task where it has several."""
    task = group.whole.config.study and group.whole.config.study.task
    return [(label, f"{task}: {text}" if task else text) for label, text in describe_data(group.whole)]


def _row(group: PlannedGroup) -> list[str]:
    note = "" if group.whole.fits else f"does not fit {group.whole.device.name}"
    return [group.name, f"{group.whole.parameters.trainable:,}", f"{len(group.runs)}", *job_cells(group.runs), note]
