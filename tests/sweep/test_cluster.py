"""What goes to a cluster; tests/integrations/test_slurm.py has a real one."""

import textwrap
from types import SimpleNamespace

import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from made_sweeps import make_job, record_job

pytest.importorskip("submitit")

from cera_train.common.settings import to_plain

GRID = ["-m", "adapter=cera,lora", "adapter.r=2,4", "name=grid", "hydra/launcher=slurm_gpu"]


@pytest.fixture
def submitted(monkeypatch):
    """The choices of the jobs that go to the cluster; each is lost there."""
    jobs = []

    def map_array(executor, launcher, job_overrides, *_):
        for overrides in job_overrides:
            jobs.append(",".join(word for word in overrides if word.startswith("adapter")))
        return [
            SimpleNamespace(results=lambda: [JobReturn(status=JobStatus.COMPLETED)])
            for _ in job_overrides
        ]

    monkeypatch.setattr("submitit.AutoExecutor.map_array", map_array)
    # Do not look for srun.
    monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda executor: 1))
    monkeypatch.setattr("cera_train.cli.cluster.replace_waiting", lambda detach: None)
    return jobs


def test_finished_jobs_are_not_submitted_again(tmp_path, run_command, capsys, submitted, compose):
    grid = tmp_path / "outputs" / "grid"

    def finish(name: str) -> None:
        config = to_plain(compose("+recipe=quickstart", *name.split(",")))
        (make_job(grid, name, 1.5) / "config.yaml").write_text(yaml.safe_dump(config))

    finish("adapter=cera,adapter.r=2")
    make_job(grid, "adapter=cera,adapter.r=4")  # cut
    finish("adapter=lora,adapter.r=2")
    record_job(grid, "adapter=lora,adapter.r=2", error=None)
    assert run_command("cera-train", *GRID) == 1
    assert submitted == ["adapter=cera,adapter.r=4", "adapter=lora,adapter.r=4"]
    assert "finished   2 of 4 jobs, which are not started again" in capsys.readouterr().out

    for name in submitted:
        finish(name)
    submitted.clear()
    assert run_command("cera-train", *GRID) == 0
    assert submitted == []


@pytest.fixture
def batch_script(tmp_path, monkeypatch):
    """The batch script that sbatch got last. It refuses all."""
    sbatch = """\
        #!/bin/sh
        cp "$1" script
        echo "sbatch: error: invalid partition specified: nope" >&2
        echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2
        exit 1
    """
    for name, text in {"sbatch": textwrap.dedent(sbatch), "srun": ""}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "script"


def test_what_sbatch_refuses_is_one_line(run_command, capsys, batch_script):
    assert run_command("cera-train", *GRID, "hydra.launcher.partition=nope") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "cera-train: hydra/launcher: sbatch submitted no job: Batch job submission failed: Invalid "
        "partition name specified. Change hydra.launcher.NAME=..."
    )


def test_a_users_setup_keeps_that_a_failed_task_ends_the_others(run_command, batch_script):
    run_command("cera-train", *GRID, "hydra.launcher.setup=[module load cuda]")
    assert "\nexport SLURM_KILL_BAD_EXIT=1\nmodule load cuda\n" in batch_script.read_text()
