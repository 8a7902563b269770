"""Real sweeps: cut, failed and started again; beside runs, in other processes, by other sweepers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from made_runs import make_run
from made_sweeps import cera_sweep, cera_train, make_job, record_sweep, states

from cera_train.config import Config
from cera_train.sweep.folder import JOBS, RECORD
from cera_train.sweep.table import State, best_jobs, read_sweep


@pytest.fixture
def sweep_here(tmp_path, tiny_folder):
    """A working folder with a user's sweep file: two by two jobs, of which one is impossible."""
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    content = {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "dtype": "float32"},
        "adapter": {"r": 4},
        "data": {"max_length": 256},
        "train": {"max_updates": 6, "batch_size": 16, "eval_every": None, "save_every": None},
        "hydra": {"sweeper": {"params": {"adapter": "lora,cera", "adapter.activation": "relu,silu"}}},
    }
    (tmp_path / "conf" / "sweep" / "tiny.yaml").write_text("# @package _global_\n" + yaml.safe_dump(content))
    return tmp_path


TINY = ["--config-dir", "conf", "-m", "+sweep=tiny"]


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cera_train", *arguments],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def content_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_same_command_skips_the_finished_goes_on_with_the_cut_and_runs_the_missing(sweep_here, monkeypatch, capsys):
    sweep = sweep_here / "outputs" / "tiny"
    command = [*TINY, "train.max_updates=100"]
    failing, finished, cut, missing = (
        f"adapter={kind},adapter.activation={gate}" for kind in ("lora", "cera") for gate in ("relu", "silu")
    )
    process = start(*command, cwd=sweep_here)
    deadline = time.monotonic() + 120
    while not (sweep / cut / "metrics.jsonl").exists() or len((sweep / cut / "metrics.jsonl").read_text()) < 2000:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list(states(sweep).values()) == ["failed", "finished", "running", "waiting"]
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "The same command goes on" in output
    assert list(states(sweep)) == [failing, finished, cut, missing]
    assert list(states(sweep).values()) == ["failed", "finished", "cut", "waiting"]
    (checkpoint,) = (sweep / cut / "checkpoints").iterdir()
    assert 0 < int(checkpoint.name) < 100

    before = content_of(sweep / finished)
    process = start(*command, cwd=sweep_here)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    assert content_of(sweep / finished) == before
    assert f"finished   outputs/tiny/{finished}: perplexity" in output
    assert f"run        outputs/tiny/{cut}, 100 updates of 16 sequences, {int(checkpoint.name)} done" in output
    assert f"run        outputs/tiny/{missing}, 100 updates of 16 sequences\n" in output
    assert list(states(sweep).values()) == ["failed", "finished", "finished", "finished"]
    # Each error once, the table once, and nothing of Hydra's beside the jobs.
    assert errors.count("\n") == errors.count("adapter.activation=relu is the gate of cera") == 1
    assert output.count("\njobs       3 finished, 1 failed\n") == output.count("\nbest       outputs") == 1
    assert {path.name for path in sweep.iterdir()} == {JOBS, RECORD, finished, cut, missing}
    monkeypatch.chdir(sweep_here)
    cera_sweep(monkeypatch, "outputs/tiny")
    assert output.endswith("\n" + capsys.readouterr().out)  # cera-sweep shows the same table

    # A report reads the sweep's folder as it is.
    from cera_train.report.page import write_report

    assert [run.name for run in write_report([sweep], sweep_here / "report").runs] == [cut, missing, finished]


@pytest.mark.slow
def test_a_job_that_is_killed_in_a_process_of_its_own_stops_no_other(sweep_here):
    pytest.importorskip("submitit")
    sweep = sweep_here / "outputs" / "tiny"
    settings = ["adapter.activation=silu", "train.max_updates=300"]
    process = start(*TINY, *settings, "hydra/launcher=local", cwd=sweep_here)
    cut, finished = (sweep / f"adapter={kind}" for kind in ("cera", "lora"))
    deadline = time.monotonic() + 120
    while not (cut / "metrics.jsonl").exists() or states(sweep)[cut.name] != State.running:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    holder = subprocess.run(["fuser", cut / ".lock"], capture_output=True, text=True, check=True).stdout
    os.kill(int(holder), signal.SIGKILL)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    assert "lost       job " in output
    assert states(sweep) == {finished.name: State.finished, cut.name: State.cut}
    assert "jobs       1 finished, 1 cut" in output


@pytest.mark.slow
def test_a_job_that_diverges_stops_no_other_nor_the_next_batch(sweep_here, monkeypatch, capfd):
    arguments = ["adapter=cera", "adapter.activation=silu", "optimizer.weight_decay=0"]
    one_by_one = ["optimizer.lr=1e30,1e-3", "hydra.sweeper.max_batch_size=1"]
    assert cera_train(monkeypatch, sweep_here, *TINY, *arguments, *one_by_one) == 1
    output, errors = capfd.readouterr()
    assert list(states(sweep_here / "outputs" / "tiny").values()) == ["failed", "finished"]
    assert len(errors.splitlines()) == 1
    assert "or its gradient is not finite" in errors
    assert "job        2 of 2: " in output
    # What an earlier command left is shown, and is no failure of a later one.
    assert cera_train(monkeypatch, sweep_here, *TINY, *arguments, "optimizer.lr=1e-3") == 0
    assert list(states(sweep_here / "outputs" / "tiny").values()) == ["finished", "failed"]


def test_a_bug_in_a_job_keeps_its_traceback_and_stops_no_other(sweep_here, monkeypatch, capfd):
    def train(config: Config) -> dict:
        if config.adapter.activation == "relu":
            raise RuntimeError("of ours")
        return {"eval/perplexity": 1.5}

    monkeypatch.setattr("cera_train.training.launch.launch", train)
    assert cera_train(monkeypatch, sweep_here, *TINY, "adapter=cera") == 1
    output, errors = capfd.readouterr()
    assert errors.count("Traceback") == 1
    assert "a bug: RuntimeError: of ours" in output
    assert "job        2 of 2: " in output


def test_a_job_gets_the_sweeps_folder_whatever_its_recipe_is_named(sweep_here, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "cera_train.training.launch.launch", lambda config: seen.append(config) or {"eval/perplexity": 1.5}
    )
    arguments = ["-m", "+recipe=math_r64,math_dora_r64", "name=main", "train.micro_batch_tokens=2048"]
    assert cera_train(monkeypatch, sweep_here, *arguments) == 1  # nothing is finished
    assert [(config.output_dir, config.name) for config in seen] == [
        ("outputs/main", "recipe=math_r64"),
        ("outputs/main", "recipe=math_dora_r64"),
    ]
    assert [bool(config.published) for config in seen] == [True, True]  # they are as published
    assert [config.tracker.group for config in seen] == ["main", "main"]
    assert not (sweep_here / "outputs" / "math_r64").exists()


def test_a_sweep_is_extended_as_a_whole(sweep_here, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "cera_train.training.launch.launch", lambda config: seen.append(config.train) or {"eval/perplexity": 1.5}
    )
    jobs = ["adapter.r=4,8", "adapter=cera", "adapter.activation=silu"]
    assert cera_train(monkeypatch, sweep_here, *TINY, *jobs, "train.max_updates=6") == 1  # nothing is finished
    longer = [*TINY, *jobs, "train.max_updates=12"]
    assert cera_train(monkeypatch, sweep_here, *longer) == 2
    assert "holds a sweep with other fixed settings" in capsys.readouterr().err
    assert cera_train(monkeypatch, sweep_here, *longer, "train.extend=true") == 1
    assert [(train.max_updates, train.extend) for train in seen] == [(6, False)] * 2 + [(12, True)] * 2
    assert cera_train(monkeypatch, sweep_here, *longer) == 1  # the record has the new length


def test_an_adapter_to_start_from_that_fits_no_job_is_refused_before_any(sweep_here, monkeypatch, capsys):
    texts = {"data.prompt": "{question}", "data.completion": "{answer}"}
    first = make_run(sweep_here / "first", **texts)  # r=64
    (first / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (first / "adapter" / name).write_text('{"peft_type": "CERA"}')
    monkeypatch.setattr("cera_train.training.launch.launch", lambda config: pytest.fail("a job began"))
    arguments = ["adapter=cera", "adapter.activation=silu", "adapter.start_from=first"]
    assert cera_train(monkeypatch, sweep_here, *TINY, *arguments) == 2
    assert "adapter.start_from=first: adapter.r is 64 there, 4 here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_peak_memory_of_a_process_is_not_that_of_its_parent():
    held = torch.ones(400_000_000)  # 1.6 GB
    script = "import torch\nfrom cera_train.distributed.accelerator import peak_memory\n"
    script += "print(peak_memory(torch.device('cpu')))"
    assert int(subprocess.check_output([sys.executable, "-c", script])) < held.nbytes


def test_the_peak_memory_of_a_job_is_its_own():
    """The jobs of a sweep share a process, whose peak would be the largest job's."""
    from cera_train.distributed.accelerator import forget_earlier_runs, peak_memory

    large = bytearray(300_000_000)
    before = peak_memory(torch.device("cpu"))
    del large
    forget_earlier_runs()
    assert peak_memory(torch.device("cpu")) < before - 250_000_000


@pytest.fixture
def counted(monkeypatch):
    """counted -> the folders of the runs that were started; they train nothing and finish."""
    begun = []

    def launch(config: Config) -> dict:
        folder = Path(config.output_dir) / config.name
        if not (folder / "result.json").exists():
            begun.append(config.name)
            make_job(folder.parent, folder.name, 1.5)
        return {"eval/perplexity": 1.5}

    monkeypatch.setattr("cera_train.training.launch.launch", launch)
    return begun


FIXED = ["data=jsonl", "data.train_files=[rows.jsonl]", "data.eval_rows=2", "data.completion=' {answer}'"]


def test_a_jobs_folder_is_named_by_what_varies_alone(tmp_path, monkeypatch, counted):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 4)
    command = ["-m", "adapter.r=4,8", *FIXED, "name=mine"]
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    assert counted == ["adapter.r=4", "adapter.r=8"]
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    assert len(counted) == 2
    # The same, of which one dimension is fixed this time; and with one dimension more.
    assert cera_train(monkeypatch, tmp_path, "-m", "adapter.r=4", *FIXED, "name=mine") == 0
    assert len(counted) == 2
    assert cera_train(monkeypatch, tmp_path, "-m", "adapter.r=4", "train.seed=1,2", *FIXED, "name=mine") == 0
    assert counted[2:] == ["adapter.r=4,train.seed=1", "adapter.r=4,train.seed=2"]
    assert set(states(tmp_path / "outputs" / "mine").values()) == {"finished"}


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
    assert (
        cera_train(monkeypatch, tmp_path, "-m", "adapter.r=4,8", "optimizer.lr=0.001", "train.keep=1", "name=mine") == 0
    )
    assert len(counted) == 2


@pytest.fixture
def answered(monkeypatch):
    """Runs that train nothing and finish: the higher the rank, the lower the perplexity, and the accuracy too."""

    def launch(config: Config) -> dict:
        folder, rank = Path(config.output_dir) / config.name, config.adapter.r
        result = {"updates": 20, "eval/perplexity": 1 + 1 / rank, "gsm8k/exact": 1 / rank, "seconds": 60.0 * rank}
        path = make_job(folder.parent, folder.name, 1.5) / "result.json"
        path.write_text(json.dumps(result))
        return result

    monkeypatch.setattr("cera_train.training.launch.launch", launch)


@pytest.mark.parametrize(
    ("metric", "best", "shown"),
    [("eval/perplexity", 8, "1.125"), ("gsm8k/exact", 2, "50.0%"), ("seconds", 2, "120.000")],
)
def test_the_metric_decides_which_job_is_best(tmp_path, monkeypatch, capfd, answered, metric, best, shown):
    command = ["-m", "adapter.r=4,2,8", "train.tasks=[gsm8k]", f"sweep.metric={metric}", "name=mine"]
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    label, output = metric.removeprefix("eval/"), capfd.readouterr().out
    assert re.search(rf"updates +{label}\n", output)
    assert re.search(rf"\nadapter.r={best} +finished +20/20 +{shown}  best\n", output)
    assert output.endswith(f"best       outputs/mine/adapter.r={best}: {label} {shown}\n")
    cera_sweep(monkeypatch, "outputs/mine")  # it needs no setting
    assert capfd.readouterr().out == output[output.rindex("sweep      outputs") :]


@pytest.mark.parametrize(("metric", "best"), [("eval/perplexity", 1.125), ("gsm8k/exact", 0.5)])
def test_optuna_gets_the_metric_and_its_direction(tmp_path, monkeypatch, answered, metric, best):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper")
    sampler = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"]
    command = ["-m", *sampler, "adapter.r=4,2,8", "train.tasks=[gsm8k]", f"sweep.metric={metric}", "name=mine"]
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    assert yaml.safe_load((tmp_path / "outputs/mine/optimization_results.yaml").read_text())["best_value"] == best


def test_jobs_of_an_earlier_version_are_found_under_their_long_names(tmp_path, monkeypatch, counted):
    """It named a job by every choice, and sweep.json had no fixed settings."""
    sweep = tmp_path / "outputs" / "mine"
    names = [f"adapter.r={r},optimizer.lr=0.001" for r in (4, 8)]
    record_sweep(sweep, *names)
    make_job(sweep, names[0], 2.5)
    command = ["-m", "adapter.r=4,8", "optimizer.lr=1e-3", "name=mine"]
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    assert counted == ["adapter.r=8"]
    assert states(sweep) == {names[0]: "finished", "adapter.r=8": "finished"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter.r=4,abc"], "adapter.r=abc: expected a whole number"),
        (["adapter=cera,lorra"], "adapter=lorra: unknown adapter 'lorra'. Did you mean lora"),
        (["adapter.r=4,8", "adapter.kind=cera,lorra"], "adapter.kind=lorra: expected one of cera"),
        (["adapter.r=4,8", "train.batch_size=16,0"], "train.batch_size=0 must be positive"),
        (["+sweep=rank_lr", "optimizer.lrr=1,2"], "optimizer.lrr=1,2: unknown setting optimizer.lrr"),
        (["adapter.r=4,8", f"name={'x' * 300}"], "300 bytes are too long for a folder"),
        (["optimizer.lr=interval(1,2)"], "needs a sweeper that draws: hydra/sweeper=optuna"),
        (["adapter.r=4,8", "sweep.metric=gsm8k/exact"], "no job has this figure: add train.tasks=[gsm8k]."),
        (["adapter.r=4,8", "sweep.metric=gsm8k/rank", "train.tasks=[gsm8k]"], "gsm8k/rank: no job has this figure"),
        (
            [
                "adapter.r=4,8",
                "sweep.metric=jsonl/verified",
                "train.tasks=[jsonl]",
                "train.task_settings={jsonl: {files: [q.jsonl], grader: text}}",
            ],
            "jsonl/verified: no job has this figure: choose one of",
        ),
        (["adapter.r=4,8", "sweep.metric=best_update"], "choose one of eval/perplexity, best_perplexity, seconds,"),
        (["adapter.r=4,8", "train.tasks=[gsm9k]"], "train.tasks=[gsm9k]: there is no such task"),
        (["adapter.r=4,8", "launch.detach=true"], "launch.detach=true is for jobs that run elsewhere"),
        (["adapter.r=4,8", "hydra/launcher=slrum"], "hydra/launcher=slrum: unknown launcher 'slrum'"),
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
        (["data.train_files=[no.jsonl]"], "data.train_files=no.jsonl: cannot read the file: No such file or directory"),
        (["data.train_files=[rows.jsonl],[no.jsonl]"], "data.train_files=no.jsonl: cannot read the file"),
        (["data.train_files=[rows.csv]"], "data.train_files=rows.csv: unknown kind of file: expected .jsonl"),
        (["data.eval_files=[no.jsonl]"], "data.eval_files=no.jsonl: cannot read the file"),
        (["model.path=./no/such"], "model.path=./no/such: folder does not exist"),
        # Every value is tried in many jobs, and none of them is possible.
        (["data.train_files=[no.jsonl]", "train.seed=range(1,40)"], "data.train_files=no.jsonl: cannot read the file"),
    ],
)
def test_a_sweep_whose_files_are_missing_is_refused_once(tmp_path, monkeypatch, capfd, counted, arguments, message):
    for name in ("rows.jsonl", "rows.csv"):
        (tmp_path / name).write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 4)
    given = {argument.partition("=")[0]: argument for argument in ["adapter.r=range(1,40)", *FIXED, *arguments]}
    assert cera_train(monkeypatch, tmp_path, "-m", *given.values(), "name=mine") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "rows.csv"}
    assert not counted


def test_finished_jobs_need_their_files_no_more(tmp_path, monkeypatch, counted):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 4)
    command = ["-m", "adapter.r=4,8", *FIXED, "name=mine"]
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    (tmp_path / "rows.jsonl").unlink()
    assert cera_train(monkeypatch, tmp_path, *command) == 0
    assert len(counted) == 2


def test_a_value_that_is_impossible_beside_some_others_fails_in_its_jobs_alone(sweep_here, monkeypatch, counted):
    assert cera_train(monkeypatch, sweep_here, *TINY) == 1
    found = states(sweep_here / "outputs" / "tiny")
    assert list(found.values()) == ["failed", "finished", "finished", "finished"]
    assert found["adapter=lora,adapter.activation=relu"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+sweep=rank_lr"], r"\+sweep=rank_lr is a grid of runs: add -m"),
        (["-m", "+sweep=rank_l"], "unknown sweep 'rank_l'. Did you mean rank_lr"),
        (["-m", "sweep=rank_lr"], r"a sweep is added with a plus sign: write \+sweep=rank_lr"),
        (["-m", "adapter.r=2,4", "name=r${adapter.r}"], "name=... is the folder of all jobs"),
        (["-m", "name=a,b"], "name=a,b is another for each job"),
        (["-m", "output_dir=a,b"], "output_dir=a,b is another for each job"),
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
    assert re.search(message, line), line
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"run", "swept"}


@pytest.mark.slow
def test_optuna_minimises_the_perplexity_and_counts_a_failure(sweep_here):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper")
    sampler = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    command = [
        *("--config-dir", "conf", "-m", "+sweep=tiny", *sampler, "hydra.sweeper.sampler.seed=1"),
        *("adapter=cera", "adapter.activation=silu", "optimizer.lr=tag(log,interval(1e-3,1e-1))"),
    ]
    process = start(*command, cwd=sweep_here)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    sweep = sweep_here / "outputs" / "tiny"
    jobs = read_sweep(sweep)
    assert [job.state for job in jobs] == ["finished"] * 3
    (best,) = best_jobs(jobs)
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert found["best_value"] == best.value == min(job.value for job in jobs)
    assert f"optimizer.lr={found['best_params']['optimizer.lr']}" in best.choices
    assert f"best       outputs/tiny/{best.name}: perplexity" in output

    # One of two trials is impossible: the study continues.
    sampler = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"]
    command = [
        *command[:4],
        *sampler,
        "adapter=cera",
        "adapter.activation=silu",
        "adapter.dropout=1.5,0.0",
        "name=failing",
    ]
    process = start(*command, cwd=sweep_here)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    assert sorted(states(sweep_here / "outputs" / "failing").values()) == [State.failed, State.finished]
    assert "Error executing job" not in errors
