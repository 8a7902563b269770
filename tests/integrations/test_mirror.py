"""cluster/mirror.py keeps in a bucket, or any other folder, a copy of outputs/ to resume from: a
killed run continues elsewhere to the same end."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from tiny_runs import losses_of, wait_until

from cera_train.common.files import read_yaml, write_checksums

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


spec = importlib.util.spec_from_file_location("mirror", CLUSTER / "mirror.py")
mirror = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mirror)


def write_checkpoint(run: Path, update: int) -> None:
    folder = run / "checkpoints" / str(update)
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "progress.json"):
        (folder / name).write_text(f"{name} {update}")
    write_checksums(folder)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{update}\n")


def assert_resumes(copy: Path) -> None:
    """Nothing in a copy depends on something missing."""
    lines = (
        (copy / "metrics.jsonl").read_text().split() if (copy / "metrics.jsonl").exists() else []
    )
    for checkpoint in copy.glob("checkpoints/*"):
        names = {path.name for path in checkpoint.iterdir()}
        assert names <= {"checksums.json"} or checkpoint.name in lines
        assert not names or "checksums.json" in names
    if (copy / "result.json").exists():
        assert (copy / "adapter" / "adapter_model.safetensors").exists()
        assert (copy / "checkpoints" / "20" / "progress.json").exists()


def test_a_copy_interrupted_anywhere_resumes(tmp_path, monkeypatch):
    run = tmp_path / "outputs"
    copyfile = shutil.copyfile
    write_checkpoint(run, 10)
    write_checkpoint(run, 20)
    (run / "adapter").mkdir()
    for name in ("adapter/adapter_model.safetensors", "result.json", ".lock", ".writing-30"):
        (run / name).write_text(name)
    files = len(list(run.rglob("*.*"))) - 2
    for cut_after in range(files + 1):
        copied = []

        def copy_some(source, target, cut_after=cut_after, copied=copied):
            if len(copied) == cut_after:
                raise OSError("the machine is gone")
            copied.append(target)
            copyfile(source, target)

        monkeypatch.setattr(shutil, "copyfile", copy_some)
        copy = tmp_path / f"copy-{cut_after}"
        copy.mkdir()
        here = mirror.Mirror(run, copy)
        if cut_after < files:
            with pytest.raises(OSError, match="gone"):
                here.update()
        else:
            here.update()
            here.update()  # nothing has changed: nothing is copied
        assert_resumes(copy)
        assert len([path for path in copy.rglob("*") if path.is_file()]) == cut_after
        monkeypatch.setattr(shutil, "copyfile", copyfile)
        (fresh := tmp_path / f"fresh-{cut_after}").mkdir()
        mirror.Mirror(fresh, copy)
        # A run refuses to start if all its checkpoints are damaged, like a single one whose copying
        # was interrupted.
        assert not [
            folder for folder in fresh.glob("checkpoints/*") if len(list(folder.iterdir())) < 4
        ]


def test_an_interrupted_restore_leaves_nothing_partial_and_the_next_one_completes_it(
    tmp_path, monkeypatch
):
    run = tmp_path / "outputs"
    copy = tmp_path / "copy"
    write_checkpoint(copy, 10)
    run.mkdir()
    (run / "metrics.jsonl").write_text("10\n11\n")  # newer than the bucket's

    def copy_a_part(source, target):
        Path(target).write_text(Path(source).read_text()[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy_a_part)
        with pytest.raises(KeyboardInterrupt):
            mirror.Mirror(run, copy)
    before = {path: path.read_bytes() for path in copy.glob("checkpoints/10/*")}
    mirror.Mirror(run, copy).update()
    assert {path: path.read_bytes() for path in copy.glob("checkpoints/10/*")} == before
    assert all(
        (run / path.relative_to(copy)).read_bytes() == content for path, content in before.items()
    )
    assert (run / "metrics.jsonl").read_text() == (copy / "metrics.jsonl").read_text() == "10\n11\n"


def run_mirror(folder: Path, bucket: Path, script: str) -> subprocess.Popen:
    command = [sys.executable, str(CLUSTER / "mirror.py"), str(bucket), "bash", "-c", script]
    with (folder / "err").open("w") as errors:
        return subprocess.Popen(command, cwd=folder, stderr=errors)


def test_a_signal_reaches_the_command_and_its_last_files_reach_the_bucket(tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    trap = "trap 'echo saved > outputs/log; exit 143' TERM"
    process = run_mirror(
        tmp_path, bucket, f"{trap}; mkdir -p outputs; touch ready; while :; do sleep 0.02; done"
    )
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert (bucket / "log").read_text() == "saved\n"


def test_a_killed_command_exits_with_its_signal_and_a_missing_bucket_fails_at_once(tmp_path):
    assert run_mirror(tmp_path, tmp_path, "kill -KILL $$").wait(timeout=60) == 137
    process = run_mirror(tmp_path, tmp_path / "missing", "touch started")
    assert process.wait(timeout=60) == 1
    assert "missing/.probe" in (tmp_path / "err").read_text()
    assert not (tmp_path / "started").exists()


def test_a_run_that_writes_elsewhere_is_refused(tmp_path, capsys):
    """Nothing of it would reach the bucket."""
    assert (
        mirror.main(str(tmp_path), "touch", str(tmp_path / "started"), "output_dir=/scratch") == 2
    )
    assert "output_dir=/scratch: only outputs/ is copied" in capsys.readouterr().err
    assert not (tmp_path / "started").exists()


@pytest.mark.slow
def test_a_killed_machine_loses_nothing(tiny_folder, tmp_path):
    """SIGKILL to everything that the run script started; another machine begins with an empty disk
    and the bucket."""
    arguments = [f"model.path={tiny_folder}", *TINY, "name=run", "train.batch_size=16"]
    arguments += ["train.max_updates=60", "train.eval_every=20", "train.save_every=5"]
    bucket = tmp_path / "bucket"
    bucket.mkdir()

    def start(machine: str) -> subprocess.Popen:
        activate = tmp_path / machine / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
        (tmp_path / machine / "cluster").symlink_to(CLUSTER)
        script = read_yaml(CLUSTER / "sky.yaml")["run"].replace(" /bucket ", f" {bucket} ")
        environment = os.environ | {
            "ARGUMENTS": shlex.join(arguments),
            "MIRROR_SECONDS": "0.2",
            "OMP_NUM_THREADS": "1",
        }
        where = {"cwd": tmp_path / machine, "env": environment, "start_new_session": True}
        with (tmp_path / f"{machine}.log").open("w") as log:
            return subprocess.Popen(["bash", "-c", script], stdout=log, stderr=log, **where)

    first = start("first")
    saved = "run/checkpoints/*"
    wait_until(lambda: any(map(mirror._is_whole, bucket.glob(saved))), seconds=240, every=0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (bucket / "run" / "result.json").exists()

    assert start("second").wait(timeout=240) == 0, (tmp_path / "second.log").read_text()
    assert re.search(r"60 updates of 16 sequences, \d+ done", (tmp_path / "second.log").read_text())
    there = bucket / "run"
    assert (there / "result.json").exists()
    assert len(losses_of(there)) == 60
