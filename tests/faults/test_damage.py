"""Damaged checkpoints: each is found and named, and the run then comes out as if nothing had been."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from attempts import content, finish, newest_first, refuse

from cera_train.common.files import WRITING, find_damage, write_checksums, write_folder
from cera_train.runs.folder import RunFolder

pytest_plugins = ("attempts",)


@pytest.fixture
def run(cut, tmp_path) -> Path:
    """A copy of the folder of the run that was killed."""
    return Path(shutil.copytree(cut, tmp_path / "outputs" / "run"))


def flip_a_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    path.write_bytes(damaged)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damage_to_any_file_of_a_folder_is_found(tmp_path, damage):
    folder = tmp_path / "folder"
    for name in ("a", "b", "checksums.json") * 10:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in ("a", "b"):
            (folder / file).write_bytes(random.randbytes(50))
        write_checksums(folder)
        assert find_damage(folder) is None
        damage(folder / name)
        assert find_damage(folder) or (name == "checksums.json" and damage is Path.unlink)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [("optimizer.pt", flip_a_bit, "checksum differs"), ("progress.json", Path.unlink, "No such file")],
)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, start, uninterrupted, name, damage, reason):
    newest, second, _ = newest_first(run)
    damage(newest / name)
    output = finish(start()).output
    (line,) = [line for line in output.splitlines() if line.startswith("damaged ")]
    assert f"{newest.relative_to(run.parents[1])} ({name}: {reason}" in line
    assert line.endswith(f"Resuming from {second.relative_to(run.parents[1])}.")
    assert content(run) == uninterrupted


@pytest.mark.slow
def test_a_run_without_a_sound_checkpoint_is_refused_and_named(run, start, uninterrupted):
    for checkpoint in newest_first(run):
        truncate(checkpoint / "optimizer.pt")
    before = content(run)
    for resume in ("auto", f"outputs/run/checkpoints/{newest_first(run)[0].name}"):
        line = refuse(start(f"train.resume={resume}"))
        assert f"train.resume={resume} finds only damaged checkpoints: outputs/run/checkpoints/" in line
        assert line.endswith("Restore one of them, or start anew with train.resume=never.")
    assert content(run) == before
    finish(start("train.resume=never"))
    assert content(run).keys() == uninterrupted.keys()
    assert content(run)["adapter/adapter_model.safetensors"] == uninterrupted["adapter/adapter_model.safetensors"]


@pytest.mark.slow
def test_metrics_with_rubbish_after_the_checkpoint_are_cut_back(run, start, uninterrupted):
    """What a file system may leave at the end of a file when the power goes."""
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"update": 14, "tra' + bytes(300) + b"\n\xff\xfe\n{}\n")
    finish(start())
    assert content(run) == uninterrupted


def test_a_folder_between_two_renames_is_put_back(tmp_path):
    """The moment at which the old folder has gone and the new one has not come; found by looking, too short to hit."""
    write_folder(tmp_path / "best", lambda folder: (folder / "weights").write_text("old"))
    (tmp_path / "best").rename(tmp_path / f"{WRITING}old-best")
    (tmp_path / f"{WRITING}best").mkdir()
    with RunFolder.open(tmp_path, {}):
        assert (tmp_path / "best" / "weights").read_text() == "old"
        assert not list(tmp_path.glob(f"{WRITING}*"))
