"""`cera-plan` on the command line, and what it prints."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cera_train.planning.table import print_plan, print_sweep_plans

MATH, QUICK = "+recipe=math_r64", "+recipe=logistic_map"
COMMAND = Path(sys.executable).parent / "cera-plan"

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


@pytest.mark.parametrize("arguments", [[], [MATH]], ids=str)
def test_it_plans_what_cera_train_would_run(compose, arguments):
    config, trained = compose(*arguments, command="plan"), compose(*arguments or ["name=default"])
    assert all(getattr(config, field.name) == getattr(trained, field.name) for field in fields(trained))


@pytest.mark.parametrize(
    ("arguments", "status", "answer"),
    [
        (["--help"], "0", "each job of a sweep, and the sum"),
        (["plan.mfu=2"], "2", "plan.mfu=2.0 is a share of the peak"),
        (["plan.gpu=cpu", "plan.gpus=2"], "2", "there is one CPU"),
        (["data=gsm8k", "data.path=org/rows"], "2", "its size is unknown"),
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
@pytest.mark.parametrize(
    ("arguments", "last"), [([], "cost"), (["-m", "adapter.r=64"], "1 job "), (["-m", "adapter.r=16,64"], "2 jobs ")]
)
def test_a_plan_prints_and_leaves_nothing_behind(tmp_path, arguments, last):
    done = subprocess.run([COMMAND, MATH, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith(last)
    assert "27,262,976" in done.stdout
    assert done.stderr == "loading    PyTorch and transformers\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gpu", ["h100", "rtx4090"])
def test_a_plan_prints_every_part(plan, capsys, gpu):
    planned = plan(MATH, "plan.price_per_hour=2", f"plan.gpu={gpu}", "train.tasks=[gsm8k]", "train.tasks_limit=15")
    print_plan(planned)
    out = capsys.readouterr().out
    assert out.startswith(
        "plan       math_r64: cera r=64 on q_proj v_proj\nmodel      meta-llama/Llama-3.1-8B, bfloat16\n"
    )
    assert "171 tokens (an estimate), 100% supervised" in out
    assert "task       gsm8k: 15 problems of 64 tokens (by facts), up to 512 to answer, at 1 evaluation\n" in out
    for label in ("parameters", "memory of one process", "work", "PFLOP", "time and cost"):
        assert f"\n{label}\n" in out
    rows = {line.rsplit("  ", 1)[0].strip(): line.split()[-1] for line in out.splitlines() if line.startswith("  ")}
    assert (rows["trainable"], rows["share"], rows["updates"]) == ("27,262,976", "0.34%", "4,689")
    assert {"frozen", "weights", "optimizer", "gradients, activations", "peak in training"} <= rows.keys()
    assert {"peak in evaluation", "forward", "backward", "evaluations", "in all", "an update"} <= rows.keys()
    assert {"answers, at most", "GPU-hours", "cost"} <= rows.keys()
    needs = f"{planned.peak / 1e9:.2f} GB needed"
    verdict = {
        "h100": f"fits       {needs} of the 80 GB of H100\n",
        "rtx4090": f"too large  {needs}, more than 95% of the 24 GB of RTX 4090\n",
    }
    assert verdict[gpu] in out


@pytest.mark.slow
def test_a_sweep_adds_up_its_jobs(plan, capsys):
    jobs = [plan(QUICK, "plan.price_per_hour=2000", f"adapter.r={r}", f"name=r{r}") for r in (4, 8, 16)]
    print_sweep_plans(jobs)
    _, *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        *(["adapter.r=4", "230,400"], ["adapter.r=8", "460,800"], ["adapter.r=16", "921,600"])
    ]
    assert total.split()[:2] == ["3", "jobs"]
    assert f"{sum(job.gpu_hours for job in jobs):,.2f}" in total
    assert total.split()[-1] == f"{sum(job.cost for job in jobs):,.2f}"


@pytest.mark.slow
def test_a_job_that_does_not_fit_is_marked(plan, capsys):
    print_sweep_plans([plan(MATH, f"model={name}", "plan.gpu=rtx4090") for name in ("llama3_2_1b", "llama3_1_8b")])
    _, small, large, _ = capsys.readouterr().out.splitlines()
    assert "does not fit" not in small
    assert large.endswith("does not fit RTX 4090")
    # Jobs on other models are told apart by their paths alone.
    assert small.startswith("model.path=meta-llama/Llama-3.2-1B  ")
    assert large.startswith("model.path=meta-llama/Llama-3.1-8B  ")
