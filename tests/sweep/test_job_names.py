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


def test_a_job_of_a_sweep_in_which_nothing_varies_is_named_by_its_choices():
    job = ["optimizer.lr=0.0003", "+sweep=rank_lr", "adapter=cera", "adapter.r=64", "name=rank_lr", "tracker=wandb"]
    assert job_name(job) == "adapter=cera,adapter.r=64,optimizer.lr=0.0003"
    assert job_name(reversed(job)) == job_name(job)
    assert job_name(["++adapter.r=64"]) == job_name(["adapter.r=64"]) == "adapter.r=64"
    assert job_name(["+recipe=quickstart", "name=a"]) == "default"


def test_a_setting_that_changes_no_result_names_a_job_only_where_it_is_swept():
    keys = [leaf.key for leaf in leaves(Config) if leaf.changes in ("cost", "nothing")]
    assert len(keys) > 20
    for key in keys:
        job = ["adapter.r=64", f"{key}=1"]
        assert job_name(job) == "adapter.r=64"
        assert job_name(job, swept=[key]) == f"{key}=1"
        assert job_name(job, swept=["adapter.r", key]) == ",".join(sorted(job))


def test_a_swept_recipe_names_its_job():
    assert job_name(["+recipe=math_r64", "name=main"], swept=["recipe"]) == "recipe=math_r64"


ODD = [
    ["adapter.target_modules=[q_proj,v_proj]"],
    ["adapter.target_modules=[q_proj,v_proj,o_proj]"],
    ["adapter.target_modules='q_proj,v_proj'"],
    ["adapter.target_modules='.*(q|v)_proj'"],
    ["adapter.target_modules=q_proj-v_proj"],
    ["data.prompt='Q: {question}'"],
    ["data.prompt='Q? {question}'"],
    ["data.prompt=../../etc/passwd"],
    ["data.train_files=[/data/train.jsonl]", "data.eval_rows=5"],
    ["data.train_files=[/data/train.jsonl,/data/more.jsonl]"],
    ["data.prompt=Größe"],
    ["adapter.alpha=$\\{adapter.r\\}"],
    ["~train.seed"],
    [f"data.prompt={'x' * 300}1"],
    [f"data.prompt={'x' * 300}2"],
    [f"data.prompt={'ä' * 300}"],
    [f"train.seed={seed}" for seed in range(40)],
    ["optimizer.lr=1e-05"],
    ["optimizer.lr=-1e-05"],
    ["adapter.r=64"],
    ["adapter.r=64,"],
]


def test_no_two_jobs_share_a_folder_and_every_name_is_one_plain_name(tmp_path):
    names = [job_name(job) for job in ODD]
    for one, other in combinations(names, 2):
        assert one != other
    for name in names:
        assert re.fullmatch(r"[\w.=,+-]+", name, re.ASCII), name
        assert len(name) <= LONGEST_NAME
        assert not name.startswith((".", "-"))
        (tmp_path / name).mkdir()
    assert job_name(ODD[0]).startswith("adapter.target_modules=q_proj-v_proj-")
    assert job_name(ODD[0]) == job_name(ODD[0])


def test_a_secret_names_no_folder(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_abcdefghijkl")
    name = job_name(["model.path=https://user:hf_abcdefghijkl@host/model"])
    assert "hf_abc" not in name
    assert "user" not in name
    assert name != job_name(["model.path=https://user:other@host/model"])


def test_interpolations_read_as_they_were_typed():
    assert choices_of(["adapter.alpha=$\\{adapter.r\\}"]) == ["adapter.alpha=${adapter.r}"]


def test_a_folder_with_commas_is_one_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = "outputs/rank_lr/adapter=cera,adapter.r=64"
    Path(folder).mkdir(parents=True)
    assert with_folder_quoted(f"run={folder}") == f"run='{folder}'"
    for argument in (f"run={folder}0", "adapter=cera,lora", "run=outputs/rank_lr", "-m", f"run='{folder}'"):
        assert with_folder_quoted(argument) == argument
