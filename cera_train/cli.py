"""The commands: each composes its config, checks it, hands it over, and turns errors into one clear line.

Nothing here imports torch: `--help` and a config error answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cera_train.composition import (
    Composition,
    check_trust,
    config_dir,
    guard_composition,
    is_about_a_null_section,
    refuse_pickled_configs,
    register_configs,
    to_config,
)
from cera_train.config import CHANGES_NO_RESULT, Config, EvalConfig, PlanRun
from cera_train.errors import explain
from cera_train.heavy import heavy_imports
from cera_train.processes import is_main_process, is_one_of_several, join_slurm_step
from cera_train.secrets import redact
from cera_train.subject import find_subject
from cera_train.sweep import BEGUN, Job, begin, refuse_grid_of_one, refuse_sweeps_folder
from cera_train.words import clean

TRAIN = Composition(Config, "cera-train")
EVAL = Composition(EvalConfig, "cera-eval")
PLAN = Composition(PlanRun, "cera-plan")


# --- console scripts -------------------------------------------------------------------------------------------------


def main() -> None:
    """`cera-train`: one training run, or a sweep with -m."""
    start(TRAIN, train_and_say_sweep)


def main_eval() -> None:
    """`cera-eval`: one evaluation of a run, or several with -m."""
    with multirun_file_elsewhere():
        start(EVAL, evaluate)


def main_plan() -> None:
    """`cera-plan`: what a run would need, or with -m the runs of a sweep."""
    with multirun_file_elsewhere():
        start(PLAN, plan)
    if SWEEP:
        from cera_train.planning.table import print_sweep_plans

        print_sweep_plans(SWEEP)


def main_report() -> None:
    """`cera-report`: a comparison of runs."""
    start(Composition(Config, "cera-report"), report)


def main_sweep() -> None:
    """`cera-sweep`: where a sweep stands."""
    start(Composition(Config, "cera-sweep"), sweep)


def start(composition: Composition, command: Callable[[], Any]) -> None:
    """Runs a command as a whole process."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    os.environ["CERA_TRAIN_DEBUG"] = "1" if debug else ""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # composition errors come out whole, to be explained here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    join_slurm_step(os.environ)
    register_configs()
    sys.argv[1:] = [with_folder_quoted(argument) for argument in sys.argv[1:]]
    guard_composition()
    try:
        with errors_in_one_line(composition):
            refuse_pickled_configs(sys.argv[1:])
            command()
        sys.stdout.flush()
    except BrokenPipeError:
        leave_closed_pipe()
    except KeyboardInterrupt:
        sys.exit(130)


def leave_closed_pipe() -> NoReturn:
    """Ends where the reader has seen enough, as in `| head`; what is left to print is nobody's."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def with_folder_quoted(argument: str) -> str:
    """Lets run=outputs/rank_lr/adapter=cera,adapter.r=64 be a folder: Hydra would read its commas and signs."""
    key, _, value = argument.partition("=")
    is_folder = any(sign in value for sign in ",=") and "'" not in value and Path(value).is_dir()
    return f"{key}='{value}'" if is_folder else argument


@contextlib.contextmanager
def multirun_file_elsewhere() -> Iterator[None]:
    """Has Hydra write the multirun.yaml of a sweep to a folder that is removed, not to where the user stands."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv.append(f"hydra.sweep.dir={folder}")
        yield


@contextlib.contextmanager
def errors_in_one_line(composition: Composition) -> Iterator[None]:
    """Says what went wrong in one line and exits with status 2; anything unexpected keeps its traceback."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        sys.exit(1 if say_error(composition, error) is None else 2)


def say_error(composition: Composition, error: Exception) -> str | None:
    """One line for an error that the user can mend; for any other its traceback, and None."""
    is_composition = isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError))
    is_composition = is_composition or is_about_a_null_section(error)
    message = composition.explain(error, sys.argv[1:]) if is_composition else explain(error)
    if message is None or os.environ.get("CERA_TRAIN_DEBUG"):
        print(clean(redact("".join(traceback.format_exception(error)))), file=sys.stderr)
    if message is None:
        return None
    message = clean(redact(message))
    print(f"{composition.program}: {message}", file=sys.stderr)
    return message


# --- what each does --------------------------------------------------------------------------------------------------
# Hydra would print a report of its own about an error that left one of its functions: each explains its errors itself.


def hydra_command(config_name: str) -> Callable:
    return hydra.main(version_base="1.3", config_path=str(config_dir("conf")), config_name=config_name)


@hydra_command("config")
def train(composed: DictConfig) -> float | None:
    """One training run, or one job of a sweep. Returns its perplexity, for sweepers that minimise.

    A job that fails returns None rather than raising: the others go on, and a sweeper such as Optuna counts a failure.
    """
    with errors_in_one_line(TRAIN):
        join_slurm_step(os.environ)  # a job that submitit started did not come by `start`
        job = Job.current(HydraConfig.get())
        if job is None:
            return run(composed)
        try:
            job.start()
            return run(composed, job)
        except BrokenPipeError:
            leave_closed_pipe()
        except Exception as error:
            job.fail(say_error(TRAIN, error) or f"a bug: {type(error).__name__}: {error}")
            if is_one_of_several():
                sys.exit(1)  # others wait for this process
            return None


def run(composed: DictConfig, job: Job | None = None) -> float:
    """Trains as composed, a job in its own folder within the sweep's."""
    refuse_grid_of_one(HydraConfig.get())
    config = to_config(composed)
    check_trust(composed, HydraConfig.get().overrides.task)
    if job is None:
        refuse_sweeps_folder(Path(config.output_dir) / config.name)
    else:
        config = replace(config, output_dir=str(job.folder), name=job.name)
    if not is_as_published(HydraConfig.get().overrides.task):
        config = replace(config, published={})
    with heavy_imports():
        from cera_train.launch import launch

    return launch(config)["eval/perplexity"]


class SweepStart(Callback):
    """Hydra's hook at the start of a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with errors_in_one_line(TRAIN):  # Hydra would turn an error into a warning and go on
            begin(config)
            detach = config.launch.detach
            if "submitit" in str(config.hydra.launcher._target_):
                from cera_train.cluster import replace_waiting

                replace_waiting(detach)
            elif detach:
                raise ValueError(
                    "launch.detach=true is for jobs that run elsewhere: choose a cluster, such as "
                    "hydra/launcher=slurm_gpu."
                )


def train_and_say_sweep() -> None:
    """`train`, and after a sweep its table; exit status 1 unless all its jobs are finished or still to come."""
    train()
    for folder, record in BEGUN.items() if is_main_process() else ():
        from cera_train.sweep_table import is_finished, say_sweep

        print()
        say_sweep(folder)
        if not (record["detached"] or is_finished(folder)):
            sys.exit(1)


def is_as_published(overrides: list[str]) -> bool:
    """Whether the paper's figures of a recipe still apply: no override changes what is computed."""
    return all(override.lstrip("+~").startswith(("recipe=", *CHANGES_NO_RESULT)) for override in overrides)


@hydra_command("eval")
def evaluate(composed: DictConfig) -> None:
    """One evaluation."""
    with errors_in_one_line(EVAL):
        config = to_config(composed, EvalConfig)
        check_trust(composed, HydraConfig.get().overrides.task)
        if config.run is not None:
            find_subject(config)  # torch takes seconds to import: a mistake gets its answer before
        with heavy_imports():
            from cera_train.evaluate import evaluate

        evaluate(config)


SWEEP: list[Any] = []
"""The plans of a sweep's jobs, which Hydra runs one after the other in this process."""


@hydra_command("plan")
def plan(composed: DictConfig) -> None:
    """One plan; of a sweep, one of its jobs."""
    with errors_in_one_line(PLAN):
        refuse_grid_of_one(HydraConfig.get())
        config = to_config(composed, PlanRun)
        from cera_train.planning.plan import make_plan
        from cera_train.planning.table import print_measured, print_plan

        is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        if is_sweep and config.plan.compare:
            raise ValueError(
                "plan.compare sets other adapters beside one plan; with -m, sweep them: adapter=cera,lora,dora."
            )
        if config.run is not None:
            print_measured(Path(config.run), config.plan)
        elif is_sweep:
            SWEEP.append(make_plan(config, with_remedies=False))
        else:
            print_plan(make_plan(config))


def report() -> None:
    """A report, or the problems on which two runs disagree."""
    parser = argparse.ArgumentParser(
        prog="cera-report",
        description="Compares runs: one table, paired tests on the same problems, pictures.",
        epilog="cera-report disagree A B [--task TASK] shows the problems that one run solves and the other does not.",
    )
    parser.error = _refuse
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a run, or a folder of runs")
    parser.add_argument("--output", type=Path, help="where report.md and report.html go (report)")
    parser.add_argument("--task", help="of disagree: the evaluation to look at")
    arguments = parser.parse_args()
    from cera_train.report import disagree, say_report, write_report

    if arguments.folders[0] == Path("disagree"):
        if len(arguments.folders) != 3:
            raise ValueError(f"disagree takes two runs, got {len(arguments.folders) - 1}: cera-report disagree A B.")
        if arguments.output is not None:
            raise ValueError("disagree writes no files: leave --output out.")
        disagree(*arguments.folders[1:], arguments.task)
    else:
        if arguments.task is not None:
            raise ValueError("--task is of cera-report disagree A B: a report shows every task. Leave it out.")
        say_report(write_report(arguments.folders, arguments.output or Path("report")))


def sweep() -> None:
    """A sweep's jobs, their states and the best, by what lies in its folder."""
    parser = argparse.ArgumentParser(
        prog="cera-sweep",
        description="Shows where a sweep stands, also while it runs: every job, its state, its perplexity, the best.",
    )
    parser.error = functools.partial(_refuse, program="cera-sweep")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the sweep's folder, such as outputs/rank_lr")
    folder = parser.parse_args().folder
    from cera_train.sweep_table import say_sweep

    say_sweep(folder)


def _refuse(message: str, program: str = "cera-report") -> NoReturn:
    """A mistake in the command line, as one line like every other."""
    raise ValueError(f"{message} (see {program} --help).")
