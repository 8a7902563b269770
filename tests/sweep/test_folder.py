"""A sweep's folder: how its jobs are named, which settings they share, the state of every job and
the table that shows it, which job is the best; and sweeps that are refused before a job begins."""

import os
import re
from pathlib import Path

import pytest
import yaml
from made_files import write_json
from made_sweeps import FIXED, content_of, make_job, record_job, record_sweep, states

from cera_train.cli.mistakes import with_texts_quoted
from cera_train.common.files import read_yaml
from cera_train.common.settings import to_plain
from cera_train.settings.run import Config
from cera_train.sweep.folder import (
    LONGEST_NAME,
    best_jobs,
    job_choices,
    job_name,
    read_sweep,
)


@pytest.fixture
def counted(monkeypatch) -> list[Config]:
    """The configs of the runs that were started. They train nothing and finish: the higher the
    rank, the lower the perplexity, and the accuracy too."""
    begun = []

    def launch(config: Config) -> dict:
        folder = Path(config.output_dir) / config.name
        rank = config.adapter.r
        result = {
            "updates": 20,
            "eval/perplexity": 1 + 1 / rank,
            "gsm8k/exact": 1 / rank,
        }
        if not (folder / "result.json").exists():
            begun.append(config)
            make_job(folder.parent, folder.name)
            (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
            write_json(folder / "result.json", result)
        return result

    monkeypatch.setattr("cera_train.training.train.launch", launch)
    return begun


def test_a_job_is_named_by_what_varies_in_any_order():
    job = [
        "adapter.r=64",
        "data=jsonl",
        "data.completion=' {answer}'",
        "optimizer.lr=0.0003",
        "name=mine",
    ]
    swept = ["optimizer.lr", "adapter.r"]
    assert (
        job_name(job, swept) == job_name(reversed(job), swept) == "adapter.r=64,optimizer.lr=0.0003"
    )
    assert job_name(["+recipe=math_r64", "name=main"], swept=["recipe"]) == "recipe=math_r64"
    # Where nothing varies, by every choice.
    job = [
        "optimizer.lr=0.0003",
        "+sweep=rank_lr",
        "adapter=cera",
        "++adapter.r=64",
        "name=rank_lr",
        "tracker=wandb",
    ]
    assert (
        job_name(job) == job_name(reversed(job)) == "adapter=cera,adapter.r=64,optimizer.lr=0.0003"
    )
    assert job_name(["+recipe=quickstart", "name=a"]) == "default"
    assert job_choices(["adapter.alpha=$\\{adapter.r\\}"]) == ["adapter.alpha=${adapter.r}"]


ODD = [
    ["adapter.target_modules=[q_proj,v_proj]"],
    ["adapter.target_modules=q_proj-v_proj"],
    ["data.prompt=../../etc/passwd"],
    ["data.train_files=[/data/train.jsonl]", "data.eval_rows=5"],
    ["adapter.alpha=$\\{adapter.r\\}"],
    ["~train.seed"],
    [f"data.prompt={'x' * 300}1"],
    [f"data.prompt={'x' * 300}2"],
    [f"train.seed={seed}" for seed in range(40)],
    ["model.path=https://user:hf_abcdefghijkl@host/model"],
    ["model.path=https://user:other@host/model"],
]


def test_no_two_jobs_share_a_folder_and_every_name_is_plain_and_without_secrets(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MY_TOKEN", "hf_abcdefghijkl")
    names = [job_name(job) for job in ODD]
    for name in names:
        assert re.fullmatch(r"[\w=+][\w.=,+-]*", name, re.ASCII), name
        assert len(name) <= LONGEST_NAME
        assert "hf_abc" not in name
        (tmp_path / name).mkdir()  # fails where another has the name
    assert names[0].startswith("adapter.target_modules=q_proj-v_proj-")


@pytest.mark.parametrize(
    "folder", ["outputs/rank_lr/adapter=cera,adapter.r=64", "outputs/größe", "outputs/run (2)"]
)
def test_a_folder_with_signs_of_hydras_is_one_argument(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(parents=True)
    Path("outputs/rank_lr").mkdir(exist_ok=True)
    words = [f"run={folder}", "run=outputs/rank_lr", "run=a,b", f"run='{folder}'"]
    quoted = with_texts_quoted("cera-eval", words, may_sweep=True)
    assert quoted == [f"run='{folder}'", *words[1:]]


def test_a_jobs_folder_is_named_by_what_varies_alone(tmp_path, run_command, counted):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 4)
    command = ["-m", "adapter.r=4,8", *FIXED, "name=mine"]
    assert run_command("cera-train", *command) == 0
    assert [config.name for config in counted] == ["adapter.r=4", "adapter.r=8"]
    # The same, of which one dimension is fixed this time; and with one dimension more.
    assert run_command("cera-train", "-m", "adapter.r=4", *FIXED, "name=mine") == 0
    assert len(counted) == 2
    assert (
        run_command("cera-train", "-m", "adapter.r=4", "train.seed=1,2", *FIXED, "name=mine") == 0
    )
    assert [config.name for config in counted[2:]] == [
        "adapter.r=4,train.seed=1",
        "adapter.r=4,train.seed=2",
    ]
    assert set(states(tmp_path / "outputs" / "mine").values()) == {"finished"}
    (tmp_path / "rows.jsonl").unlink()  # finished jobs need it no more
    assert run_command("cera-train", *command) == 0
    assert len(counted) == 4


def test_other_fixed_settings_in_the_same_folder_are_refused(tmp_path, run_command, counted, capfd):
    assert run_command("cera-train", "-m", "adapter.r=4,8", "optimizer.lr=1e-3", "name=mine") == 0
    before = content_of(tmp_path)
    capfd.readouterr()
    for other, shown in (
        (
            ["optimizer.lr=3e-3"],
            "optimizer.lr=0.001 recipe=quickstart; here optimizer.lr=0.003 recipe=quick",
        ),
        ([], "optimizer.lr=0.001 recipe=quickstart; here recipe=quickstart"),
        (["optimizer.lr=0.001", "+recipe=gsm8k_r64"], "here optimizer.lr=0.001 recipe=gsm8k_r64"),
    ):
        assert run_command("cera-train", "-m", "adapter.r=4,8", *other, "name=mine") == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "name=mine: outputs/mine holds a sweep with other fixed settings" in line
        assert shown in line
    assert content_of(tmp_path) == before
    # Where and how a run computes is free.
    free = ["optimizer.lr=0.001", "train.keep=1", "name=mine"]
    assert run_command("cera-train", "-m", "adapter.r=4,8", *free) == 0
    assert len(counted) == 2


def test_a_job_gets_the_sweeps_folder_whatever_its_recipe_is_named(
    sweep_here, run_command, counted, monkeypatch
):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    arguments = [
        "-m",
        "+recipe=math_r64,math_dora_r64",
        "name=main",
        "train.micro_batch_tokens=2048",
    ]
    assert run_command("cera-train", *arguments) == 0
    assert [(config.output_dir, config.name) for config in counted] == [
        ("outputs/main", "recipe=math_r64"),
        ("outputs/main", "recipe=math_dora_r64"),
    ]
    assert os.environ["WANDB_RUN_GROUP"] == "main"


def test_the_metric_decides_which_job_is_best(run_command, capfd, counted):
    command = [
        "-m",
        "adapter.r=4,2,8",
        "train.tasks=[gsm8k]",
        "sweep.metric=gsm8k/exact",
        "name=mine",
    ]
    assert run_command("cera-train", *command) == 0
    output = capfd.readouterr().out
    assert re.search(r"updates +gsm8k/exact\n", output)
    assert re.search(r"\nadapter.r=2 +finished +20/20 +50.0%  best\n", output)
    assert output.endswith("best       outputs/mine/adapter.r=2: gsm8k/exact 50.0%\n")
    run_command("cera-sweep", "outputs/mine")  # it needs no setting
    assert capfd.readouterr().out == output[output.rindex("sweep      outputs") :]


@pytest.mark.parametrize("metric", ["eval/perplexity", "gsm8k/exact"])
def test_optuna_gets_the_metric_and_its_direction(tmp_path, run_command, capfd, counted, metric):
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper"
    )
    sampler = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    sampler += ["hydra.sweeper.sampler.seed=0"]
    drawn = ["adapter.r=range(1,64)", "optimizer.lr=tag(log,interval(1e-3,1e-1))"]
    command = ["-m", *sampler, *drawn, "train.tasks=[gsm8k]", f"sweep.metric={metric}", "name=mine"]
    assert run_command("cera-train", *command) == 0
    jobs = read_sweep(tmp_path / "outputs" / "mine")
    assert [job.state for job in jobs] == ["finished"] * 3
    (best,) = best_jobs(jobs)
    assert best.value == (min if metric == "eval/perplexity" else max)(job.value for job in jobs)
    results = read_yaml(tmp_path / "outputs/mine/optimization_results.yaml")
    assert results["best_value"] == best.value
    assert f"optimizer.lr={results['best_params']['optimizer.lr']}" in best.name
    assert (
        f"best       outputs/mine/{best.name}: {metric.removeprefix('eval/')}"
        in capfd.readouterr().out
    )
    assert run_command("cera-train", *command) == 0  # draws the same again
    assert len(counted) == 3


def test_a_state_follows_from_what_lies_in_the_folder(tmp_path):
    expected = [
        ("adapter.r=2", "finished", "20/20", 2.5),
        ("adapter.r=4", "stopped", "5/20", 9.0),
        ("adapter.r=8", "failed", "5/20", 9.0),
        ("adapter.r=16", "failed", "", None),
        ("adapter.r=32", "waiting", "", None),
    ]
    record_sweep(tmp_path, *(name for name, *_ in expected))
    make_job(tmp_path, "adapter.r=2", 2.5)
    make_job(tmp_path, "adapter.r=4")
    make_job(tmp_path, "adapter.r=8", error="the loss is not finite")
    record_job(tmp_path, "adapter.r=16", "impossible")
    jobs = read_sweep(tmp_path)  # in the order of the grid
    assert [(job.name, job.state, job.progress, job.value) for job in jobs] == expected
    assert jobs[2].error == "the loss is not finite"


def test_the_best_is_of_finished_jobs_on_the_same_rows(tmp_path):
    names = ["data=a,adapter.r=2", "data=a,adapter.r=4", "data=a,adapter.r=8", "data=b,adapter.r=2"]
    record_sweep(tmp_path, *names)
    for name, perplexity in zip(names, (2.5, 2.4, None, 3.5), strict=True):
        make_job(tmp_path, name, perplexity, rows=name[5])
    assert [job.name for job in best_jobs(read_sweep(tmp_path))] == [names[1], names[3]]
