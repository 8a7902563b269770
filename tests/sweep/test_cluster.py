"""What goes to a cluster; tests/integrations/test_slurm.py has a real one."""

import textwrap

import pytest

pytest.importorskip("submitit")

GRID = ["-m", "adapter=cera,lora", "adapter.r=2,4", "name=grid", "hydra/launcher=slurm_gpu"]


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


def test_what_sbatch_gets_and_that_its_refusal_is_one_line(run_command, capsys, batch_script):
    words = ["hydra.launcher.partition=nope", "hydra.launcher.setup=[module load cuda]"]
    assert run_command("cera-train", *GRID, *words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "cera-train: hydra/launcher: sbatch submitted no job: Batch job submission failed: Invalid "
        "partition name specified. Change hydra.launcher.NAME=..."
    )
    # A failed task ends the others, also with a user's setup.
    assert "\nexport SLURM_KILL_BAD_EXIT=1\nmodule load cuda\n" in batch_script.read_text()
