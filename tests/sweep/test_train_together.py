"""hydra/launcher=together: a launcher and nothing else. What jobs leave is what they leave by Hydra's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_sweeps import cera_train, states

from cera_train.common.errors import UserError
from cera_train.planning import together as planning
from cera_train.planning.plan import memory_of_arm, most_arms
from cera_train.settings.planning import GpuKind, PlanConfig
from cera_train.settings.run import PlanRun
from cera_train.sweep.record import RECORD
from cera_train.sweep.table import read_sweep
from cera_train.training.together import describe_packs, pack_jobs, why_alone


@pytest.fixture
def sweep(tmp_path, tiny_folder, monkeypatch):
    """sweep("adapter.r=2,4", ...) -> exit status of a sweep of the tiny model."""

    def sweep(*arguments: str) -> int:
        fixed = (f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256", "train.batch_size=16")
        short = ("train.max_updates=3", "train.eval_every=null", "train.save_every=null", "adapter.dropout=0")
        return cera_train(monkeypatch, tmp_path, "-m", *fixed, *short, *arguments)

    return sweep


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_jobs_leave_what_they_leave_by_hydras_own_launcher(sweep, tmp_path, capsys):
    grid = ("adapter=cera,lora,dora", "train.seed=0,1", "adapter.r=2")
    assert sweep(*grid, "name=together", "hydra/launcher=together") == 0
    output = capsys.readouterr().out
    assert "together   4 jobs share a base, 2 alone (adapter.kind=dora)\n" in output
    assert (
        "jobs       1 adapter=cera,train.seed=0, 2 adapter=cera,train.seed=1, 3 adapter=lora,train.seed=0, " in output
    )
    assert sweep(*grid, "name=apart") == 0
    together, apart = tmp_path / "outputs" / "together", tmp_path / "outputs" / "apart"
    assert files_of(together) == files_of(apart)
    records = [json.loads((folder / RECORD).read_text()) for folder in (together, apart)]
    assert [job["name"] for job in records[0]["jobs"]] == [job["name"] for job in records[1]["jobs"]]
    for ours, theirs in zip(read_sweep(together), read_sweep(apart), strict=True):
        assert (ours.name, ours.state) == (theirs.name, theirs.state)
        results = [json.loads((folder / ours.name / "result.json").read_text()) for folder in (together, apart)]
        assert results[0].keys() == results[1].keys()
        assert results[0]["eval/perplexity"] == pytest.approx(results[1]["eval/perplexity"], rel=1e-5)


@pytest.mark.slow
def test_what_is_finished_is_not_run_again_and_a_mistake_is_its_jobs_own(sweep, tmp_path, capsys):
    grid = ("adapter=cera,lora", "adapter.activation=silu,relu", "adapter.r=2", "name=sweep", "hydra/launcher=together")
    assert sweep(*grid) == 1  # LoRA has no gate
    failing = "adapter=lora,adapter.activation=relu"
    expected = {name: "failed" if name == failing else "finished" for name in states(tmp_path / "outputs" / "sweep")}
    assert states(tmp_path / "outputs" / "sweep") == expected
    assert "only adapter.kind=cera has adapter.activation" in capsys.readouterr().err
    assert sweep(*grid, "launch.together=2") == 1
    output = capsys.readouterr().out
    assert output.count("Its result stands") == 3
    assert "2 jobs share a base, 1 alone" in output


@pytest.mark.slow
def test_a_halving_trains_its_rungs_together(sweep, tmp_path, capsys):
    halving = ("adapter.r=2", "hydra/sweeper=halving", "hydra.sweeper.first=1", "optimizer.lr=1e-4,1e-3,1e-2,1e-1")
    assert sweep("adapter=cera,lora", *halving, "name=halved", "hydra/launcher=together", "launch.together=8") == 0
    assert "8 jobs share a base" in capsys.readouterr().out
    assert sorted(states(tmp_path / "outputs" / "halved").values()).count("finished") == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["launch.together=2"], "launch.together=2: jobs train together with hydra/launcher=together here, or on a"),
        (["launch.together=0", "hydra/launcher=together"], "launch.together=0 must be auto or a positive number."),
        (["launch.together=auto", "hydra/launcher=slurm_cpu"], "launch.together=auto: the memory of the cluster's"),
        (["launch.together=2", "hydra/launcher=slurm_node"], "launch.together=2: jobs that train together share one"),
        (["launch.processes=2", "hydra/launcher=together"], "jobs that train together share one process, and these"),
        (
            ["launch.together=2", "hydra/launcher=together", "adapter=dora"],
            "launch.together=2: no jobs share a base, 2 alone (adapter.kind=dora). Leave it out.",
        ),
        (
            ["launch.together=2", "hydra/launcher=local", "adapter=dora"],
            "launch.together=2: no jobs share a base, 2 alone (adapter.kind=dora). Leave it out.",
        ),
    ],
)
def test_refusals(sweep, tmp_path, capsys, arguments, error):
    assert sweep("adapter.r=2,4", "name=refused", *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert error in lines[0]
    assert not list(tmp_path.glob("outputs/refused/*/metrics.jsonl"))


# --- which jobs share a base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("adapter=dora", "adapter.kind=dora"),
        ("adapter.experts=true", "adapted experts"),
        ("+adapter.settings.bias=all", "adapter.settings"),
        ("train.compile=true", "train.compile=true"),
        ("model.dtype=float16", "model.dtype=float16"),
        ("model.quantization=int8", "model.quantization=int8"),
        ("model.quantization=nf4", ""),
        ("adapter=rslora", ""),
        ("adapter.mix=learned", ""),
    ],
)
def test_what_trains_alone(tiny_config, override, reason):
    assert why_alone(tiny_config(override)) == reason


def test_jobs_on_one_base_may_differ_in_all_but_base_rows_and_batch(tiny_config):
    free = ("adapter.r=2", "optimizer.lr=1", "train.seed=4", "train.max_updates=3", "tracker=tensorboard", "name=x")
    bound = ("model.dtype=bfloat16", "data.max_length=128", "train.batch_size=8", "data.eval_rows=3")
    jobs = [tiny_config(override) for override in (*free, *bound, "train.epochs=9")]
    packs = pack_jobs(jobs, len)
    assert [pack.jobs for pack in packs] == [[0, 1, 2, 3, 4, 5, 10], [6], [7], [8], [9]]
    assert describe_packs(packs) == "7 jobs share a base, 4 alone"
    packs = pack_jobs(jobs, lambda _: 3)
    assert [pack.jobs for pack in packs][:3] == [[0, 1, 2], [3, 4, 5], [6]]


def test_as_many_runs_share_a_base_as_fit_by_plan(tiny_config, monkeypatch):
    config = tiny_config("adapter.r=8")
    planned = PlanRun(**vars(config), plan=PlanConfig(gpu=GpuKind.cpu))
    shared, own = memory_of_arm(planned)
    trainable = 2 * 2 * 8 * (32 + 32) - 2 * 8 * 16  # q and v of two layers, v is half as wide
    assert own == trainable * (4 + 4 + 8)  # weights, gradients, two moments

    def leave_memory(size: float) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=size / planning.USABLE))

    leave_memory(shared + 3.5 * own)
    assert planning.arms_that_fit([config] * 8) == 3
    assert most_arms(planned, (shared + 3.5 * own) / planning.USABLE) == 3
    assert planning.arms_that_fit([config] * 2) == 2
    with pytest.raises(UserError, match=r"launch.together=auto cannot be planned: .*Or set launch.together=8"):
        planning.arms_that_fit([tiny_config("adapter.r=512")])
    leave_memory(1)
    assert planning.arms_that_fit([config] * 8) == 1
    wide = replace(config, adapter=replace(config.adapter, r=16))
    shared, more = memory_of_arm(replace(planned, adapter=wide.adapter))
    leave_memory(shared + more + 1.5 * own)
    assert planning.arms_that_fit([config, wide, config]) == 2


@pytest.mark.slow
def test_jobs_of_a_cluster_train_several_jobs_of_the_sweep(sweep, tmp_path):
    pytest.importorskip("submitit")
    grid = ("adapter=cera,dora", "adapter.r=2,4", "name=packed", "hydra.launcher.gpus_per_node=0")
    assert sweep(*grid, "hydra/launcher=local", "launch.together=2") == 0
    folder = tmp_path / "outputs" / "packed"
    assert set(states(folder).values()) == {"finished"}
    logs = [path.read_text() for path in (folder / ".submitit").glob("*/*_log.out")]
    assert len(logs) == 3
    assert sum("2 jobs share a base" in log for log in logs) == 1
