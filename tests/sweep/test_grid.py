"""Every file of conf/sweep: its jobs compose, and its header holds what cera-plan predicts."""

import re
import shlex

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from cera_train.cli.help import register_configs
from cera_train.common.files import config_dir, options, read_yaml
from cera_train.planning.plan import RunPlan
from cera_train.settings.run import Config
from cera_train.sweep.folder import job_name
from cera_train.sweep.grid import grid

SWEEPS = sorted(config_dir("conf").glob("sweep/*.yaml"))
MEASURED = {"quickstart", "logistic_map", "grpo_dates", "sft"}
"""Recipes whose cost was measured, or that cera-plan does not know."""


@pytest.fixture(scope="module")
def jobs_of():
    """jobs_of("+sweep=rank_lr", ...) -> the overrides of every job, as Hydra's sweeper makes
    them."""
    register_configs()

    def jobs_of(*arguments: str) -> list[list[str]]:
        with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
            loaded = GlobalHydra.instance().hydra
            return grid(loaded.compose_config("plan", list(arguments), run_mode=RunMode.MULTIRUN))

    return jobs_of


@pytest.fixture(scope="module")
def plans_of(jobs_of, plan):
    """plans_of("+sweep=rank_lr", ...) -> the plan of every job."""
    known: dict[tuple[str, ...], RunPlan] = {}

    def plan_once(job: list[str]) -> RunPlan:
        key = tuple(sorted(override for override in job if not override.startswith("name=")))
        if key not in known:
            known[key] = plan(*job)
        return known[key]

    return lambda *arguments: [plan_once(job) for job in jobs_of(*arguments)]


every_sweep = pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)


@every_sweep
def test_the_jobs_of_a_sweep_compose_and_have_names_of_their_own(compose, jobs_of, path):
    jobs = jobs_of(f"+sweep={path.stem}")
    swept = read_yaml(path)["hydra"]["sweeper"]["params"]
    assert len({job_name(job, swept) for job in jobs}) == len(jobs) > 1
    for job in (jobs[0], jobs[-1]):
        config = compose(*job)
        assert isinstance(config, Config)
        assert config.name == path.stem
        assert config.adapter.alpha is None  # each method at the scale CeRA has


@pytest.mark.nightly
@every_sweep
def test_the_header_of_a_sweep_has_what_cera_plan_predicts(jobs_of, plans_of, path):
    jobs = len(jobs_of(f"+sweep={path.stem}"))
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert header.startswith("# @package _global_\n")
    assert f"command   cera-train -m +sweep={path.stem}\n" in header
    assert "expected  " in header
    if path.stem in ("logistic_map_grid", "forgetting"):  # they were measured
        assert f"cost      {jobs} jobs, " in header
    else:
        plans = plans_of(f"+sweep={path.stem}")
        hours = f"{sum(plan.gpu_hours for plan in plans):,.2f}"
        assert f"cost      {jobs} jobs, {hours} GPU-hours of an H100 by cera-plan" in header
        assert "tokens per row are estimates" in header
        assert all(plan.fits for plan in plans)


@pytest.mark.nightly
def test_the_costs_of_recipes_are_what_cera_plan_predicts(plans_of):
    for name in set(options("recipe")) - MEASURED:
        gpu, called = ("rtx4090", "RTX 4090") if name == "math_r64_nf4" else ("h100", "H100")
        (plan,) = plans_of(f"+recipe={name}", f"plan.gpu={gpu}")
        header = (config_dir("recipes") / f"{name}.yaml").read_text()
        assert f"{plan.gpu_hours:.1f} hours of one {called} by cera-plan" in header
        assert f"{plan.totals.updates:,} updates of {plan.config.train.batch_size}" in header


@pytest.mark.nightly
def test_the_table_of_the_papers_results_says_what_cera_plan_predicts(plans_of):
    """recipes/README.md: every command that trains composes, and its jobs and GPU-hours are those
    of now."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (config_dir("recipes") / "README.md").read_text().splitlines()
        if line.startswith("|") and "`cera-train " in line
    ]
    for row in rows:
        command, jobs, hours = row[1:4]
        (command,) = re.fullmatch(r"`cera-train (.*)`", command).groups()
        # The sweep's header has what cera-plan predicts.
        if sweep := re.fullmatch(r"-m \+sweep=(\w+)", command):
            header = (config_dir("conf") / f"sweep/{sweep[1]}.yaml").read_text()
            assert f"cost      {jobs} jobs, {hours} GPU-hours" in header
            continue
        arguments = [argument for argument in shlex.split(command) if argument != "-m"]
        plans = plans_of(*arguments)
        assert ("-m " in command) == (len(plans) > 1), command
        assert (jobs, hours) == (
            str(len(plans)),
            f"{sum(plan.gpu_hours for plan in plans):,.2f}",
        ), command
        assert all(plan.fits for plan in plans), command


def test_an_argument_replaces_a_dimension_of_the_file(jobs_of):
    jobs = jobs_of("+sweep=rank_lr", "model=llama3_2_1b", "optimizer.lr=3e-4")
    assert len(jobs) == 9
    assert all({"model=llama3_2_1b", "optimizer.lr=0.0003"} <= set(job) for job in jobs)
    wider = jobs_of("+sweep=rank_lr", "adapter=cera", "adapter.r=64", "train.seed=range(3)")
    assert len(wider) == 4 * 3
