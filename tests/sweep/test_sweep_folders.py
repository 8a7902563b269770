"""A sweep's folder: how its jobs are named, which settings they share, and which job is the best."""

from __future__ import annotations

import re

import pytest
import yaml
from made_sweeps import FIXED, TINY, cera_sweep, cera_train, content_of, states

from cera_train.sweep.table import best_jobs, read_sweep


def test_a_jobs_folder_is_named_by_what_varies_alone(tmp_path, monkeypatch, counted):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 4)
    command = ["-m", "adapter.r=4,8", *FIXED, "name=mine"]
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    assert [config.name for config in counted] == ["adapter.r=4", "adapter.r=8"]
    # The same, of which one dimension is fixed this time; and with one dimension more.
    assert cera_train(monkeypatch, tmp_path, "-m", "adapter.r=4", *FIXED, "name=mine") == 0
    assert len(counted) == 2
    assert cera_train(monkeypatch, tmp_path, "-m", "adapter.r=4", "train.seed=1,2", *FIXED, "name=mine") == 0
    assert [config.name for config in counted[2:]] == ["adapter.r=4,train.seed=1", "adapter.r=4,train.seed=2"]
    assert set(states(tmp_path / "outputs" / "mine").values()) == {"finished"}
    (tmp_path / "rows.jsonl").unlink()  # finished jobs need it no more
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    assert len(counted) == 4


def test_other_fixed_settings_in_the_same_folder_are_refused(tmp_path, monkeypatch, counted, capfd):
    assert cera_train(monkeypatch, tmp_path, "-m", "adapter.r=4,8", "optimizer.lr=1e-3", "name=mine") == 0
    before = content_of(tmp_path)
    capfd.readouterr()
    for other, shown in (
        (["optimizer.lr=3e-3"], "optimizer.lr=0.001; here optimizer.lr=0.003"),
        ([], "optimizer.lr=0.001; here none"),
        (["optimizer.lr=0.001", "+recipe=gsm8k_r64"], "here optimizer.lr=0.001 recipe=gsm8k_r64"),
    ):
        assert cera_train(monkeypatch, tmp_path, "-m", "adapter.r=4,8", *other, "name=mine") == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "name=mine: outputs/mine holds a sweep with other fixed settings" in line
        assert shown in line
    assert content_of(tmp_path) == before
    # Where and how a run computes is free.
    free = ["optimizer.lr=0.001", "train.keep=1", "name=mine"]
    assert cera_train(monkeypatch, tmp_path, "-m", "adapter.r=4,8", *free) == 0
    assert len(counted) == 2


def test_a_job_gets_the_sweeps_folder_whatever_its_recipe_is_named(sweep_here, monkeypatch, counted):
    arguments = ["-m", "+recipe=math_r64,math_dora_r64", "name=main", "train.micro_batch_tokens=2048"]
    assert cera_train(monkeypatch, sweep_here, *arguments) == 0
    assert [(config.output_dir, config.name) for config in counted] == [
        ("outputs/main", "recipe=math_r64"),
        ("outputs/main", "recipe=math_dora_r64"),
    ]
    assert [bool(config.published) for config in counted] == [True, True]  # they are as published
    assert [config.tracker.group for config in counted] == ["main", "main"]


def test_a_sweep_is_extended_as_a_whole(sweep_here, monkeypatch, capsys, counted):
    jobs = [*TINY, "adapter.r=4,8", "adapter=cera", "adapter.activation=silu"]
    assert cera_train(monkeypatch, sweep_here, *jobs, "train.max_updates=6") == 0
    longer = [*jobs, "train.max_updates=12"]
    assert cera_train(monkeypatch, sweep_here, *longer) == 2
    assert "holds a sweep with other fixed settings" in capsys.readouterr().err
    assert cera_train(monkeypatch, sweep_here, *longer, "train.extend=true") == 0
    lengths = [(config.train.max_updates, config.train.extend) for config in counted]
    assert lengths == [(6, False)] * 2 + [(12, True)] * 2
    assert cera_train(monkeypatch, sweep_here, *longer) == 0  # the record has the new length


@pytest.mark.parametrize(("metric", "best", "shown"), [("gsm8k/exact", 2, "50.0%"), ("seconds", 2, "120.000")])
def test_the_metric_decides_which_job_is_best(tmp_path, monkeypatch, capfd, counted, metric, best, shown):
    command = ["-m", "adapter.r=4,2,8", "train.tasks=[gsm8k]", f"sweep.metric={metric}", "name=mine"]
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    output = capfd.readouterr().out
    assert re.search(rf"updates +{metric}\n", output)
    assert re.search(rf"\nadapter.r={best} +finished +20/20 +{shown}  best\n", output)
    assert output.endswith(f"best       outputs/mine/adapter.r={best}: {metric} {shown}\n")
    cera_sweep(monkeypatch, "outputs/mine")  # it needs no setting
    assert capfd.readouterr().out == output[output.rindex("sweep      outputs") :]


@pytest.mark.parametrize("metric", ["eval/perplexity", "gsm8k/exact"])
def test_optuna_gets_the_metric_and_its_direction(tmp_path, monkeypatch, capfd, counted, metric):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper")
    sampler = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    drawn = ["adapter.r=range(1,64)", "optimizer.lr=tag(log,interval(1e-3,1e-1))"]
    command = ["-m", *sampler, *drawn, "train.tasks=[gsm8k]", f"sweep.metric={metric}", "name=mine"]
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    jobs = read_sweep(tmp_path / "outputs" / "mine")
    assert [job.state for job in jobs] == ["finished"] * 3
    (best,) = best_jobs(jobs)
    assert best.value == (min if metric == "eval/perplexity" else max)(job.value for job in jobs)
    results = yaml.safe_load((tmp_path / "outputs/mine/optimization_results.yaml").read_text())
    assert results["best_value"] == best.value
    assert f"optimizer.lr={results['best_params']['optimizer.lr']}" in best.choices
    assert f"best       outputs/mine/{best.name}: {metric.removeprefix('eval/')}" in capfd.readouterr().out
