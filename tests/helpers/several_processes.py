"""Runs in several processes, as torchrun starts them. As a script it trains the configs of
runs.json one after the other, so that each process pays its imports once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from commands import python


def popen(*command: object, cwd: Path) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], cwd=cwd, **pipes)


def train_in_processes(runs: list[list[str]], processes: int, cwd: Path, *words: str) -> str:
    """Trains the configs of these overrides, scaling gradients at the word "scaled"; returns what
    was printed."""
    (cwd / "runs.json").write_text(json.dumps(runs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return python(*torchrun, __file__, *words, cwd=cwd)


def cut_copy(run: Path, folder: Path, update: int) -> None:
    """A copy of a finished run, as if it had been killed after a checkpoint."""
    shutil.copytree(run, folder)
    (folder / "result.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name) > update:
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    import pytest
    from tiny_runs import scale_gradients

    from cera_train.cli.compose import compose
    from cera_train.training.train import train

    with pytest.MonkeyPatch.context() as patch:
        if "scaled" in sys.argv:
            scale_gradients(patch)
        for overrides in json.loads(Path("runs.json").read_text()):
            train(compose(*overrides))
