"""Sweeps that are refused before a job begins."""

from __future__ import annotations

import pytest
from made_runs import make_run
from made_sweeps import FIXED, TINY, cera_train, record_sweep


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter.r=4,abc"], "adapter.r: Value 'abc'"),
        (["adapter.r=4,8", "train.batch_size=16,0"], "train.batch_size=0 must be positive"),
        (["+sweep=rank_lr", "optimizer.lrr=1,2"], "unknown setting optimizer.lrr. Did you mean optimizer.lr?"),
        (["sweep=rank_lr"], "a sweep is added with a plus sign: write +sweep=rank_lr"),
        (["adapter.r=4,8", "sweep.metric=gsm8k/exact"], "no job has this figure: add train.tasks=[gsm8k]."),
        (["adapter.r=4,8", "sweep.metric=best_update"], "choose one of eval/perplexity, best_perplexity, seconds,"),
        (["adapter.r=4,8", "launch.detach=true"], "launch.detach=true is for jobs that run elsewhere"),
        (["adapter.r=2,4", "name=r${adapter.r}"], "name=... is the folder of all jobs"),
        (["output_dir=a,b"], "output_dir=a,b is another for each job"),
    ],
)
def test_a_sweep_with_an_impossible_value_leaves_nothing(tmp_path, monkeypatch, capfd, counted, arguments, message):
    assert cera_train(monkeypatch, tmp_path, "-m", *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
    assert not counted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train_files=[rows.jsonl],[no.jsonl]"], "data.train_files=no.jsonl: cannot read the file"),
        (["model.path=./no/such"], "model.path=./no/such: folder does not exist"),
        # Every value is tried in many jobs, and none of them is possible.
        (["data.train_files=[no.jsonl]", "train.seed=range(1,40)"], "data.train_files=no.jsonl: cannot read the file"),
    ],
)
def test_a_sweep_whose_files_are_missing_is_refused_once(tmp_path, monkeypatch, capfd, counted, arguments, message):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 4)
    given = {argument.partition("=")[0]: argument for argument in ["adapter.r=range(1,40)", *FIXED, *arguments]}
    assert cera_train(monkeypatch, tmp_path, "-m", *given.values(), "name=mine") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}
    assert not counted


def test_an_adapter_to_start_from_that_fits_no_job_is_refused_before_any(sweep_here, monkeypatch, capsys, counted):
    first = make_run(sweep_here / "first", **{"data.prompt": "{question}", "data.completion": "{answer}"})  # r=64
    (first / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (first / "adapter" / name).write_text('{"peft_type": "CERA", "r": 64}')
    arguments = ["adapter=cera", "adapter.activation=silu", "adapter.start_from=first"]
    assert cera_train(monkeypatch, sweep_here, *TINY, *arguments) == 2
    assert "adapter.start_from=first: r is 64 there, 4 here" in capsys.readouterr().err
    assert not counted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "adapter.r=2,4", "name=run"], "outputs/run is the folder of a run: choose another name"),
        (["name=swept"], "outputs/swept is the folder of a sweep: choose another name=... for a run, or add -m"),
    ],
)
def test_a_sweep_and_a_run_share_no_folder(tmp_path, monkeypatch, capfd, arguments, message):
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    (tmp_path / "outputs" / "run" / "config.yaml").write_text("adapter: {}\n")
    record_sweep(tmp_path / "outputs" / "swept")
    assert cera_train(monkeypatch, tmp_path, *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"run", "swept"}
