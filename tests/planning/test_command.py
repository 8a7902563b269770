"""`cera-plan` on the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import hydra
import pytest

from cera_train.common.files import config_dir

WITHOUT_TORCH = """
import sys
sys.argv = ["cera-plan", *sys.argv[1:]]
from cera_train.cli.plan import main as main_plan
try:
    main_plan()
except SystemExit as end:
    print(end.code)
heavy = {"torch", "transformers", "peft", "bitsandbytes", "datasets"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_a_recipe_composes_under_cera_plan_and_hydra_writes_nothing_here(compose):
    config = compose("+recipe=math_r64", "plan.gpu=a100", command="plan")
    trained = compose("+recipe=math_r64")
    assert all(getattr(config, field.name) == getattr(trained, field.name) for field in fields(trained))
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        own = hydra.compose("plan", ["+recipe=math_r64"], return_hydra_config=True).hydra
        assert (own.run.dir, own.sweep.subdir, own.output_subdir) == (".", ".", None)
        assert own.job_logging.root is None
        assert own.hydra_logging.root is None


def test_without_arguments_it_plans_what_cera_train_runs(compose):
    config, trained = compose(command="plan"), compose("name=default")
    assert all(getattr(config, field.name) == getattr(trained, field.name) for field in fields(trained))


@pytest.mark.parametrize(
    ("arguments", "status", "answer"),
    [
        (["--help"], "0", "side by side at the same rank"),
        (["plan.mfu=2"], "2", "plan.mfu=2.0 is a share of the peak"),
        (["plan.gpu=cpu", "plan.gpus=2"], "2", "there is one CPU"),
        (["data=gsm8k", "data.path=org/rows"], "2", "its size is unknown"),
        (["run=outputs/no_such_run"], "2", "there is no config.yaml of a run"),
    ],
    ids=str,
)
def test_help_and_mistakes_are_answered_without_torch(tmp_path, arguments, status, answer):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert answer in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == status or arguments == ["--help"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_leaves_nothing_behind_and_one_job_is_a_sweep_too(tmp_path):
    command = [Path(sys.executable).parent / "cera-plan", "-m", "+recipe=math_r64"]
    for ranks, jobs in (("16,64", "2 jobs"), ("64", "1 job")):
        done = subprocess.run(
            [*command, f"adapter.r={ranks}"], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        assert done.stdout.splitlines()[-1].startswith(f"{jobs} ")
        assert "27,262,976" in done.stdout
    refused = subprocess.run(
        [*command, "adapter.r=16,64", "plan.compare=[lora]"], capture_output=True, text=True, cwd=tmp_path
    )
    assert refused.returncode == 2
    assert (refused.stdout, refused.stderr.count("\n")) == ("", 1)
    assert "plan.compare=['lora'] sets other adapters beside one plan; with -m, sweep them" in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plan_prints_and_leaves_nothing_behind(tmp_path):
    command = [Path(sys.executable).parent / "cera-plan", "+recipe=math_r64"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "27,262,976" in done.stdout
    assert not list(Path(tmp_path).iterdir())
