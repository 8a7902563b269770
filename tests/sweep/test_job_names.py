"""The names of jobs' folders: what varies, never shared, plain."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

from cera_train.cli.mistakes import with_folder_quoted
from cera_train.common.settings import leaves
from cera_train.settings.run import Config
from cera_train.sweep.folder import LONGEST_NAME, choices_of, job_name


def test_a_job_is_named_by_what_varies_in_any_order():
    job = ["adapter.r=64", "data=jsonl", "data.completion=' {answer}'", "optimizer.lr=0.0003", "name=mine"]
    swept = ["optimizer.lr", "adapter.r"]
    assert job_name(job, swept) == job_name(reversed(job), swept) == "adapter.r=64,optimizer.lr=0.0003"
    assert job_name(["+recipe=math_r64", "name=main"], swept=["recipe"]) == "recipe=math_r64"


def test_a_job_of_a_sweep_in_which_nothing_varies_is_named_by_its_choices():
    job = ["optimizer.lr=0.0003", "+sweep=rank_lr", "adapter=cera", "++adapter.r=64", "name=rank_lr", "tracker=wandb"]
    assert job_name(job) == job_name(reversed(job)) == "adapter=cera,adapter.r=64,optimizer.lr=0.0003"
    assert job_name(["+recipe=quickstart", "name=a"]) == "default"
    assert choices_of(["adapter.alpha=$\\{adapter.r\\}"]) == ["adapter.alpha=${adapter.r}"]


def test_a_setting_that_changes_no_result_names_a_job_only_where_it_is_swept():
    keys = [leaf.key for leaf in leaves(Config) if leaf.changes in ("cost", "nothing")]
    assert len(keys) > 20
    for key in keys:
        job = ["adapter.r=64", f"{key}=1"]
        assert job_name(job) == "adapter.r=64"
        assert job_name(job, swept=["adapter.r", key]) == ",".join(sorted(job))


ODD = [
    ["adapter.target_modules=[q_proj,v_proj]"],
    ["adapter.target_modules='q_proj,v_proj'"],
    ["adapter.target_modules=q_proj-v_proj"],
    ["data.prompt='Q: {question}'"],
    ["data.prompt='Q? {question}'"],
    ["data.prompt=../../etc/passwd"],
    ["data.prompt=Größe"],
    ["data.train_files=[/data/train.jsonl]", "data.eval_rows=5"],
    ["adapter.alpha=$\\{adapter.r\\}"],
    ["~train.seed"],
    [f"data.prompt={'x' * 300}1"],
    [f"data.prompt={'x' * 300}2"],
    [f"train.seed={seed}" for seed in range(40)],
    ["optimizer.lr=1e-05"],
    ["optimizer.lr=-1e-05"],
    ["model.path=https://user:hf_abcdefghijkl@host/model"],
    ["model.path=https://user:other@host/model"],
]


def test_no_two_jobs_share_a_folder_and_every_name_is_plain_and_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_abcdefghijkl")
    names = [job_name(job) for job in ODD]
    for one, other in combinations(names, 2):
        assert one != other
    for name in names:
        assert re.fullmatch(r"[\w=+][\w.=,+-]*", name, re.ASCII), name
        assert len(name) <= LONGEST_NAME
        assert "hf_abc" not in name
        (tmp_path / name).mkdir()
    assert names[0].startswith("adapter.target_modules=q_proj-v_proj-")


def test_a_folder_with_commas_is_one_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = "outputs/rank_lr/adapter=cera,adapter.r=64"
    Path(folder).mkdir(parents=True)
    assert with_folder_quoted(f"run={folder}") == f"run='{folder}'"
    for argument in (f"run={folder}0", "adapter=cera,lora", "run=outputs/rank_lr", "-m", f"run='{folder}'"):
        assert with_folder_quoted(argument) == argument
